//! The online softmax: what is known of some rows, and how a tile of scores changes it.

use std::ops::Range;

use super::{PANELS, TILE};
use crate::simd::pairs::{PANEL, PairDot, exp2};

/// What the softmax knows of some rows: for each row its largest score (in whole vectors), the sum of its weights in
/// [`PANEL`] lanes, and its weighted values.
pub(super) struct State<'a> {
    pub max: &'a mut [f32],
    pub sum: &'a mut [[f32; PANEL]],
    pub out: &'a mut [f32],
}

impl<'a> State<'a> {
    pub const fn len(rows: usize, columns: usize) -> usize {
        rows.next_multiple_of(PANEL) + rows * (PANEL + columns)
    }

    /// Divides memory of [`State::len`].
    pub fn of(memory: &'a mut [f32], rows: usize, columns: usize) -> Self {
        let (max, rest) = memory[..Self::len(rows, columns)].split_at_mut(rows.next_multiple_of(PANEL));
        let (sum, out) = rest.split_at_mut(rows * PANEL);
        Self { max, sum: sum.as_chunks_mut().0, out }
    }

    /// Nothing seen.
    pub fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill([0.0; PANEL]);
        self.out.fill(0.0);
    }

    /// Row `r` of `out`.
    pub fn row(&mut self, r: usize) -> &mut [f32] {
        let columns = self.out.len() / self.sum.len();
        &mut self.out[r * columns..(r + 1) * columns]
    }

    /// Makes row `r`'s weights relative to a new maximum.
    #[inline(always)]
    unsafe fn rebase<D: PairDot>(&mut self, r: usize, max: f32) {
        if max == self.max[r] {
            return; // all factors would be 1
        }
        // SAFETY: a row has whole panels; the rest is the caller's.
        unsafe {
            let shrink = exp2::<D>(D::splat(self.max[r] - max));
            self.max[r] = max;
            let sum = self.sum[r].as_mut_ptr();
            D::store(sum, D::mul(D::load_sums(sum), shrink));
            for panel in self.row(r).as_chunks_mut::<PANEL>().0 {
                D::store(panel.as_mut_ptr(), D::mul(D::load_sums(panel.as_ptr()), shrink));
            }
        }
    }

    /// Adds the next part.
    #[inline(always)]
    pub unsafe fn fold<D: PairDot>(&mut self, part: &mut State<'_>) {
        for r in 0..self.sum.len() {
            let max = self.max[r].max(part.max[r]);
            // SAFETY: the caller's.
            unsafe {
                self.rebase::<D>(r, max);
                part.rebase::<D>(r, max);
            }
            self.sum[r].iter_mut().zip(&part.sum[r]).for_each(|(sum, part)| *sum += part);
            self.row(r).iter_mut().zip(part.row(r)).for_each(|(out, part)| *out += *part);
        }
    }
}

/// By a fixed tree.
pub(super) fn sum_lanes(lanes: [f32; PANEL]) -> f32 {
    let by8: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let by4: [f32; 4] = std::array::from_fn(|i| by8[i] + by8[i + 4]);
    (by4[0] + by4[2]) + (by4[1] + by4[3])
}

/// How dot products become exponents of 2.
#[derive(Clone, Copy)]
pub(super) struct ScoreRule {
    /// Of what [`ScoreRule::cap`] leaves.
    pub factor: f32,
    soft_cap: Option<SoftCap>,
}

/// See [`quire_backend::Attention::soft_cap`].
#[derive(Clone, Copy)]
struct SoftCap {
    cap: f32,
    /// Turns a dot product into the exponent of 2 that is e^(2 score / cap).
    factor: f32,
}

impl ScoreRule {
    pub fn new(scale: f32, soft_cap: Option<f32>) -> Self {
        let scale = scale * std::f32::consts::LOG2_E;
        match soft_cap {
            None => Self { factor: scale, soft_cap: None },
            Some(cap) => Self {
                factor: std::f32::consts::LOG2_E,
                soft_cap: Some(SoftCap { cap, factor: 2.0 * scale / cap }),
            },
        }
    }

    /// Whether [`ScoreRule::cap`] does anything.
    pub const fn has_cap(&self) -> bool {
        self.soft_cap.is_some()
    }

    /// Puts `cap * tanh(score / cap)` in place of the dot products of one KV head, by tanh x = 1 - 2 / (e^2x + 1), if there
    /// is a cap. The keys' scales are in it then.
    ///
    /// # Safety
    /// As for [`PairDot`].
    #[inline(always)]
    pub unsafe fn cap<D: PairDot>(
        &self,
        dots: &mut [f32],
        key_scales: Option<&[f32]>,
        rows: Range<usize>,
        panels: Range<usize>,
    ) {
        let Some(SoftCap { cap, factor }) = self.soft_cap else { return };
        let dots = dots.as_chunks_mut::<PANEL>().0.as_chunks_mut::<PANELS>().0;
        // SAFETY: every chunk holds a panel; the rest is the caller's.
        unsafe {
            let one = D::splat(1.0);
            for row in &mut dots[rows] {
                for i in panels.clone() {
                    let mut x = D::mul(D::load_sums(row[i].as_ptr()), D::splat(factor));
                    if let Some(scales) = key_scales {
                        x = D::mul(x, D::load_sums(scales[i * PANEL..][..PANEL].as_ptr()));
                    }
                    // Within the range of `exp2`, and far beyond where the quotient is 0.
                    let power = exp2::<D>(D::min(D::splat(126.0), x));
                    let quotient = D::div(one, D::add(power, one));
                    let score = D::fma(D::splat(-2.0 * cap), quotient, D::splat(cap));
                    D::store(row[i].as_mut_ptr(), score);
                }
            }
        }
    }
}

/// Scales of a KV head: those of a tile's keys, then those of its values.
pub(super) const SCALES: usize = 2 * TILE;

/// Turns the scores of some rows into weights.
pub(super) struct Softmax<'a> {
    /// Of a score, in the exponent of 2.
    pub factor: f32,
    /// Of each KV head's keys, [`SCALES`] apart, if they have any and they are still to be applied.
    pub key_scales: Option<&'a [f32]>,
    /// Of its values.
    pub value_scales: Option<&'a [f32]>,
    /// Rows of a KV head.
    pub head_rows: usize,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
}

impl Softmax<'_> {
    /// In three passes, none of which branches on a number: the highest score of each row; then, for [`PANEL`] rows at
    /// once, the new maximum and in place of the tile's what it shrinks earlier weights by; then the weights and their
    /// sums. Weighted values are yet to be shrunk.
    ///
    /// # Safety
    /// As for [`PairDot`].
    #[inline(always)]
    pub unsafe fn run<D: PairDot>(
        &self,
        scores: &[f32],
        highest: &mut [f32],
        weights: &mut [u32],
        state: &mut State<'_>,
    ) {
        let scores = scores.as_chunks::<PANEL>().0.as_chunks::<PANELS>().0;
        let weights = weights.as_chunks_mut::<PANEL>().0.as_chunks_mut::<{ PANELS / 2 }>().0;
        let (rows, vectors) = (self.rows.clone(), self.rows.start / PANEL..self.rows.end.div_ceil(PANEL));
        // A row that sees nothing here keeps its maximum.
        highest[vectors.start * PANEL..vectors.end * PANEL].fill(f32::NEG_INFINITY);
        // SAFETY: every chunk holds a panel; the rest is the caller's.
        unsafe {
            for r in rows.clone() {
                let mut most = D::splat(f32::NEG_INFINITY);
                for x in &self.scaled::<D>(&scores[r], self.of_head(self.key_scales, r)) {
                    most = D::max(*x, most);
                }
                highest[r] = D::highest(most);
            }
            let maxima = &mut state.max.as_chunks_mut::<PANEL>().0[vectors.clone()];
            let tile_maxima = &mut highest.as_chunks_mut::<PANEL>().0[vectors];
            for (max, highest) in maxima.iter_mut().zip(tile_maxima) {
                let before = D::load_sums(max.as_ptr());
                let now = D::max(D::load_sums(highest.as_ptr()), before);
                D::store(highest.as_mut_ptr(), exp2::<D>(D::sub(before, now)));
                D::store(max.as_mut_ptr(), now);
            }
            let known = rows.clone().zip(&state.max[rows.clone()]).zip(&mut state.sum[rows.clone()]);
            for ((r, max), sum) in known {
                let [key_scales, value_scales] =
                    [self.of_head(self.key_scales, r), self.of_head(self.value_scales, r)];
                let (mut x, max) = (self.scaled::<D>(&scores[r], key_scales), D::splat(*max));
                let mut total = D::mul(D::load_sums(sum.as_ptr()), D::splat(highest[r]));
                for i in 0..PANELS {
                    x[i] = exp2::<D>(D::sub(x[i], max));
                    total = D::add(total, x[i]);
                    if let Some(scales) = value_scales {
                        x[i] = D::mul(x[i], D::load_sums(scales[i * PANEL..][..PANEL].as_ptr()));
                    }
                }
                D::store(sum.as_mut_ptr(), total);
                for (i, pairs) in weights[r].iter_mut().enumerate() {
                    D::store_pairs(pairs.as_mut_ptr(), x[2 * i], x[2 * i + 1]);
                }
            }
        }
    }

    /// Those of row `r`'s KV head.
    #[inline(always)]
    fn of_head<'b>(&self, scales: Option<&'b [f32]>, r: usize) -> Option<&'b [f32]> {
        scales.map(|scales| &scales[r / self.head_rows * SCALES..][..TILE])
    }

    /// A row's scores as exponents of 2; in panels that nobody sees, of nothing.
    #[inline(always)]
    unsafe fn scaled<D: PairDot>(
        &self,
        scores: &[[f32; PANEL]; PANELS],
        scales: Option<&[f32]>,
    ) -> [D::V; PANELS] {
        // SAFETY: every chunk holds a panel; the rest is the caller's.
        unsafe {
            let mut x = [D::splat(f32::NEG_INFINITY); PANELS];
            for i in self.panels.clone() {
                x[i] = D::mul(D::load_sums(scores[i].as_ptr()), D::splat(self.factor));
                if let Some(scales) = scales {
                    x[i] = D::mul(x[i], D::load_sums(scales[i * PANEL..][..PANEL].as_ptr()));
                }
            }
            x
        }
    }
}
