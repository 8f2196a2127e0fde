//! How many devices a trace needs to keep promises.

use std::time::Duration;

use quire_core::ExecError;

use crate::serve_report::ServeReport;
use crate::serve_trace::{ServeConfig, serve_fleet};
use crate::trace::TraceRequest;

/// What a promise is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latency {
    /// From the arrival of a request to its first token; never, where it was refused.
    FirstToken,
    /// From one token of an answer to the next.
    BetweenTokens,
}

/// A promise: so many percent of all within so long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Goal {
    /// Of what.
    pub what: Latency,
    /// In (0, 100].
    pub percent: f64,
    /// How long.
    pub within: Duration,
}

impl Goal {
    /// What `report` says of it, in seconds.
    pub fn value(&self, report: &ServeReport) -> f64 {
        match self.what {
            Latency::FirstToken => report.ttft_percentile(self.percent),
            Latency::BetweenTokens => report.gaps.percentile_ms(self.percent) / 1000.0,
        }
    }

    /// Whether it was kept.
    pub fn is_met(&self, report: &ServeReport) -> bool {
        self.value(report) <= self.within.as_secs_f64()
    }
}

/// The fewest devices, at most `max_devices`, with which every goal is met, and what clients see then; `None` if no
/// number will do. More devices are taken to be no worse.
///
/// # Errors
/// As [`serve_fleet`].
pub fn plan(
    trace: &[TraceRequest],
    config: &ServeConfig,
    goals: &[Goal],
    max_devices: usize,
) -> Result<Option<(usize, ServeReport)>, ExecError> {
    let try_with = |devices: usize| {
        let report = serve_fleet(trace, config, devices)?;
        let met = goals.iter().all(|goal| goal.is_met(&report));
        Ok(met.then_some((devices, report)))
    };
    let (mut too_few, mut devices) = (0, 1);
    let mut best = loop {
        if let Some(enough) = try_with(devices)? {
            break enough;
        }
        if devices == max_devices {
            return Ok(None);
        }
        too_few = devices;
        devices = (2 * devices).min(max_devices);
    };
    while best.0 - too_few > 1 {
        let middle = too_few + (best.0 - too_few) / 2;
        match try_with(middle)? {
            Some(enough) => best = enough,
            None => too_few = middle,
        }
    }
    Ok(Some(best))
}
