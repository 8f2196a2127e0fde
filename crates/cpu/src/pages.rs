//! Pages whose keys and values are ready for pair products: what `store` writes and [`crate::ops::paged`] reads.
//!
//! A block of `B` tokens holds first, per head, its keys as panels `[head_dim / 2][lane][2]` of up to [`PANEL`] tokens a
//! lane, then, per head, its values as `[pair of tokens][head_dim][2]`: blocks lie in any order, and memory gives the more
//! the longer a piece is. Odd ends are filled up: `head_dim` to whole panels, and a block of one token to a pair. Elements
//! are bf16, or bytes with one scale per key and one per value, of a token and head. Stored numbers are finite, so that a
//! weight of zero leaves nothing of them.

use quire_backend::{BackendError, KvLayerShape, KvLayout};

use quire_core::DType;

use crate::buffer::Aligned;
use crate::element::Plain;
use crate::populate::Range;
use crate::simd::pairs::PANEL;

/// Where things lie in [`PackedPages`].
#[derive(Clone, Copy)]
pub(crate) struct PackedShape {
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub block_size: usize,
}

impl PackedShape {
    /// Tokens side by side in a panel of keys.
    pub const fn lanes(&self) -> usize {
        if self.block_size < PANEL { self.block_size } else { PANEL }
    }

    /// Columns of values: `head_dim`, filled up to whole panels.
    pub const fn columns(&self) -> usize {
        self.head_dim.next_multiple_of(PANEL)
    }

    /// Pairs of a key.
    pub const fn key_pairs(&self) -> usize {
        self.head_dim.div_ceil(2)
    }

    /// Pairs of a head's keys in a block.
    const fn key_len(&self) -> usize {
        self.key_pairs() * self.block_size
    }

    /// Pairs of a head's values in a block.
    const fn value_len(&self) -> usize {
        self.block_size.div_ceil(2) * self.columns()
    }

    /// Pairs of a block.
    const fn block_len(&self) -> usize {
        self.num_kv_heads * (self.key_len() + self.value_len())
    }

    /// Scales of a block.
    const fn block_scales(&self) -> usize {
        self.num_kv_heads * 2 * self.block_size
    }

    /// First pair of the panel with `offset` of `head`'s keys.
    #[inline(always)]
    pub const fn key_panel(&self, block: usize, head: usize, offset: usize) -> usize {
        block * self.block_len()
            + head * self.key_len()
            + offset / self.lanes() * self.lanes() * self.key_pairs()
    }

    /// First column of the row with `offset` of `head`'s values.
    #[inline(always)]
    pub const fn value_row(&self, block: usize, head: usize, offset: usize) -> usize {
        block * self.block_len()
            + self.num_kv_heads * self.key_len()
            + head * self.value_len()
            + offset / 2 * self.columns()
    }
}

/// K and V of a layer.
pub(crate) struct PackedPages {
    pub pairs: Pairs,
    pub shape: PackedShape,
    num_blocks: usize,
}

/// The elements.
pub(crate) enum Pairs {
    Bf16(Aligned<u32>),
    /// Scales are `[num_blocks, num_kv_heads, 2, block_size]`: those of keys, then those of values. None is zero.
    Int8 {
        bytes: Aligned<u16>,
        scales: Aligned<f32>,
    },
}

impl PackedPages {
    /// # Errors
    /// Out of memory.
    pub(crate) fn new(layout: &KvLayout, layer: &KvLayerShape) -> Result<Self, BackendError> {
        let shape = PackedShape {
            num_kv_heads: layer.num_kv_heads as usize,
            head_dim: layer.head_dim as usize,
            block_size: layout.block_size as usize,
        };
        let (num_blocks, what) = (layout.num_blocks as usize, "kv cache");
        let pairs = if layout.dtype == DType::I8 {
            Pairs::Int8 {
                bytes: Aligned::zeroed(num_blocks * shape.block_len(), what)?,
                scales: Aligned::zeroed(num_blocks * shape.block_scales(), what)?,
            }
        } else {
            Pairs::Bf16(Aligned::zeroed(num_blocks * shape.block_len(), what)?)
        };
        Ok(Self { pairs, shape, num_blocks })
    }

    /// Where their memory lies.
    pub(crate) fn ranges(&self) -> Vec<Range> {
        match &self.pairs {
            Pairs::Bf16(pairs) => vec![Range::of(pairs)],
            Pairs::Int8 { bytes, scales } => vec![Range::of(bytes), Range::of(scales)],
        }
    }

    /// Whether elements are bytes with scales.
    #[inline(always)]
    pub(crate) const fn is_bytes(&self) -> bool {
        matches!(self.pairs, Pairs::Int8 { .. })
    }

    /// Panics if a block lies outside the cache.
    #[inline(always)]
    pub(crate) fn check(&self, block: usize) {
        assert!(block < self.num_blocks, "block {block} of {}", self.num_blocks);
    }

    /// Where the panel of keys and the row of values with `offset` of `head` begin.
    #[inline(always)]
    pub(crate) fn address(&self, block: usize, head: usize, offset: usize) -> (*const u8, *const u8) {
        let (key, value) =
            (self.shape.key_panel(block, head, offset), self.shape.value_row(block, head, offset));
        match &self.pairs {
            Pairs::Bf16(pairs) => {
                let start = pairs.as_ptr();
                (start.wrapping_add(key).cast(), start.wrapping_add(value).cast())
            }
            Pairs::Int8 { bytes, .. } => {
                let start = bytes.as_ptr();
                (start.wrapping_add(key).cast(), start.wrapping_add(value).cast())
            }
        }
    }

    /// Bytes from the keys of a head to those of the next one, in the same block, and from its values.
    #[inline(always)]
    pub(crate) const fn head_strides(&self) -> [usize; 2] {
        let size = if self.is_bytes() { size_of::<u16>() } else { size_of::<u32>() };
        [self.shape.key_len() * size, self.shape.value_len() * size]
    }

    /// Copies block `src` of other pages of this shape and these elements.
    pub(crate) fn copy_block_of(&mut self, from: &Self, src: usize, dst: usize) {
        fn copy<T: Plain>(to: &mut Aligned<T>, from: &Aligned<T>, len: usize, src: usize, dst: usize) {
            to[dst * len..(dst + 1) * len].copy_from_slice(&from[src * len..(src + 1) * len]);
        }
        let shape = self.shape;
        match (&mut self.pairs, &from.pairs) {
            (Pairs::Bf16(pairs), Pairs::Bf16(from)) => copy(pairs, from, shape.block_len(), src, dst),
            (Pairs::Int8 { bytes, scales }, Pairs::Int8 { bytes: from, scales: from_scales }) => {
                copy(bytes, from, shape.block_len(), src, dst);
                copy(scales, from_scales, shape.block_scales(), src, dst);
            }
            _ => unreachable!("both are allocated from one layout"),
        }
    }

    pub(crate) fn copy_block(&mut self, src: usize, dst: usize) {
        fn copy<T: Plain>(array: &mut Aligned<T>, len: usize, src: usize, dst: usize) {
            array.copy_within(src * len..(src + 1) * len, dst * len);
        }
        let shape = self.shape;
        match &mut self.pairs {
            Pairs::Bf16(pairs) => copy(pairs, shape.block_len(), src, dst),
            Pairs::Int8 { bytes, scales } => {
                copy(bytes, shape.block_len(), src, dst);
                copy(scales, shape.block_scales(), src, dst);
            }
        }
    }
}
