//! The paged cache. Per layer either `[num_blocks, num_kv_heads, block_size, head_dim]`, so that one head's keys within a
//! block follow each other, or packed for products of pairs (`pages.rs`).

use std::sync::Arc;

use half::{bf16, f16};
use quire_backend::convert::tensor_error;
use quire_backend::{BackendError, KvLayerShape, KvLayout};
use quire_core::{BlockCopy, DType};

use crate::Precision;
use crate::buffer::Aligned;
use crate::element::Element;
use crate::pages::PackedPages;
use crate::populate::{Activity, Populating, Range};

/// The cache of one KV group.
pub struct CpuKv {
    /// Goes before the memory does.
    _populating: Option<Populating>,
    pub(crate) layers: Vec<KvLayer>,
    /// The same layers with other blocks, if there is a host tier. All is host memory here; it is a tier all the same.
    pub(crate) host: Vec<KvLayer>,
}

/// K and V of a layer.
pub(crate) enum KvLayer {
    F32(Pages<f32>),
    F16(Pages<f16>),
    Bf16(Pages<bf16>),
    Packed(PackedPages),
}

/// K and V of a layer in one element type.
pub(crate) struct Pages<T> {
    pub k: Aligned<T>,
    pub v: Aligned<T>,
    pub shape: PageShape,
}

/// Where things lie in [`Pages`].
#[derive(Clone, Copy)]
pub(crate) struct PageShape {
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub block_size: usize,
}

impl PageShape {
    /// Elements of a block.
    pub const fn block_len(&self) -> usize {
        self.num_kv_heads * self.block_size * self.head_dim
    }

    /// First element of `head`'s key (or value) at `offset` within `block`.
    #[inline(always)]
    pub const fn at(&self, block: usize, head: usize, offset: usize) -> usize {
        ((block * self.num_kv_heads + head) * self.block_size + offset) * self.head_dim
    }
}

impl CpuKv {
    /// A bf16 cache is packed where products are of bf16, one of bytes always.
    pub(crate) fn new(layout: &KvLayout, precision: Precision) -> Result<Self, BackendError> {
        let layer = |shape: &KvLayerShape| {
            Ok(match layout.dtype {
                DType::F32 => KvLayer::F32(Pages::new(layout, shape)?),
                DType::F16 => KvLayer::F16(Pages::new(layout, shape)?),
                DType::I8 => KvLayer::Packed(PackedPages::new(layout, shape)?),
                DType::BF16 if precision == Precision::Bf16 => {
                    KvLayer::Packed(PackedPages::new(layout, shape)?)
                }
                DType::BF16 => KvLayer::Bf16(Pages::new(layout, shape)?),
                other => {
                    let message =
                        format!("type {other} is not supported on cpu yet, use f32, f16, bf16 or int8");
                    return Err(tensor_error("kv cache", message));
                }
            })
        };
        let layers = layout.layers.iter().map(layer).collect::<Result<_, _>>()?;
        Ok(Self { _populating: None, layers, host: Vec::new() })
    }

    /// With memory that becomes present while `activity` shows none.
    pub(crate) fn populated(self, activity: Arc<Activity>) -> Self {
        let ranges = self.layers.iter().flat_map(KvLayer::ranges).collect();
        Self { _populating: Some(Populating::start(ranges, activity)), ..self }
    }

    pub(crate) fn copy_block(&mut self, copy: BlockCopy) {
        for layer in &mut self.layers {
            match layer {
                KvLayer::F32(pages) => pages.copy_block(copy),
                KvLayer::F16(pages) => pages.copy_block(copy),
                KvLayer::Bf16(pages) => pages.copy_block(copy),
                KvLayer::Packed(pages) => pages.copy_block(copy.src.0 as usize, copy.dst.0 as usize),
            }
        }
    }
}

impl KvLayer {
    /// Where its memory lies.
    fn ranges(&self) -> Vec<Range> {
        match self {
            Self::F32(pages) => pages.ranges(),
            Self::F16(pages) => pages.ranges(),
            Self::Bf16(pages) => pages.ranges(),
            Self::Packed(pages) => pages.ranges(),
        }
    }

    /// Copies block `src` of `from`, which is of the same form, to block `dst`.
    pub(crate) fn copy_block_of(&mut self, from: &Self, src: usize, dst: usize) {
        match (self, from) {
            (Self::F32(pages), Self::F32(from)) => pages.copy_block_of(from, src, dst),
            (Self::F16(pages), Self::F16(from)) => pages.copy_block_of(from, src, dst),
            (Self::Bf16(pages), Self::Bf16(from)) => pages.copy_block_of(from, src, dst),
            (Self::Packed(pages), Self::Packed(from)) => pages.copy_block_of(from, src, dst),
            _ => unreachable!("both tiers are allocated from one layout"),
        }
    }
}

impl<T: Element> Pages<T> {
    fn new(layout: &KvLayout, layer: &KvLayerShape) -> Result<Self, BackendError> {
        let shape = PageShape {
            num_kv_heads: layer.num_kv_heads as usize,
            head_dim: layer.head_dim as usize,
            block_size: layout.block_size as usize,
        };
        let len = layout.num_blocks as usize * shape.block_len();
        Ok(Self { k: Aligned::zeroed(len, "kv cache")?, v: Aligned::zeroed(len, "kv cache")?, shape })
    }

    fn ranges(&self) -> Vec<Range> {
        vec![Range::of(&self.k), Range::of(&self.v)]
    }

    fn copy_block_of(&mut self, from: &Self, src: usize, dst: usize) {
        let len = self.shape.block_len();
        let (src, dst) = (src * len..(src + 1) * len, dst * len..(dst + 1) * len);
        self.k[dst.clone()].copy_from_slice(&from.k[src.clone()]);
        self.v[dst].copy_from_slice(&from.v[src]);
    }

    fn copy_block(&mut self, copy: BlockCopy) {
        let len = self.shape.block_len();
        let (src, dst) = (copy.src.0 as usize * len, copy.dst.0 as usize * len);
        self.k.copy_within(src..src + len, dst);
        self.v.copy_within(src..src + len, dst);
    }
}
