//! What the machine can do at most: bandwidth of memory, and rate of multiply-adds.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::{doctor, machine};

/// Time for one measurement of arithmetic.
const MEASURE_FOR: Duration = Duration::from_millis(40);
/// The best of several measurements counts: whoever shares the machine can only slow it.
const FMA_TRIES: usize = 5;
const READ_TRIES: usize = 2;
/// Lanes of the vectors that every 64-bit target has.
const BASE_LANES: f64 = 4.0;
/// Independent chains of additions, enough to hide their latency.
const CHAINS: usize = 12;

/// The limits that operations are held against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes per second, read by all threads together.
    pub(crate) read_bytes_s: f64,
    /// f32 operations per second of all threads together; a multiply-add counts two.
    pub(crate) fma_flops_s: f64,
}

/// Measures this machine with as many threads as the engine has. Takes under two seconds.
pub(crate) fn limits(threads: u32) -> Limits {
    let read_bytes_s = (0..READ_TRIES).map(|_| doctor::read_bandwidth(threads)).fold(0.0, f64::max);
    Limits { read_bytes_s, fma_flops_s: fma_flops(threads) }
}

/// Safe code cannot use instructions that not every processor has, so the peak is reckoned: 128-bit multiplications
/// and additions are timed, and a fused multiply-add on the widest vectors does `width_factor` times as much a cycle.
fn fma_flops(threads: u32) -> f64 {
    let factor = width_factor(&machine::simd());
    (0..FMA_TRIES).map(|_| base_flops(threads) * factor).fold(0.0, f64::max)
}

/// How much more one port does in a cycle than one 128-bit multiplication or addition: lanes, and two operations where
/// they are fused.
fn width_factor(simd: &[&str]) -> f64 {
    let has = |name: &str| simd.contains(&name);
    let lanes = if has("avx512f") {
        16.0
    } else if has("avx2") {
        8.0
    } else {
        BASE_LANES
    };
    let fused = if has("fma") || has("neon") { 2.0 } else { 1.0 };
    lanes / BASE_LANES * fused
}

/// Floating-point operations per second of all threads, multiplications and additions counted one each.
fn base_flops(threads: u32) -> f64 {
    let barrier = Barrier::new(threads as usize);
    std::thread::scope(|scope| {
        let one = || {
            barrier.wait();
            multiply_add_for_a_while()
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or(0.0)).sum()
    })
}

fn multiply_add_for_a_while() -> f64 {
    const ROUNDS: usize = 10_000;
    let mut chains = black_box([[1.0f32; 4]; CHAINS]);
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed() < MEASURE_FOR {
        multiply_add(&mut chains, black_box([0.999_9; 4]), black_box([1e-4; 4]), ROUNDS);
        rounds += ROUNDS;
    }
    let seconds = start.elapsed().as_secs_f64();
    black_box(chains);
    (rounds * CHAINS) as f64 * BASE_LANES * 2.0 / seconds
}

#[inline(never)]
fn multiply_add(chains: &mut [[f32; 4]; CHAINS], factor: [f32; 4], term: [f32; 4], rounds: usize) {
    // A copy of its own can live in registers.
    let mut local = *chains;
    for _ in 0..rounds {
        for chain in &mut local {
            for lane in 0..4 {
                chain[lane] = chain[lane] * factor[lane] + term[lane];
            }
        }
    }
    *chains = local;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wider_units_do_more() {
        assert_eq!(width_factor(&["sse4.2"]), 1.0);
        assert_eq!(width_factor(&["avx2", "fma"]), 4.0);
        assert_eq!(width_factor(&["avx2", "fma", "avx512f"]), 8.0);
        assert_eq!(width_factor(&["neon"]), 2.0);
    }

    #[test]
    fn chains_are_computed() {
        let mut chains = [[1.0; 4]; CHAINS];
        multiply_add(&mut chains, [0.5; 4], [0.25; 4], 2);
        assert_eq!(chains, [[0.625; 4]; CHAINS]);
        assert!(multiply_add_for_a_while() > 0.0);
    }
}
