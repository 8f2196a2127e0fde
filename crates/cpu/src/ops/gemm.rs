//! Products of rounded activations with packed weights: one code for a single token and for thousands.
//!
//! Every sum is one chain over the pairs of inputs in order, kept in a register or two dozen side by side; the shape of
//! the tile, the blocks and the threads never change a bit. A thread owns panels, that is output channels. It takes the
//! tokens in groups whose activations stay in its L2 cache, a few panels at a time, so that weights come from memory
//! once per group.

use std::ops::Range;

use quire_backend::Activation;
use quire_core::ExecError;

use super::lora::Expand;
use super::mlp::activate_lanes;
use super::tiles::{Ahead, Cut, NARROW, STREAM_AHEAD, Tiled, Turn, each_panel, group_rows};
use crate::buffer::SharedRows;
use crate::packed::{Packed, Rounded, RoundedRows};
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairDot, PairKernel, dispatch_pairs};
use crate::simd::rows::Rows;

/// A product.
#[derive(Clone, Copy)]
pub(crate) struct Gemm<'a> {
    pub weight: &'a Packed,
    pub bias: Option<&'a [f32]>,
    pub x: &'a Rounded,
    /// Rows of `x`.
    pub tokens: usize,
    /// Columns of the output.
    pub n: usize,
}

impl Gemm<'_> {
    /// `out = x · weightᵀ + bias`; `weight` has `n` channels.
    pub(crate) fn run(self, pool: &mut Pool, isa: Isa, out: SharedRows<'_>) -> Result<(), ExecError> {
        let to = ToRows { bias: self.bias, out, n: self.n };
        self.split(pool, isa, self.n.div_ceil(PANEL), Places::IN_ORDER, to)
    }

    /// `out = activation(x · gateᵀ) * (x · upᵀ)`; `weight` has gate's channels, then up's: `2 * n`, and `n` is a multiple
    /// of [`PANEL`]. What adapters add, they add before the activation.
    pub(crate) fn run_gated(
        self,
        pool: &mut Pool,
        isa: Isa,
        activation: Activation,
        lora: Option<&Expand<'_>>,
        out: Hidden<'_>,
    ) -> Result<(), ExecError> {
        let panels = self.n / PANEL;
        let to = ToGated { bias: self.bias, lora, activation, out, n: self.n };
        self.split(pool, isa, 2 * panels, Places::gate_and_up(panels), to)
    }

    /// Hands out panels `0..panels`, which lie at `places` of the weights.
    fn split(
        self,
        pool: &mut Pool,
        isa: Isa,
        panels: usize,
        places: Places,
        to: impl Sink,
    ) -> Result<(), ExecError> {
        let cut = Cut { tokens: self.tokens, group: self.group(), panels };
        let work = NARROW * PANEL * 2 * self.weight.k2();
        pool.split_guided(cut.units(), cut.grain(work, pool.num_threads()), |_, units| {
            cut.each(units, |rows, panels| {
                // SAFETY: `isa` was detected; each piece has rows and panels, that is columns of the output, of its own.
                unsafe { self.piece(isa, rows, panels, places, to) }
            });
        })
    }

    fn group(&self) -> usize {
        group_rows(self.weight.k2())
    }

    /// Some panels for some rows of `x`, on this thread.
    ///
    /// # Safety
    /// `isa` is available; nobody else touches these columns of these rows of the output.
    pub(crate) unsafe fn piece(
        self,
        isa: Isa,
        rows: Range<usize>,
        panels: Range<usize>,
        places: Places,
        to: impl Sink,
    ) {
        // SAFETY: the caller's.
        unsafe { dispatch_pairs(isa, Product { gemm: self, rows, panels, places, to }) }
    }
}

/// Where panels that are computed one after the other lie in the weights.
///
/// Data, not a function: each type that a product is generic over doubles the machine code.
#[derive(Clone, Copy)]
pub(crate) struct Places {
    first: usize,
    /// Panels of the gate where gate and up take turns, so that a tile holds both of the same channels; else 0.
    gate: usize,
}

impl Places {
    pub(crate) const IN_ORDER: Self = Self { first: 0, gate: 0 };

    /// Gate's panels, then as many of up.
    pub(crate) const fn gate_and_up(panels: usize) -> Self {
        Self { first: 0, gate: panels }
    }

    /// The same from panel `first` of the weights on.
    pub(crate) const fn from(self, first: usize) -> Self {
        Self { first, ..self }
    }

    #[inline(always)]
    pub(crate) const fn at(self, p: usize) -> usize {
        self.first + if self.gate == 0 { p } else { p / 2 + p % 2 * self.gate }
    }
}

/// Where the sums of a tile go.
pub(crate) trait Sink: Copy + Send + Sync {
    /// Takes the sums of token `m` for panels `p..p + P`.
    ///
    /// # Safety
    /// As for [`PairDot`]; nobody else touches these columns of row `m`.
    unsafe fn take<D: PairDot, const P: usize>(&self, m: usize, p: usize, sums: [D::V; P]);
}

/// Hands over the sums of rows `m..m + M`.
///
/// # Safety
/// As for [`Sink::take`].
#[inline(always)]
pub(crate) unsafe fn give<D: PairDot, const M: usize, const P: usize>(
    to: &impl Sink,
    m: usize,
    p: usize,
    sums: [[D::V; P]; M],
) {
    // Through memory, and to a function of its own: a sink is a long loop body, whose constants would push the sums of
    // the product out of the registers (109 instructions for 24 products instead of 62).
    let mut rows = [[[0.0; PANEL]; P]; M];
    // SAFETY: every array holds a panel; the rest is the caller's.
    unsafe {
        for r in 0..M {
            for i in 0..P {
                D::store(rows[r][i].as_mut_ptr(), sums[r][i]);
            }
        }
        D::apart(Give { rows: &rows, m, p, to: *to });
    }
}

/// What [`give`] does with sums in memory.
struct Give<'a, T, const P: usize> {
    rows: &'a [[[f32; PANEL]; P]],
    m: usize,
    p: usize,
    to: T,
}

impl<T: Sink, const P: usize> PairKernel for Give<'_, T, P> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        for (r, sums) in self.rows.iter().enumerate() {
            // SAFETY: every array holds a panel; the rest is the caller's.
            unsafe {
                let mut row = [D::zero(); P];
                for i in 0..P {
                    row[i] = D::load_sums(sums[i].as_ptr());
                }
                self.to.take::<D, P>(self.m + r, self.p, row);
            }
        }
    }
}

/// Plain rows of `n` columns.
#[derive(Clone, Copy)]
pub(crate) struct ToRows<'a> {
    pub bias: Option<&'a [f32]>,
    pub out: SharedRows<'a>,
    pub n: usize,
}

impl Sink for ToRows<'_> {
    #[inline(always)]
    unsafe fn take<D: PairDot, const P: usize>(&self, m: usize, p: usize, sums: [D::V; P]) {
        let first = p * PANEL;
        let width = (P * PANEL).min(self.n - first);
        // SAFETY: the columns are ours by contract; `out` holds whole panels if all are.
        unsafe {
            let out = self.out.part(m, first, width);
            if width == P * PANEL && self.bias.is_none() {
                for i in 0..P {
                    D::store(out.as_mut_ptr().add(i * PANEL), sums[i]);
                }
                return;
            }
            for (i, out) in out.chunks_mut(PANEL).enumerate() {
                let mut values = [0.0; PANEL];
                D::store(values.as_mut_ptr(), sums[i]);
                let values = &mut values[..out.len()];
                add_bias(values, self.bias, first + i * PANEL);
                out.copy_from_slice(values);
            }
        }
    }
}

/// The hidden layer of a gated feed-forward: even panels are the gate's, odd ones up's.
#[derive(Clone, Copy)]
pub(crate) struct ToGated<'a> {
    pub bias: Option<&'a [f32]>,
    pub lora: Option<&'a Expand<'a>>,
    pub activation: Activation,
    pub out: Hidden<'a>,
    pub n: usize,
}

/// Where it goes to: rounded, or as it is into the first columns.
#[derive(Clone, Copy)]
pub(crate) enum Hidden<'a> {
    Pairs(RoundedRows<'a>),
    Rows(SharedRows<'a>),
}

impl Sink for ToGated<'_> {
    #[inline(always)]
    unsafe fn take<D: PairDot, const P: usize>(&self, m: usize, p: usize, sums: [D::V; P]) {
        // One panel alone cannot be: both halves have the same number.
        for i in (0..P - 1).step_by(2) {
            let panel = (p + i) / 2;
            // SAFETY: the biases reach to the last channel; the columns are ours by contract.
            unsafe {
                let [mut gate, mut up] = [sums[i], sums[i + 1]];
                if let Some(bias) = self.bias {
                    gate = D::add(gate, D::load_sums(bias[panel * PANEL..][..PANEL].as_ptr()));
                    up = D::add(up, D::load_sums(bias[self.n + panel * PANEL..][..PANEL].as_ptr()));
                }
                if let Some(lora) = self.lora {
                    let (low, high) = (panel * PANEL, self.n + panel * PANEL);
                    gate = lora.panel::<D>(m, low).map_or(gate, |added| D::add(gate, added));
                    up = lora.panel::<D>(m, high).map_or(up, |added| D::add(up, added));
                }
                let hidden = D::mul(activate_lanes::<D>(self.activation, gate), up);
                match self.out {
                    Hidden::Pairs(out) => {
                        let mut pairs = [0; PANEL];
                        D::store_pairs(pairs.as_mut_ptr(), hidden, D::zero());
                        let out = out.part(m, panel * PANEL / 2, PANEL / 2);
                        out.copy_from_slice(&pairs[..PANEL / 2]);
                    }
                    Hidden::Rows(out) => D::store(out.part(m, panel * PANEL, PANEL).as_mut_ptr(), hidden),
                }
            }
        }
    }
}

#[inline(always)]
fn add_bias(values: &mut [f32], bias: Option<&[f32]>, first: usize) {
    if let Some(bias) = bias {
        values.iter_mut().zip(&bias[first..]).for_each(|(x, bias)| *x += bias);
    }
}

/// One piece: some panels for some rows.
struct Product<'a, T> {
    gemm: Gemm<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    places: Places,
    to: T,
}

impl<T: Sink> PairKernel for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let group = self.gemm.group();
        for first in self.rows.clone().step_by(group) {
            let rows = first..(first + group).min(self.rows.end);
            // SAFETY: the caller's.
            unsafe { each_panel::<D, _>(&self, rows, self.panels.clone()) };
        }
    }
}

impl<T: Sink> Product<'_, T> {
    /// What memory works ahead on while a tile of `panels` computes.
    #[inline(always)]
    fn ahead<const P: usize>(&self, p: usize, panels: [*const u32; P], turn: Turn) -> Ahead<P> {
        let next = |i: usize| {
            let next = p + P + i;
            (next < self.panels.end).then(|| self.gemm.weight.panel(self.places.at(next)))
        };
        Ahead::of(panels, self.gemm.weight.k2(), turn, next)
    }
}

/// The sums of one panel.
///
/// # Safety
/// The panel holds `k2` vectors, each row as many pairs.
#[inline(always)]
unsafe fn column<D: PairDot, const M: usize>(
    panel: *const u32,
    k2: usize,
    rows: [*const u32; M],
) -> [D::V; M] {
    // SAFETY: the caller's; a prefetch may touch any address.
    unsafe {
        let (mut x, mut sums) = (Rows::new(rows), [D::zero(); M]);
        let mut first = 0;
        while first < k2 {
            let end = Rows::<M>::piece_end::<D>(first, k2);
            x.prepare::<D>(first, end);
            for k in first..end {
                let weights = D::load(panel.add(k * PANEL));
                D::prefetch(panel.wrapping_add(k * PANEL + STREAM_AHEAD));
                for r in 0..M {
                    sums[r] = x.dot::<D>(sums[r], weights, r, first, k);
                }
            }
            first = end;
        }
        sums
    }
}

impl<T: Sink> Tiled for Product<'_, T> {
    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, m: usize, p: usize, turn: Turn) {
        let k2 = self.gemm.weight.k2();
        let panels: [*const u32; P] =
            std::array::from_fn(|i| self.gemm.weight.panel(self.places.at(p + i)).as_ptr());
        let (x, stride) = self.gemm.x.rows(m, M);
        assert!(k2 <= stride, "rows of {stride} pairs for weights of {k2}");
        // SAFETY: `panels` hold k2 vectors each, `x` M rows of `stride`; prefetches may leave them.
        unsafe {
            let rows: [*const u32; M] = std::array::from_fn(|i| x.as_ptr().add(i * stride));
            let mut sums = [[D::zero(); P]; M];
            if turn.is_memory_bound(M) {
                for i in 0..P {
                    let column = column::<D, M>(panels[i], k2, rows);
                    for r in 0..M {
                        sums[r][i] = column[r];
                    }
                }
                return give::<D, M, P>(&self.to, m, p, sums);
            }
            let ahead = self.ahead(p, panels, turn);
            let (mut x, mut first) = (Rows::new(rows), 0);
            while first < k2 {
                let end = Rows::<M>::piece_end::<D>(first, k2);
                x.prepare::<D>(first, end);
                for k in first..end {
                    let mut weights = [D::load(panels[0]); P];
                    for i in 0..P {
                        weights[i] = D::load(panels[i].add(k * PANEL));
                        ahead.fetch::<D>(i, k);
                    }
                    for r in 0..M {
                        for i in 0..P {
                            sums[r][i] = x.dot::<D>(sums[r][i], weights[i], r, first, k);
                        }
                    }
                }
                first = end;
            }
            give::<D, M, P>(&self.to, m, p, sums);
        }
    }
}
