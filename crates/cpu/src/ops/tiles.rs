//! How rows and panels are cut into tiles of sums that fit the registers.

use std::ops::Range;

use crate::simd::bytes::ByteDot;
use crate::simd::pairs::PairDot;

/// Panels at once for few rows: enough sums to hide the latency of an addition, enough streams to keep memory busy.
pub(crate) const WIDE: usize = 4;
/// Panels at once for many rows.
pub(crate) const NARROW: usize = 2;

/// Tile `index` of `of`.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    pub index: usize,
    pub of: usize,
}

/// Something that is computed tile by tile.
pub(crate) trait Tiled {
    /// Rows `row..row + M` of panels `panel..panel + P`; `turn` says which of all tiles of these panels this is.
    ///
    /// # Safety
    /// As for [`PairDot`], and what the job asks for.
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, panel: usize, turn: Turn);
}

/// All panels for these rows: four at a time where there are few rows, else two.
///
/// # Safety
/// The job's.
#[inline(always)]
pub(crate) unsafe fn each_panel<D: ByteDot>(job: &impl Tiled, rows: Range<usize>, panels: Range<usize>) {
    let mut p = panels.start;
    // SAFETY: the caller's.
    unsafe {
        if rows.len() <= D::TILE_SUMS / WIDE {
            while p + WIDE <= panels.end {
                each_row::<D, WIDE>(job, rows.clone(), p);
                p += WIDE;
            }
        }
        while p + NARROW <= panels.end {
            each_row::<D, NARROW>(job, rows.clone(), p);
            p += NARROW;
        }
        if p < panels.end {
            each_row::<D, 1>(job, rows, p);
        }
    }
}

/// Panels `p..p + P` for these rows, in tiles of about the same size.
#[inline(always)]
unsafe fn each_row<D: ByteDot, const P: usize>(job: &impl Tiled, rows: Range<usize>, p: usize) {
    let most = D::TILE_SUMS / if P > NARROW { WIDE } else { NARROW };
    let tiles = rows.len().div_ceil(most);
    let (least, larger) = (rows.len() / tiles.max(1), rows.len() % tiles.max(1));
    let mut m = rows.start;
    for tile in 0..tiles {
        let height = least + usize::from(tile < larger);
        let turn = Turn { index: tile, of: tiles };
        // SAFETY: the caller's.
        unsafe {
            match height {
                1 => job.tile::<D, 1, P>(m, p, turn),
                2 => job.tile::<D, 2, P>(m, p, turn),
                3 => job.tile::<D, 3, P>(m, p, turn),
                4 => job.tile::<D, 4, P>(m, p, turn),
                5 => job.tile::<D, 5, P>(m, p, turn),
                6 => job.tile::<D, 6, P>(m, p, turn),
                7 => job.tile::<D, 7, P>(m, p, turn),
                8 => job.tile::<D, 8, P>(m, p, turn),
                9 => job.tile::<D, 9, P>(m, p, turn),
                10 => job.tile::<D, 10, P>(m, p, turn),
                11 => job.tile::<D, 11, P>(m, p, turn),
                _ => job.tile::<D, 12, P>(m, p, turn),
            }
        }
        m += height;
    }
}

/// Tiles larger than the registers are never asked for; this keeps them from being compiled.
#[inline(always)]
pub(crate) fn fits<D: PairDot, const M: usize, const P: usize>() {
    if M * P > D::TILE_SUMS {
        unreachable!("a tile of {M} rows and {P} panels does not fit the registers");
    }
}
