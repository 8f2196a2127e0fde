//! Many durations in little memory, each known to within one percent.

use std::time::Duration;

/// Buckets in each power of two of microseconds.
const PER_OCTAVE_BITS: u32 = 7;
const PER_OCTAVE: u64 = 1 << PER_OCTAVE_BITS;

/// Durations by logarithmic buckets that are linear inside of each power of two; exact below 128 us.
#[derive(Clone, Debug, Default)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: Duration,
    max: Duration,
}

fn bucket_of(micros: u64) -> usize {
    let octave = (micros | (PER_OCTAVE - 1)).ilog2() + 1 - PER_OCTAVE_BITS;
    // In octave 0, values are their own buckets; above, the leading bit says only which octave it is.
    (u64::from(octave) * PER_OCTAVE / 2 + (micros >> octave)) as usize
}

/// The least value of a bucket, in microseconds.
fn start_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let octave = (bucket * 2 / PER_OCTAVE).saturating_sub(1);
    (bucket - octave * PER_OCTAVE / 2) << octave
}

impl Histogram {
    pub(crate) fn record(&mut self, value: Duration, times: u64) {
        let bucket = bucket_of(u64::try_from(value.as_micros()).unwrap_or(u64::MAX));
        if bucket >= self.counts.len() {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += times;
        self.count += times;
        self.sum += value * u32::try_from(times).unwrap_or(u32::MAX);
        self.max = self.max.max(value);
    }

    /// In seconds; 0 for none.
    pub(crate) fn mean(&self) -> f64 {
        self.sum.as_secs_f64() / self.count.max(1) as f64
    }

    /// In seconds; exact.
    pub(crate) fn max(&self) -> f64 {
        self.max.as_secs_f64()
    }

    /// The value below which `share` (0 to 1) of all lie, in seconds; 0 for none.
    pub(crate) fn percentile(&self, share: f64) -> f64 {
        let rank = (share.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let middle = (start_of(bucket) + start_of(bucket + 1) - 1) as f64 / 2e6;
                return middle.min(self.max());
            }
        }
        0.0
    }

    /// Each bucket that is not empty: its middle in seconds, and how many are in it.
    pub(crate) fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let filled = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        filled.map(|(bucket, &count)| ((start_of(bucket) + start_of(bucket + 1) - 1) as f64 / 2e6, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::harness::Random;
    use crate::bench::report::percentile;

    #[test]
    fn every_value_is_in_its_bucket_and_buckets_are_narrow() {
        let powers = (0..60).flat_map(|bit| [(1u64 << bit) - 1, 1 << bit, (1 << bit) + 1, 3 << bit]);
        for micros in powers.chain(0..5000) {
            let bucket = bucket_of(micros);
            let (start, end) = (start_of(bucket), start_of(bucket + 1));
            assert!(start <= micros && micros < end, "{micros} is not in {start}..{end}");
            assert!((end - start) as f64 <= (start as f64 / 64.0).max(1.0), "{start}..{end}");
        }
    }

    #[test]
    fn percentiles_are_those_of_the_values() {
        let mut random = Random(5);
        // From 100 us to 10 s, evenly on a logarithmic scale.
        let values: Vec<f64> =
            (0..20_000).map(|_| 1e-4 * 10f64.powf(5.0 * (random.next() as f64 / u64::MAX as f64))).collect();
        let mut histogram = Histogram::default();
        values.iter().for_each(|&value| histogram.record(Duration::from_secs_f64(value), 1));
        for share in [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0] {
            let (exact, found) = (percentile(&values, share), histogram.percentile(share));
            assert!((found / exact - 1.0).abs() < 0.02, "p{share}: {found} instead of {exact}");
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        assert!((histogram.mean() / mean - 1.0).abs() < 1e-6);
        assert_eq!(histogram.buckets().map(|(_, count)| count).sum::<u64>(), 20_000);
    }

    #[test]
    fn nothing_and_repetitions() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.percentile(0.5), histogram.mean(), histogram.max()), (0.0, 0.0, 0.0));
        histogram.record(Duration::from_micros(40), 3);
        histogram.record(Duration::from_micros(80), 1);
        assert_eq!((histogram.percentile(0.5), histogram.percentile(1.0)), (40e-6, 80e-6));
        assert!((histogram.mean() - 50e-6).abs() < 1e-12);
    }
}
