//! The metrics page: what the recorder holds, in the order of [`metric_names::ALL`], with `vllm:` names beside ours.
//!
//! Every family is described on the page from the first second, so that a dashboard can tell "zero" from "not there".
//! Histograms always have buckets: the exporter would render one without as a summary, which cannot be aggregated.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::Write;

use metrics::gauge;
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use quire_core::metric_names::{self, Family, Kind};

use crate::args::MetricsCompat;
use crate::process;

/// Renders the page.
#[derive(Clone)]
pub struct MetricsPage {
    handle: PrometheusHandle,
    compat: MetricsCompat,
}

/// A recorder that has buckets for every histogram, and the page that reads it.
///
/// # Errors
/// A histogram has no buckets.
pub fn recorder(compat: MetricsCompat) -> Result<(PrometheusRecorder, MetricsPage), BuildError> {
    let mut builder = PrometheusBuilder::new();
    for family in metric_names::ALL {
        if let Kind::Histogram(buckets) = family.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(family.name.into()), buckets)?;
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    Ok((recorder, MetricsPage { handle, compat }))
}

/// Makes a recorder that of the whole process and registers what is known from the start.
///
/// # Errors
/// There is one already, or [`recorder`] failed.
pub fn install(compat: MetricsCompat) -> Result<MetricsPage, String> {
    let (recorder, page) = recorder(compat).map_err(|error| error.to_string())?;
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
    /// Moves what was recorded since the last call into buckets; without it, observations pile up between two scrapes.
    pub fn run_upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// The page in Prometheus' text format.
    pub fn render(&self) -> String {
        let text = self.handle.render();
        let own = process::samples().into_iter();
        let own: Vec<_> =
            own.map(|(family, value)| (family.name, format!("{} {value}", family.name))).collect();
        let mut samples = split_by_family(&text);
        samples.extend(own.iter().map(|(name, line)| (*name, Cow::Borrowed(line.as_str()))));
        let mut page = String::with_capacity(2 * text.len() + 2 * DESCRIPTIONS);
        for family in metric_names::ALL {
            let lines = samples.get(family.name).map_or("", Cow::as_ref);
            write_description(&mut page, family, family.name);
            if !lines.is_empty() {
                page.push_str(lines);
                page.push('\n');
            }
            page.push('\n');
            if self.compat == MetricsCompat::Vllm {
                write_aliases(&mut page, family, lines);
            }
        }
        page
    }
}

/// Bytes of all families' descriptions, about.
const DESCRIPTIONS: usize = 16 * 1024;

/// The sample lines of each family, which the recorder yields in paragraphs. Counters and gauges are sorted, because their order
/// is random; lines of histograms keep theirs.
fn split_by_family(text: &str) -> HashMap<&str, Cow<'_, str>> {
    let mut families = HashMap::with_capacity(metric_names::ALL.len());
    for paragraph in text.split_terminator("\n\n") {
        // Nothing is described there, so the type is the first line.
        let Some(rest) = paragraph.strip_prefix("# TYPE ") else { continue };
        let (head, lines) = rest.split_once('\n').unwrap_or((rest, ""));
        let (name, kind) = head.split_once(' ').unwrap_or((head, ""));
        families.insert(name, in_order(lines, kind == "histogram"));
    }
    families
}

fn in_order(lines: &str, is_ordered: bool) -> Cow<'_, str> {
    if is_ordered || !lines.contains('\n') {
        return lines.into();
    }
    let mut lines: Vec<&str> = lines.lines().collect();
    lines.sort_unstable();
    lines.join("\n").into()
}

fn write_description(page: &mut String, family: &Family, name: &str) {
    let kind = match family.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram(_) => "histogram",
    };
    // Writing to a string cannot fail.
    let _ = writeln!(page, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
}

/// The same samples once more, under each alias and with its buckets alone. Buckets are cumulative, so leaving some out
/// is right.
fn write_aliases(page: &mut String, family: &Family, lines: &str) {
    for alias in family.aliases {
        write_description(page, family, alias.name);
        let leaves_out =
            matches!(family.kind, Kind::Histogram(buckets) if buckets.len() > alias.buckets.len());
        let keeps =
            |line: &str| !leaves_out || bucket_bound(line).is_none_or(|bound| alias.buckets.contains(&bound));
        let kept = lines.lines().filter(|line| keeps(line));
        for rest in kept.filter_map(|line| line.strip_prefix(family.name)) {
            page.push_str(alias.name);
            page.push_str(rest);
            page.push('\n');
        }
        page.push('\n');
    }
}

/// The finite upper bound of a `_bucket` line.
fn bucket_bound(line: &str) -> Option<f64> {
    let (_, rest) = line.rsplit_once("le=\"")?;
    let bound: f64 = rest.split('"').next()?.parse().ok()?;
    bound.is_finite().then_some(bound)
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
