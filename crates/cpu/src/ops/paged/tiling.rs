//! How the rows and panels of attention are cut into tiles of sums, where there are many rows.

use std::ops::Range;

use crate::ops::tiles::{NARROW, Tiled, Turn, each_row};
use crate::simd::bytes::ByteDot;

/// Panels of a tile: the nearer rows and panels are to each other in number, the less a sum has to be loaded for.
const BROAD: usize = 4;

/// More rows than these are cut here.
pub(super) const fn few_rows<D: ByteDot>() -> usize {
    D::TILE_SUMS / NARROW
}

/// These panels for many rows, in tiles of [`BROAD`] panels; but of panels from `until(row)` on nothing is computed for rows
/// up to `row`.
///
/// # Safety
/// The job's.
#[inline(always)]
pub(super) unsafe fn each_broad_panel<D: ByteDot, J: Tiled>(
    job: &J,
    rows: Range<usize>,
    panels: Range<usize>,
    until: impl Fn(usize) -> usize,
) {
    let most = const { D::TILE_SUMS / BROAD };
    let tiles = rows.len().div_ceil(most);
    let (least, larger) = (rows.len() / tiles.max(1), rows.len() % tiles.max(1));
    let mut p = panels.start;
    // SAFETY: the caller's.
    unsafe {
        while p + NARROW <= panels.end {
            let mut m = rows.start;
            let broad = p + BROAD <= panels.end;
            for index in 0..tiles {
                let height = least + usize::from(index < larger);
                let seen = until(m + height - 1);
                if broad && seen > p + NARROW {
                    tile::<D, J, BROAD>(job, m, height, p);
                } else if seen > p {
                    tile::<D, J, NARROW>(job, m, height, p);
                }
                m += height;
            }
            p += if broad { BROAD } else { NARROW };
        }
        if p < panels.end {
            each_row::<D, J, 1>(job, rows, p);
        }
    }
}

/// A tile of so many rows.
#[inline(always)]
unsafe fn tile<D: ByteDot, J: Tiled, const P: usize>(job: &J, row: usize, height: usize, panel: usize) {
    const TURN: Turn = Turn { index: 0, of: 1 };
    // SAFETY: the caller's.
    unsafe {
        match height {
            1 => job.tile::<D, 1, P>(row, panel, TURN),
            2 if const { 2 * BROAD <= D::TILE_SUMS } => job.tile::<D, 2, P>(row, panel, TURN),
            3 if const { 3 * BROAD <= D::TILE_SUMS } => job.tile::<D, 3, P>(row, panel, TURN),
            4 if const { 4 * BROAD <= D::TILE_SUMS } => job.tile::<D, 4, P>(row, panel, TURN),
            5 if const { 5 * BROAD <= D::TILE_SUMS } => job.tile::<D, 5, P>(row, panel, TURN),
            6 if const { 6 * BROAD <= D::TILE_SUMS } => job.tile::<D, 6, P>(row, panel, TURN),
            _ => unreachable!("a tile of {height} rows has too many sums"),
        }
    }
}
