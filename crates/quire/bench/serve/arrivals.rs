//! When requests are sent: a renewal process whose gaps have a gamma distribution, as `vllm bench serve` has it.

use crate::bench::harness::Random;

/// Seconds after the start at which each of `count` requests is sent, ascending.
///
/// `rate` is in requests per second; `burstiness` is the shape of the gaps' distribution, so that their coefficient of
/// variation is `1 / sqrt(burstiness)`. The times are scaled so that the last one is `count / rate`: a short run then
/// has the rate that was asked for, whatever the seed.
pub(crate) fn arrivals(count: u32, rate: f64, burstiness: f64, seed: u64) -> Vec<f64> {
    if rate.is_infinite() {
        return vec![0.0; count as usize];
    }
    let mut random = Random(seed);
    let mut now = 0.0;
    let step = |_| {
        now += if burstiness.is_infinite() { 1.0 } else { gamma(&mut random, burstiness) };
        now
    };
    let mut times: Vec<f64> = (0..count).map(step).collect();
    let scale = f64::from(count) / rate / now;
    times.iter_mut().for_each(|time| *time *= scale);
    times
}

/// Uniform in (0, 1].
fn uniform(random: &mut Random) -> f64 {
    ((random.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// A standard normal variate (Box & Muller, 1958).
fn normal(random: &mut Random) -> f64 {
    let radius = (-2.0 * uniform(random).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(random)).cos()
}

/// A gamma variate of scale 1 (Marsaglia & Tsang, 2000).
fn gamma(random: &mut Random, shape: f64) -> f64 {
    if shape < 1.0 {
        // One of shape + 1, times a power of a uniform one.
        return gamma(random, shape + 1.0) * uniform(random).powf(1.0 / shape);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = normal(random);
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && uniform(random).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return d * v;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_and_the_variation_asked_for() {
        for burstiness in [0.25, 1.0, 4.0] {
            let times = arrivals(40_000, 50.0, burstiness, 7);
            let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
            assert!(gaps.iter().all(|&gap| gap >= 0.0));
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            let variation = variance.sqrt() / mean;
            assert!((mean * 50.0 - 1.0).abs() < 0.01, "{burstiness}: mean {mean}");
            assert!(
                (variation * burstiness.sqrt() - 1.0).abs() < 0.03,
                "{burstiness}: variation {variation}"
            );
            assert!((times.last().unwrap() - 800.0).abs() < 1e-6);
        }
    }

    #[test]
    fn gaps_of_shape_one_are_exponential() {
        let times = arrivals(40_000, 1.0, 1.0, 3);
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        for limit in [0.1, 0.5, 1.0, 2.0, 4.0f64] {
            let share = gaps.iter().filter(|&&gap| gap <= limit).count() as f64 / gaps.len() as f64;
            assert!((share - (1.0 - (-limit).exp())).abs() < 0.01, "{share} of the gaps are below {limit}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_times_and_extremes_are_plain() {
        assert_eq!(arrivals(100, 3.0, 0.5, 1), arrivals(100, 3.0, 0.5, 1));
        assert_ne!(arrivals(100, 3.0, 0.5, 1), arrivals(100, 3.0, 0.5, 2));
        assert_eq!(arrivals(3, f64::INFINITY, 1.0, 1), [0.0; 3]);
        assert_eq!(arrivals(4, 2.0, f64::INFINITY, 1), [0.5, 1.0, 1.5, 2.0]);
    }
}
