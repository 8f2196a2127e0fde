//! Dot products of bytes: what the kernels over int8 and int4 weights ask of an instruction set, beside [`PairDot`].
//!
//! A quad is a `u32` of four consecutive inputs, the first in the low byte: unsigned for weights, signed for activations.
//! Everything is exact, so every instruction set gives the same bits.

use super::Simd;
use super::pairs::{Emulated, PANEL, PairDot};

/// More of [`PairDot::W`]: [`PANEL`] 32-bit integers, and bytes or nibbles within them.
///
/// # Safety
/// As for [`PairDot`].
#[allow(clippy::missing_safety_doc, missing_docs)] // said once, there; the names say the rest
pub unsafe trait ByteDot: PairDot {
    unsafe fn splat_int(x: i32) -> Self::W;
    unsafe fn store_words(to: *mut u32, words: Self::W);
    /// Adds, in each lane, the products of a quad of weights with the one quad `x` of activations.
    unsafe fn dot_bytes(sums: Self::W, weights: Self::W, x: *const u32) -> Self::W;
    unsafe fn to_float(a: Self::W) -> Self::V;
    unsafe fn sub_int(a: Self::W, b: Self::W) -> Self::W;
    unsafe fn mul_int(a: Self::W, b: Self::W) -> Self::W;
    unsafe fn add_int(a: Self::W, b: Self::W) -> Self::W;
    /// The low and the high nibbles of all bytes, as bytes.
    unsafe fn nibbles(words: Self::W) -> [Self::W; 2];
    /// Low and high nibbles of [`PANEL`] bytes, as integers: steps and zeros of a group.
    unsafe fn steps_and_zeros(from: *const u8) -> [Self::W; 2];
    /// What [`ByteDot::expand`] needs of a group.
    unsafe fn expander(step: Self::W, zero: Self::W) -> [Self::W; 2];
    /// `step * (code - zero) + 128` of every byte.
    unsafe fn expand(codes: Self::W, expander: [Self::W; 2]) -> Self::W;
    /// Numbers in -127..=127, to the nearest byte, ties to even.
    unsafe fn store_bytes(to: *mut i8, v: Self::V);
    /// Signed bytes, two a lane, as pairs of bf16: exact.
    unsafe fn widen_pairs(from: *const u16) -> Self::W;
    /// The larger of `bits` and the magnitude of `v`, as the bits that order magnitudes: infinity and NaN come last.
    unsafe fn max_magnitude(bits: Self::W, v: Self::V) -> Self::W;
    /// The largest lane, unsigned.
    unsafe fn highest_word(words: Self::W) -> u32;
    /// Sums of the signed bytes of each half of four vectors at `quads`.
    unsafe fn sum_halves(quads: *const u32) -> [i32; 8];
    /// Stores [`PANEL`] halves at every second place from `to` on; what lies between is not touched.
    unsafe fn spread_halves(to: *mut u16, halves: *const u16);
    /// As [`Self::spread_halves`], of bytes.
    unsafe fn spread_bytes(to: *mut i8, bytes: *const i8);
}

/// Two signed bytes as a pair of bf16, which holds them exactly.
#[inline(always)]
pub(crate) fn widen_pair(pair: u16) -> u32 {
    let [low, high] = pair.to_le_bytes().map(|byte| f32::from(byte.cast_signed()).to_bits());
    low >> 16 | high
}

pub(super) const LOW_NIBBLES: u32 = 0x0F0F_0F0F;
pub(super) const EVEN_BYTES: u32 = 0x00FF_00FF;
pub(super) const MAGNITUDE: u32 = 0x7FFF_FFFF;

// SAFETY: needs no more than `S`; pointers are read and written unaligned.
unsafe impl<S: Simd> ByteDot for Emulated<S> {
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> Self::W {
        [x.cast_unsigned(); PANEL]
    }

    #[inline(always)]
    unsafe fn store_words(to: *mut u32, words: Self::W) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::W>().write_unaligned(words) }
    }

    #[inline(always)]
    unsafe fn dot_bytes(sums: Self::W, weights: Self::W, x: *const u32) -> Self::W {
        // SAFETY: as above.
        let x = unsafe { *x };
        let at = |byte: u32| i32::from((x >> (8 * byte)) as i8);
        let x = [at(0), at(1), at(2), at(3)];
        std::array::from_fn(|i| {
            let weight = |byte: u32| (weights[i] >> (8 * byte) & 0xFF).cast_signed();
            let products = weight(0) * x[0] + weight(1) * x[1] + weight(2) * x[2] + weight(3) * x[3];
            sums[i].wrapping_add(products.cast_unsigned())
        })
    }

    #[inline(always)]
    unsafe fn to_float(a: Self::W) -> Self::V {
        a.map(|x| x.cast_signed() as f32)
    }

    #[inline(always)]
    unsafe fn sub_int(a: Self::W, b: Self::W) -> Self::W {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    unsafe fn mul_int(a: Self::W, b: Self::W) -> Self::W {
        std::array::from_fn(|i| a[i].wrapping_mul(b[i]))
    }

    #[inline(always)]
    unsafe fn add_int(a: Self::W, b: Self::W) -> Self::W {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    unsafe fn nibbles(words: Self::W) -> [Self::W; 2] {
        [words.map(|w| w & LOW_NIBBLES), words.map(|w| w >> 4 & LOW_NIBBLES)]
    }

    #[inline(always)]
    unsafe fn steps_and_zeros(from: *const u8) -> [Self::W; 2] {
        // SAFETY: as above.
        let bytes = unsafe { from.cast::<[u8; PANEL]>().read_unaligned() };
        [bytes.map(|b| u32::from(b & 15)), bytes.map(|b| u32::from(b >> 4))]
    }

    #[inline(always)]
    unsafe fn expander(step: Self::W, zero: Self::W) -> [Self::W; 2] {
        let offset = |i: usize| 128u32.wrapping_sub(step[i].wrapping_mul(zero[i])) & 0xFF;
        [step.map(|s| s | s << 16), std::array::from_fn(|i| offset(i) * 0x0101_0101)]
    }

    #[inline(always)]
    unsafe fn expand(codes: Self::W, [step, offset]: [Self::W; 2]) -> Self::W {
        std::array::from_fn(|i| {
            let byte = |b: u32| {
                let code = codes[i] >> (8 * b) & 0xFF;
                (code * (step[i] & 0xFF)).wrapping_add(offset[i]) & 0xFF
            };
            byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24
        })
    }

    #[inline(always)]
    unsafe fn store_bytes(to: *mut i8, v: Self::V) {
        // SAFETY: as above.
        unsafe { to.cast::<[i8; PANEL]>().write_unaligned(v.map(|x| x.round_ties_even() as i32 as i8)) }
    }

    #[inline(always)]
    unsafe fn widen_pairs(from: *const u16) -> Self::W {
        // SAFETY: as above.
        unsafe { from.cast::<[u16; PANEL]>().read_unaligned() }.map(widen_pair)
    }

    #[inline(always)]
    unsafe fn max_magnitude(bits: Self::W, v: Self::V) -> Self::W {
        std::array::from_fn(|i| bits[i].max(v[i].to_bits() & MAGNITUDE))
    }

    #[inline(always)]
    unsafe fn highest_word(words: Self::W) -> u32 {
        words.into_iter().fold(0, u32::max)
    }

    #[inline(always)]
    unsafe fn sum_halves(quads: *const u32) -> [i32; 8] {
        // SAFETY: as above; four vectors may be read.
        let halves = unsafe { quads.cast::<[[i8; 2 * PANEL]; 8]>().read_unaligned() };
        halves.map(|half| half.into_iter().map(i32::from).sum())
    }

    #[inline(always)]
    unsafe fn spread_halves(to: *mut u16, halves: *const u16) {
        // SAFETY: as above.
        (0..PANEL).for_each(|i| unsafe { *to.add(2 * i) = *halves.add(i) });
    }

    #[inline(always)]
    unsafe fn spread_bytes(to: *mut i8, bytes: *const i8) {
        // SAFETY: as above.
        (0..PANEL).for_each(|i| unsafe { *to.add(2 * i) = *bytes.add(i) });
    }
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::super::pairs::{PairKernel, dispatch_pairs};
    use super::*;

    /// Some of everything, from random words.
    struct Everything<'a>(&'a [[u32; PANEL]; 4]);

    impl PairKernel for Everything<'_> {
        type Output = [[u32; PANEL]; 13];

        #[inline(always)]
        unsafe fn run<D: ByteDot>(self) -> Self::Output {
            let mut out = [[0; PANEL]; 13];
            // SAFETY: all arrays hold PANEL elements.
            unsafe {
                let [a, b, c, x] = self.0.each_ref().map(|words| D::load(words.as_ptr()));
                let [low, high] = D::nibbles(a);
                let [step, zero] = D::steps_and_zeros(self.0[1].as_ptr().cast());
                let expander = D::expander(step, zero);
                let mut sums = D::splat_int(-5);
                for quad in &self.0[3] {
                    sums = D::dot_bytes(sums, c, quad);
                }
                let floats = D::to_float(D::sub_int(sums, D::mul_int(step, zero)));
                let all =
                    [low, high, D::expand(low, expander), D::expand(high, expander), sums, D::add_int(b, x)];
                all.iter().zip(&mut out).for_each(|(words, out)| D::store_words(out.as_mut_ptr(), *words));
                D::store(out[6].as_mut_ptr().cast(), floats);
                D::store_bytes(out[7].as_mut_ptr().cast(), D::mul(floats, D::splat(1e-5)));
                D::store_words(out[9].as_mut_ptr(), D::widen_pairs(self.0[0].as_ptr().cast()));
                D::store_words(out[8].as_mut_ptr(), D::max_magnitude(a, floats));
                out[10][..8].copy_from_slice(&D::sum_halves(self.0.as_ptr().cast()).map(i32::cast_unsigned));
                out[10][8] = D::highest_word(a);
                D::spread_halves(out[11].as_mut_ptr().cast(), self.0[0].as_ptr().cast());
                D::spread_bytes(out[12].as_mut_ptr().cast::<i8>().add(1), self.0[0].as_ptr().cast());
            }
            out
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let mut state = 7u64;
        let mut word = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        };
        for _ in 0..2000 {
            let words = std::array::from_fn(|_| std::array::from_fn(|_| word()));
            // SAFETY: the instruction sets are there.
            let run = |isa: Isa| unsafe { dispatch_pairs(isa.min(Isa::detect()), Everything(&words)) };
            let expected = run(Isa::Portable);
            assert_eq!(run(Isa::Avx2), expected);
            assert_eq!(run(Isa::Avx512Bf16), expected);
        }
    }

    #[test]
    fn expands_to_the_value_of_a_code() {
        for step in 0..16u32 {
            for zero in 0..16u32 {
                let [codes, group] = [0x0302_0100, 0x0F0E_0D0C].map(|codes| {
                    // SAFETY: the instruction set is there.
                    unsafe { dispatch_pairs(Isa::detect(), Expand { codes, byte: (step | zero << 4) as u8 }) }
                });
                for (code, byte) in
                    [0u8, 1, 2, 3, 12, 13, 14, 15].into_iter().zip(codes.into_iter().chain(group))
                {
                    let value = quire_backend::quant::int4_value((step | zero << 4) as u8, code);
                    assert_eq!(
                        i32::from(byte),
                        (value + 128) & 0xFF,
                        "step {step}, zero {zero}, code {code}"
                    );
                }
            }
        }
    }

    struct Expand {
        codes: u32,
        byte: u8,
    }

    impl PairKernel for Expand {
        type Output = [u8; 4];

        #[inline(always)]
        unsafe fn run<D: ByteDot>(self) -> [u8; 4] {
            let mut out = [0; PANEL];
            // SAFETY: all arrays hold PANEL elements.
            unsafe {
                let [step, zero] = D::steps_and_zeros([self.byte; PANEL].as_ptr());
                let codes = D::splat_int(self.codes.cast_signed());
                D::store_words(out.as_mut_ptr(), D::expand(codes, D::expander(step, zero)));
            }
            out[3].to_le_bytes()
        }
    }
}
