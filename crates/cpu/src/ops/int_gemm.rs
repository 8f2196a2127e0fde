//! Products of quantized activations with quantized weights: the counterpart of `gemm.rs` for bytes.
//!
//! Sums of integers are exact, so they may be taken in any order; the floats that carry them from one group of inputs to
//! the next follow the order of [`quire_backend::quant`]. For a few tokens int4 is multiplied as it is and each group's
//! sum then scaled; for more of them a panel is expanded to bytes once and multiplied like int8.

use std::ops::Range;

use quire_core::ExecError;

use super::gemm::{Places, Sink, give};
use super::tiles::{Ahead, Tiled, Turn, WIDE, each_panel, pieces};
use crate::buffer::Shared;
use crate::pool::Pool;
use crate::quantized::{ACT_QUADS, ByteRows, Bytes, Codes, INT4_QUADS, INT4_VECTORS, Quantized};
use crate::simd::Isa;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairDot, PairKernel, dispatch_pairs};

/// Quads of activations that stay in cache while weights stream by: half of a 1 MiB L2.
const GROUP_QUADS: usize = 128 * 1024;
/// Tokens of a group at least.
const MIN_GROUP: usize = 192;
/// Up to how many tokens int4 is multiplied without being expanded.
const FEW: usize = 8;

/// A product.
#[derive(Clone, Copy)]
pub(crate) struct IntGemm<'a> {
    pub weight: &'a Quantized,
    pub x: &'a Bytes,
    /// Rows of `x`.
    pub tokens: usize,
}

/// One thread's room for expanded panels.
pub(crate) type Panels = Vec<u32>;

impl IntGemm<'_> {
    /// Hands out panels `0..panels`, which lie at `places` of the weights, and the sums of each to `to`.
    pub(crate) fn run(
        self,
        pool: &mut Pool,
        isa: Isa,
        scratch: &mut [Panels],
        panels: usize,
        places: Places,
        to: impl Sink,
    ) -> Result<(), ExecError> {
        self.reserve(scratch, self.tokens);
        let scratch = Shared::new(scratch);
        let units = panels.div_ceil(WIDE);
        let work = WIDE * PANEL * self.weight.quads() * self.tokens;
        pool.split(units, pieces(units, work, self.tokens, pool.num_threads()), |worker, units| {
            let panels = units.start * WIDE..(units.end * WIDE).min(panels);
            // SAFETY: `isa` was detected; each piece has panels, that is columns of the output, of its own, and each
            // thread its scratch.
            unsafe { self.piece(isa, &mut scratch.slice(worker, 1)[0], 0..self.tokens, panels, places, to) }
        })
    }

    /// Makes the room that [`Self::piece`] needs for up to `rows` rows.
    pub(crate) fn reserve(&self, scratch: &mut [Panels], rows: usize) {
        if self.weight.codes() == Codes::Int4 && rows > FEW {
            let len = WIDE * self.weight.quads() * PANEL;
            scratch.iter_mut().for_each(|panels| panels.resize(len.max(panels.len()), 0));
        }
    }

    /// Some panels for some rows of `x`, on this thread; `expanded` is its own.
    ///
    /// # Safety
    /// `isa` is available; nobody else touches these columns of these rows of the output.
    pub(crate) unsafe fn piece(
        self,
        isa: Isa,
        expanded: &mut Panels,
        rows: Range<usize>,
        panels: Range<usize>,
        places: Places,
        to: impl Sink,
    ) {
        let expanded = Shared::new(expanded);
        // SAFETY: the caller's.
        unsafe { dispatch_pairs(isa, Piece { gemm: self, rows, panels, places, to, expanded }) };
    }
}

/// Some panels for some rows.
struct Piece<'a, T> {
    gemm: IntGemm<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    places: Places,
    to: T,
    /// Where int4 panels are expanded to.
    expanded: Shared<'a, u32>,
}

impl<T: Sink> PairKernel for Piece<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let weight = self.gemm.weight;
        let group = (GROUP_QUADS / weight.quads().max(1)).max(MIN_GROUP);
        for first in self.rows.clone().step_by(group) {
            let rows = first..(first + group).min(self.rows.end);
            // SAFETY: the caller's.
            unsafe {
                if weight.codes() == Codes::Int4 && self.rows.len() <= FEW {
                    each_panel::<D, _>(&Nibbles(&self), rows, self.panels.clone());
                } else {
                    each_panel::<D, _>(&self, rows, self.panels.clone());
                }
            }
        }
    }
}

impl<T: Sink> Piece<'_, T> {
    /// Panel `p + i` as bytes, expanded if need be: once for all tiles of the same panels.
    #[inline(always)]
    unsafe fn bytes<D: ByteDot>(&self, p: usize, i: usize, turn: Turn) -> *const u32 {
        let weight = self.gemm.weight;
        let panel = weight.panel(self.places.at(p + i));
        match weight.codes() {
            Codes::Int8 => panel.as_ptr(),
            Codes::Int4 => {
                let len = weight.quads() * PANEL;
                // SAFETY: the scratch is this thread's.
                let to = unsafe { self.expanded.slice(i * len, len) };
                if turn.index == 0 {
                    // SAFETY: the caller's.
                    unsafe { expand::<D>(panel, weight.steps_at(), to) };
                }
                to.as_ptr()
            }
        }
    }

    /// What memory works ahead on while a tile of `panels` computes.
    #[inline(always)]
    fn ahead<const P: usize>(&self, p: usize, panels: [*const u32; P], turn: Turn) -> Ahead<P> {
        let next = |i: usize| {
            let next = p + P + i;
            (next < self.panels.end).then(|| self.gemm.weight.panel(self.places.at(next)))
        };
        Ahead::of(panels, self.gemm.weight.quads(), turn, next)
    }

    /// Where sums go to.
    #[inline(always)]
    fn scaled(&self) -> Scaled<'_, T> {
        Scaled { weight: self.gemm.weight, places: self.places, to: self.to }
    }
}

/// Scales sums by those of the weights.
#[derive(Clone, Copy)]
struct Scaled<'a, T> {
    weight: &'a Quantized,
    places: Places,
    to: T,
}

impl<T: Sink> Sink for Scaled<'_, T> {
    #[inline(always)]
    unsafe fn take<D: PairDot, const P: usize>(&self, m: usize, p: usize, sums: [D::V; P]) {
        let mut scaled = sums;
        // SAFETY: a panel's scales are one vector; the rest is the caller's.
        unsafe {
            for i in 0..P {
                let scales = self.weight.scales(self.places.at(p + i));
                scaled[i] = D::mul(sums[i], D::load_sums(scales.as_ptr()));
            }
            self.to.take::<D, P>(m, p, scaled);
        }
    }
}

/// A panel of int4 as one of int8.
#[inline(always)]
unsafe fn expand<D: ByteDot>(panel: &[u32], steps_at: usize, to: &mut [u32]) {
    let (codes, steps) = panel.split_at(steps_at);
    let groups =
        codes.as_chunks::<{ INT4_VECTORS * PANEL }>().0.iter().zip(steps.as_chunks::<{ PANEL / 4 }>().0);
    for ((codes, steps), to) in groups.zip(to.as_chunks_mut::<{ INT4_QUADS * PANEL }>().0) {
        // SAFETY: all chunks hold whole vectors; the rest is the caller's.
        unsafe {
            let [step, zero] = D::steps_and_zeros(steps.as_ptr().cast());
            let expander = D::expander(step, zero);
            for v in 0..INT4_VECTORS {
                let [low, high] = D::nibbles(D::load(codes.as_ptr().add(v * PANEL)));
                D::store_words(to.as_mut_ptr().add(v * PANEL), D::expand(low, expander));
                let high = D::expand(high, expander);
                D::store_words(to.as_mut_ptr().add((v + INT4_VECTORS) * PANEL), high);
            }
        }
    }
}

impl<T: Sink> Tiled for Piece<'_, T> {
    /// Sums of integers lie beside those of floats.
    const SHARE: (usize, usize) = (2, 3);

    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, m: usize, p: usize, turn: Turn) {
        let quads = self.gemm.weight.quads();
        // SAFETY: panels hold `quads` vectors each, rows as many quads; prefetches may leave them.
        unsafe {
            let x = self.gemm.x.rows(m, M, quads);
            // Not by `from_fn`: a closure that is not inlined would be compiled without the instruction set.
            let mut panels = [std::ptr::null(); P];
            for i in 0..P {
                panels[i] = self.bytes::<D>(p, i, turn);
            }
            let ahead = self.ahead(p, panels, turn);
            let mut sums = [[D::zero(); P]; M];
            for (g, first) in (0..quads).step_by(ACT_QUADS).enumerate() {
                let mut dots = [[D::splat_int(0); P]; M];
                for r in 0..M {
                    dots[r] = [D::splat_int(*x.offsets.add(r * x.groups + g)); P];
                }
                for k in first..(first + ACT_QUADS).min(quads) {
                    let mut weights = [D::load(panels[0]); P];
                    for i in 0..P {
                        weights[i] = D::load(panels[i].add(k * PANEL));
                        ahead.fetch::<D>(i, k);
                    }
                    for r in 0..M {
                        for i in 0..P {
                            dots[r][i] = D::dot_bytes(dots[r][i], weights[i], x.quads.add(r * x.stride + k));
                        }
                    }
                }
                for r in 0..M {
                    let scale = D::splat(*x.scales.add(r * x.groups + g));
                    for i in 0..P {
                        sums[r][i] = D::fma(scale, D::to_float(dots[r][i]), sums[r][i]);
                    }
                }
            }
            give::<D, M, P>(&self.scaled(), m, p, sums);
        }
    }
}

/// The product with int4 as it is, for up to [`FEW`] tokens.
struct Nibbles<'a, 'b, T>(&'b Piece<'a, T>);

impl<T: Sink> Tiled for Nibbles<'_, '_, T> {
    /// So do those of one group.
    const SHARE: (usize, usize) = (1, 3);

    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, m: usize, p: usize, turn: Turn) {
        let weight = self.0.gemm.weight;
        let (quads, steps_at) = (weight.quads(), weight.steps_at());
        // SAFETY: panels hold `steps_at` words of codes and then the steps, rows `quads` quads; prefetches may leave them.
        unsafe {
            let x = self.0.gemm.x.rows(m, M, quads);
            let panels: [*const u32; P] =
                std::array::from_fn(|i| weight.panel(self.0.places.at(p + i)).as_ptr());
            let ahead = self.0.ahead(p, panels, turn);
            let mut sums = [[D::zero(); P]; M];
            for (g, first) in (0..quads).step_by(ACT_QUADS).enumerate() {
                let mut totals = [[D::splat_int(0); P]; M];
                for small in first / INT4_QUADS..(first + ACT_QUADS).min(quads) / INT4_QUADS {
                    add_group::<D, M, P>(&mut totals, panels, ahead, steps_at, small, x);
                }
                for r in 0..M {
                    let scale = D::splat(*x.scales.add(r * x.groups + g));
                    for i in 0..P {
                        sums[r][i] = D::fma(scale, D::to_float(totals[r][i]), sums[r][i]);
                    }
                }
            }
            // A tile is too short for a call of its own (15 % at 4 tokens).
            let to = self.0.scaled();
            for r in 0..M {
                to.take::<D, P>(m + r, p, sums[r]);
            }
        }
    }
}

/// Adds `step * Σ (code - zero) * x` over one group of inputs.
#[inline(always)]
unsafe fn add_group<D: ByteDot, const M: usize, const P: usize>(
    totals: &mut [[D::W; P]; M],
    panels: [*const u32; P],
    ahead: Ahead<P>,
    steps_at: usize,
    group: usize,
    x: ByteRows,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut dots = [[D::splat_int(0); P]; M];
        for v in 0..INT4_VECTORS {
            let at = (group * INT4_VECTORS + v) * PANEL;
            let quads = x.quads.add(group * INT4_QUADS + v);
            for i in 0..P {
                let [low, high] = D::nibbles(D::load(panels[i].add(at)));
                ahead.fetch::<D>(i, group * INT4_VECTORS + v);
                for r in 0..M {
                    let quads = quads.add(r * x.stride);
                    dots[r][i] = D::dot_bytes(dots[r][i], low, quads);
                    dots[r][i] = D::dot_bytes(dots[r][i], high, quads.add(INT4_VECTORS));
                }
            }
        }
        for i in 0..P {
            let steps = panels[i].add(steps_at + group * (PANEL / 4));
            let [step, zero] = D::steps_and_zeros(steps.cast());
            for r in 0..M {
                let offset = D::mul_int(zero, D::splat_int(*x.sums.add(r * x.small_groups + group)));
                let dot = D::mul_int(step, D::sub_int(dots[r][i], offset));
                totals[r][i] = D::add_int(totals[r][i], dot);
            }
        }
    }
}
