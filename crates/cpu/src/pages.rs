//! Pages whose keys and values are ready for pair products: what [`crate::ops::paged`] reads.
//!
//! A block of `B` tokens holds, per head, its keys as panels `[head_dim / 2][lane][2]` of up to [`PANEL`] tokens a lane,
//! and its values as `[pair of tokens][head_dim][2]`. Odd ends are filled up: `head_dim` to whole panels, and a block of
//! one token to a pair. Elements are bf16, or bytes with one scale per key and one per value, of a token and head. Stored
//! numbers are finite, so that a weight of zero leaves nothing of them.

use quire_backend::quant::TINY;
use quire_backend::{BackendError, KvLayerShape, KvLayout};

use quire_core::DType;

use crate::buffer::{Aligned, Shared};
use crate::element::Plain;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel};

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
        Ok(Self { pairs, shape })
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

/// [`PackedPages`], written by several threads, each its own slots. Of values single halves are shared, since the tokens
/// of a pair may be written by two threads.
#[derive(Clone, Copy)]
pub(crate) struct SharedPackedPages<'a> {
    pairs: SharedPairs<'a>,
    shape: PackedShape,
}

#[derive(Clone, Copy)]
enum SharedPairs<'a> {
    Bf16 { k: Shared<'a, u32>, v: Shared<'a, u16> },
    Int8 { k: Shared<'a, u16>, v: Shared<'a, i8>, scales: Shared<'a, f32> },
}

impl<'a> SharedPackedPages<'a> {
    pub(crate) fn new(pages: &'a mut PackedPages) -> Self {
        let shape = pages.shape;
        let pairs = match &mut pages.pairs {
            Pairs::Bf16 { k, v } => SharedPairs::Bf16 { k: Shared::new(k), v: Shared::new(v.halves_mut()) },
            Pairs::Int8 { k, v, scales } => SharedPairs::Int8 {
                k: Shared::new(k),
                v: Shared::new(v.bytes_mut()),
                scales: Shared::new(scales),
            },
        };
        Self { pairs, shape }
    }
}

/// Stores keys and values of several rows; they are made finite. No other thread may write these slots.
pub(crate) struct StoreRows<'a> {
    pub pages: SharedPackedPages<'a>,
    /// `[rows]`
    pub slots: &'a [u32],
    /// `[rows, stride]`, of which the last columns are keys and then values.
    pub qkv: &'a [f32],
    pub stride: usize,
}

impl PairKernel for StoreRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let PackedShape { num_kv_heads, head_dim, .. } = self.pages.shape;
        let values = self.stride - num_kv_heads * head_dim;
        let keys = values - num_kv_heads * head_dim;
        // Head by head, as the tokens of one share the cache lines of its panels.
        for head in 0..num_kv_heads {
            for (slot, row) in self.slots.iter().zip(self.qkv.chunks_exact(self.stride)) {
                let key = &row[keys + head * head_dim..][..head_dim];
                let value = &row[values + head * head_dim..][..head_dim];
                // SAFETY: the caller's.
                unsafe { self.pages.store::<D>(*slot, head, key, value) };
            }
        }
    }
}

impl SharedPackedPages<'_> {
    /// One head's key and value at `slot`, which is the caller's alone.
    #[inline(always)]
    unsafe fn store<D: ByteDot>(&self, slot: u32, head: usize, key: &[f32], value: &[f32]) {
        let shape = self.shape;
        let (block, offset) = (slot as usize / shape.block_size, slot as usize % shape.block_size);
        let key_at = shape.key_panel(block, head, offset) + offset % shape.lanes();
        let value_at = 2 * shape.value_row(block, head, offset) + offset % 2;
        let (lanes, pairs) = (shape.lanes(), shape.key_pairs());
        // SAFETY: in bounds as `strided` has checked; slots are disjoint, and this one is ours by contract.
        unsafe {
            match self.pairs {
                SharedPairs::Bf16 { k, v } => {
                    let (k, v) = (k.strided(key_at, lanes, pairs), v.strided(value_at, 2, value.len()));
                    each_pair::<D>(key, |i, pair| *k.add(i * lanes) = pair);
                    each_pair::<D>(value, |i, pair| {
                        *v.add(4 * i) = pair as u16;
                        if 2 * i + 1 < value.len() {
                            *v.add(4 * i + 2) = (pair >> 16) as u16;
                        }
                    });
                }
                SharedPairs::Int8 { k, v, scales } => {
                    let at = (block * shape.num_kv_heads + head) * 2 * shape.block_size + offset;
                    let scales = scales.strided(at, shape.block_size, 2);
                    let (k, v) = (k.strided(key_at, lanes, pairs), v.strided(value_at, 2, value.len()));
                    *scales = each_byte(key, |i, byte| *k.cast::<i8>().add(i / 2 * lanes * 2 + i % 2) = byte);
                    *scales.add(shape.block_size) = each_byte(value, |i, byte| *v.add(2 * i) = byte);
                }
            }
        }
    }
}

/// What bf16 can hold.
const MAX: f32 = 3.389_531_4e38;

/// Makes numbers finite, rounds them, and hands out the pairs with their number.
#[inline(always)]
unsafe fn each_pair<D: ByteDot>(values: &[f32], mut to: impl FnMut(usize, u32)) {
    const CHUNK: usize = 2 * PANEL;
    for (chunk, values) in values.chunks(CHUNK).enumerate() {
        let (mut padded, mut pairs) = ([0.0; CHUNK], [0; PANEL]);
        padded[..values.len()].copy_from_slice(values);
        // SAFETY: both arrays hold two panels; the rest is the caller's.
        unsafe {
            let finite = |from: &[f32]| {
                let x = D::max(D::load_sums(from.as_ptr()), D::splat(-MAX)); // NaN, too
                D::min(x, D::splat(MAX))
            };
            D::store_pairs(pairs.as_mut_ptr(), finite(&padded), finite(&padded[PANEL..]));
        }
        let number = values.len().div_ceil(2);
        pairs[..number].iter().enumerate().for_each(|(i, pair)| to(chunk * PANEL + i, *pair));
    }
}

/// Rounds to bytes, whose largest becomes 127, and hands them out with their number. Returns the scale, which is positive.
#[inline(always)]
fn each_byte(values: &[f32], mut to: impl FnMut(usize, i8)) -> f32 {
    let max = values.iter().fold(TINY, |max, x| max.max(finite(*x).abs()));
    let inverse = 127.0 / max;
    let codes = values.iter().map(|x| (finite(*x) * inverse).round_ties_even() as i8);
    codes.enumerate().for_each(|(i, code)| to(i, code));
    max / 127.0
}

/// In the range of bf16; NaN becomes the lowest number.
#[inline(always)]
fn finite(x: f32) -> f32 {
    let x = if x > -MAX { x } else { -MAX };
    if x < MAX { x } else { MAX }
}
