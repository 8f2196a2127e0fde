//! Causal attention over the paged cache.
//!
//! One item of work is (row, KV head): the query heads that share the KV head run side by side, so that K and V are read
//! once for them. Keys are taken in tiles that begin at multiples of [`TILE`] positions; tiles are merged in order by
//! the online softmax (Milakov & Gimelshein, arXiv 1805.02867). A key's lane within its tile is its position, so the sums
//! do not know the block size, the chunk, or who else is in the batch.

use std::ops::RangeInclusive;

use quire_backend::{Attention, AttnShape, StepBuffer};
use quire_core::ExecError;

use super::dot::dot_tile;
use super::grain;
use super::soft_cap::soft_cap;
use crate::CpuBackend;
use crate::buffer::{CpuBuf, SharedRows};
use crate::element::Element;
use crate::kv::{CpuKv, KvLayer, PageShape, Pages};
use crate::pool::Pool;
use crate::simd::{Isa, Kernel, LANES, Simd, dispatch, exp};

/// Positions in a tile.
pub const TILE: usize = 64;

/// Keys, and query heads, whose dot products run side by side.
const SCORE_KEYS: usize = 4;
const SCORE_HEADS: usize = 2;
/// Vectors of a value row that are summed in registers.
const VALUE_VECTORS: usize = 4;

/// The whole operation. `row_seqs[t]` is the sequence of row `t`.
pub(crate) fn attention(
    pool: &mut Pool,
    isa: Isa,
    step: &StepBuffer,
    row_seqs: &[u32],
    op: Attention<'_, CpuBackend>,
) -> Result<(), ExecError> {
    let Attention { qkv, shape, scale, soft_cap, window, sinks, kv, layer, out } = op;
    let kv_heads = shape.num_kv_heads as usize;
    let out = out.shared();
    let items = step.num_tokens() * kv_heads;
    let context: usize = step.positions.iter().map(|&p| p as usize + 1).sum();
    let work = 2 * context * shape.q_size() / items.max(1);
    pool.split(items, grain(items, work, pool.num_threads()), |_, items| {
        for item in items {
            let (t, kv_head) = (item / kv_heads, item % kv_heads);
            let row = Row {
                qkv,
                shape,
                scale,
                soft_cap,
                sinks: sinks.map(|sinks| &sinks[..]),
                kv_head,
                block_table: step.block_table(row_seqs[t] as usize),
                first: window.map_or(0, |window| (step.positions[t] + 1).saturating_sub(window)) as usize,
                last: step.positions[t] as usize,
                t,
                out,
            };
            row.run(isa, kv, layer);
        }
    })
}

/// One item.
struct Row<'a> {
    qkv: &'a CpuBuf,
    shape: AttnShape,
    scale: f32,
    soft_cap: Option<f32>,
    /// `[num_heads]`.
    sinks: Option<&'a [f32]>,
    kv_head: usize,
    block_table: &'a [u32],
    /// Positions seen: `first..=last`.
    first: usize,
    last: usize,
    t: usize,
    out: SharedRows<'a>,
}

impl Row<'_> {
    fn run(self, isa: Isa, kv: &CpuKv, layer: usize) {
        // SAFETY: `isa` was detected; the output columns of (row, KV head) belong to this item alone.
        unsafe {
            match &kv.layers[layer] {
                KvLayer::F32(pages) => dispatch(isa, RowKernel { row: self, pages }),
                KvLayer::F16(pages) => dispatch(isa, RowKernel { row: self, pages }),
                KvLayer::Bf16(pages) => dispatch(isa, RowKernel { row: self, pages }),
                KvLayer::Packed(_) => unreachable!("packed pages have an operation of their own"),
            }
        }
    }
}

struct RowKernel<'a, E> {
    row: Row<'a>,
    pages: &'a Pages<E>,
}

/// What the softmax of one query head knows after the tiles so far.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

impl<E: Element> Kernel for RowKernel<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Row { qkv, shape, kv_head, t, first, last, out, .. } = self.row;
        let head_dim = shape.head_dim as usize;
        let group = (shape.num_heads / shape.num_kv_heads) as usize;
        // SAFETY: these columns of row `t` belong to this item.
        let out = unsafe { out.part(t, kv_head * group * head_dim, group * head_dim) };
        let q = &qkv.row(t)[kv_head * group * head_dim..(kv_head + 1) * group * head_dim];

        for heads in (0..group).step_by(SCORE_HEADS) {
            let columns = heads * head_dim..(heads + SCORE_HEADS).min(group) * head_dim;
            let (q, out) = (&q[columns.clone()], &mut out[columns]);
            let first_head = kv_head * group + heads;
            // SAFETY: the caller's.
            unsafe {
                if q.len() == head_dim {
                    self.heads::<S, 1>(q, out, first_head, first..=last);
                } else {
                    self.heads::<S, SCORE_HEADS>(q, out, first_head, first..=last);
                }
            }
        }
    }
}

impl<E: Element> RowKernel<'_, E> {
    /// `H` query heads of one KV head, from `first_head` on, over these positions.
    #[inline(always)]
    unsafe fn heads<S: Simd, const H: usize>(
        &self,
        q: &[f32],
        out: &mut [f32],
        first_head: usize,
        positions: RangeInclusive<usize>,
    ) {
        let head_dim = q.len() / H;
        let (first, last) = positions.into_inner();
        let mut running = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; H];
        out.fill(0.0);
        for tile in first / TILE..=last / TILE {
            let start = tile * TILE;
            let keys = first.max(start) - start..(last + 1).min(start + TILE) - start;
            let offsets = self.offsets(start, keys.clone());
            let mut scores = [[f32::NEG_INFINITY; TILE]; H];
            // SAFETY: the caller's; `offsets` were checked.
            unsafe {
                self.scores::<S, H>(q, &offsets, keys.clone(), &mut scores);
                for h in 0..H {
                    let out = &mut out[h * head_dim..(h + 1) * head_dim];
                    if let Some(cap) = self.row.soft_cap {
                        cap_scores::<S>(&mut scores[h], keys.clone(), cap);
                    }
                    softmax_tile::<S>(&mut scores[h], &mut running[h], out);
                }
                self.values::<S, H>(&scores, &offsets, keys, out);
            }
        }
        for h in 0..H {
            let Running { max, sum } = running[h];
            let sink = self.row.sinks.map_or(0.0, |sinks| (sinks[first_head + h] - max).exp());
            let scale = 1.0 / (sum + sink);
            out[h * head_dim..(h + 1) * head_dim].iter_mut().for_each(|o| *o *= scale);
        }
    }

    /// Where the keys (and values) of a tile begin. Panics if one lies outside the cache.
    #[inline(always)]
    fn offsets(&self, start: usize, keys: std::ops::Range<usize>) -> [usize; TILE] {
        let shape: PageShape = self.pages.shape;
        let end = self.pages.k.len();
        let mut offsets = [0; TILE];
        for key in keys {
            let position = start + key;
            let block = self.row.block_table[position / shape.block_size] as usize;
            let at = shape.at(block, self.row.kv_head, position % shape.block_size);
            assert!(at + shape.head_dim <= end, "block {block} is outside the cache");
            offsets[key] = at;
        }
        offsets
    }

    /// `scores[h][key] = scale * q[h] · K[key]`.
    #[inline(always)]
    unsafe fn scores<S: Simd, const H: usize>(
        &self,
        q: &[f32],
        offsets: &[usize; TILE],
        keys: std::ops::Range<usize>,
        scores: &mut [[f32; TILE]; H],
    ) {
        let head_dim = q.len() / H;
        let scale = self.row.scale;
        let (mut key, k) = (keys.start, self.pages.k.as_ptr());
        // SAFETY: `offsets` lie inside the cache; `q` holds H heads.
        unsafe {
            let qs: [*const f32; H] = std::array::from_fn(|h| q.as_ptr().add(h * head_dim));
            while key + SCORE_KEYS <= keys.end {
                let rows = std::array::from_fn(|i| k.add(offsets[key + i]));
                let dots = dot_tile::<S, E, SCORE_KEYS, H>(rows, qs, head_dim);
                for i in 0..SCORE_KEYS {
                    for h in 0..H {
                        scores[h][key + i] = dots[i][h] * scale;
                    }
                }
                key += SCORE_KEYS;
            }
            while key < keys.end {
                let [dots] = dot_tile::<S, E, 1, H>([k.add(offsets[key])], qs, head_dim);
                for h in 0..H {
                    scores[h][key] = dots[h] * scale;
                }
                key += 1;
            }
        }
    }

    /// `out[h] += Σ weights[h][key] * V[key]`, keys in order.
    #[inline(always)]
    unsafe fn values<S: Simd, const H: usize>(
        &self,
        weights: &[[f32; TILE]; H],
        offsets: &[usize; TILE],
        keys: std::ops::Range<usize>,
        out: &mut [f32],
    ) {
        let head_dim = out.len() / H;
        let v = self.pages.v.as_ptr();
        let mut d = 0;
        // SAFETY: `d` and what is read from it stay below `head_dim`; `offsets` lie inside the cache.
        unsafe {
            while d + VALUE_VECTORS * LANES <= head_dim {
                value_columns::<S, E, H, VALUE_VECTORS>(weights, offsets, keys.clone(), v, out, d);
                d += VALUE_VECTORS * LANES;
            }
            while d + LANES <= head_dim {
                value_columns::<S, E, H, 1>(weights, offsets, keys.clone(), v, out, d);
                d += LANES;
            }
            for d in d..head_dim {
                for h in 0..H {
                    for key in keys.clone() {
                        out[h * head_dim + d] += weights[h][key] * (*v.add(offsets[key] + d)).to_f32();
                    }
                }
            }
        }
    }
}

/// `C` vectors of columns from `d` on.
#[inline(always)]
unsafe fn value_columns<S: Simd, E: Element, const H: usize, const C: usize>(
    weights: &[[f32; TILE]; H],
    offsets: &[usize; TILE],
    keys: std::ops::Range<usize>,
    v: *const E,
    out: &mut [f32],
    d: usize,
) {
    let head_dim = out.len() / H;
    let out = out.as_mut_ptr();
    // SAFETY: the caller checked that `C * LANES` columns from `d` exist.
    unsafe {
        let mut acc = [[S::splat(0.0); C]; H];
        for h in 0..H {
            for c in 0..C {
                acc[h][c] = S::load(out.add(h * head_dim + d + c * LANES));
            }
        }
        for key in keys {
            let row = v.add(offsets[key] + d);
            for c in 0..C {
                let value = E::load::<S>(row.add(c * LANES));
                for h in 0..H {
                    acc[h][c] = S::fma(S::splat(weights[h][key]), value, acc[h][c]);
                }
            }
        }
        for h in 0..H {
            for c in 0..C {
                S::store(out.add(h * head_dim + d + c * LANES), acc[h][c]);
            }
        }
    }
}

/// Caps the scores of these keys of a tile.
#[inline(always)]
unsafe fn cap_scores<S: Simd>(scores: &mut [f32; TILE], keys: std::ops::Range<usize>, cap: f32) {
    // SAFETY: offsets stay below TILE; the rest is the caller's.
    unsafe {
        for i in (0..TILE).step_by(LANES) {
            let at = scores.as_mut_ptr().add(i);
            S::store(at, soft_cap::<S>(S::load(at), cap));
        }
    }
    scores[..keys.start].fill(f32::NEG_INFINITY);
    scores[keys.end..].fill(f32::NEG_INFINITY);
}

/// Turns a tile's scores into weights relative to the new maximum, and scales what was summed before down to it.
#[inline(always)]
unsafe fn softmax_tile<S: Simd>(scores: &mut [f32; TILE], running: &mut Running, out: &mut [f32]) {
    let max = scores.iter().copied().fold(running.max, f32::max);
    let shrink = (running.max - max).exp();
    // SAFETY: offsets stay below TILE; the rest is the caller's.
    let sum = unsafe {
        let (shift, mut sum) = (S::splat(-max), S::splat(0.0));
        for i in (0..TILE).step_by(LANES) {
            let at = scores.as_mut_ptr().add(i);
            let weight = exp::<S>(S::add(S::load(at), shift));
            S::store(at, weight);
            sum = S::add(sum, weight);
        }
        S::sum(sum)
    };
    *running = Running { max, sum: running.sum * shrink + sum };
    out.iter_mut().for_each(|o| *o *= shrink);
}
