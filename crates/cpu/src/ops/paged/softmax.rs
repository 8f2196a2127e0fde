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

    /// Makes the scales of a KV head's keys what their scores are multiplied by.
    ///
    /// # Safety
    /// As for [`PairDot`].
    #[inline(always)]
    pub unsafe fn weigh<D: PairDot>(&self, key_scales: &mut [f32]) {
        for scales in key_scales.as_chunks_mut::<PANEL>().0 {
            // SAFETY: every chunk holds a panel; the rest is the caller's.
            unsafe {
                let factor = D::splat(self.factor);
                // A cap has them in already.
                let scales_in = self.soft_cap.is_some();
                let x = if scales_in { factor } else { D::mul(D::load_sums(scales.as_ptr()), factor) };
                D::store(scales.as_mut_ptr(), x);
            }
        }
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
    /// Of each KV head, [`SCALES`] apart, if they have any; those of keys are factors already ([`ScoreRule::weigh`]).
    pub scales: Option<&'a [f32]>,
    /// Rows of a KV head.
    pub head_rows: usize,
    pub rows: Range<usize>,
    /// In twos: weights are stored as pairs of keys.
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
        let vectors = self.rows.start / PANEL..self.rows.end.div_ceil(PANEL);
        // A row that sees nothing here keeps its maximum.
        highest[vectors.start * PANEL..vectors.end * PANEL].fill(f32::NEG_INFINITY);
        // SAFETY: every chunk holds a panel; the rest is the caller's.
        unsafe {
            match self.scales {
                Some(scales) => self.find_highest::<D, true>(scores, scales, highest),
                None => self.find_highest::<D, false>(scores, &[], highest),
            }
            let maxima = &mut state.max.as_chunks_mut::<PANEL>().0[vectors.clone()];
            let tile_maxima = &mut highest.as_chunks_mut::<PANEL>().0[vectors];
            for (max, highest) in maxima.iter_mut().zip(tile_maxima) {
                let before = D::load_sums(max.as_ptr());
                let now = D::max(D::load_sums(highest.as_ptr()), before);
                D::store(highest.as_mut_ptr(), exp2::<D>(D::sub(before, now)));
                D::store(max.as_mut_ptr(), now);
            }
            match self.scales {
                Some(scales) => self.weigh::<D, true>(scores, scales, highest, weights, state),
                None => self.weigh::<D, false>(scores, &[], highest, weights, state),
            }
        }
    }

    /// The first pass.
    #[inline(always)]
    unsafe fn find_highest<D: PairDot, const SCALED: bool>(
        &self,
        scores: &[f32],
        scales: &[f32],
        highest: &mut [f32],
    ) {
        let scores = scores.as_chunks::<TILE>().0;
        let known = scores[self.rows.clone()].iter().zip(&mut highest[self.rows.clone()]);
        for (r, (scores, highest)) in self.rows.clone().zip(known) {
            let (scores, scales) = (self.of_panels(scores), self.of_head::<SCALED>(scales, r));
            // SAFETY: every chunk holds a panel; the rest is the caller's.
            unsafe {
                let mut most = D::splat(f32::NEG_INFINITY);
                for (i, score) in scores.iter().enumerate() {
                    let score = D::load_sums(score.as_ptr());
                    let x = if SCALED { D::mul(score, D::load_sums(scales[0][i].as_ptr())) } else { score };
                    most = D::max(x, most);
                }
                // Factors are positive: the largest product is that of the largest score.
                *highest = if SCALED { D::highest(most) } else { D::highest(most) * self.factor };
            }
        }
    }

    /// The third.
    #[inline(always)]
    unsafe fn weigh<D: PairDot, const SCALED: bool>(
        &self,
        scores: &[f32],
        scales: &[f32],
        shrink: &[f32],
        weights: &mut [u32],
        state: &mut State<'_>,
    ) {
        let rows = self.rows.clone();
        let scores = scores.as_chunks::<TILE>().0[rows.clone()].iter();
        let weights = weights.as_chunks_mut::<{ TILE / 2 }>().0[rows.clone()].iter_mut();
        let known =
            state.max[rows.clone()].iter().zip(&mut state.sum[rows.clone()]).zip(&shrink[rows.clone()]);
        for (r, ((scores, weights), ((max, sum), shrink))) in rows.zip(scores.zip(weights).zip(known)) {
            let (scores, scales) = (self.of_panels(scores), self.of_head::<SCALED>(scales, r));
            let weights = &mut weights.as_chunks_mut::<PANEL>().0[self.panels.start / 2..];
            // SAFETY: every chunk holds a panel; the rest is the caller's.
            unsafe {
                let (factor, less) = (D::splat(self.factor), D::splat(-*max));
                let mut total = D::mul(D::load_sums(sum.as_ptr()), D::splat(*shrink));
                for (pair, (scores, to)) in scores.as_chunks::<2>().0.iter().zip(weights).enumerate() {
                    let mut x = [less; 2];
                    for i in 0..2 {
                        let at = 2 * pair + i;
                        let factor = if SCALED { D::load_sums(scales[0][at].as_ptr()) } else { factor };
                        x[i] = exp2::<D>(D::fma(D::load_sums(scores[i].as_ptr()), factor, less));
                        total = D::add(total, x[i]);
                        if SCALED {
                            x[i] = D::mul(x[i], D::load_sums(scales[1][at].as_ptr()));
                        }
                    }
                    D::store_pairs(to.as_mut_ptr(), x[0], x[1]);
                }
                D::store(sum.as_mut_ptr(), total);
            }
        }
    }

    /// A row's scores.
    #[inline(always)]
    fn of_panels<'b>(&self, row: &'b [f32; TILE]) -> &'b [[f32; PANEL]] {
        &row.as_chunks().0[self.panels.clone()]
    }

    /// Those of row `r`'s KV head, of keys and of values, if there are any.
    #[inline(always)]
    fn of_head<'b, const SCALED: bool>(&self, scales: &'b [f32], r: usize) -> [&'b [[f32; PANEL]]; 2] {
        if !SCALED {
            return [&[]; 2];
        }
        let (keys, values) = scales[r / self.head_rows * SCALES..][..SCALES].split_at(TILE);
        [keys, values].map(|scales| &scales.as_chunks().0[self.panels.clone()])
    }
}
