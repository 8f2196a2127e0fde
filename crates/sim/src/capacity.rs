//! How much of a trace one device takes.

use quire_core::ExecError;

use crate::serve_report::ServeReport;
use crate::serve_trace::{ServeConfig, serve_trace};
use crate::trace::TraceRequest;

/// Requests that must be good, in percent.
const GOOD_PERCENT: f64 = 90.0;
/// Halvings of the interval, in the logarithm of the rate, after it was found.
const NUM_HALVINGS: u32 = 7;
/// Rates tried while the interval is looked for.
const MAX_DOUBLINGS: u32 = 12;

/// The highest scaling of arrivals at which 90 % of the requests are good, by bisection, with its report; `None` if even
/// a trickle is too much.
///
/// # Errors
/// As [`serve_trace`].
pub fn capacity(
    trace: &[TraceRequest],
    config: &ServeConfig,
) -> Result<Option<(f64, ServeReport)>, ExecError> {
    let serve = |rate_scale| serve_trace(trace, &ServeConfig { rate_scale, ..*config });
    let is_enough = |report: &ServeReport| report.good_percent() >= GOOD_PERCENT;
    let (mut low, mut high) = (None, None);
    let mut scale = config.rate_scale;
    for _ in 0..MAX_DOUBLINGS {
        let report = serve(scale)?;
        if is_enough(&report) {
            low = Some((scale, report));
            scale *= 2.0;
        } else {
            high = Some(scale);
            scale /= 2.0;
        }
        if low.is_some() && high.is_some() {
            break;
        }
    }
    let (Some(mut best), Some(mut high)) = (low.clone(), high) else { return Ok(low) };
    for _ in 0..NUM_HALVINGS {
        let scale = (best.0 * high).sqrt();
        let report = serve(scale)?;
        if is_enough(&report) {
            best = (scale, report);
        } else {
            high = scale;
        }
    }
    Ok(Some(best))
}
