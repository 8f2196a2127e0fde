//! Tiles of keys and values: where they lie in the cache, and in which form.

use std::ops::Range;

use super::scratch::TileRoom;
use super::softmax::SCALES;
use super::{PANEL_PAIRS, PANELS, TILE};
use crate::pages::{PackedPages, Pairs};
use crate::simd::bytes::{ByteDot, widen_pair};
use crate::simd::pairs::PANEL;

/// How operands lie in memory, in vectors of a panel's pairs.
pub(super) trait Form: Copy {
    /// Bytes of a vector.
    const SIZE: usize;
    /// Whether a few rows take the scores of several heads at once: where vectors take work, the chains of sums of one head
    /// alone leave the processor idle; where they do not, one stream from memory is faster than four.
    const SIDE_BY_SIDE: bool;
    /// Whether it is meant for few rows: others get no tiles of their own, which would only be more code.
    const FEW_ROWS: bool;

    /// Vector `i` from `at` on.
    ///
    /// # Safety
    /// It can be read; the rest as for [`ByteDot`].
    unsafe fn load<D: ByteDot>(at: *const u8, i: usize) -> D::W;
}

/// As pairs of bf16.
#[derive(Clone, Copy)]
pub(super) struct Wide;

/// As pairs of bytes.
#[derive(Clone, Copy)]
pub(super) struct Bytes;

impl Form for Wide {
    const SIZE: usize = PANEL * size_of::<u32>();
    const SIDE_BY_SIDE: bool = false;
    const FEW_ROWS: bool = false;

    #[inline(always)]
    unsafe fn load<D: ByteDot>(at: *const u8, i: usize) -> D::W {
        // SAFETY: the caller's.
        unsafe { D::load(at.add(i * Self::SIZE).cast()) }
    }
}

impl Form for Bytes {
    const SIZE: usize = PANEL * size_of::<u16>();
    const SIDE_BY_SIDE: bool = true;
    const FEW_ROWS: bool = true;

    #[inline(always)]
    unsafe fn load<D: ByteDot>(at: *const u8, i: usize) -> D::W {
        // SAFETY: the caller's.
        unsafe { D::widen_pairs(at.add(i * Self::SIZE).cast()) }
    }
}

/// Where the keys and values of a tile's first head lie: panels of 16 keys, `[key_pairs][PANEL]`, and the values of the same keys,
/// `[PANEL_PAIRS][columns]`. Panels without a visible key are null, or in a tile to come like their neighbours.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub keys: [*const u8; PANELS],
    pub values: [*const u8; PANELS],
}

/// The keys of a tile that are to be found.
pub(super) struct Wanted<'a> {
    pub block_table: &'a [u32],
    pub first_head: usize,
    pub heads: usize,
    /// Position of the tile.
    pub start: usize,
    /// Within the tile.
    pub keys: Range<usize>,
}

impl Wanted<'_> {
    /// Block and offset of a key.
    #[inline(always)]
    fn at(&self, key: usize, block_size: usize) -> (usize, usize) {
        let position = self.start + key;
        (self.block_table[position / block_size] as usize, position % block_size)
    }
}

impl Tile {
    /// The tile with the wanted keys as it lies in the cache, unless its panels are in pieces. Panics if a block lies
    /// outside the cache.
    #[inline(always)]
    pub fn in_place(pages: &PackedPages, wanted: &Wanted<'_>) -> Option<Self> {
        let shape = pages.shape;
        let mut tile = Self { keys: [std::ptr::null(); PANELS], values: [std::ptr::null(); PANELS] };
        if shape.block_size < PANEL {
            return None;
        }
        for panel in wanted.keys.start / PANEL..wanted.keys.end.div_ceil(PANEL) {
            let (block, offset) = wanted.at(panel * PANEL, shape.block_size);
            pages.check(block);
            (tile.keys[panel], tile.values[panel]) = pages.address(block, wanted.first_head, offset);
        }
        Some(tile)
    }

    /// What memory works on while each of these panels is at work: what comes `depth` panels later in the order of work,
    /// which is keys and then values of this tile, then `next`. So it is in the cache in time, but not long before.
    pub fn ahead(&self, panels: &Range<usize>, depth: usize, next: &Self) -> Self {
        let mut order = [next.values[PANELS - 1]; 4 * PANELS];
        let all = [&self.keys[panels.clone()], &self.values[panels.clone()], &next.keys, &next.values];
        order.iter_mut().zip(all.into_iter().flatten()).for_each(|(to, from)| *to = *from);
        let mut ahead = *self;
        let (keys, values) = order[depth..].split_at(panels.len());
        ahead.keys[panels.clone()].copy_from_slice(keys);
        ahead.values[panels.clone()].copy_from_slice(&values[..panels.len()]);
        ahead
    }

    /// The keys of another head, `strides` apart.
    #[inline(always)]
    pub fn keys_of(&self, head: usize, strides: [usize; 2]) -> [*const u8; PANELS] {
        self.keys.map(|at| at.wrapping_add(head * strides[0]))
    }

    /// The values of another head.
    #[inline(always)]
    pub fn values_of(&self, head: usize, strides: [usize; 2]) -> [*const u8; PANELS] {
        self.values.map(|at| at.wrapping_add(head * strides[1]))
    }

    /// A tile of bytes as one of pairs, in `room`, while memory works on the next one.
    ///
    /// # Safety
    /// The panels can be read; the rest as for [`ByteDot`].
    #[inline(always)]
    pub unsafe fn widen<D: ByteDot>(
        &self,
        pages: &PackedPages,
        panels: &Range<usize>,
        next: &Self,
        room: &mut TileRoom<'_>,
    ) -> Self {
        let (pairs, columns) = (pages.shape.key_pairs(), pages.shape.columns());
        let mut tile = *self;
        for i in panels.clone() {
            let keys = &mut room.keys[i * PANEL * pairs..(i + 1) * PANEL * pairs];
            let values = &mut room.values[i * PANEL_PAIRS * columns..(i + 1) * PANEL_PAIRS * columns];
            // SAFETY: the caller's.
            unsafe {
                widen::<D>(self.keys[i], keys, next.keys[i]);
                widen::<D>(self.values[i], values, next.values[i]);
            }
            (tile.keys[i], tile.values[i]) = (keys.as_ptr().cast(), values.as_ptr().cast());
        }
        tile
    }
}

/// Whole panels of bytes as bf16.
#[inline(always)]
unsafe fn widen<D: ByteDot>(from: *const u8, to: &mut [u32], next: *const u8) {
    for (i, to) in to.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
        // SAFETY: `to` holds a panel, any address may be prefetched; the rest is the caller's.
        unsafe {
            D::prefetch(next.wrapping_add(i * Bytes::SIZE).cast());
            D::store_words(to.as_mut_ptr(), Bytes::load::<D>(from, i));
        }
    }
}

/// The scales of a tile's keys, then those of its values.
#[inline(always)]
pub(super) fn find_scales(pages: &PackedPages, wanted: &Wanted<'_>, to: &mut [f32]) {
    let shape = pages.shape;
    if let Pairs::Int8 { scales, .. } = &pages.pairs {
        let lanes = shape.lanes();
        for head in 0..wanted.heads {
            let (keys, values) = to[head * SCALES..][..SCALES].split_at_mut(TILE);
            for key in (wanted.keys.start / lanes * lanes..wanted.keys.end).step_by(lanes) {
                let (block, offset) = wanted.at(key, shape.block_size);
                let head = block * shape.num_kv_heads + wanted.first_head + head;
                let from = &scales[head * 2 * shape.block_size..][..2 * shape.block_size];
                keys[key..key + lanes].copy_from_slice(&from[offset..offset + lanes]);
                values[key..key + lanes].copy_from_slice(&from[shape.block_size + offset..][..lanes]);
            }
        }
    }
}

/// Copies the keys and values of a tile together.
pub(super) fn gather(pages: &PackedPages, wanted: &Wanted<'_>, room: &mut TileRoom<'_>) -> Tile {
    let shape = pages.shape;
    let (pairs, columns, lanes) = (shape.key_pairs(), shape.columns(), shape.lanes());
    for key in wanted.keys.clone() {
        let (block, offset) = wanted.at(key, shape.block_size);
        let from = shape.key_panel(block, wanted.first_head, offset) + offset;
        for i in 0..pairs {
            room.keys[(key / PANEL * pairs + i) * PANEL + key % PANEL] = match &pages.pairs {
                Pairs::Bf16(pairs) => pairs[from + i * lanes],
                Pairs::Int8 { bytes, .. } => widen_pair(bytes[from + i * lanes]),
            };
        }
        let from = shape.value_row(block, wanted.first_head, offset);
        for column in 0..columns {
            let pair = match &pages.pairs {
                Pairs::Bf16(pairs) => pairs[from + column],
                Pairs::Int8 { bytes, .. } => widen_pair(bytes[from + column]),
            };
            let half = if offset % 2 == 0 { pair & 0xFFFF } else { pair >> 16 };
            let to = &mut room.values[key / 2 * columns + column];
            *to = if key % 2 == 0 { *to & 0xFFFF_0000 | half } else { *to & 0xFFFF | half << 16 };
        }
    }
    let tile = |i: usize, of: &[u32]| of[i * (of.len() / PANELS)..].as_ptr().cast::<u8>();
    let (keys, values) = (&room.keys[..TILE * pairs], &room.values[..TILE / 2 * columns]);
    Tile { keys: std::array::from_fn(|i| tile(i, keys)), values: std::array::from_fn(|i| tile(i, values)) }
}
