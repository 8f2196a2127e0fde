//! Norm and rotation of q and k, and k and v into the cache: one pass over a `qkv` row.

use half::{bf16, f16};
use quire_backend::{AttnShape, BackendError, RopeTable};

use super::norm::norm_in_place;
use crate::buffer::{Aligned, Shared};
use crate::element::Element;
use crate::kv::{KvLayer, PageShape, Pages};
use crate::pool::Pool;
use crate::simd::pairs::dispatch_pairs;
use crate::simd::{Isa, Kernel, Simd};
use crate::store::{SharedPackedPages, StoreRows};

/// Sines and cosines of all positions.
pub struct CpuRope {
    half: usize,
    /// `[max_positions, 2, half]`: cosines, then sines.
    table: Aligned<f32>,
}

impl CpuRope {
    pub(crate) fn new(pool: &mut Pool, source: &RopeTable) -> Result<Self, BackendError> {
        let half = source.inv_freq.len();
        let mut table = Aligned::zeroed(source.max_positions as usize * 2 * half, "rope table")?;
        let rows = Shared::new(&mut table);
        pool.split(source.max_positions as usize, 256, |_, positions| {
            for position in positions {
                // SAFETY: each position's row is written once.
                let (cos, sin) = unsafe { rows.slice(position * 2 * half, 2 * half) }.split_at_mut(half);
                for i in 0..half {
                    (sin[i], cos[i]) = source.sin_cos(position as u32, i);
                }
            }
        })?;
        Ok(Self { half, table })
    }

    /// Cosines and sines of a position. Panics past the last.
    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let start = position as usize * 2 * self.half;
        assert!(start < self.table.len(), "position {position} is past the rope table");
        self.table[start..start + 2 * self.half].split_at(self.half)
    }
}

/// One row.
pub(crate) struct RopeRow<'a> {
    pub row: &'a mut [f32],
    pub shape: AttnShape,
    pub qk_norm: Option<(&'a [f32], &'a [f32])>,
    pub eps: f32,
    pub rope: Option<&'a CpuRope>,
    pub position: u32,
}

impl Kernel for RopeRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let head_dim = self.shape.head_dim as usize;
        let (q, kv) = self.row.split_at_mut(self.shape.q_size());
        let k = &mut kv[..self.shape.kv_size()];
        let angles = self.rope.map(|rope| rope.at(self.position));
        let weights = self.qk_norm.unzip();
        for (heads, weight) in [(q, weights.0), (k, weights.1)] {
            for head in heads.chunks_exact_mut(head_dim) {
                if let Some(weight) = weight {
                    // SAFETY: the caller's.
                    unsafe { norm_in_place::<S>(head, weight, self.eps) };
                }
                if let Some((cos, sin)) = angles {
                    rotate(head, cos, sin);
                }
            }
        }
    }
}

#[inline(always)]
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (low, high) = head[..2 * half].split_at_mut(half);
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// A layer's cache, written by several threads, each its own slots.
#[derive(Clone, Copy)]
pub(crate) enum SharedLayer<'a> {
    F32(SharedPages<'a, f32>),
    F16(SharedPages<'a, f16>),
    Bf16(SharedPages<'a, bf16>),
    Packed(SharedPackedPages<'a>),
}

#[derive(Clone, Copy)]
pub(crate) struct SharedPages<'a, T> {
    k: Shared<'a, T>,
    v: Shared<'a, T>,
    shape: PageShape,
}

impl<'a> SharedLayer<'a> {
    pub(crate) fn new(layer: &'a mut KvLayer) -> Self {
        match layer {
            KvLayer::F32(pages) => Self::F32(SharedPages::new(pages)),
            KvLayer::F16(pages) => Self::F16(SharedPages::new(pages)),
            KvLayer::Bf16(pages) => Self::Bf16(SharedPages::new(pages)),
            KvLayer::Packed(pages) => Self::Packed(SharedPackedPages::new(pages)),
        }
    }

    /// Stores the keys and values of rows `[rows, stride]`, which are their last columns, at `slots`.
    ///
    /// # Safety
    /// `isa` is available, and no other thread writes these slots.
    pub(crate) unsafe fn store(&self, isa: Isa, slots: &[u32], qkv: &[f32], stride: usize) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::F32(pages) => pages.store_rows(slots, qkv, stride),
                Self::F16(pages) => pages.store_rows(slots, qkv, stride),
                Self::Bf16(pages) => pages.store_rows(slots, qkv, stride),
                Self::Packed(pages) => dispatch_pairs(isa, StoreRows { pages: *pages, slots, qkv, stride }),
            }
        }
    }
}

impl<'a, T: Element> SharedPages<'a, T> {
    fn new(pages: &'a mut Pages<T>) -> Self {
        Self { k: Shared::new(&mut pages.k), v: Shared::new(&mut pages.v), shape: pages.shape }
    }

    unsafe fn store_rows(&self, slots: &[u32], qkv: &[f32], stride: usize) {
        let kv_size = self.shape.num_kv_heads * self.shape.head_dim;
        for (slot, row) in slots.iter().zip(qkv.chunks_exact(stride)) {
            let (k, v) = row[stride - 2 * kv_size..].split_at(kv_size);
            // SAFETY: the caller's.
            unsafe { self.store(*slot, k, v) };
        }
    }

    unsafe fn store(&self, slot: u32, k: &[f32], v: &[f32]) {
        let (block, offset) = (slot as usize / self.shape.block_size, slot as usize % self.shape.block_size);
        let head_dim = self.shape.head_dim;
        let heads = k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim));
        for (head, (k, v)) in heads.enumerate() {
            let at = self.shape.at(block, head, offset);
            // SAFETY: slots are disjoint, and this one is ours by contract.
            let (k_out, v_out) = unsafe { (self.k.slice(at, head_dim), self.v.slice(at, head_dim)) };
            k_out.iter_mut().zip(k).for_each(|(to, from)| *to = T::from_f32(*from));
            v_out.iter_mut().zip(v).for_each(|(to, from)| *to = T::from_f32(*from));
        }
    }
}
