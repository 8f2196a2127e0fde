//! `quire bench scheduler`: what deciding costs, beside what is decided.

use quire_sim::bench_scheduler::{BenchConfig, run};

use super::report::{Report, table};

/// Measures for a few seconds.
pub(crate) fn scheduler() -> Report {
    let mut report = Report::new(1, "scheduler alone, one thread");
    let mut lines = Vec::new();
    for row in run(&BenchConfig::default()) {
        lines.push(vec![
            row.name.clone(),
            format!("{:.2}", row.value),
            row.target.to_string(),
            row.unit.to_owned(),
        ]);
        report.row(row.name, row.value, row.unit);
    }
    report.text(&format!("\n{}", table(&["what", "measured", "target", "unit"], &lines)));
    report
}
