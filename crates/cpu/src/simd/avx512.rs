//! AVX-512 with bf16 dot products (`vdpbf16ps`).

use std::arch::x86_64::*;

use super::Simd;
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

/// # Safety
/// As [`run`].
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
unsafe fn run_apart<K: PairKernel>(kernel: K) -> K::Output {
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
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: as above.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(v), high))
        }
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
    unsafe fn store_zipped(to: *mut u32, even: __m512, odd: __m512) {
        /// Half `i` of the first 16, then half `i` of the others.
        const ORDER: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 32 {
                order[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            order
        };
        // SAFETY: as above; ORDER is one vector.
        unsafe {
            let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even));
            let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
            _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(order, halves));
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[[u32; 16]; 16], to: *mut u32) {
        // SAFETY: as above. Squares of 2, then of 4 within quarters, then the quarters change places.
        unsafe {
            let mut a = [_mm512_setzero_si512(); 16];
            for i in 0..8 {
                let low = _mm512_loadu_si512(rows[2 * i].as_ptr().cast());
                let high = _mm512_loadu_si512(rows[2 * i + 1].as_ptr().cast());
                (a[2 * i], a[2 * i + 1]) =
                    (_mm512_unpacklo_epi32(low, high), _mm512_unpackhi_epi32(low, high));
            }
            let mut b = a;
            for i in [0, 4, 8, 12] {
                b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
                b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
                b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
                b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
            }
            for i in 0..4 {
                let even = [
                    _mm512_shuffle_i32x4::<0x88>(b[i], b[i + 4]),
                    _mm512_shuffle_i32x4::<0x88>(b[i + 8], b[i + 12]),
                ];
                let odd = [
                    _mm512_shuffle_i32x4::<0xDD>(b[i], b[i + 4]),
                    _mm512_shuffle_i32x4::<0xDD>(b[i + 8], b[i + 12]),
                ];
                let columns = [
                    _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
                    _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
                    _mm512_shuffle_i32x4::<0xDD>(even[0], even[1]),
                    _mm512_shuffle_i32x4::<0xDD>(odd[0], odd[1]),
                ];
                for (quarter, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add((4 * quarter + i) * 16).cast(), column);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u32) {
        // SAFETY: a hint; it does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn apart<K: PairKernel>(kernel: K) -> K::Output {
        // SAFETY: as above.
        unsafe { run_apart(kernel) }
    }
}
