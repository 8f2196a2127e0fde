//! Where everything that is measured adds up: a number or a row of buckets for each series, changed by atomics alone.
//!
//! Only families of [`metric_names::ALL`] are kept. The text of a series' labels is made when the series is, so that a page
//! is little more than copying. A lock is taken to make a series or a handle to it, and to read the page.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{Display, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use metrics::atomics::AtomicU64;
use metrics::{
    Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit,
};
use quire_core::metric_names::{self, Family, Kind};

/// One series.
#[derive(Clone)]
pub(crate) enum Series {
    Counter(Arc<AtomicU64>),
    /// The bits of a number.
    Gauge(Arc<AtomicU64>),
    Histogram(Arc<Buckets>),
}

/// Observations by upper bound.
pub(crate) struct Buckets {
    bounds: &'static [f64],
    /// One more than there are bounds: the last has none.
    counts: Box<[AtomicU64]>,
    /// The bits of a number.
    sum: AtomicU64,
}

impl Buckets {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }
}

impl HistogramFn for Buckets {
    fn record(&self, value: f64) {
        self.record_many(value, 1);
    }

    fn record_many(&self, value: f64, count: usize) {
        let at = self.bounds.partition_point(|&bound| bound < value);
        self.counts[at].fetch_add(count as u64, Ordering::Relaxed);
        let add = |bits| Some((f64::from_bits(bits) + value * count as f64).to_bits());
        // It always gives a new value, so it cannot fail.
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }
}

#[derive(Default)]
struct Registered {
    by_key: HashMap<Key, Series>,
    /// By family, then by the text of their labels: `name="value",…`.
    by_family: HashMap<&'static str, BTreeMap<String, Series>>,
}

/// All series. Cheap to clone; clones share them.
#[derive(Clone, Default)]
pub struct SeriesRecorder {
    registered: Arc<RwLock<Registered>>,
}

impl SeriesRecorder {
    /// The series of `key`, made if it is not there yet; `None` if the name is nobody's.
    fn series(&self, key: &Key) -> Option<Series> {
        let registered = self.registered.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = registered.by_key.get(key) {
            return Some(series.clone());
        }
        drop(registered);
        let family = metric_names::ALL.iter().find(|family| family.name == key.name())?;
        let mut registered = self.registered.write().unwrap_or_else(PoisonError::into_inner);
        // Somebody may have made it meanwhile, or with the labels in another order.
        let series = registered.by_family.entry(family.name).or_default().entry(labels_text(key.labels()));
        let series = series.or_insert_with(|| new_series(family.kind)).clone();
        registered.by_key.insert(key.to_retained(), series.clone());
        Some(series)
    }

    /// Appends the samples of a family under `name`, of histograms the given buckets alone. Buckets are cumulative, so
    /// leaving some out is right.
    pub(crate) fn write(&self, family: &Family, name: &str, keeps: impl Fn(f64) -> bool, page: &mut String) {
        let registered = self.registered.read().unwrap_or_else(PoisonError::into_inner);
        for (labels, series) in registered.by_family.get(family.name).into_iter().flatten() {
            match series {
                Series::Counter(count) => write_sample(page, name, labels, count.load(Ordering::Relaxed)),
                Series::Gauge(bits) => {
                    write_sample(page, name, labels, f64::from_bits(bits.load(Ordering::Relaxed)));
                }
                Series::Histogram(buckets) => buckets.write(name, labels, &keeps, page),
            }
        }
    }
}

impl Buckets {
    fn write(&self, name: &str, labels: &str, keeps: impl Fn(f64) -> bool, page: &mut String) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        let mut write_bucket = |bound: &dyn Display, total: u64| {
            // Writing to a string cannot fail.
            let _ = writeln!(page, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}");
        };
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            total += count.load(Ordering::Relaxed);
            if keeps(*bound) {
                write_bucket(bound, total);
            }
        }
        total += self.counts[self.bounds.len()].load(Ordering::Relaxed);
        write_bucket(&"+Inf", total);
        let sum = f64::from_bits(self.sum.load(Ordering::Relaxed));
        write_sample(page, format_args!("{name}_sum"), labels, sum);
        write_sample(page, format_args!("{name}_count"), labels, total);
    }
}

/// Appends one line.
pub(crate) fn write_sample(page: &mut String, name: impl Display, labels: &str, value: impl Display) {
    let _ = match labels {
        "" => writeln!(page, "{name} {value}"),
        labels => writeln!(page, "{name}{{{labels}}} {value}"),
    };
}

fn new_series(kind: Kind) -> Series {
    match kind {
        Kind::Counter => Series::Counter(Arc::default()),
        Kind::Gauge => Series::Gauge(Arc::default()),
        Kind::Histogram(bounds) => Series::Histogram(Arc::new(Buckets::new(bounds))),
    }
}

/// As they stand between the braces of a sample, values escaped.
fn labels_text<'a>(labels: impl Iterator<Item = &'a Label>) -> String {
    let mut text = String::new();
    for label in labels {
        let value = label.value().replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let comma = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{comma}{}=\"{value}\"", label.key());
    }
    text
}

impl Recorder for SeriesRecorder {
    // What a family means is known from the list of families.
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        match self.series(key) {
            Some(Series::Counter(count)) => Counter::from_arc(count),
            _ => Counter::noop(),
        }
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        match self.series(key) {
            Some(Series::Gauge(bits)) => Gauge::from_arc(bits),
            _ => Gauge::noop(),
        }
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        match self.series(key) {
            Some(Series::Histogram(buckets)) => Histogram::from_arc(buckets),
            _ => Histogram::noop(),
        }
    }
}
