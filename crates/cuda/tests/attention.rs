//! The attention kernels, built for the host: right values over a grid of shapes, and the same bits of a row whichever
//! kernel, chunk, batch or split of the work computes it.

mod attention_problem;
mod common;

use attention_problem::{Chunk, Number, Problem, Route, Shape, Spread};
use common::HostKernels;

const BASE: Shape = Shape {
    number: Number::Bf16,
    fp8: false,
    tile_dim: 64,
    head_dim: 64,
    num_kv_heads: 1,
    group: 4,
    page_tokens: 16,
    window: 0,
    soft_cap: 0.0,
    sinks: false,
};

/// Few blocks: items of whole sequences. Many: items of one split.
const WHOLE: Spread = Spread(1);
const CUT: Spread = Spread(1000);

fn tolerance(shape: &Shape) -> f64 {
    match shape.number {
        Number::Bf16 => 1e-2,
        Number::F16 => 2e-3,
    }
}

fn check(kernels: &HostKernels, shape: Shape, lens: &[usize], chunks: &[Chunk]) {
    let problem = Problem::random(shape, lens);
    for (i, spread) in [WHOLE, CUT].into_iter().enumerate() {
        for route in [Route::Planned, Route::AllPrefill] {
            let out = problem.run(kernels, chunks, route, spread, 7 + i as u64);
            let error = problem.error(chunks, &out);
            assert!(error < tolerance(&shape), "{shape:?}, {chunks:?}, {route:?}, {spread:?}: error {error:e}");
        }
    }
}

#[test]
fn decodes_any_length_and_group() {
    let Some(kernels) = HostKernels::load() else { return };
    let lens = [1, 63, 64, 65, 130];
    let last: Vec<Chunk> = lens.iter().enumerate().map(|(seq, &len)| (seq, len - 1, len)).collect();
    for (group, num_kv_heads, page_tokens) in [(1, 3, 16), (2, 2, 32), (4, 1, 16), (8, 1, 64), (16, 1, 16), (3, 2, 16)] {
        check(kernels, Shape { group, num_kv_heads, page_tokens, ..BASE }, &lens, &last);
    }
}

#[test]
fn every_type_and_head_size() {
    let Some(kernels) = HostKernels::load() else { return };
    let chunks: &[Chunk] = &[(0, 69, 70), (1, 0, 9), (2, 30, 40)];
    for number in [Number::Bf16, Number::F16] {
        for fp8 in [false, true] {
            for (tile_dim, head_dim) in [(64, 64), (64, 16), (128, 128), (128, 80), (256, 256), (256, 192)] {
                let shape = Shape { number, fp8, tile_dim, head_dim, group: 2, ..BASE };
                check(kernels, shape, &[70, 9, 40], chunks);
            }
        }
    }
}
