//! Rows of pairs as the instruction set at work multiplies them: as they are, or taken apart into floats, some of each row
//! at a time. That costs two instructions for sixteen pairs, where a pair taken apart as it is needed costs two for every
//! tile that it is in.

use std::mem::MaybeUninit;

use super::pairs::{PANEL, PairDot};

/// Pairs of a row that are taken apart at once: those of the largest tile stay in the L1 cache.
const PIECE: usize = 64;

/// `M` rows of activations.
pub(crate) struct Rows<const M: usize> {
    pairs: [*const u32; M],
    /// Of each row, the even and the odd elements of the piece at work.
    floats: MaybeUninit<[[[f32; PIECE]; 2]; M]>,
}

impl<const M: usize> Rows<M> {
    #[inline(always)]
    pub fn new(pairs: [*const u32; M]) -> Self {
        Self { pairs, floats: MaybeUninit::uninit() }
    }

    /// Where the piece that begins with pair `first` ends, of pairs up to `end`.
    #[inline(always)]
    pub fn piece_end<D: PairDot>(first: usize, end: usize) -> usize {
        if D::SPLITS { end.min(first + PIECE) } else { end }
    }

    /// Prepares the pairs of a piece for [`Self::dot`].
    ///
    /// # Safety
    /// As for [`PairDot`]; the rows hold these pairs, at most as many as [`Self::piece_end`] says.
    #[inline(always)]
    pub unsafe fn prepare<D: PairDot>(&mut self, first: usize, end: usize) {
        if !D::SPLITS {
            return;
        }
        let floats = self.floats.as_mut_ptr().cast::<[[f32; PIECE]; 2]>();
        for r in 0..M {
            // SAFETY: a piece is a whole number of panels long; the rest is the caller's.
            unsafe {
                let evens = floats.add(r).cast::<f32>();
                for k in (first..end).step_by(PANEL) {
                    let evens = evens.add(k - first);
                    D::split(self.pairs[r].add(k), PANEL.min(end - k), evens, evens.add(PIECE));
                }
            }
        }
    }

    /// Adds the products with pair `k` of row `r`, which is in the piece prepared that begins with pair `first`.
    ///
    /// # Safety
    /// As for [`PairDot`].
    #[inline(always)]
    pub unsafe fn dot<D: PairDot>(
        &self,
        sums: D::V,
        weights: D::W,
        r: usize,
        first: usize,
        k: usize,
    ) -> D::V {
        // SAFETY: the caller's.
        unsafe {
            if !D::SPLITS {
                return D::dot(sums, weights, self.pairs[r].add(k));
            }
            let evens = self.floats.as_ptr().cast::<[[f32; PIECE]; 2]>().add(r).cast::<f32>().add(k - first);
            D::dot_split(sums, weights, evens, evens.add(PIECE))
        }
    }
}
