//! A small seeded generator (SplitMix64; Steele, Lea & Flood, 2014): the same numbers on every machine.

/// One stream of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Uniform in `low..=high`.
    pub(crate) fn range(&mut self, low: u32, high: u32) -> u32 {
        debug_assert!(low <= high);
        low + (self.next() % (u64::from(high - low) + 1)) as u32
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u32) -> bool {
        self.range(1, n) == 1
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.range(0, from.len() as u32 - 1) as usize]
    }

    /// Uniform in its logarithm: short is as likely as long.
    pub(crate) fn log_range(&mut self, low: u32, high: u32) -> u32 {
        let octaves = high.ilog2() - low.ilog2();
        let octave = low << self.range(0, octaves);
        self.range(octave, (2 * octave - 1).min(high))
    }

    /// How often something happens again that does so with `percent` in a hundred.
    pub(crate) fn geometric(&mut self, percent: u32) -> u32 {
        let mut n = 0;
        while n < 100 && self.range(1, 100) <= percent {
            n += 1;
        }
        n
    }

    /// About exponentially distributed: an octave by coin flips, uniform inside it. No logarithm, so that every machine
    /// gives the same.
    pub(crate) fn exponential(&mut self, mean: u64) -> u64 {
        let uniform = self.next() >> 11;
        // -ln(u) by its octave and a chord inside it.
        let octave = uniform.leading_zeros() - 11;
        let top = 1_u64 << (52 - octave.min(52));
        let part = ((top - (uniform & (top - 1)).min(top)) as f64) / top as f64;
        (mean as f64 * std::f64::consts::LN_2 * (f64::from(octave) + part)) as u64
    }
}

/// A bijection that scatters its input.
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
