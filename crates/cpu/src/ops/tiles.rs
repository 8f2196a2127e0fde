//! How rows and panels are cut into tiles of sums that fit the registers.

use std::ops::Range;

use super::grain;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::PANEL;

/// Panels at once for few rows: enough sums to hide the latency of an addition, enough streams to keep memory busy.
pub(crate) const WIDE: usize = 4;
/// Panels at once for many rows.
pub(crate) const NARROW: usize = 2;

/// How far ahead weights are asked for at most, so that they are still in cache when it is their turn.
const AHEAD_BYTES: usize = 384 * 1024;
/// How far ahead in a panel else, in vectors.
const AHEAD_VECTORS: usize = 32;
/// Up to how many tokens memory is the limit, not computing.
const MEMORY_BOUND: usize = 8;

/// What memory works ahead on while panels of `len` vectors are computed with: the panels after them, or, where these are
/// long, a little further on in them.
#[inline(always)]
pub(crate) fn ahead<'a, const P: usize>(
    panels: [*const u32; P],
    len: usize,
    next: impl Fn(usize) -> Option<&'a [u32]>,
) -> [*const u32; P] {
    let mut ahead = panels;
    for i in 0..P {
        let near = P * len * PANEL * size_of::<u32>() <= AHEAD_BYTES;
        ahead[i] = match next(i) {
            Some(next) if near => next.as_ptr(),
            _ => panels[i].wrapping_add(AHEAD_VECTORS * PANEL),
        };
    }
    ahead
}

/// How many of `units` make a piece. Where memory is the limit, each thread gets one, to read it from end to end.
pub(crate) fn pieces(units: usize, work_per_unit: usize, tokens: usize, threads: usize) -> usize {
    let grain = grain(units, work_per_unit, threads);
    if tokens <= MEMORY_BOUND { grain.max(units.div_ceil(threads)) } else { grain }
}

/// Tile `index` of `of`.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    pub index: usize,
    pub of: usize,
}

/// Something that is computed tile by tile.
pub(crate) trait Tiled {
    /// The most sums of a tile: rows times panels. At least [`WIDE`].
    #[inline(always)]
    fn sums<D: ByteDot>() -> usize {
        D::TILE_SUMS
    }

    /// Rows `row..row + M` of panels `panel..panel + P`; `turn` says which of all tiles of these panels this is.
    ///
    /// # Safety
    /// As for [`crate::simd::pairs::PairDot`], and what the job asks for.
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, panel: usize, turn: Turn);
}

/// All panels for these rows: four at a time where there are few rows, else two.
///
/// # Safety
/// The job's.
#[inline(always)]
pub(crate) unsafe fn each_panel<D: ByteDot, J: Tiled>(job: &J, rows: Range<usize>, panels: Range<usize>) {
    let mut p = panels.start;
    // SAFETY: the caller's.
    unsafe {
        if rows.len() <= J::sums::<D>() / WIDE {
            while p + WIDE <= panels.end {
                each_row::<D, J, WIDE>(job, rows.clone(), p);
                p += WIDE;
            }
        }
        while p + NARROW <= panels.end {
            each_row::<D, J, NARROW>(job, rows.clone(), p);
            p += NARROW;
        }
        if p < panels.end {
            each_row::<D, J, 1>(job, rows, p);
        }
    }
}

/// Panels `p..p + P` for these rows, in tiles of about the same size.
#[inline(always)]
unsafe fn each_row<D: ByteDot, J: Tiled, const P: usize>(job: &J, rows: Range<usize>, p: usize) {
    let most = J::sums::<D>() / if P > NARROW { WIDE } else { NARROW };
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

/// Tiles larger than `sums` are never asked for; this keeps them from being compiled.
#[inline(always)]
pub(crate) fn fits<const M: usize, const P: usize>(sums: usize) {
    if M * P > sums {
        unreachable!("a tile of {M} rows and {P} panels has more than {sums} sums");
    }
}
