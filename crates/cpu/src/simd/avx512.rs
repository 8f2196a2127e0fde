//! AVX-512 with bf16 dot products (`vdpbf16ps`).

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::pairs::{PairDot, PairKernel};

#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16;

/// # Safety
/// The machine has the features, and whatever the kernel asks for.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn run<K: PairKernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512Bf16>() }
}

// SAFETY: each method needs only the features that `run` enables and valid pointers, which the trait demands.
unsafe impl PairDot for Avx512Bf16 {
    const TILE_SUMS: usize = 24;
    type S = Avx2;
    type V = __m512;
    type W = __m512i;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the trait's contract; so for all below.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(weights: *const u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(weights.cast()) }
    }

    #[inline(always)]
    unsafe fn dot(sums: __m512, weights: __m512i, x: *const u32) -> __m512 {
        // SAFETY: as above; vectors of one size may be reinterpreted.
        unsafe {
            let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
            _mm512_dpbf16_ps(sums, pairs(weights), pairs(_mm512_set1_epi32((*x).cast_signed())))
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, sums: __m512) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, sums) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }

    #[inline(always)]
    unsafe fn scale(a: __m512, n: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_scalef_ps(a, n) }
    }

    #[inline(always)]
    unsafe fn zero_below(v: __m512, x: __m512, bound: f32) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, _mm512_set1_ps(bound)), v) }
    }

    #[inline(always)]
    unsafe fn highest(v: __m512) -> f32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_max_ps(v) }
    }

    #[inline(always)]
    unsafe fn store_pairs(to: *mut u32, low: __m512, high: __m512) {
        // SAFETY: as above; vectors of one size may be reinterpreted.
        unsafe {
            let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(to.cast(), pairs);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u32) {
        // SAFETY: a hint; it does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn prefetch_near(at: *const u32) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
