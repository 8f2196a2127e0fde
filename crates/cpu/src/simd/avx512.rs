//! AVX-512 with VNNI, with and without bf16 dot products (`vdpbf16ps`).

use std::arch::x86_64::*;
use std::time::Instant;

use super::Simd;
use super::avx2::Avx2;
use super::pairs::{PANEL, PairDot, PairKernel};

/// `BF16`: pairs are multiplied by `vdpbf16ps`; else as two multiply-adds of floats, with the same results.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>;

/// A kernel as functions that enable the features, and stay functions: see [`PairDot::apart`].
pub(super) trait OnAvx512: PairKernel + Sized {
    /// # Safety
    /// The machine has the features, and whatever the kernel asks for.
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
    unsafe fn on_avx512_bf16(self) -> Self::Output {
        // SAFETY: the caller's.
        unsafe { self.run::<Avx512<true>>() }
    }

    /// # Safety
    /// As [`Self::on_avx512_bf16`].
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn on_avx512(self) -> Self::Output {
        // SAFETY: the caller's.
        unsafe { self.run::<Avx512<false>>() }
    }
}

impl<K: PairKernel> OnAvx512 for K {}

/// Whether `vdpbf16ps` multiplies more pairs in a time than two multiply-adds of floats. It takes a cycle or less on some
/// processors, and more than two on others, which have it for a unit beside it that does matrices. Measured in some 300 us:
/// the best of rounds enough that the machine is not busy with something else in all of them.
pub(super) fn bf16_is_faster() -> bool {
    const ROUNDS: usize = 32;
    // SAFETY: asked only where the machine has both.
    let measure = || unsafe { [Chains.on_avx512_bf16(), Chains.on_avx512()] };
    let least = |a: [f64; 2], b: [f64; 2]| [a[0].min(b[0]), a[1].min(b[1])];
    let [bf16, floats] = (0..ROUNDS).map(|_| measure()).fold([f64::INFINITY; 2], least);
    bf16 < floats
}

/// Seconds that the same number of products takes, in chains enough to hide the latency of one.
struct Chains;

impl PairKernel for Chains {
    type Output = f64;

    #[inline(always)]
    unsafe fn run<D: PairDot>(self) -> f64 {
        // SAFETY: the arrays hold a panel, or two; the rest is the caller's.
        unsafe {
            let pairs = std::hint::black_box([0x3F80_3F80; PANEL]);
            let (weights, floats) = (D::load(pairs.as_ptr()), [1.0; 2 * PANEL]);
            let mut sums = [D::zero(); 12];
            let start = Instant::now();
            for _ in 0..500 {
                for sum in &mut sums {
                    *sum = if D::SPLITS {
                        D::dot_split(*sum, weights, floats.as_ptr(), floats[PANEL..].as_ptr())
                    } else {
                        D::dot(*sum, weights, pairs.as_ptr())
                    };
                }
            }
            for sum in sums {
                std::hint::black_box(D::highest(sum));
            }
            start.elapsed().as_secs_f64()
        }
    }
}

/// The even elements of pairs as floats.
#[inline(always)]
unsafe fn even(pairs: __m512i) -> __m512 {
    // SAFETY: the features are there, by contract.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)) }
}

/// The odd ones.
#[inline(always)]
unsafe fn odd(pairs: __m512i) -> __m512 {
    // SAFETY: as above.
    unsafe { _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(HIGH_HALF))) }
}

const HIGH_HALF: i32 = 0xFFFF_0000_u32.cast_signed();

/// `x` rounded to bf16 in its upper half, as `packed::round_pairs` does; what is in the lower half means nothing.
#[inline(always)]
unsafe fn round_high(x: __m512) -> __m512i {
    // SAFETY: as above.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let tie = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(tie, _mm512_set1_epi32(0x7FFF)));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    }
}

// SAFETY: each method needs only the features that `on_avx512` enables, `on_avx512_bf16` where `BF16`, and valid
// pointers, which the trait demands.
unsafe impl<const BF16: bool> PairDot for Avx512<BF16> {
    const TILE_SUMS: usize = 24;
    const SPLITS: bool = !BF16;
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
            let x = _mm512_set1_epi32((*x).cast_signed());
            if BF16 {
                let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
                return _mm512_dpbf16_ps(sums, pairs(weights), pairs(x));
            }
            let sums = _mm512_fmadd_ps(odd(weights), odd(x), sums);
            _mm512_fmadd_ps(even(weights), even(x), sums)
        }
    }

    #[inline(always)]
    unsafe fn split(pairs: *const u32, len: usize, evens: *mut f32, odds: *mut f32) {
        // SAFETY: as above; what is masked out is not touched.
        unsafe {
            let pairs = if len >= PANEL {
                Self::load(pairs)
            } else {
                _mm512_maskz_loadu_epi32((1 << len) - 1, pairs.cast())
            };
            _mm512_storeu_ps(evens, even(pairs));
            _mm512_storeu_ps(odds, odd(pairs));
        }
    }

    #[inline(always)]
    unsafe fn dot_split(sums: __m512, weights: __m512i, x_even: *const f32, x_odd: *const f32) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let sums = _mm512_fmadd_ps(odd(weights), _mm512_set1_ps(*x_odd), sums);
            _mm512_fmadd_ps(even(weights), _mm512_set1_ps(*x_even), sums)
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
        /// The upper half of each word of the first vector, then of the second.
        const UPPER: [u16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 32 {
                order[i] = 2 * i as u16 + 1;
                i += 1;
            }
            order
        };
        // SAFETY: as above; UPPER is one vector, and vectors of one size may be reinterpreted.
        unsafe {
            let pairs = if BF16 {
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            } else {
                let order = _mm512_loadu_si512(UPPER.as_ptr().cast());
                _mm512_permutex2var_epi16(round_high(low), order, round_high(high))
            };
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
            if !BF16 {
                let even = _mm512_srli_epi32::<16>(round_high(even));
                let odd = _mm512_and_si512(round_high(odd), _mm512_set1_epi32(HIGH_HALF));
                return _mm512_storeu_si512(to.cast(), _mm512_or_si512(even, odd));
            }
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
        unsafe { if BF16 { kernel.on_avx512_bf16() } else { kernel.on_avx512() } }
    }
}
