//! `quire bench scheduler`: what deciding costs, beside what is decided, and what a token costs from there to its reader.

use quire_sim::bench_engine;
use quire_sim::bench_scheduler::{BenchConfig, run};

use super::report::{Report, table};
use crate::args::MetricsCompat;
use crate::{Failure, Result, metrics};

/// Measures for a few seconds.
pub(crate) fn scheduler() -> Result<Report> {
    let mut report = Report::new(1, "scheduler alone, one thread");
    let mut lines = Vec::new();
    let mut rows = run(&BenchConfig::default());
    // A server counts and times each token, too.
    let _page = metrics::install(MetricsCompat::None).map_err(Failure)?;
    rows.extend(bench_engine::run().map_err(Failure)?);
    for row in rows {
        lines.push(vec![
            row.name.clone(),
            format!("{:.2}", row.value),
            row.target.to_string(),
            row.unit.to_owned(),
        ]);
        report.row(row.name, row.value, row.unit);
    }
    report.text(&format!("\n{}", table(&["what", "measured", "target", "unit"], &lines)));
    Ok(report)
}
