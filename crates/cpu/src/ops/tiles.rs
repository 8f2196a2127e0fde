//! How rows and panels are cut into tiles of sums that fit the registers.

use std::ops::Range;

use super::grain;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::PANEL;

/// Panels of a tile: enough for the two halves of a gated layer.
pub(crate) const NARROW: usize = 2;

/// How far ahead weights are asked for at most, so that they are still in cache when it is their turn.
const AHEAD_BYTES: usize = 384 * 1024;
/// Up to this many bytes, all tiles of the panels at work ask for the next ones; longer ones wait for the last tile.
const SHARED_BYTES: usize = 112 * 1024;
/// How far ahead in a panel else, in vectors.
const AHEAD_VECTORS: usize = 32;
/// Up to how many tokens memory is the limit, not computing.
pub(crate) const MEMORY_BOUND: usize = 8;

/// What memory works ahead on while a tile computes: the panels after these, of which each tile asks for its share; or,
/// where panels are long, a little further on in these.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<const P: usize> {
    from: [*const u32; P],
    /// Words from one vector to the next.
    stride: usize,
}

impl<const P: usize> Ahead<P> {
    /// `panels` have `len` vectors each; `next(i)` comes after panel `i` of them.
    #[inline(always)]
    pub fn of<'a>(
        panels: [*const u32; P],
        len: usize,
        turn: Turn,
        next: impl Fn(usize) -> Option<&'a [u32]>,
    ) -> Self {
        let mut from = panels;
        let bytes = P * len * PANEL * size_of::<u32>();
        if bytes > AHEAD_BYTES {
            for i in 0..P {
                from[i] = panels[i].wrapping_add(AHEAD_VECTORS * PANEL);
            }
            return Self { from, stride: PANEL };
        }
        let Turn { index, of } = match turn {
            turn if bytes <= SHARED_BYTES => turn,
            turn if turn.index + 1 == turn.of => Turn { index: 0, of: 1 },
            _ => return Self { from, stride: PANEL },
        };
        let share = (len * PANEL).div_ceil(of);
        for i in 0..P {
            from[i] = match next(i) {
                Some(next) => next.as_ptr().wrapping_add(index * share),
                None => panels[i],
            };
        }
        Self { from, stride: PANEL.div_ceil(of) }
    }

    /// While vector `k` of panel `i` is computed with.
    ///
    /// # Safety
    /// As for [`crate::simd::pairs::PairDot`].
    #[inline(always)]
    pub unsafe fn fetch<D: ByteDot>(&self, i: usize, k: usize) {
        // SAFETY: the caller's; a prefetch may touch any address.
        unsafe { D::prefetch(self.from[i].wrapping_add(k * self.stride)) };
    }
}

/// Work of a piece, in multiply-adds, beside which its beginning does not count: some 30 us.
const LONG_WORK: usize = 16 << 20;

/// Words of activations that stay near while panels pass by: half of a 1 MiB L2.
const NEAR_WORDS: usize = 128 * 1024;
/// Rows of a group at least: panels come from memory once a group, and with fewer rows that would take as long as the work.
const MIN_GROUP: usize = 192;
/// Rows of a group whose activations come from the L3 anyway.
const FAR_GROUP: usize = 512;

/// Rows of `words` words that panels pass by before the next rows' turn. Somewhat too many for the L2 are better than too
/// few, and where it is far too small for them, the panels alone lie there.
pub(crate) fn group_rows(words: usize) -> usize {
    let near = NEAR_WORDS / words.max(1);
    if 3 * near > MIN_GROUP { near.max(MIN_GROUP) } else { FAR_GROUP }
}

/// How the rows and panels of a product are handed out: in units of some rows and [`NARROW`] panels, of which those of
/// the same rows are neighbours.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    pub tokens: usize,
    /// See [`group_rows`]: at most so many are a unit's.
    pub group: usize,
    pub panels: usize,
}

impl Cut {
    /// Rows of a unit: all groups about the same.
    const fn rows(self) -> usize {
        let groups = self.tokens.div_ceil(self.group);
        if groups < 2 { self.tokens } else { self.tokens.div_ceil(groups) }
    }

    /// Units of the same rows.
    const fn pairs(self) -> usize {
        self.panels.div_ceil(NARROW)
    }

    pub const fn units(self) -> usize {
        if self.tokens == 0 { 0 } else { self.tokens.div_ceil(self.rows()) * self.pairs() }
    }

    /// How many units make a piece at least. Where memory is the limit, each thread gets one, to read it from end to end.
    pub fn grain(self, work_per_row: usize, threads: usize) -> usize {
        let (units, work) = (self.units(), work_per_row * self.rows());
        let grain = grain(units, work, threads);
        if self.tokens <= MEMORY_BOUND {
            return grain.max(units.div_ceil(threads));
        }
        grain.min(LONG_WORK.div_ceil(work.max(1)))
    }

    /// The rows and panels of these units.
    pub fn each(self, units: Range<usize>, mut piece: impl FnMut(Range<usize>, Range<usize>)) {
        let (rows, pairs) = (self.rows(), self.pairs());
        let mut next = units.start;
        while next < units.end {
            let (group, pair) = (next / pairs, next % pairs);
            let end = (pair + units.end - next).min(pairs);
            let panels = pair * NARROW..(end * NARROW).min(self.panels);
            piece(group * rows..((group + 1) * rows).min(self.tokens), panels);
            next += end - pair;
        }
    }
}

/// How far ahead of one stream memory is asked, in words: what comes within its latency, twice over. The processor looks
/// ahead by itself only as far as it has room for instructions, and with every row there are more of them to a vector.
pub(crate) const STREAM_AHEAD: usize = 8 * 1024 / size_of::<u32>();

/// Tile `index` of `of`.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    pub index: usize,
    pub of: usize,
}

impl Turn {
    /// Whether tiles of `rows` rows wait for memory. Their panels are then read one after the other: one stream from end
    /// to end comes a third faster than two or four side by side, as the processor fetches ahead by itself.
    #[inline(always)]
    pub const fn is_memory_bound(self, rows: usize) -> bool {
        rows <= MEMORY_BOUND && rows * self.of <= MEMORY_BOUND
    }
}

/// Something that is computed tile by tile.
pub(crate) trait Tiled {
    /// The share of the registers for sums that a tile may use, as a fraction.
    const SHARE: (usize, usize) = (1, 1);

    /// Rows `row..row + M` of panels `panel..panel + P`; `turn` says which of all tiles of these panels this is.
    ///
    /// # Safety
    /// As for [`crate::simd::pairs::PairDot`], and what the job asks for.
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, panel: usize, turn: Turn);
}

/// All panels for these rows, two at a time.
///
/// # Safety
/// The job's.
#[inline(always)]
pub(crate) unsafe fn each_panel<D: ByteDot, J: Tiled>(job: &J, rows: Range<usize>, panels: Range<usize>) {
    let mut p = panels.start;
    // SAFETY: the caller's.
    unsafe {
        while p + NARROW <= panels.end {
            each_row::<D, J, NARROW>(job, rows.clone(), p);
            p += NARROW;
        }
        if p < panels.end {
            each_row::<D, J, 1>(job, rows, p);
        }
    }
}

/// As [`each_panel`], for so few rows that `WIDE` panels fit one tile: what lies side by side is then read side by side.
/// Other rows and what is left over are cut as there.
///
/// # Safety
/// The job's.
#[inline(always)]
pub(crate) unsafe fn each_wide_panel<D: ByteDot, J: Tiled, const WIDE: usize>(
    job: &J,
    rows: Range<usize>,
    panels: Range<usize>,
) {
    let mut p = panels.start;
    // SAFETY: the caller's.
    unsafe {
        if rows.len() <= const { rows_of::<D, J>(WIDE) } {
            while p + WIDE <= panels.end {
                each_row::<D, J, WIDE>(job, rows.clone(), p);
                p += WIDE;
            }
        }
        each_panel::<D, J>(job, rows, p..panels.end);
    }
}

/// The most sums of a tile: rows times panels.
const fn sums<D: ByteDot, J: Tiled>() -> usize {
    D::TILE_SUMS * J::SHARE.0 / J::SHARE.1
}

/// The most rows of a tile of so many panels. One panel alone is what an odd number leaves over: it gets no tiles of its
/// own height, which would only be more code.
const fn rows_of<D: ByteDot, J: Tiled>(panels: usize) -> usize {
    match panels {
        1 => sums::<D, J>().div_ceil(4 * NARROW),
        panels => sums::<D, J>() / panels,
    }
}

/// A tile, if it is one that is asked for: others are not even compiled.
#[inline(always)]
unsafe fn tile<D: ByteDot, J: Tiled, const M: usize, const P: usize>(
    job: &J,
    row: usize,
    panel: usize,
    turn: Turn,
) {
    if const { M <= rows_of::<D, J>(P) } {
        // SAFETY: the caller's.
        unsafe { job.tile::<D, M, P>(row, panel, turn) };
    } else {
        unreachable!("a tile of {M} rows and {P} panels has too many sums");
    }
}

/// Panels `p..p + P` for these rows, in tiles of about the same size.
///
/// # Safety
/// The job's.
#[inline(always)]
pub(crate) unsafe fn each_row<D: ByteDot, J: Tiled, const P: usize>(job: &J, rows: Range<usize>, p: usize) {
    let most = const { rows_of::<D, J>(P) };
    let tiles = rows.len().div_ceil(most);
    let (least, larger) = (rows.len() / tiles.max(1), rows.len() % tiles.max(1));
    let mut m = rows.start;
    for index in 0..tiles {
        let height = least + usize::from(index < larger);
        let turn = Turn { index, of: tiles };
        // SAFETY: the caller's.
        unsafe {
            match height {
                1 => tile::<D, J, 1, P>(job, m, p, turn),
                2 => tile::<D, J, 2, P>(job, m, p, turn),
                3 => tile::<D, J, 3, P>(job, m, p, turn),
                4 => tile::<D, J, 4, P>(job, m, p, turn),
                5 => tile::<D, J, 5, P>(job, m, p, turn),
                6 => tile::<D, J, 6, P>(job, m, p, turn),
                7 => tile::<D, J, 7, P>(job, m, p, turn),
                8 => tile::<D, J, 8, P>(job, m, p, turn),
                9 => tile::<D, J, 9, P>(job, m, p, turn),
                10 => tile::<D, J, 10, P>(job, m, p, turn),
                11 => tile::<D, J, 11, P>(job, m, p, turn),
                _ => tile::<D, J, 12, P>(job, m, p, turn),
            }
        }
        m += height;
    }
}
