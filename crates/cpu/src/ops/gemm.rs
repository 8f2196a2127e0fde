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
use super::sink::{Hidden, Sink, ToGated, ToRows, give};
use super::tiles::{Ahead, Cut, NARROW, STREAM_AHEAD, Tiled, Turn, each_panel, group_rows};
use crate::buffer::SharedRows;
use crate::packed::{Packed, Rounded};
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
        self.split(pool, isa, self.n.div_ceil(PANEL), Places::IN_ORDER, Sink::Rows(to))
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
        self.split(pool, isa, 2 * panels, Places::gate_and_up(panels), Sink::Gated(to))
    }

    /// Hands out panels `0..panels`, which lie at `places` of the weights.
    fn split(
        self,
        pool: &mut Pool,
        isa: Isa,
        panels: usize,
        places: Places,
        to: Sink<'_>,
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
        to: Sink<'_>,
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

/// One piece: some panels for some rows.
struct Product<'a> {
    gemm: Gemm<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    places: Places,
    to: Sink<'a>,
}

impl PairKernel for Product<'_> {
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

impl Product<'_> {
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

impl Tiled for Product<'_> {
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
