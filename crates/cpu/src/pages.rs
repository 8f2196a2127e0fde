//! Pages whose keys and values are ready for pair products: what [`crate::ops::paged`] reads.
//!
//! A block of `B` tokens holds, per head, its keys as panels `[head_dim / 2][lane][2]` of up to [`PANEL`] tokens a lane,
//! and its values as `[pair of tokens][head_dim][2]`. Odd ends are filled up: `head_dim` to whole panels, and a block of
//! one token to a pair. Stored numbers are finite, so that a weight of zero leaves nothing of them.

use quire_backend::{BackendError, KvLayerShape, KvLayout};

use crate::buffer::{Aligned, Shared};
use crate::packed::round_row;
use crate::simd::pairs::{PANEL, PairDot, PairKernel};

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

/// K and V of a layer in bf16.
pub(crate) struct PackedPages {
    pub k: Aligned<u32>,
    pub v: Aligned<u32>,
    pub shape: PackedShape,
}

impl PackedPages {
    pub(crate) fn new(layout: &KvLayout, layer: &KvLayerShape) -> Result<Self, BackendError> {
        let shape = PackedShape {
            num_kv_heads: layer.num_kv_heads as usize,
            head_dim: layer.head_dim as usize,
            block_size: layout.block_size as usize,
        };
        let heads = layout.num_blocks as usize * shape.num_kv_heads;
        Ok(Self {
            k: Aligned::zeroed(heads * shape.key_len(), "kv cache")?,
            v: Aligned::zeroed(heads * shape.value_len(), "kv cache")?,
            shape,
        })
    }

    pub(crate) fn copy_block(&mut self, src: usize, dst: usize) {
        let heads = self.shape.num_kv_heads;
        let (k, v) = (heads * self.shape.key_len(), heads * self.shape.value_len());
        self.k.copy_within(src * k..(src + 1) * k, dst * k);
        self.v.copy_within(src * v..(src + 1) * v, dst * v);
    }
}

/// [`PackedPages`], written by several threads, each its own slots.
#[derive(Clone, Copy)]
pub(crate) struct SharedPackedPages<'a> {
    k: Shared<'a, u32>,
    /// Single halves: the tokens of a pair may be written by two threads.
    v: Shared<'a, u16>,
    shape: PackedShape,
}

impl<'a> SharedPackedPages<'a> {
    pub(crate) fn new(pages: &'a mut PackedPages) -> Self {
        Self { k: Shared::new(&mut pages.k), v: Shared::new(pages.v.halves_mut()), shape: pages.shape }
    }
}

/// Stores a row's keys and values at `slot`; they are made finite. No other thread may write this slot.
pub(crate) struct StoreRow<'a> {
    pub pages: SharedPackedPages<'a>,
    pub slot: u32,
    pub k: &'a [f32],
    pub v: &'a [f32],
}

impl PairKernel for StoreRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: PairDot>(self) {
        let shape = self.pages.shape;
        let (block, offset) = (self.slot as usize / shape.block_size, self.slot as usize % shape.block_size);
        let heads = self.k.chunks_exact(shape.head_dim).zip(self.v.chunks_exact(shape.head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let key = shape.key_panel(block, head, offset) + offset % shape.lanes();
            let key = self.pages.k.strided(key, shape.lanes(), shape.key_pairs());
            let value = 2 * shape.value_row(block, head, offset) + offset % 2;
            let value = self.pages.v.strided(value, 2, shape.head_dim);
            // SAFETY: in bounds as `strided` has checked; slots are disjoint, and this one is ours by contract.
            unsafe {
                each_pair::<D>(k, |i, pair| *key.add(i * shape.lanes()) = pair);
                each_pair::<D>(v, |i, pair| {
                    *value.add(4 * i) = pair as u16;
                    if 2 * i + 1 < v.len() {
                        *value.add(4 * i + 2) = (pair >> 16) as u16;
                    }
                });
            }
        }
    }
}

/// Rounds finite pairs and hands them out with their number.
#[inline(always)]
unsafe fn each_pair<D: PairDot>(values: &[f32], mut to: impl FnMut(usize, u32)) {
    const CHUNK: usize = 2 * PANEL;
    for (chunk, values) in values.chunks(CHUNK).enumerate() {
        let (mut finite, mut pairs) = ([0.0; CHUNK], [0; PANEL]);
        finite.iter_mut().zip(values).for_each(|(to, from)| *to = finite_bf16(*from));
        // SAFETY: the caller's.
        unsafe { round_row::<D>(&finite, &mut pairs) };
        let number = values.len().div_ceil(2);
        pairs[..number].iter().enumerate().for_each(|(i, pair)| to(chunk * PANEL + i, *pair));
    }
}

/// What bf16 cannot hold becomes the largest number that it can, and NaN zero.
#[inline(always)]
fn finite_bf16(x: f32) -> f32 {
    const MAX: f32 = 3.389_531_4e38;
    // Comparisons of this form are one instruction each; `f32::clamp` also minds NaN.
    let x = if x.is_nan() { 0.0 } else { x };
    let x = if x > -MAX { x } else { -MAX };
    if x < MAX { x } else { MAX }
}
