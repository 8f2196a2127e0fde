//! The metrics page: what the recorder holds, in the order of [`metric_names::ALL`], with `vllm:` names beside ours.
//!
//! Every family is described on the page from the first second, so that a dashboard can tell "zero" from "not there".

use std::fmt::Write;

use metrics::gauge;
use quire_core::metric_names::{self, Family, Kind};

use crate::args::MetricsCompat;
use crate::process;
use crate::recorder::{SeriesRecorder, write_sample};

/// Bytes of a page, roughly.
const PAGE_BYTES: usize = 128 << 10;

/// Renders the page.
#[derive(Clone)]
pub struct MetricsPage {
    recorder: SeriesRecorder,
    compat: MetricsCompat,
}

/// A recorder, and the page that reads it.
pub fn recorder(compat: MetricsCompat) -> (SeriesRecorder, MetricsPage) {
    let recorder = SeriesRecorder::default();
    (recorder.clone(), MetricsPage { recorder, compat })
}

/// Makes a recorder that of the whole process and registers what is known from the start.
///
/// # Errors
/// There is one already.
pub fn install(compat: MetricsCompat) -> Result<MetricsPage, String> {
    let (recorder, page) = recorder(compat);
    metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
    register_process_wide("cpu");
    Ok(page)
}

/// Series that exist once a process and need no engine.
fn register_process_wide(backend: &'static str) {
    let commit = option_env!("QUIRE_COMMIT").unwrap_or("unknown");
    let labels = [("version", env!("CARGO_PKG_VERSION")), ("commit", commit), ("backend", backend)];
    gauge!(metric_names::BUILD_INFO.name, &labels).set(1.0);
    gauge!(metric_names::HTTP_INFLIGHT.name).set(0.0);
    metrics::counter!(metric_names::CLIENT_DISCONNECTS.name).absolute(0);
    // Registering is enough: it shows with a count of zero.
    let _ = metrics::histogram!(metric_names::TOKENIZE_SECONDS.name);
}

impl MetricsPage {
    /// The page in Prometheus' text format.
    pub fn render(&self) -> String {
        let process = process::samples();
        let mut page = String::with_capacity(PAGE_BYTES);
        for family in metric_names::ALL {
            write_head(&mut page, family, family.name);
            self.recorder.write(family, family.name, |_| true, &mut page);
            for (_, value) in process.iter().filter(|(of, _)| of.name == family.name) {
                write_sample(&mut page, family.name, "", value);
            }
            page.push('\n');
            if self.compat == MetricsCompat::Vllm {
                self.write_aliases(family, &mut page);
            }
        }
        page
    }

    /// The same samples once more, under each alias and with its buckets alone.
    fn write_aliases(&self, family: &Family, page: &mut String) {
        for alias in family.aliases {
            write_head(page, family, alias.name);
            self.recorder.write(family, alias.name, |bound| alias.buckets.contains(&bound), page);
            page.push('\n');
        }
    }
}

fn write_head(page: &mut String, family: &Family, name: &str) {
    let kind = match family.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram(_) => "histogram",
    };
    // Writing to a string cannot fail.
    let _ = writeln!(page, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
