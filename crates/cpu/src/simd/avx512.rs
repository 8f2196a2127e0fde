//! AVX-512 with bf16 dot products (`vdpbf16ps`).

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::pairs::{PairDot, PairKernel};

#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16;

/// # Safety
/// The machine has the features, and whatever the kernel asks for.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bf16")]
pub(super) unsafe fn run<K: PairKernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512Bf16>() }
}

// SAFETY: each method needs only the features that `run` enables and valid pointers, which the trait demands.
unsafe impl PairDot for Avx512Bf16 {
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
    unsafe fn prefetch(at: *const u32) {
        // SAFETY: a hint; it does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}
