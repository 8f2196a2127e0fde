//! What adapters add to a linear layer: `out[t] += B (scaling · A · x[t])`, in f32.
//!
//! Two steps: `A · x` of every row that has an adapter ([`shrink`]), then `B` times that, for any range of columns of any
//! row ([`Expand`]). A sum of the second step begins at zero and goes through the ranks in order, and only then is added,
//! so that neither the range nor the operation that asks for it changes a bit.

use std::ops::Range;

use quire_backend::convert::to_f32;
use quire_backend::{BackendError, LoraSource, StepBuffer};
use quire_core::AdapterId;

use super::dot::dot_tile;
use super::grain;
use crate::buffer::{Aligned, CpuBuf, Shared, SharedRows};
use crate::pool::Pool;
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// Rows of `A` that one piece multiplies, and columns that one piece adds to.
const PIECE_RANKS: usize = 4;
const PIECE_COLUMNS: usize = 256;
/// Sums side by side.
const WIDTH: usize = 16;
/// Of rows without an adapter.
const NONE: u32 = u32::MAX;

/// What all adapters add to one linear layer.
pub struct CpuLora {
    /// By id.
    adapters: Vec<Adapter>,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    /// The most rows of an adapter's `A`.
    max_rank: usize,
}

struct Adapter {
    /// `[rank, in_features]`, the parts' one after the other.
    a: Aligned<f32>,
    rank: usize,
    parts: Vec<Part>,
}

struct Part {
    outputs: Range<usize>,
    /// Its rows of `a`.
    ranks: Range<usize>,
    /// `[rank][outputs]`: the transpose of `B`.
    b: Aligned<f32>,
    scaling: f32,
}

impl CpuLora {
    pub(crate) fn load(source: &LoraSource<'_>) -> Result<Self, BackendError> {
        source.check()?;
        let adapters = (0..source.adapters.len()).map(|index| Adapter::load(source, index));
        let adapters: Vec<_> = adapters.collect::<Result<_, BackendError>>()?;
        Ok(Self {
            max_rank: adapters.iter().map(|adapter| adapter.rank).max().unwrap_or(0),
            in_features: source.in_features,
            out_features: source.out_features,
            adapters,
        })
    }
}

impl Adapter {
    fn load(source: &LoraSource<'_>, index: usize) -> Result<Self, BackendError> {
        let (name, parts) = (source.name, &source.adapters[index]);
        let rank = parts.iter().map(quire_backend::LoraPart::rank).sum();
        let mut a = Aligned::zeroed(rank * source.in_features, name)?;
        let (mut first, mut loaded) = (0, Vec::with_capacity(parts.len()));
        for part in parts {
            let (ranks, outputs) = (first..first + part.rank(), part.outputs());
            let rows = ranks.start * source.in_features..ranks.end * source.in_features;
            a[rows].copy_from_slice(&to_f32(name, &part.a)?);
            let mut b = Aligned::zeroed(ranks.len() * outputs.len(), name)?;
            for (n, row) in to_f32(name, &part.b)?.chunks_exact(ranks.len()).enumerate() {
                row.iter().enumerate().for_each(|(j, &value)| b[j * outputs.len() + n] = value);
            }
            first = ranks.end;
            loaded.push(Part { outputs, ranks, b, scaling: part.scaling });
        }
        Ok(Self { a, rank, parts: loaded })
    }
}

/// Which rows of a step have adapters, and room for what [`shrink`] makes of them.
#[derive(Default)]
pub(crate) struct LoraRows {
    /// Those that have one, and whose.
    rows: Vec<(u32, AdapterId)>,
    /// `[T]` index into `rows`, or [`NONE`].
    index_of: Vec<u32>,
    /// `[rows.len(), stride]`.
    shrunk: Vec<f32>,
}

impl LoraRows {
    /// Finds the rows of a step.
    pub(crate) fn prepare(&mut self, step: &StepBuffer) {
        self.rows.clear();
        self.index_of.clear();
        if step.seq_adapters.iter().all(Option::is_none) {
            return;
        }
        self.index_of.resize(step.num_tokens(), NONE);
        for s in 0..step.num_seqs() {
            let Some(adapter) = step.adapter_of(s) else { continue };
            for row in step.rows_of(s) {
                self.index_of[row] = self.rows.len() as u32;
                self.rows.push((row as u32, adapter));
            }
        }
    }
}

/// `scaling · A · x` of every row that has an adapter.
pub(crate) fn shrink<'a>(
    pool: &mut Pool,
    isa: Isa,
    lora: &'a CpuLora,
    x: &CpuBuf,
    work: &'a mut LoraRows,
) -> Result<Expand<'a>, BackendError> {
    let (stride, k) = (lora.max_rank, lora.in_features);
    work.shrunk.resize((work.rows.len() * stride).max(work.shrunk.len()), 0.0);
    let pieces = stride.div_ceil(PIECE_RANKS).max(1);
    let (units, rows) = (work.rows.len() * pieces, &work.rows);
    let shrunk = Shared::new(&mut work.shrunk);
    pool.split(units, grain(units, PIECE_RANKS * k, pool.num_threads()), |_, units| {
        for unit in units {
            let (index, first) = (unit / pieces, unit % pieces * PIECE_RANKS);
            let (row, adapter) = rows[index];
            let adapter = &lora.adapters[adapter.0 as usize];
            let ranks = first.min(adapter.rank)..(first + PIECE_RANKS).min(adapter.rank);
            // SAFETY: `isa` was detected; these sums belong to this unit alone.
            unsafe {
                let out = shrunk.slice(index * stride + ranks.start, ranks.len());
                let x = &x.values[row as usize * x.cols..][..k];
                dispatch(isa, Shrink { adapter, ranks, x, out });
            }
        }
    })?;
    Ok(Expand { lora, rows: &work.rows, index_of: &work.index_of, shrunk: &work.shrunk })
}

struct Shrink<'a> {
    adapter: &'a Adapter,
    ranks: Range<usize>,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Shrink<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let k = self.x.len();
        let a = &self.adapter.a[self.ranks.start * k..self.ranks.end * k];
        // SAFETY: `a` holds the rows, each of `k` elements, and so does `x`; the rest is the caller's.
        unsafe {
            if self.ranks.len() == PIECE_RANKS {
                let rows = std::array::from_fn(|r| a.as_ptr().add(r * k));
                let dots = dot_tile::<S, f32, PIECE_RANKS, 1>(rows, [self.x.as_ptr()], k);
                self.out.iter_mut().zip(dots).for_each(|(out, [dot])| *out = dot);
            } else {
                for (row, out) in a.chunks_exact(k).zip(&mut *self.out) {
                    *out = dot_tile::<S, f32, 1, 1>([row.as_ptr()], [self.x.as_ptr()], k)[0][0];
                }
            }
        }
        for (rank, out) in self.ranks.zip(self.out) {
            let part = self.adapter.parts.iter().find(|part| part.ranks.contains(&rank));
            *out *= part.map_or(0.0, |part| part.scaling);
        }
    }
}

/// What rows with adapters add to a layer's outputs.
#[derive(Clone, Copy)]
pub(crate) struct Expand<'a> {
    lora: &'a CpuLora,
    rows: &'a [(u32, AdapterId)],
    index_of: &'a [u32],
    shrunk: &'a [f32],
}

impl Expand<'_> {
    /// Adds to the outputs from `first` on of row `t`, if it has an adapter. Compiled for whatever it is inlined into.
    #[inline(always)]
    pub(crate) fn add(&self, t: usize, first: usize, out: &mut [f32]) {
        let index = self.index_of.get(t).map_or(usize::MAX, |&index| index as usize);
        let Some((_, adapter)) = self.rows.get(index) else { return };
        let shrunk = &self.shrunk[index * self.lora.max_rank..];
        let end = first + out.len();
        for part in &self.lora.adapters[adapter.0 as usize].parts {
            let columns = first.max(part.outputs.start)..end.min(part.outputs.end);
            if columns.is_empty() {
                continue;
            }
            let (from, shrunk) = (columns.start - part.outputs.start, &shrunk[part.ranks.clone()]);
            let (blocks, rest) = out[columns.start - first..columns.end - first].as_chunks_mut::<WIDTH>();
            let num_blocks = blocks.len();
            for (block, out) in blocks.iter_mut().enumerate() {
                let mut sums = [0.0; WIDTH];
                for (j, &s) in shrunk.iter().enumerate() {
                    let b = &part.b[j * part.outputs.len() + from + block * WIDTH..][..WIDTH];
                    (0..WIDTH).for_each(|i| sums[i] += s * b[i]);
                }
                (0..WIDTH).for_each(|i| out[i] += sums[i]);
            }
            for (i, out) in rest.iter_mut().enumerate() {
                let column = from + num_blocks * WIDTH + i;
                let terms =
                    shrunk.iter().enumerate().map(|(j, s)| s * part.b[j * part.outputs.len() + column]);
                *out += terms.fold(0.0, |sum, term| sum + term);
            }
        }
    }
}

/// The whole operation.
pub(crate) fn add_lora(
    pool: &mut Pool,
    isa: Isa,
    lora: &CpuLora,
    x: &CpuBuf,
    work: &mut LoraRows,
    out: SharedRows<'_>,
) -> Result<(), BackendError> {
    let expand = shrink(pool, isa, lora, x, work)?;
    let n = lora.out_features;
    let pieces = n.div_ceil(PIECE_COLUMNS).max(1);
    let units = expand.rows.len() * pieces;
    pool.split(units, grain(units, PIECE_COLUMNS * lora.max_rank, pool.num_threads()), |_, units| {
        for unit in units {
            let (t, first) = (expand.rows[unit / pieces].0 as usize, unit % pieces * PIECE_COLUMNS);
            // SAFETY: `isa` was detected; these columns of row `t` belong to this unit alone.
            unsafe {
                let out = out.part(t, first, PIECE_COLUMNS.min(n - first));
                dispatch(isa, ExpandPiece { expand, t, first, out });
            }
        }
    })?;
    Ok(())
}

struct ExpandPiece<'a> {
    expand: Expand<'a>,
    t: usize,
    first: usize,
    out: &'a mut [f32],
}

impl Kernel for ExpandPiece<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        self.expand.add(self.t, self.first, self.out);
    }
}
