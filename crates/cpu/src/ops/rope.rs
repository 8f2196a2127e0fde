//! Norm and rotation of q and k, and k and v into the cache: one pass over a `qkv` row.

use std::ops::Range;

use half::{bf16, f16};
use quire_backend::{AttnShape, BackendError, RopeTable};

use super::norm::{inverse_rms, sum_of_squares};
use crate::buffer::{Aligned, Shared, SharedRows};
use crate::element::Element;
use crate::kv::{KvLayer, PageShape, Pages};
use crate::pool::Pool;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel};
use crate::simd::panel::{load_some, store_some};
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

/// Some rows, and their slots of the cache, which are the caller's alone.
pub(crate) struct RopeRows<'a> {
    pub rows: Range<usize>,
    /// `[tokens, stride]`
    pub qkv: SharedRows<'a>,
    pub shape: AttnShape,
    pub qk_norm: Option<(&'a [f32], &'a [f32])>,
    pub eps: f32,
    pub rope: Option<&'a CpuRope>,
    /// `[tokens]`, as the slots.
    pub positions: &'a [u32],
    pub slots: &'a [u32],
    pub cache: SharedLayer<'a>,
}

impl PairKernel for RopeRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let Range { mut start, end } = self.rows;
        let stride = self.qkv.cols;
        while start < end {
            // What is stored together is still in a near cache then.
            let slots = self.cache.first(&self.slots[start..end]);
            // SAFETY: the caller's.
            unsafe {
                for t in start..start + slots.len() {
                    self.turn_row::<D>(self.qkv.row(t), self.positions[t]);
                }
                let rows = self.qkv.values.slice(start * stride, slots.len() * stride);
                self.cache.store::<D>(slots, rows, stride);
            }
            start += slots.len();
        }
    }
}

impl RopeRows<'_> {
    #[inline(always)]
    unsafe fn turn_row<D: ByteDot>(&self, row: &mut [f32], position: u32) {
        let (q, kv) = row.split_at_mut(self.shape.q_size());
        let k = &mut kv[..self.shape.kv_size()];
        let angles = self.rope.map(|rope| rope.at(position));
        let weights = self.qk_norm.unzip();
        let head_dim = self.shape.head_dim as usize;
        for (heads, weight) in [(q, weights.0), (k, weights.1)] {
            for heads in heads.chunks_mut(PANEL * head_dim) {
                // SAFETY: the caller's.
                unsafe {
                    match (weight, angles) {
                        (Some(weight), _) => self.norm_and_turn::<D>(heads, weight, angles),
                        (None, Some(_)) => heads
                            .chunks_exact_mut(head_dim)
                            .for_each(|head| turn::<D>(head, angles, |x, _, _| x)),
                        (None, None) => {}
                    }
                }
            }
        }
    }

    /// Up to [`PANEL`] heads: first what each is scaled by, as one would wait for its own all alone.
    #[inline(always)]
    unsafe fn norm_and_turn<D: ByteDot>(
        &self,
        heads: &mut [f32],
        weight: &[f32],
        angles: Option<(&[f32], &[f32])>,
    ) {
        let head_dim = self.shape.head_dim as usize;
        let weight = &weight[..head_dim];
        let mut scales = [0.0; PANEL];
        for (scale, head) in scales.iter_mut().zip(heads.chunks_exact(head_dim)) {
            // SAFETY: the caller's.
            *scale = unsafe { sum_of_squares::<D>(head) };
        }
        scales = scales.map(|sum| inverse_rms(sum, head_dim, self.eps));
        for (scale, head) in scales.into_iter().zip(heads.chunks_exact_mut(head_dim)) {
            // SAFETY: `turn` asks for places within the head; the rest is the caller's.
            unsafe {
                turn::<D>(head, angles, |x, i, len| {
                    D::mul(x, D::mul(D::splat(scale), load_some::<D>(weight.as_ptr().add(i), len)))
                });
            }
        }
    }
}

/// Rotates a head by `angles`, after `norm(x, i, len)` of `len` elements from `i` on.
#[inline(always)]
unsafe fn turn<D: ByteDot>(
    head: &mut [f32],
    angles: Option<(&[f32], &[f32])>,
    norm: impl Fn(D::V, usize, usize) -> D::V,
) {
    let half = angles.map_or(0, |(cos, _)| cos.len());
    assert!(2 * half <= head.len(), "{half} angles for a head of {}", head.len());
    let x = head.as_mut_ptr();
    // SAFETY: places are within the head, those of angles within `half`; the rest is the caller's.
    unsafe {
        if let Some((cos, sin)) = angles {
            for i in (0..half).step_by(PANEL) {
                let (len, j) = (PANEL.min(half - i), half + i);
                let a = norm(load_some::<D>(x.add(i), len), i, len);
                let b = norm(load_some::<D>(x.add(j), len), j, len);
                let (cos, sin) =
                    (load_some::<D>(cos.as_ptr().add(i), len), load_some::<D>(sin.as_ptr().add(i), len));
                store_some::<D>(x.add(i), len, D::sub(D::mul(a, cos), D::mul(b, sin)));
                store_some::<D>(x.add(j), len, D::add(D::mul(b, cos), D::mul(a, sin)));
            }
        }
        for i in (2 * half..head.len()).step_by(PANEL) {
            let len = PANEL.min(head.len() - i);
            store_some::<D>(x.add(i), len, norm(load_some::<D>(x.add(i), len), i, len));
        }
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

    /// The first of `slots`: those whose keys and values are stored together.
    #[inline(always)]
    fn first<'s>(&self, slots: &'s [u32]) -> &'s [u32] {
        match self {
            Self::Packed(pages) if pages.is_panel(slots) => &slots[..PANEL],
            _ => &slots[..1],
        }
    }

    /// Stores the keys and values of rows `[rows, stride]`, which are their last columns, at `slots`.
    ///
    /// # Safety
    /// No other thread writes these slots; the rest as for [`ByteDot`].
    #[inline(always)]
    unsafe fn store<D: ByteDot>(&self, slots: &[u32], qkv: &[f32], stride: usize) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::F32(pages) => pages.store_rows(slots, qkv, stride),
                Self::F16(pages) => pages.store_rows(slots, qkv, stride),
                Self::Bf16(pages) => pages.store_rows(slots, qkv, stride),
                Self::Packed(pages) => StoreRows { pages: *pages, slots, qkv, stride }.run::<D>(),
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
