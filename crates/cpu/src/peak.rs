//! What the arithmetic of this machine does at most: dot products on registers, as the kernels use them and nothing else.

use std::hint::black_box;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quire_core::ExecError;

use crate::Isa;
use crate::pool::Pool;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel, dispatch_pairs};
use crate::simd::rows::Rows;
use crate::simd::{Kernel, LANES, Simd, dispatch};

/// Independent sums: enough to hide the latency of an addition on every machine.
const SUMS: usize = 24;
/// Additions to each sum between two looks at the clock.
const ROUNDS: usize = 20_000;
const MEASURE_FOR: Duration = Duration::from_millis(30);
/// The best counts: whoever shares the machine can only slow it.
const TRIES: usize = 4;

/// Operations per second of all threads together; a multiplication and its addition are two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// Multiply-adds in f32.
    pub f32: f64,
    /// Products of bf16 pairs, by whatever is fastest.
    pub bf16: f64,
    /// Dot products of bytes.
    pub int8: f64,
}

impl Peaks {
    /// Measures with so many threads. Takes less than half a second.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn measure(threads: usize) -> Result<Self, ExecError> {
        let (isa, mut pool) = (Isa::detect(), Pool::new(threads.max(1))?);
        // SAFETY: `isa` was detected.
        let f32 = best(&mut pool, LANES * 2, || unsafe { dispatch(isa, MultiplyAdds) })?;
        // SAFETY: as above.
        let bf16 = best(&mut pool, PANEL * 4, || unsafe { dispatch_pairs(isa, Pairs) })?;
        // SAFETY: as above.
        let int8 = best(&mut pool, PANEL * 8, || unsafe { dispatch_pairs(isa, Bytes) })?;
        Ok(Self { f32, bf16, int8 })
    }
}

/// The best rate of `work`, which does `SUMS * ROUNDS` steps of `ops` operations.
fn best(pool: &mut Pool, ops: usize, work: impl Fn() + Sync) -> Result<f64, ExecError> {
    let mut best = 0.0f64;
    for _ in 0..TRIES {
        let total = Mutex::new(0.0);
        pool.run(&|_| {
            let (start, mut calls) = (Instant::now(), 0);
            while start.elapsed() < MEASURE_FOR {
                work();
                calls += 1;
            }
            *total.lock() += (calls * SUMS * ROUNDS * ops) as f64 / start.elapsed().as_secs_f64();
        })?;
        best = best.max(total.into_inner());
    }
    Ok(best)
}

struct MultiplyAdds;

impl Kernel for MultiplyAdds {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (S::splat(black_box(1.0)), S::splat(black_box(0.5)));
            // Half as many: such machines have half as many registers.
            let mut sums = [S::splat(0.0); SUMS / 2];
            for _ in 0..2 * ROUNDS {
                for sum in &mut sums {
                    *sum = S::fma(a, b, *sum);
                }
            }
            black_box(sums.map(|sum| S::sum(sum)));
        }
    }
}

struct Pairs;

impl PairKernel for Pairs {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        // SAFETY: the array holds a panel; the rest is the caller's.
        unsafe {
            let words = black_box([0x3F80_3F80u32; PANEL]);
            let (weights, mut sums) = (D::load(words.as_ptr()), [D::zero(); SUMS]);
            let mut rows = Rows::new([words.as_ptr()]);
            rows.prepare::<D>(0, PANEL);
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = rows.dot::<D>(*sum, weights, 0, 0, 0);
                }
            }
            for sum in sums {
                black_box(D::highest(sum));
            }
        }
    }
}

struct Bytes;

impl PairKernel for Bytes {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        // SAFETY: as above.
        unsafe {
            let words = black_box([0x0101_0101u32; PANEL]);
            let (weights, mut sums) = (D::load(words.as_ptr()), [D::splat_int(0); SUMS]);
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = D::dot_bytes(*sum, weights, words.as_ptr());
                }
            }
            for sum in sums {
                black_box(D::highest(D::to_float(sum)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrower_numbers_are_not_slower() {
        let peaks = Peaks::measure(1).expect("one thread needs no other");
        assert!(peaks.f32 > 1e8 && peaks.bf16 > 1e8 && peaks.int8 > 1e8, "{peaks:?}");
        if Isa::detect() >= Isa::Avx512 {
            assert!(peaks.bf16 > 1.3 * peaks.f32 && peaks.int8 > 1.3 * peaks.bf16, "{peaks:?}");
        }
    }
}
