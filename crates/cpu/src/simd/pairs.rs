//! Dot products of bf16 pairs: what the kernels over packed weights ask of an instruction set.
//!
//! A pair is a `u32` with the even element in its low half. One step adds, in each of [`PANEL`] lanes, first the product of
//! the odd elements and then that of the even ones, each as one fused multiply-add in f32: what `vdpbf16ps` does. The
//! emulation does the same and gives the same bits, except that the instruction takes and gives zeros for subnormal
//! numbers (below 1.2e-38).

use super::bytes::ByteDot;
use super::portable::Portable;
use super::{Isa, Simd};
#[cfg(target_arch = "x86_64")]
use super::{avx2::OnAvx2, avx512::OnAvx512};
use crate::packed::round_pairs;

/// Lanes: output channels that lie side by side in packed weights.
pub const PANEL: usize = 16;

/// Vectors of [`PANEL`] sums.
///
/// # Safety
/// As for [`Simd`]; pointers must be valid for [`PANEL`] elements (`x`: for one), at any alignment.
#[allow(clippy::missing_safety_doc, missing_docs)] // said once, above; the names say the rest
pub unsafe trait PairDot: Copy {
    /// Vectors of sums that the registers hold next to their operands: those of one tile. At least six.
    const TILE_SUMS: usize;
    /// For the rest of the arithmetic.
    type S: Simd;
    /// [`PANEL`] sums.
    type V: Copy;
    /// [`PANEL`] words: weights, or whatever else is not a float.
    type W: Copy;
    unsafe fn zero() -> Self::V;
    unsafe fn load(weights: *const u32) -> Self::W;
    /// Adds the products of the weights' pairs with the one pair `x`.
    unsafe fn dot(sums: Self::V, weights: Self::W, x: *const u32) -> Self::V;
    /// Whether it is better to take rows of `x` apart first, and then to multiply by [`Self::dot_split`]: see [`Rows`].
    ///
    /// [`Rows`]: super::rows::Rows
    const SPLITS: bool;
    /// Stores the even and the odd elements of `len` pairs, zeros after them up to [`PANEL`] each.
    unsafe fn split(pairs: *const u32, len: usize, evens: *mut f32, odds: *mut f32);
    /// As [`Self::dot`], with the elements of `x` as floats.
    unsafe fn dot_split(sums: Self::V, weights: Self::W, x_even: *const f32, x_odd: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, sums: Self::V);
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load_sums(from: *const f32) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` if one is not a number.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` if one is not a number.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for whole `n` in -126..=127.
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V;
    /// `v` where `x >= bound`, else 0.
    unsafe fn zero_below(v: Self::V, x: Self::V, bound: f32) -> Self::V;
    /// All lanes, by a fixed tree: halves, then as [`Simd::sum`].
    unsafe fn sum(v: Self::V) -> f32;
    /// The largest lane; lanes that are not numbers may be left out.
    unsafe fn highest(v: Self::V) -> f32;
    /// Rounds 32 numbers to bf16 (to nearest, ties to even) and stores them as [`PANEL`] pairs, `low`'s first.
    unsafe fn store_pairs(to: *mut u32, low: Self::V, high: Self::V);
    /// Rounds as [`Self::store_pairs`] does, but each pair is of one lane of both.
    unsafe fn store_zipped(to: *mut u32, even: Self::V, odd: Self::V);
    /// Turns rows into columns: word `i` of row `j` goes to `to[i * PANEL + j]`.
    unsafe fn transpose(rows: &[[u32; PANEL]; PANEL], to: *mut u32);
    /// A hint that the cache line at `at` will be read; any address will do.
    unsafe fn prefetch(at: *const u32);
    /// Runs `kernel` as a function of its own, whose constants do not take registers from the loop before it.
    unsafe fn apart<K: PairKernel>(kernel: K) -> K::Output;
}

/// `2^x` to about 2e-7 for `x <= 127`; 0 below -126. `2^n 2^f` with whole `n` and the polynomial of degree 5 whose largest
/// relative error for `|f| <= 1/2` is the least (9e-8, before rounding) of those that are 1 at 0.
///
/// # Safety
/// As for [`PairDot`].
#[inline(always)]
pub unsafe fn exp2<D: PairDot>(x: D::V) -> D::V {
    const LOWEST: f32 = -126.0;
    #[expect(clippy::approx_constant, reason = "the best coefficient is near ln 2, but not ln 2")]
    const COEFFICIENTS: [f32; 6] =
        [1.326_472_7e-3, 9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1, 1.0];
    // SAFETY: the caller's.
    unsafe {
        let clamped = D::max(x, D::splat(LOWEST));
        let n = D::round(clamped);
        let f = D::sub(clamped, n);
        let mut y = D::splat(COEFFICIENTS[0]);
        for c in &COEFFICIENTS[1..] {
            y = D::fma(y, f, D::splat(*c));
        }
        D::zero_below(D::scale(y, n), x, LOWEST)
    }
}

/// [`super::Kernel`], over [`PairDot`].
pub trait PairKernel {
    /// What it returns.
    type Output;

    /// The work. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// The machine has `D`'s instruction set; kernels may ask for more.
    unsafe fn run<D: ByteDot>(self) -> Self::Output;
}

/// Runs `kernel` compiled for `isa`.
///
/// # Safety
/// `isa` is at most [`Isa::detect`] or one of [`Isa::available`], and whatever the kernel asks for.
pub unsafe fn dispatch_pairs<K: PairKernel>(isa: Isa, kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => kernel.on_avx512_bf16(),
            _ => dispatch_bytes(isa, kernel),
        }
    }
}

/// As [`dispatch_pairs`], for kernels that multiply no pairs: they are not compiled for [`Isa::Avx512Bf16`], which has
/// nothing for them that [`Isa::Avx512`] has not.
///
/// # Safety
/// As for [`dispatch_pairs`].
pub unsafe fn dispatch_bytes<K: PairKernel>(isa: Isa, kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => kernel.on_avx512(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => kernel.on_avx2(),
            _ => kernel.on_portable(),
        }
    }
}

/// A kernel as a function. This and its like for other instruction sets are methods of the kernel, not functions that take
/// one: the compiler puts methods with the type that they are of, so that kernels of several files are built side by side.
trait OnPortable: PairKernel + Sized {
    /// # Safety
    /// Whatever the kernel asks for.
    unsafe fn on_portable(self) -> Self::Output {
        // SAFETY: the caller's.
        unsafe { self.run::<Emulated<Portable>>() }
    }
}

impl<K: PairKernel> OnPortable for K {}

/// The same sums without the instruction, for tests and for machines that lack it.
#[derive(Clone, Copy)]
pub(super) struct Emulated<S>(std::marker::PhantomData<S>);

const fn even(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

const fn odd(pair: u32) -> f32 {
    f32::from_bits(pair & 0xFFFF_0000)
}

// SAFETY: needs no more than `S`; pointers are read unaligned.
unsafe impl<S: Simd> PairDot for Emulated<S> {
    const TILE_SUMS: usize = 6;
    type S = S;
    type V = [f32; PANEL];
    type W = [u32; PANEL];

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        [0.0; PANEL]
    }

    #[inline(always)]
    unsafe fn load(weights: *const u32) -> Self::W {
        // SAFETY: the trait's contract; so for all below.
        unsafe { weights.cast::<Self::W>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::V, weights: Self::W, x: *const u32) -> Self::V {
        // SAFETY: as above.
        let x = unsafe { *x };
        std::array::from_fn(|i| {
            let sum = odd(weights[i]).mul_add(odd(x), sums[i]);
            even(weights[i]).mul_add(even(x), sum)
        })
    }

    const SPLITS: bool = false;

    #[inline(always)]
    unsafe fn split(pairs: *const u32, len: usize, evens: *mut f32, odds: *mut f32) {
        for i in 0..PANEL {
            // SAFETY: as above.
            unsafe {
                let pair = if i < len { *pairs.add(i) } else { 0 };
                (*evens.add(i), *odds.add(i)) = (even(pair), odd(pair));
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_split(sums: Self::V, weights: Self::W, x_even: *const f32, x_odd: *const f32) -> Self::V {
        // SAFETY: as above.
        let (x_even, x_odd) = unsafe { (*x_even, *x_odd) };
        std::array::from_fn(|i| {
            let sum = odd(weights[i]).mul_add(x_odd, sums[i]);
            even(weights[i]).mul_add(x_even, sum)
        })
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, sums: Self::V) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::V>().write_unaligned(sums) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; PANEL]
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const f32) -> Self::V {
        // SAFETY: as above.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    unsafe fn scale(a: Self::V, n: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) << 23).cast_unsigned()))
    }

    #[inline(always)]
    unsafe fn zero_below(v: Self::V, x: Self::V, bound: f32) -> Self::V {
        std::array::from_fn(|i| if x[i] >= bound { v[i] } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        let (low, high) = v.split_at(PANEL / 2);
        // SAFETY: both are vectors of `S`.
        unsafe { S::sum(S::add(S::load(low.as_ptr()), S::load(high.as_ptr()))) }
    }

    #[inline(always)]
    unsafe fn highest(v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn store_pairs(to: *mut u32, low: Self::V, high: Self::V) {
        // SAFETY: as above; PANEL pairs may be written.
        let to = unsafe { std::slice::from_raw_parts_mut(to, PANEL) };
        round_pairs(&low, &mut to[..PANEL / 2]);
        round_pairs(&high, &mut to[PANEL / 2..]);
    }

    #[inline(always)]
    unsafe fn store_zipped(to: *mut u32, even: Self::V, odd: Self::V) {
        // SAFETY: as above; PANEL pairs may be written.
        let to = unsafe { std::slice::from_raw_parts_mut(to, PANEL) };
        for i in 0..PANEL {
            round_pairs(&[even[i], odd[i]], &mut to[i..=i]);
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[[u32; PANEL]; PANEL], to: *mut u32) {
        // SAFETY: as above; PANEL vectors may be written.
        let to = unsafe { std::slice::from_raw_parts_mut(to, PANEL * PANEL) };
        for (i, to) in to.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            *to = std::array::from_fn(|j| rows[j][i]);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u32) {}

    #[inline(always)]
    unsafe fn apart<K: PairKernel>(kernel: K) -> K::Output {
        // A function of its own would not have `S`'s instruction set.
        // SAFETY: the caller's.
        unsafe { kernel.run::<Self>() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums by both ways to multiply.
    struct Chain<'a>(&'a [[u32; PANEL]], &'a [u32]);

    impl PairKernel for Chain<'_> {
        type Output = [[u32; PANEL]; 2];
        #[inline(always)]
        unsafe fn run<D: PairDot>(self) -> Self::Output {
            let mut out = [[0.0; PANEL]; 2];
            let [mut evens, mut odds] = [[7.0; PANEL]; 2];
            // SAFETY: all arrays hold PANEL elements.
            unsafe {
                let mut sums = [D::zero(); 2];
                for (weights, x) in self.0.chunks(PANEL).zip(self.1.chunks(PANEL)) {
                    D::split(x.as_ptr(), x.len(), evens.as_mut_ptr(), odds.as_mut_ptr());
                    for (k, (weights, x)) in weights.iter().zip(x).enumerate() {
                        let weights = D::load(weights.as_ptr());
                        sums[0] = D::dot(sums[0], weights, x);
                        sums[1] = D::dot_split(sums[1], weights, &evens[k], &odds[k]);
                    }
                }
                for (out, sums) in out.iter_mut().zip(sums) {
                    D::store(out.as_mut_ptr(), sums);
                }
            }
            assert!(evens[100 % PANEL..].iter().chain(&odds[100 % PANEL..]).all(|x| *x == 0.0));
            out.map(|out| out.map(f32::to_bits))
        }
    }

    struct Lanes<'a>(&'a [f32; PANEL]);

    impl PairKernel for Lanes<'_> {
        type Output = ([f32; PANEL], [u32; 2], [[u32; PANEL]; PANEL]);
        #[inline(always)]
        unsafe fn run<D: PairDot>(self) -> Self::Output {
            let (mut out, mut pairs) = ([0.0; PANEL], [[0; PANEL]; PANEL]);
            let mut turned = pairs;
            // SAFETY: all arrays hold PANEL elements.
            unsafe {
                let x = D::load_sums(self.0.as_ptr());
                let y = exp2::<D>(x);
                D::store(out.as_mut_ptr(), y);
                let other = D::mul(y, D::splat(-3.7));
                for pairs in pairs.as_chunks_mut::<2>().0 {
                    D::store_pairs(pairs[0].as_mut_ptr(), y, other);
                    D::store_zipped(pairs[1].as_mut_ptr(), other, x);
                }
                D::transpose(&pairs, turned.as_flattened_mut().as_mut_ptr());
                (out, [D::highest(x), D::sum(y)].map(f32::to_bits), turned)
            }
        }
    }

    #[test]
    fn exp2_is_accurate_and_every_instruction_set_agrees() {
        for step in 0..20_000 {
            let first = -125.0 + step as f32 * 0.0126;
            let x = std::array::from_fn(|i| first + i as f32 * 7e-4);
            // SAFETY: the instruction sets are there.
            let run = |isa: Isa| unsafe { dispatch_pairs(isa, Lanes(&x)) };
            let expected = run(Isa::Portable);
            for (x, y) in x.iter().zip(expected.0) {
                let error = f64::from(y) / f64::from(*x).exp2() - 1.0;
                assert!(error.abs() < 3e-7, "2^{x} = {y}");
            }
            for isa in Isa::available() {
                assert_eq!(run(isa), expected, "{isa:?}");
            }
        }
        let mut x = [-126.5; PANEL];
        x[..3].copy_from_slice(&[f32::NEG_INFINITY, 0.0, 1.0]);
        for isa in Isa::available() {
            // SAFETY: as above.
            let (y, [highest, _], _) = unsafe { dispatch_pairs(isa, Lanes(&x)) };
            assert_eq!((y[..4].to_vec(), f32::from_bits(highest)), (vec![0.0, 1.0, 2.0, 0.0], 1.0));
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let mut state = 1u64;
        // Normal numbers of both signs from 2^-15 to 2^16.
        let mut half = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bits = (state >> 33) as u32;
            (bits & 0x8000) | ((112 + (bits >> 16) % 32) << 7) | (bits & 0x7F)
        };
        for _ in 0..500 {
            let mut pair = || half() | half() << 16;
            let weights: Vec<[u32; PANEL]> = (0..100).map(|_| std::array::from_fn(|_| pair())).collect();
            let x: Vec<u32> = (0..100).map(|_| pair()).collect();
            // SAFETY: the instruction sets are there.
            let run = |isa: Isa| unsafe { dispatch_pairs(isa, Chain(&weights, &x)) };
            let expected = run(Isa::Portable);
            assert_eq!(expected[0], expected[1]);
            for isa in Isa::available() {
                assert_eq!(run(isa), expected, "{isa:?}");
            }
        }
    }
}
