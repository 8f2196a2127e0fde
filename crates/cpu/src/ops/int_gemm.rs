//! Products of quantized activations with quantized weights: the counterpart of `gemm.rs` for bytes.
//!
//! Sums of integers are exact, so they may be taken in any order; the floats that carry them from one group of inputs to
//! the next follow the order of [`quire_backend::quant`]. For a few tokens int4 is multiplied as it is and each group's
//! sum then scaled; for more of them a panel is expanded to bytes once and multiplied like int8.

use std::ops::Range;

use quire_core::ExecError;

use super::gemm::Places;
use super::sink::{Sink, give};
use super::tiles::{Ahead, Cut, MEMORY_BOUND, NARROW, STREAM_AHEAD, Tiled, Turn, each_panel, group_rows};
use crate::buffer::Shared;
use crate::pool::Pool;
use crate::quantized::{ACT_QUADS, ByteRows, Bytes, Codes, INT4_QUADS, INT4_VECTORS, Quantized};
use crate::simd::Isa;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairDot, PairKernel, dispatch_bytes};

/// Up to so many rows the sums of nibbles are too few to hide the latency of a dot product.
const FEW: usize = 4;

/// Quads that are multiplied at once.
const STEP: usize = 4;

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
        to: Sink<'_>,
    ) -> Result<(), ExecError> {
        self.reserve(scratch, self.tokens);
        let scratch = Shared::new(scratch);
        let cut = Cut { tokens: self.tokens, group: self.group(), panels };
        let work = NARROW * PANEL * self.weight.quads();
        pool.split_guided(cut.units(), cut.grain(work, pool.num_threads()), |worker, units| {
            cut.each(units, |rows, panels| {
                // SAFETY: `isa` was detected; each piece has rows and panels, that is columns of the output, of its own,
                // and each thread its scratch.
                unsafe { self.piece(isa, &mut scratch.slice(worker, 1)[0], rows, panels, places, to) }
            });
        })
    }

    fn group(&self) -> usize {
        group_rows(self.weight.quads())
    }

    /// Makes the room that [`Self::piece`] needs for up to `rows` rows.
    pub(crate) fn reserve(&self, scratch: &mut [Panels], rows: usize) {
        if self.weight.codes() == Codes::Int4 && rows > MEMORY_BOUND {
            let len = NARROW * self.weight.quads() * PANEL;
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
        to: Sink<'_>,
    ) {
        let expanded = Shared::new(expanded);
        // SAFETY: the caller's.
        unsafe { dispatch_bytes(isa, Piece { gemm: self, rows, panels, places, to, expanded }) };
    }
}

/// Some panels for some rows.
struct Piece<'a> {
    gemm: IntGemm<'a>,
    rows: Range<usize>,
    panels: Range<usize>,
    places: Places,
    to: Sink<'a>,
    /// Where int4 panels are expanded to.
    expanded: Shared<'a, u32>,
}

impl PairKernel for Piece<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let (weight, group) = (self.gemm.weight, self.gemm.group());
        for first in self.rows.clone().step_by(group) {
            let rows = first..(first + group).min(self.rows.end);
            // SAFETY: the caller's.
            unsafe {
                if weight.codes() == Codes::Int4 && self.rows.len() <= MEMORY_BOUND {
                    each_panel::<D, _>(&Nibbles(&self), rows, self.panels.clone());
                } else {
                    each_panel::<D, _>(&self, rows, self.panels.clone());
                }
            }
        }
    }
}

impl Piece<'_> {
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

    /// Sums of panels `p..p + P` in the unit of their channels.
    #[inline(always)]
    unsafe fn scale<D: PairDot, const M: usize, const P: usize>(&self, p: usize, sums: &mut [[D::V; P]; M]) {
        for i in 0..P {
            let scales = self.gemm.weight.scales(self.places.at(p + i));
            // SAFETY: a panel's scales are one vector; the rest is the caller's.
            unsafe {
                let scales = D::load_sums(scales.as_ptr());
                for r in 0..M {
                    sums[r][i] = D::mul(sums[r][i], scales);
                }
            }
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

impl Tiled for Piece<'_> {
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
            let mut sums = [[D::zero(); P]; M];
            if turn.is_memory_bound(M) {
                for i in 0..P {
                    let column = column::<D, M>(panels[i], quads, x);
                    for r in 0..M {
                        sums[r][i] = column[r];
                    }
                }
                self.scale::<D, M, P>(p, &mut sums);
                return give::<D, M, P>(&self.to, m, p, sums);
            }
            let ahead = self.ahead(p, panels, turn);
            for (g, first) in (0..quads).step_by(ACT_QUADS).enumerate() {
                let mut dots = [[D::splat_int(0); P]; M];
                for r in 0..M {
                    dots[r] = [D::splat_int(*x.offsets.add(r * x.groups + g)); P];
                }
                let (mut k, end) = (first, (first + ACT_QUADS).min(quads));
                while k + STEP <= end {
                    step::<D, M, P, STEP>(&mut dots, panels, x, k, ahead);
                    k += STEP;
                }
                while k < end {
                    step::<D, M, P, 1>(&mut dots, panels, x, k, ahead);
                    k += 1;
                }
                for r in 0..M {
                    let scale = D::splat(*x.scales.add(r * x.groups + g));
                    for i in 0..P {
                        sums[r][i] = D::fma(scale, D::to_float(dots[r][i]), sums[r][i]);
                    }
                }
            }
            self.scale::<D, M, P>(p, &mut sums);
            give::<D, M, P>(&self.to, m, p, sums);
        }
    }
}

/// Adds the products of quads `k..k + N`. Several at once, as where eight rows lie is then found once for all of them:
/// that takes 7 additions, most of which wait for the one before, beside 16 products.
///
/// # Safety
/// The panels hold these quads, and so does each row of `x`.
#[inline(always)]
unsafe fn step<D: ByteDot, const M: usize, const P: usize, const N: usize>(
    dots: &mut [[D::W; P]; M],
    panels: [*const u32; P],
    x: ByteRows,
    k: usize,
    ahead: Ahead<P>,
) {
    // SAFETY: the caller's; a prefetch may touch any address.
    unsafe {
        for k in k..k + N {
            let mut weights = [D::load(panels[0]); P];
            for i in 0..P {
                weights[i] = D::load(panels[i].add(k * PANEL));
            }
            for r in 0..M {
                for i in 0..P {
                    dots[r][i] = D::dot_bytes(dots[r][i], weights[i], x.quads.add(r * x.stride + k));
                }
            }
            for i in 0..P {
                ahead.fetch::<D>(i, k);
            }
        }
    }
}

/// The sums of one panel of int8.
///
/// # Safety
/// The panel holds `quads` vectors, each row of `x` as many quads.
#[inline(always)]
unsafe fn column<D: ByteDot, const M: usize>(panel: *const u32, quads: usize, x: ByteRows) -> [D::V; M] {
    // SAFETY: the caller's; a prefetch may touch any address.
    unsafe {
        let mut sums = [D::zero(); M];
        for (g, first) in (0..quads).step_by(ACT_QUADS).enumerate() {
            let mut dots = [D::splat_int(0); M];
            for r in 0..M {
                dots[r] = D::splat_int(*x.offsets.add(r * x.groups + g));
            }
            for k in first..(first + ACT_QUADS).min(quads) {
                let weights = D::load(panel.add(k * PANEL));
                D::prefetch(panel.wrapping_add(k * PANEL + STREAM_AHEAD));
                for r in 0..M {
                    dots[r] = D::dot_bytes(dots[r], weights, x.quads.add(r * x.stride + k));
                }
            }
            for r in 0..M {
                let scale = D::splat(*x.scales.add(r * x.groups + g));
                sums[r] = D::fma(scale, D::to_float(dots[r]), sums[r]);
            }
        }
        sums
    }
}

/// The product with int4 as it is, for so few tokens that memory is the limit.
struct Nibbles<'a>(&'a Piece<'a>);

impl Tiled for Nibbles<'_> {
    /// Of one panel at a time, beside sums of integers and those of one group.
    const SHARE: (usize, usize) = (2, 3);

    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, m: usize, p: usize, _: Turn) {
        let (weight, places) = (self.0.gemm.weight, self.0.places);
        let quads = weight.quads();
        // SAFETY: rows hold `quads` quads; the rest is the caller's.
        unsafe {
            let x = self.0.gemm.x.rows(m, M, quads);
            let mut sums = [[D::zero(); P]; M];
            for i in 0..P {
                let next = (p + i + 1).min(self.0.panels.end - 1);
                let next_steps = weight.panel(places.at(next)).as_ptr().add(weight.steps_at());
                let panel = NibblePanel { codes: weight.panel(places.at(p + i)).as_ptr(), next_steps };
                let column = panel.column::<D, M>(quads, weight.steps_at(), x);
                for r in 0..M {
                    sums[r][i] = column[r];
                }
            }
            // A tile is too short for a call of its own (15 % at 4 tokens).
            self.0.scale::<D, M, P>(p, &mut sums);
            for r in 0..M {
                self.0.to.take::<D, P>(m + r, p, sums[r]);
            }
        }
    }
}

/// A panel of int4.
#[derive(Clone, Copy)]
struct NibblePanel {
    /// Codes, and behind them one vector of bytes for each group: steps and zeros.
    codes: *const u32,
    /// Those of the next panel, which lie ahead of where memory is read: they are asked for now.
    next_steps: *const u32,
}

impl NibblePanel {
    /// Its sums.
    ///
    /// # Safety
    /// Codes and steps are those of `quads` quads, `steps_at` words apart; rows of `x` hold as many.
    #[inline(always)]
    unsafe fn column<D: ByteDot, const M: usize>(
        self,
        quads: usize,
        steps_at: usize,
        x: ByteRows,
    ) -> [D::V; M] {
        // SAFETY: the caller's; a prefetch may touch any address.
        unsafe {
            let mut sums = [D::zero(); M];
            for (g, first) in (0..quads).step_by(ACT_QUADS).enumerate() {
                let mut totals = [D::splat_int(0); M];
                for group in first / INT4_QUADS..(first + ACT_QUADS).min(quads) / INT4_QUADS {
                    D::prefetch(self.next_steps.wrapping_add(group * (PANEL / 4)));
                    self.add_group::<D, M>(&mut totals, steps_at, group, x);
                }
                for r in 0..M {
                    let scale = D::splat(*x.scales.add(r * x.groups + g));
                    sums[r] = D::fma(scale, D::to_float(totals[r]), sums[r]);
                }
            }
            sums
        }
    }

    /// Adds `step * Σ (code - zero) * x` over one group of inputs. For a few rows low and high nibbles have sums of their
    /// own, as one after the other would wait for the latency of the dot product.
    #[inline(always)]
    unsafe fn add_group<D: ByteDot, const M: usize>(
        self,
        totals: &mut [D::W; M],
        steps_at: usize,
        group: usize,
        x: ByteRows,
    ) {
        // SAFETY: the caller's; a prefetch may touch any address.
        unsafe {
            let mut lows = [D::splat_int(0); M];
            let mut highs = lows;
            self.fetch_ahead::<D>(group);
            for v in 0..INT4_VECTORS {
                let [low, high] = D::nibbles(D::load(self.codes.add((group * INT4_VECTORS + v) * PANEL)));
                for r in 0..M {
                    let quads = x.quads.add(group * INT4_QUADS + v + r * x.stride);
                    lows[r] = D::dot_bytes(lows[r], low, quads);
                    let highs = if M <= FEW { &mut highs } else { &mut lows };
                    highs[r] = D::dot_bytes(highs[r], high, quads.add(INT4_VECTORS));
                }
            }
            let [step, zero] = D::steps_and_zeros(self.codes.add(steps_at + group * (PANEL / 4)).cast());
            for r in 0..M {
                let dot = if M <= FEW { D::add_int(lows[r], highs[r]) } else { lows[r] };
                let offset = D::mul_int(zero, D::splat_int(*x.sums.add(r * x.small_groups + group)));
                totals[r] = D::add_int(totals[r], D::mul_int(step, D::sub_int(dot, offset)));
            }
        }
    }

    /// Asks for what comes [`STREAM_AHEAD`] later: of every group its codes and its share of the steps behind them.
    #[inline(always)]
    unsafe fn fetch_ahead<D: ByteDot>(self, group: usize) {
        let ahead = self.codes.wrapping_add(STREAM_AHEAD + group * (INT4_VECTORS * PANEL + PANEL / 4));
        for line in 0..=INT4_VECTORS {
            // SAFETY: a prefetch may touch any address.
            unsafe { D::prefetch(ahead.wrapping_add(line * PANEL)) };
        }
    }
}
