//! Bytes in AVX-512: [`ByteDot`] with VNNI.

use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::bytes::{ByteDot, EVEN_BYTES, LOW_NIBBLES, MAGNITUDE};

// SAFETY: each method needs only the features that `on_avx512` enables, `on_avx512_bf16` where `BF16`, and valid
// pointers.
unsafe impl<const BF16: bool> ByteDot for Avx512<BF16> {
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> __m512i {
        // SAFETY: the trait's contract; so for all below.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, words: __m512i) {
        // SAFETY: as above.
        unsafe { _mm512_storeu_si512(to.cast(), words) }
    }

    #[inline(always)]
    unsafe fn dot_bytes(sums: __m512i, weights: __m512i, x: *const u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32((*x).cast_signed())) }
    }

    #[inline(always)]
    unsafe fn to_float(a: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    unsafe fn sub_int(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_sub_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_int(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_mullo_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn add_int(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn nibbles(words: __m512i) -> [__m512i; 2] {
        // SAFETY: as above.
        unsafe {
            let low = _mm512_set1_epi32(LOW_NIBBLES.cast_signed());
            [_mm512_and_si512(words, low), _mm512_and_si512(_mm512_srli_epi32::<4>(words), low)]
        }
    }

    #[inline(always)]
    unsafe fn steps_and_zeros(from: *const u8) -> [__m512i; 2] {
        // SAFETY: as above.
        unsafe {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            [_mm512_and_si512(both, _mm512_set1_epi32(15)), _mm512_srli_epi32::<4>(both)]
        }
    }

    #[inline(always)]
    unsafe fn expander(step: __m512i, zero: __m512i) -> [__m512i; 2] {
        // SAFETY: as above.
        unsafe {
            let offset = _mm512_sub_epi32(_mm512_set1_epi32(128), _mm512_mullo_epi32(step, zero));
            let offset = _mm512_and_si512(offset, _mm512_set1_epi32(0xFF));
            let halves = _mm512_or_si512(step, _mm512_slli_epi32::<16>(step));
            [halves, _mm512_mullo_epi32(offset, _mm512_set1_epi32(0x0101_0101))]
        }
    }

    #[inline(always)]
    unsafe fn expand(codes: __m512i, [step, offset]: [__m512i; 2]) -> __m512i {
        // Products of a code and a step are below 256, so two bytes can be multiplied as two halves.
        // SAFETY: as above.
        unsafe {
            let even = _mm512_and_si512(codes, _mm512_set1_epi32(EVEN_BYTES.cast_signed()));
            let odd = _mm512_srli_epi16::<8>(codes);
            let (even, odd) = (_mm512_mullo_epi16(even, step), _mm512_mullo_epi16(odd, step));
            _mm512_add_epi8(_mm512_or_si512(even, _mm512_slli_epi16::<8>(odd)), offset)
        }
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut i8, v: __m512) {
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }

    #[inline(always)]
    unsafe fn widen_pairs(from: *const u16) -> __m512i {
        // SAFETY: as above.
        unsafe {
            if !BF16 {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                let even = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(words));
                let odd = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(words));
                let [even, odd] = [even, odd].map(|x| _mm512_castps_si512(_mm512_cvtepi32_ps(x)));
                return _mm512_or_si512(_mm512_srli_epi32::<16>(even), odd);
            }
            let low = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.add(8).cast()));
            let (low, high) = (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[inline(always)]
    unsafe fn max_magnitude(bits: __m512i, v: __m512) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let magnitude = _mm512_set1_epi32(MAGNITUDE.cast_signed());
            _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(v), magnitude))
        }
    }

    #[inline(always)]
    unsafe fn highest_word(words: __m512i) -> u32 {
        // SAFETY: as above.
        unsafe { _mm512_reduce_max_epu32(words) }
    }

    #[inline(always)]
    unsafe fn sum_halves(quads: *const u32) -> [i32; 8] {
        // Sums of eight bytes, made positive, of vector `i` are words `i` of one vector; then four words become one.
        // SAFETY: as above; results of one size may be reinterpreted.
        unsafe {
            let eights = |i: usize| {
                let bytes = _mm512_loadu_si512(quads.add(16 * i).cast());
                _mm512_sad_epu8(_mm512_xor_si512(bytes, _mm512_set1_epi8(-128)), _mm512_setzero_si512())
            };
            let low = _mm512_or_si512(eights(0), _mm512_slli_epi64::<16>(eights(1)));
            let high = _mm512_or_si512(eights(2), _mm512_slli_epi64::<16>(eights(3)));
            let sums = _mm512_or_si512(low, _mm512_slli_epi64::<32>(high));
            let sums = _mm512_add_epi16(sums, _mm512_permutex_epi64::<0b01_00_11_10>(sums));
            let sums = _mm512_add_epi16(sums, _mm512_permutex_epi64::<0b10_11_00_01>(sums));
            let halves = [_mm512_castsi512_si128(sums), _mm512_extracti32x4_epi32::<2>(sums)];
            let in_order = _mm256_cvtepu16_epi32(_mm_unpacklo_epi16(halves[0], halves[1]));
            std::mem::transmute(_mm256_sub_epi32(in_order, _mm256_set1_epi32(32 * 128)))
        }
    }

    #[inline(always)]
    unsafe fn spread_halves(to: *mut u16, halves: *const u16) {
        // SAFETY: as above; of `to`, only lanes of the mask are touched.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(halves.cast()));
            _mm512_mask_storeu_epi16(to.cast(), 0x5555_5555, words);
        }
    }

    #[inline(always)]
    unsafe fn spread_bytes(to: *mut i8, bytes: *const i8) {
        // SAFETY: as above.
        unsafe {
            let halves = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.cast()));
            _mm256_mask_storeu_epi8(to, 0x5555_5555, halves);
        }
    }
}
