//! `quire sim --trace … --plot DIR`: what clients saw, drawn.

use std::path::Path;

use quire_sim::ServeReport;

use crate::svg::{Series, document};
use crate::{Failure, Result};

/// Points of a line at most.
const POINTS: usize = 400;

/// Writes one file a plot into `dir`, which is made if it is not there, and names them.
pub(crate) fn write_plots(report: &ServeReport, dir: &Path) -> Result<Vec<&'static str>> {
    let failed = |error: std::io::Error| Failure(format!("cannot write plots to {}: {error}", dir.display()));
    std::fs::create_dir_all(dir).map_err(failed)?;
    let plots = plots(report);
    for (name, svg) in &plots {
        std::fs::write(dir.join(name), svg).map_err(failed)?;
    }
    Ok(plots.iter().map(|&(name, _)| name).collect())
}

fn plots(report: &ServeReport) -> [(&'static str, String); 5] {
    let over_time = |name: &str, value: fn(&quire_sim::Bucket) -> f64| Series {
        name: name.into(),
        points: report.over_time.iter().map(|bucket| (bucket.until, value(bucket))).collect(),
    };
    let rates = [over_time("sent", |bucket| bucket.sent), over_time("good", |bucket| bucket.good)];
    let hits = [over_time("hit rate", |bucket| bucket.hit_percent)];
    [
        (
            "ttft_cdf.svg",
            document("Part of all requests whose first token came within so many seconds", &[ttft(report)]),
        ),
        (
            "itl_cdf.svg",
            document("Part of the gaps between tokens within so many milliseconds", &[gaps(report)]),
        ),
        (
            "goodput.svg",
            document("Requests per second, sent and within the targets, by seconds of arrival", &rates),
        ),
        (
            "hit_rate.svg",
            document("Percent of the prompt tokens found in the prefix cache, by seconds of arrival", &hits),
        ),
        ("service.svg", document("Weighted tokens that each tenant got, by seconds", &service(report))),
    ]
}

/// Those that never came are part of all, so that the line ends below 1.
fn ttft(report: &ServeReport) -> Series {
    let all = report.all_ttft.len().max(1) as f64;
    let came = report.all_ttft.iter().zip(1_u32..).take_while(|(seconds, _)| seconds.is_finite());
    let points: Vec<(f64, f64)> = came.map(|(&seconds, rank)| (seconds, f64::from(rank) / all)).collect();
    Series { name: "TTFT".into(), points: thinned(points) }
}

fn gaps(report: &ServeReport) -> Series {
    let from = std::iter::once((0.0, 0.0));
    Series { name: "ITL".into(), points: thinned(from.chain(report.gaps.distribution()).collect()) }
}

fn service(report: &ServeReport) -> Vec<Series> {
    let fairness = &report.fairness;
    let of = |tenant: usize| {
        let samples = fairness.samples.iter().zip(0_u32..);
        let points = samples.map(|(sample, at)| (f64::from(at) * fairness.period, sample[tenant]));
        Series { name: format!("tenant {tenant}"), points: points.collect() }
    };
    (0..fairness.service.len()).map(of).collect()
}

/// About [`POINTS`] of them, evenly chosen, the last among them.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS).max(1);
    let last = points.last().copied();
    let mut thin: Vec<(f64, f64)> = points.into_iter().step_by(step).collect();
    if thin.last().copied() != last {
        thin.extend(last);
    }
    thin
}
