//! Pages whose keys and values are ready for pair products: what `store` writes and [`crate::ops::paged`] reads.
//!
//! A block of `B` tokens holds, per head, its keys as panels `[head_dim / 2][lane][2]` of up to [`PANEL`] tokens a lane,
//! and its values as `[pair of tokens][head_dim][2]`. Odd ends are filled up: `head_dim` to whole panels, and a block of
//! one token to a pair. Elements are bf16, or bytes with one scale per key and one per value, of a token and head. Stored
//! numbers are finite, so that a weight of zero leaves nothing of them.

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

    /// First pair of the panel with `offset` of `head`'s keys.
    #[inline(always)]
    pub const fn key_panel(&self, block: usize, head: usize, offset: usize) -> usize {
        (block * self.num_kv_heads + head) * self.key_len()
            + offset / self.lanes() * self.lanes() * self.key_pairs()
    }

    /// First column of the row with `offset` of `head`'s values.
    #[inline(always)]
    pub const fn value_row(&self, block: usize, head: usize, offset: usize) -> usize {
        (block * self.num_kv_heads + head) * self.value_len() + offset / 2 * self.columns()
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
    Bf16 {
        k: Aligned<u32>,
        v: Aligned<u32>,
    },
    /// Scales are `[num_blocks, num_kv_heads, 2, block_size]`: those of keys, then those of values. None is zero.
    Int8 {
        k: Aligned<u16>,
        v: Aligned<u16>,
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
        let heads = layout.num_blocks as usize * shape.num_kv_heads;
        let (k, v, what) = (heads * shape.key_len(), heads * shape.value_len(), "kv cache");
        let pairs = if layout.dtype == DType::I8 {
            Pairs::Int8 {
                k: Aligned::zeroed(k, what)?,
                v: Aligned::zeroed(v, what)?,
                scales: Aligned::zeroed(heads * 2 * shape.block_size, what)?,
            }
        } else {
            Pairs::Bf16 { k: Aligned::zeroed(k, what)?, v: Aligned::zeroed(v, what)? }
        };
        Ok(Self { pairs, shape, num_blocks: layout.num_blocks as usize })
    }

    /// Where their memory lies.
    pub(crate) fn ranges(&self) -> Vec<Range> {
        match &self.pairs {
            Pairs::Bf16 { k, v } => vec![Range::of(k), Range::of(v)],
            Pairs::Int8 { k, v, scales } => vec![Range::of(k), Range::of(v), Range::of(scales)],
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
            Pairs::Bf16 { k, v } => {
                (k.as_ptr().wrapping_add(key).cast(), v.as_ptr().wrapping_add(value).cast())
            }
            Pairs::Int8 { k, v, .. } => {
                (k.as_ptr().wrapping_add(key).cast(), v.as_ptr().wrapping_add(value).cast())
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
        let heads = self.shape.num_kv_heads;
        let (key, value) = (heads * self.shape.key_len(), heads * self.shape.value_len());
        match (&mut self.pairs, &from.pairs) {
            (Pairs::Bf16 { k, v }, Pairs::Bf16 { k: from_k, v: from_v }) => {
                copy(k, from_k, key, src, dst);
                copy(v, from_v, value, src, dst);
            }
            (Pairs::Int8 { k, v, scales }, Pairs::Int8 { k: from_k, v: from_v, scales: from_scales }) => {
                copy(k, from_k, key, src, dst);
                copy(v, from_v, value, src, dst);
                copy(scales, from_scales, heads * 2 * self.shape.block_size, src, dst);
            }
            _ => unreachable!("both are allocated from one layout"),
        }
    }

    pub(crate) fn copy_block(&mut self, src: usize, dst: usize) {
        fn copy<T: Plain>(array: &mut Aligned<T>, len: usize, src: usize, dst: usize) {
            array.copy_within(src * len..(src + 1) * len, dst * len);
        }
        let heads = self.shape.num_kv_heads;
        let (key, value) = (heads * self.shape.key_len(), heads * self.shape.value_len());
        match &mut self.pairs {
            Pairs::Bf16 { k, v } => {
                copy(k, key, src, dst);
                copy(v, value, src, dst);
            }
            Pairs::Int8 { k, v, scales } => {
                copy(k, key, src, dst);
                copy(v, value, src, dst);
                copy(scales, heads * 2 * self.shape.block_size, src, dst);
            }
        }
    }
}
