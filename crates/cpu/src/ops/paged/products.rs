//! The two products of a tile.

use std::marker::PhantomData;
use std::ops::Range;

use super::tile::Form;
use super::{PANEL_PAIRS, PANELS, TILE};
use crate::buffer::Shared;
use crate::ops::tiles::{Tiled, Turn};
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::PANEL;
use crate::simd::rows::Rows;

/// Bytes that come from memory together.
const LINE: usize = 64;

/// `scores = q · keysᵀ`: rows by panels of keys.
pub(super) struct Scores<'a, F> {
    pub q: &'a [u32],
    pub pairs: usize,
    pub keys: [*const u8; PANELS],
    /// What memory works on meanwhile, as much for each panel.
    pub next: [*const u8; PANELS],
    pub out: Shared<'a, f32>,
    pub form: PhantomData<F>,
}

impl<F: Form> Tiled for Scores<'_, F> {
    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, panel: usize, _: Turn) {
        let q = &self.q[row * self.pairs..(row + M) * self.pairs];
        // SAFETY: `q` holds M rows; each panel holds `pairs` vectors, and so do its values or more of them.
        unsafe {
            let rows: [*const u32; M] = std::array::from_fn(|r| q.as_ptr().add(r * self.pairs));
            let keys: [*const u8; P] = std::array::from_fn(|i| self.keys[panel + i]);
            let next: [*const u8; P] = std::array::from_fn(|i| self.next[panel + i]);
            let mut sums = [[D::zero(); P]; M];
            let (mut q, mut first) = (Rows::new(rows), 0);
            while first < self.pairs {
                let end = Rows::<M>::piece_end::<D>(first, self.pairs);
                q.prepare::<D>(first, end);
                for line in (first..end).step_by(LINE / F::SIZE) {
                    for i in 0..P {
                        D::prefetch(next[i].wrapping_add(line * F::SIZE).cast());
                    }
                    for k in line..(line + LINE / F::SIZE).min(end) {
                        let mut weights = [F::load::<D>(keys[0], 0); P];
                        for i in 0..P {
                            weights[i] = F::load::<D>(keys[i], k);
                        }
                        for r in 0..M {
                            for i in 0..P {
                                sums[r][i] = q.dot::<D>(sums[r][i], weights[i], r, first, k);
                            }
                        }
                    }
                }
                first = end;
            }
            for r in 0..M {
                let out = self.out.slice((row + r) * TILE + panel * PANEL, P * PANEL);
                for i in 0..P {
                    D::store(out[i * PANEL..].as_mut_ptr(), sums[r][i]);
                }
            }
        }
    }
}

/// [`Scores`] of one panel of keys of each head: rows of a head by heads. A sum is a chain of products of which each waits
/// for the one before, so several heads' chains run side by side.
pub(super) struct HeadScores<'a, F> {
    /// Of all heads.
    pub q: &'a [u32],
    pub pairs: usize,
    /// Rows from a head to the next one.
    pub head_rows: usize,
    /// The first head's, and the panel's number in the tile.
    pub keys: *const u8,
    pub panel: usize,
    /// What memory works on meanwhile.
    pub next: *const u8,
    /// Bytes from a head to the next one.
    pub stride: usize,
    pub out: Shared<'a, f32>,
    pub form: PhantomData<F>,
}

impl<F: Form> Tiled for HeadScores<'_, F> {
    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, head: usize, _: Turn) {
        let first = |i: usize| (head + i) * self.head_rows + row;
        let q = &self.q[..(first(P - 1) + M) * self.pairs];
        // SAFETY: `q` holds the rows of all heads; each panel holds `pairs` vectors, and its values or more of them follow.
        unsafe {
            let row = |i: usize, r: usize| q.as_ptr().wrapping_add((first(i) + r) * self.pairs);
            let mut q: [Rows<M>; P] = std::array::from_fn(|i| Rows::new(std::array::from_fn(|r| row(i, r))));
            let at = |of: *const u8, i: usize| of.wrapping_add((head + i) * self.stride);
            let keys: [*const u8; P] = std::array::from_fn(|i| at(self.keys, i));
            let next: [*const u8; P] = std::array::from_fn(|i| at(self.next, i));
            let mut sums = [[D::zero(); P]; M];
            let mut first_pair = 0;
            while first_pair < self.pairs {
                let end = Rows::<M>::piece_end::<D>(first_pair, self.pairs);
                for q in &mut q {
                    q.prepare::<D>(first_pair, end);
                }
                for line in (first_pair..end).step_by(LINE / F::SIZE) {
                    for i in 0..P {
                        D::prefetch(next[i].wrapping_add(line * F::SIZE).cast());
                    }
                    for k in line..(line + LINE / F::SIZE).min(end) {
                        for i in 0..P {
                            let weights = F::load::<D>(keys[i], k);
                            for r in 0..M {
                                sums[r][i] = q[i].dot::<D>(sums[r][i], weights, r, first_pair, k);
                            }
                        }
                    }
                }
                first_pair = end;
            }
            for r in 0..M {
                for i in 0..P {
                    let out = self.out.slice((first(i) + r) * TILE + self.panel * PANEL, PANEL);
                    D::store(out.as_mut_ptr(), sums[r][i]);
                }
            }
        }
    }
}

/// Where some rows of tokens by query heads lie in an activation.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    pub start: *const f32,
    /// Numbers from a token to the next one.
    pub stride: usize,
    /// Rows of a token, and what each holds.
    pub group: usize,
    pub head_dim: usize,
}

impl Lines {
    /// Memory works on a panel of a row.
    ///
    /// # Safety
    /// As for [`ByteDot`].
    #[inline(always)]
    unsafe fn prefetch<D: ByteDot>(&self, row: usize, panel: usize) {
        let at = row / self.group * self.stride + row % self.group * self.head_dim + panel * PANEL;
        // SAFETY: any address may be prefetched; the rest is the caller's.
        unsafe { D::prefetch(self.start.wrapping_add(at).cast()) };
    }
}

/// `out = out * shrink + weights · values`: rows by panels of columns.
pub(super) struct Values<'a, F, U> {
    pub weights: &'a [u32],
    pub shrink: &'a [f32],
    pub values: [*const u8; PANELS],
    /// What memory works on meanwhile, as much for each panel.
    pub next: [*const u8; PANELS],
    /// Pairs of keys.
    pub pairs: Range<usize>,
    pub columns: usize,
    pub out: Shared<'a, f32>,
    /// What is read and written next: as many rows and panels.
    pub lines: [Option<Lines>; 2],
    /// Pairs of keys from this one on are hidden from rows up to this one.
    pub until: U,
    pub form: PhantomData<F>,
}

impl<F: Form, U: Fn(usize) -> usize> Tiled for Values<'_, F, U> {
    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, panel: usize, _: Turn) {
        let weights = &self.weights[row * TILE / 2..(row + M) * TILE / 2];
        // SAFETY: `weights` holds M rows of TILE / 2, `out` its rows; values reach to the last column.
        unsafe {
            let rows: [*const u32; M] = std::array::from_fn(|r| weights.as_ptr().add(r * TILE / 2));
            let out: [*mut f32; M] = std::array::from_fn(|r| {
                self.out.slice((row + r) * self.columns + panel * PANEL, P * PANEL).as_mut_ptr()
            });
            for lines in self.lines.iter().flatten() {
                for r in 0..M {
                    for i in 0..P {
                        lines.prefetch::<D>(row + r, panel + i);
                    }
                }
            }
            let last = self.pairs.end.min((self.until)(row + M - 1));
            let mut sums = [[D::zero(); P]; M];
            for r in 0..M {
                let shrink = D::splat(self.shrink[row + r]);
                for i in 0..P {
                    sums[r][i] = D::mul(D::load_sums(out[r].add(i * PANEL)), shrink);
                }
            }
            let (mut weights, mut pair) = (Rows::new(rows), self.pairs.start);
            let (mut first, mut piece_end) = (pair, pair);
            while pair < last {
                if pair == piece_end {
                    (first, piece_end) = (pair, Rows::<M>::piece_end::<D>(pair, last));
                    weights.prepare::<D>(first, piece_end);
                }
                let end = (pair + PANEL_PAIRS).min(last);
                let (from, next) = (self.values[pair / PANEL_PAIRS], self.next[pair / PANEL_PAIRS]);
                for k in 0..end - pair {
                    let mut values = [F::load::<D>(from, panel); P];
                    for i in 0..P {
                        let at = k * (self.columns / PANEL) + panel + i;
                        values[i] = F::load::<D>(from, at);
                        if i % (LINE / F::SIZE) == 0 {
                            D::prefetch(next.wrapping_add(at * F::SIZE).cast());
                        }
                    }
                    for r in 0..M {
                        for i in 0..P {
                            sums[r][i] = weights.dot::<D>(sums[r][i], values[i], r, first, pair + k);
                        }
                    }
                }
                pair = end;
            }
            for r in 0..M {
                for i in 0..P {
                    D::store(out[r].add(i * PANEL), sums[r][i]);
                }
            }
        }
    }
}
