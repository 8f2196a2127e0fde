//! What adapters add to a linear layer: `out[t] += B (scaling · A · x[t])`, in f32.
//!
//! Two steps: `A · x` of every row that has an adapter ([`shrink`]), then `B` times that, for any panel of outputs of any
//! row ([`Expand`]). A sum of the second step begins at zero and goes through the ranks in order, and only then is added,
//! so that the operation that asks for it does not change a bit; nor do the neighbours that share what is read.

use std::ops::Range;

use quire_backend::convert::{tensor_error, to_f32};
use quire_backend::{BackendError, LoraSource, StepBuffer};
use quire_core::AdapterId;

use super::dot::dot_tile;
use super::grain;
use crate::buffer::{Aligned, CpuBuf, Shared, SharedRows};
use crate::pool::Pool;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairDot, PairKernel, dispatch_pairs};
use crate::simd::{Isa, Kernel, Simd, dispatch};

/// Rows of `A` that one piece multiplies, and panels of outputs that one piece adds to.
const PIECE_RANKS: usize = 4;
const PIECE_PANELS: usize = 16;
/// Rows of one adapter, one behind the other, that share what is read of its factors.
const GROUP: usize = 3;
/// Of rows without an adapter.
const NONE: u32 = u32::MAX;

/// What all adapters add to one linear layer.
pub struct CpuLora {
    /// By id.
    adapters: Vec<Adapter>,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    /// The most rows of an adapter's `A`, and the most panels of outputs.
    max_rank: usize,
    max_panels: usize,
    name: String,
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
    /// `[panel][rank][PANEL]`: the transpose of `B` in panels of outputs, the last one filled up with zeros.
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
            max_panels: adapters.iter().map(Adapter::num_panels).max().unwrap_or(0),
            name: source.name.to_owned(),
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
            let mut b = Aligned::zeroed(ranks.len() * outputs.len().next_multiple_of(PANEL), name)?;
            for (n, row) in to_f32(name, &part.b)?.chunks_exact(ranks.len()).enumerate() {
                let at = n / PANEL * ranks.len() * PANEL + n % PANEL;
                row.iter().enumerate().for_each(|(j, &value)| b[at + j * PANEL] = value);
            }
            first = ranks.end;
            loaded.push(Part { outputs, ranks, b, scaling: part.scaling });
        }
        Ok(Self { a, rank, parts: loaded })
    }

    fn num_panels(&self) -> usize {
        self.parts.iter().map(Part::num_panels).sum()
    }

    /// The part that a panel, counted through all parts, belongs to, and its number there.
    fn panel(&self, mut panel: usize) -> Option<(&Part, usize)> {
        for part in &self.parts {
            if panel < part.num_panels() {
                return Some((part, panel));
            }
            panel -= part.num_panels();
        }
        None
    }
}

impl Part {
    fn num_panels(&self) -> usize {
        self.outputs.len().div_ceil(PANEL)
    }

    /// `B` of a panel times shrunk rows.
    ///
    /// # Safety
    /// As for [`PairDot`].
    #[inline(always)]
    unsafe fn times<D: PairDot, const M: usize>(&self, panel: usize, shrunk: [&[f32]; M]) -> [D::V; M] {
        let rank = self.ranks.len();
        let b = &self.b[panel * rank * PANEL..][..rank * PANEL];
        let shrunk = shrunk.map(|row| &row[self.ranks.clone()]);
        // SAFETY: every chunk is a panel; the rest is the caller's.
        unsafe {
            let mut sums = [D::zero(); M];
            for (j, b) in b.as_chunks::<PANEL>().0.iter().enumerate() {
                let b = D::load_sums(b.as_ptr());
                for m in 0..M {
                    sums[m] = D::fma(D::splat(shrunk[m][j]), b, sums[m]);
                }
            }
            sums
        }
    }
}

/// Which rows of a step have adapters, and room for what [`shrink`] makes of them.
#[derive(Default)]
pub(crate) struct LoraRows {
    /// Those that have one, and whose.
    rows: Vec<(u32, AdapterId)>,
    /// Of `rows`: up to [`GROUP`] of the same adapter.
    groups: Vec<Range<usize>>,
    /// `[T]` index into `rows`, or [`NONE`].
    index_of: Vec<u32>,
    /// `[rows.len(), stride]`.
    shrunk: Vec<f32>,
}

impl LoraRows {
    /// Finds the rows of a step.
    pub(crate) fn prepare(&mut self, step: &StepBuffer) {
        self.rows.clear();
        self.groups.clear();
        self.index_of.clear();
        if step.seq_adapters.iter().all(Option::is_none) {
            return;
        }
        self.index_of.resize(step.num_tokens(), NONE);
        for s in 0..step.num_seqs() {
            let Some(adapter) = step.adapter_of(s) else { continue };
            for row in step.rows_of(s) {
                let index = self.rows.len();
                self.index_of[row] = index as u32;
                match self.groups.last_mut() {
                    Some(group) if group.len() < GROUP && self.rows[group.start].1 == adapter => {
                        group.end += 1;
                    }
                    _ => self.groups.push(index..index + 1),
                }
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
    let (rows, groups) = (&work.rows, &work.groups);
    // Groups that follow one another read the same rows of `A`.
    let units = groups.len() * stride.div_ceil(PIECE_RANKS);
    let shrunk = Shared::new(&mut work.shrunk);
    pool.split(units, grain(units, GROUP * PIECE_RANKS * k, pool.num_threads()), |_, units| {
        for unit in units {
            let (group, first) = (&groups[unit % groups.len()], unit / groups.len() * PIECE_RANKS);
            let adapter = &lora.adapters[rows[group.start].1.0 as usize];
            let ranks = first.min(adapter.rank)..(first + PIECE_RANKS).min(adapter.rank);
            let row =
                |m: usize| &x.values[rows[(group.start + m).min(group.end - 1)].0 as usize * x.cols..][..k];
            let shrink = Shrink { adapter, ranks, xs: std::array::from_fn(row), shrunk, group, stride };
            // SAFETY: `isa` was detected; these sums belong to this unit alone.
            unsafe { dispatch(isa, shrink) };
        }
    })?;
    let LoraRows { rows, groups, index_of, shrunk } = work;
    Ok(Expand { lora, rows, groups, index_of, shrunk })
}

/// Some rows of an adapter's `A` times a group of rows.
struct Shrink<'a> {
    adapter: &'a Adapter,
    ranks: Range<usize>,
    /// The group's, the last one repeated.
    xs: [&'a [f32]; GROUP],
    shrunk: Shared<'a, f32>,
    group: &'a Range<usize>,
    stride: usize,
}

impl Kernel for Shrink<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let full = self.ranks.len() == PIECE_RANKS;
        // SAFETY: the caller's; the ranks are within the adapter's.
        unsafe {
            match self.group.len() {
                1 if full => self.tile::<S, PIECE_RANKS, 1>(self.ranks.start),
                2 if full => self.tile::<S, PIECE_RANKS, 2>(self.ranks.start),
                _ if full => self.tile::<S, PIECE_RANKS, GROUP>(self.ranks.start),
                _ => self.ranks.clone().for_each(|rank| self.tile::<S, 1, GROUP>(rank)),
            }
        }
    }
}

impl Shrink<'_> {
    /// Ranks `first..first + R` of the first `M` rows.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const M: usize>(&self, first: usize) {
        let k = self.xs[0].len();
        let a = &self.adapter.a[first * k..(first + R) * k];
        // SAFETY: `a` holds R rows of k, as do all of `xs`; the rest is the caller's.
        unsafe {
            let rows = std::array::from_fn(|r| a.as_ptr().add(r * k));
            let xs = std::array::from_fn(|m| self.xs[m].as_ptr());
            let dots = dot_tile::<S, f32, R, M>(rows, xs, k);
            for (r, dots) in dots.into_iter().enumerate() {
                let part = self.adapter.parts.iter().find(|part| part.ranks.contains(&(first + r)));
                let scaling = part.map_or(0.0, |part| part.scaling);
                for (index, dot) in self.group.clone().zip(dots) {
                    self.shrunk.slice(index * self.stride + first + r, 1)[0] = dot * scaling;
                }
            }
        }
    }
}

/// What rows with adapters add to a layer's outputs.
#[derive(Clone, Copy)]
pub(crate) struct Expand<'a> {
    lora: &'a CpuLora,
    rows: &'a [(u32, AdapterId)],
    groups: &'a [Range<usize>],
    index_of: &'a [u32],
    shrunk: &'a [f32],
}

impl<'a> Expand<'a> {
    /// For [`Self::panel`].
    ///
    /// # Errors
    /// A part does not begin at a multiple of [`PANEL`].
    pub(crate) fn in_panels(self) -> Result<Self, BackendError> {
        let mut parts = self.lora.adapters.iter().flat_map(|adapter| &adapter.parts);
        match parts.find(|part| !part.outputs.start.is_multiple_of(PANEL)) {
            None => Ok(self),
            Some(part) => {
                let (name, first) = (&self.lora.name, part.outputs.start);
                Err(tensor_error(
                    name,
                    format!("an adapter begins at output {first}, which is no multiple of {PANEL}"),
                ))
            }
        }
    }

    /// What is added to the panel of outputs from `first` on of row `t`, if anything.
    ///
    /// # Safety
    /// As for [`PairDot`].
    #[inline(always)]
    pub(crate) unsafe fn panel<D: PairDot>(&self, t: usize, first: usize) -> Option<D::V> {
        let index = *self.index_of.get(t)? as usize;
        let (_, adapter) = self.rows.get(index)?;
        let part =
            self.lora.adapters[adapter.0 as usize].parts.iter().find(|part| part.outputs.contains(&first))?;
        let panel = (first - part.outputs.start) / PANEL;
        // SAFETY: the caller's.
        unsafe { Some(part.times::<D, 1>(panel, [self.row(index)])[0]) }
    }

    /// A shrunk row.
    #[inline(always)]
    fn row(&self, index: usize) -> &'a [f32] {
        &self.shrunk[index * self.lora.max_rank..][..self.lora.max_rank]
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
    let groups = expand.groups;
    let units = groups.len() * lora.max_panels.div_ceil(PIECE_PANELS);
    let grain = grain(units, GROUP * PIECE_PANELS * PANEL * lora.max_rank, pool.num_threads());
    pool.split(units, grain, |_, units| {
        for unit in units {
            let (group, first) = (&groups[unit % groups.len()], unit / groups.len() * PIECE_PANELS);
            let panels = first..first + PIECE_PANELS;
            // SAFETY: `isa` was detected; these panels of the group's rows belong to this unit alone.
            unsafe { dispatch_pairs(isa, ExpandPiece { expand, group: group.clone(), panels, out }) };
        }
    })?;
    Ok(())
}

/// Some panels of outputs of a group of rows.
struct ExpandPiece<'a> {
    expand: Expand<'a>,
    group: Range<usize>,
    panels: Range<usize>,
    out: SharedRows<'a>,
}

impl PairKernel for ExpandPiece<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        // SAFETY: the caller's.
        unsafe {
            match self.group.len() {
                1 => self.rows::<D, 1>(),
                2 => self.rows::<D, 2>(),
                _ => self.rows::<D, GROUP>(),
            }
        }
    }
}

impl ExpandPiece<'_> {
    #[inline(always)]
    unsafe fn rows<D: PairDot, const M: usize>(&self) {
        let (_, adapter) = self.expand.rows[self.group.start];
        let adapter = &self.expand.lora.adapters[adapter.0 as usize];
        let shrunk: [&[f32]; M] = std::array::from_fn(|m| self.expand.row(self.group.start + m));
        for panel in self.panels.clone() {
            let Some((part, panel)) = adapter.panel(panel) else { return };
            let first = part.outputs.start + panel * PANEL;
            let width = PANEL.min(part.outputs.end - first);
            // SAFETY: the columns are ours by contract; `sums` is a panel.
            unsafe {
                let added = part.times::<D, M>(panel, shrunk);
                for m in 0..M {
                    let mut sums = [0.0; PANEL];
                    D::store(sums.as_mut_ptr(), added[m]);
                    let t = self.expand.rows[self.group.start + m].0 as usize;
                    let out = self.out.part(t, first, width);
                    out.iter_mut().zip(&sums).for_each(|(out, sum)| *out += sum);
                }
            }
        }
    }
}
