//! The attention kernels, built for the host: right values over a grid of shapes, and the same bits of a row whichever
//! kernel, chunk, batch or split of the work computes it.

mod attention_problem;
mod common;

use attention_problem::{Chunk, Number, Problem, Route, Shape, Spread};
use common::{HostKernels, under_sanitizers};

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
            assert!(
                error < tolerance(&shape),
                "{shape:?}, {chunks:?}, {route:?}, {spread:?}: error {error:e}"
            );
        }
    }
}

#[test]
fn decodes_any_length_and_group() {
    let Some(kernels) = HostKernels::load() else { return };
    let lens = [1, 63, 64, 65, 130];
    let last: Vec<Chunk> = lens.iter().enumerate().map(|(seq, &len)| (seq, len - 1, len)).collect();
    for (group, num_kv_heads, page_tokens) in
        [(1, 3, 16), (2, 2, 32), (4, 1, 16), (8, 1, 64), (16, 1, 16), (3, 2, 16)]
    {
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

#[test]
fn windows_caps_and_sinks() {
    let Some(kernels) = HostKernels::load() else { return };
    let chunks: &[Chunk] = &[(0, 149, 150), (1, 60, 100), (0, 80, 150)];
    for (window, soft_cap, sinks) in
        [(5, 0.0, false), (64, 1.5, false), (70, 0.0, true), (0, 1.5, true), (1, 0.0, false)]
    {
        for (fp8, group) in [(false, 2), (true, 4)] {
            check(kernels, Shape { window, soft_cap, sinks, fp8, group, ..BASE }, &[150, 100], chunks);
        }
    }
}

/// The rows `from..to` of a sequence as the last rows of `chunk`-sized chunks, in a batch with another sequence.
fn rows_in_chunks(
    kernels: &HostKernels,
    problem: &Problem,
    [from, to]: [usize; 2],
    chunk: usize,
    route: Route,
    spread: Spread,
) -> Vec<u16> {
    let row = problem.shape.num_kv_heads * problem.shape.group * problem.shape.head_dim;
    let mut rows = Vec::new();
    for first in (from..to).step_by(chunk) {
        let last = to.min(first + chunk);
        let chunks = [(1, 3, 4), (0, first, last)];
        let out = problem.run(kernels, &chunks, route, spread, (first + chunk) as u64);
        rows.extend_from_slice(&out[row..]);
    }
    rows
}

/// From a row of a prompt in one piece to a token at a time, over one and several splits.
fn same_bits(kernels: &HostKernels, shape: Shape, [from, to]: [usize; 2]) {
    let problem = Problem::random(shape, &[to, 4]);
    let whole = rows_in_chunks(kernels, &problem, [from, to], to - from, Route::Planned, WHOLE);
    let error = problem.error(&[(0, from, to)], &whole);
    assert!(error < tolerance(&shape), "{shape:?}: error {error:e}");
    let variants = [
        (to - from, Route::Planned, CUT),
        (7, Route::Planned, CUT),
        (3, Route::AllPrefill, WHOLE),
        (1, Route::Planned, WHOLE),
        (1, Route::Planned, CUT),
        (1, Route::AllPrefill, CUT),
    ];
    for (chunk, route, spread) in variants {
        let out = rows_in_chunks(kernels, &problem, [from, to], chunk, route, spread);
        assert!(out == whole, "{shape:?}, chunks of {chunk}, {route:?}, {spread:?}: other bits");
    }
}

#[test]
fn a_row_has_the_same_bits_in_prefill_and_decode() {
    let Some(kernels) = HostKernels::load() else { return };
    let shape = Shape { num_kv_heads: 2, group: 2, ..BASE };
    // Within a split, across the end of the first, and over three.
    same_bits(kernels, shape, [60, 72]);
    same_bits(kernels, Shape { soft_cap: 2.0, sinks: true, page_tokens: 32, ..shape }, [505, 517]);
    same_bits(kernels, Shape { num_kv_heads: 1, group: 8, number: Number::F16, ..shape }, [1020, 1030]);
    same_bits(kernels, Shape { num_kv_heads: 1, fp8: true, ..shape }, [1020, 1029]);
    // The window leaves the first split while the rows pass by.
    same_bits(kernels, Shape { window: 600, num_kv_heads: 1, ..shape }, [1106, 1116]);
    same_bits(kernels, Shape { window: 33, num_kv_heads: 1, ..shape }, [530, 548]);
    same_bits(kernels, Shape { tile_dim: 128, head_dim: 128, num_kv_heads: 1, ..shape }, [510, 518]);
    same_bits(kernels, Shape { tile_dim: 256, head_dim: 256, num_kv_heads: 1, ..shape }, [510, 516]);
}

#[test]
fn thread_order_does_not_matter() {
    let Some(kernels) = HostKernels::load() else { return };
    let problem = Problem::random(Shape { fp8: true, ..BASE }, &[150, 80]);
    let chunks = [(0, 149, 150), (1, 40, 80), (1, 79, 80)];
    let first = problem.run(kernels, &chunks, Route::Planned, WHOLE, 0);
    for seed in 1..8 {
        assert!(problem.run(kernels, &chunks, Route::Planned, WHOLE, seed) == first, "seed {seed}");
    }
}

#[test]
fn addresses_stay_within_what_exists() {
    let Some(kernels) = HostKernels::load() else { return };
    let chunks: &[Chunk] = &[(0, 74, 75), (1, 3, 30)];
    check(kernels, Shape { window: 20, num_kv_heads: 2, head_dim: 40, ..BASE }, &[75, 30], chunks);
    check(kernels, Shape { fp8: true, tile_dim: 128, head_dim: 112, sinks: true, ..BASE }, &[75, 30], chunks);
}

#[test]
fn sanitizers_find_nothing() {
    under_sanitizers("addresses");
}
