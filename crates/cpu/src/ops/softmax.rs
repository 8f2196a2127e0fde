//! The online softmax of [`super::paged`]: what is known of some rows, and how a tile of scores changes it.

use std::ops::Range;

use super::paged::{PANELS, TILE};
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

/// Turns the scores of some rows into weights.
pub(super) struct Softmax<'a> {
    /// Of a score, in the exponent of 2.
    pub factor: f32,
    /// Of each KV head, of the tile's keys, then of its values, if they have any.
    pub scales: Option<&'a [f32]>,
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
                for x in &self.scaled::<D>(&scores[r], self.scales_of(r)) {
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
                let scales = self.scales_of(r);
                let (mut x, max) = (self.scaled::<D>(&scores[r], scales), D::splat(*max));
                let mut total = D::mul(D::load_sums(sum.as_ptr()), D::splat(highest[r]));
                for i in 0..PANELS {
                    x[i] = exp2::<D>(D::sub(x[i], max));
                    total = D::add(total, x[i]);
                    if let Some(scales) = scales {
                        x[i] = D::mul(x[i], D::load_sums(scales[TILE + i * PANEL..][..PANEL].as_ptr()));
                    }
                }
                D::store(sum.as_mut_ptr(), total);
                for (i, pairs) in weights[r].iter_mut().enumerate() {
                    D::store_pairs(pairs.as_mut_ptr(), x[2 * i], x[2 * i + 1]);
                }
            }
        }
    }

    /// Of row `r`'s KV head.
    #[inline(always)]
    fn scales_of(&self, r: usize) -> Option<&[f32]> {
        self.scales.map(|scales| &scales[r / self.head_rows * 2 * TILE..][..2 * TILE])
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
