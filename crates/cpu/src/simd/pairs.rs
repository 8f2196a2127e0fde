//! Dot products of bf16 pairs: what the kernels over packed weights ask of an instruction set.
//!
//! A pair is a `u32` with the even element in its low half. One step adds, in each of [`PANEL`] lanes, first the product of
//! the odd elements and then that of the even ones, each as one fused multiply-add in f32: what `vdpbf16ps` does. The
//! emulation does the same and gives the same bits, except that the instruction takes and gives zeros for subnormal
//! numbers (below 1.2e-38).

use super::portable::Portable;
use super::{Isa, Simd};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Lanes: output channels that lie side by side in packed weights.
pub const PANEL: usize = 16;

/// Vectors of [`PANEL`] sums.
///
/// # Safety
/// As for [`Simd`]; pointers must be valid for [`PANEL`] elements (`x`: for one), at any alignment.
#[allow(clippy::missing_safety_doc, missing_docs)] // said once, above; the names say the rest
pub unsafe trait PairDot: Copy {
    /// For the rest of the arithmetic.
    type S: Simd;
    type V: Copy;
    type W: Copy;
    unsafe fn zero() -> Self::V;
    unsafe fn load(weights: *const u32) -> Self::W;
    /// Adds the products of the weights' pairs with the one pair `x`.
    unsafe fn dot(sums: Self::V, weights: Self::W, x: *const u32) -> Self::V;
    unsafe fn store(to: *mut f32, sums: Self::V);
    /// A hint that the cache line at `at` will be read; any address will do.
    unsafe fn prefetch(at: *const u32);
}

/// [`super::Kernel`], over [`PairDot`].
pub trait PairKernel {
    /// What it returns.
    type Output;

    /// The work. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// The machine has `D`'s instruction set; kernels may ask for more.
    unsafe fn run<D: PairDot>(self) -> Self::Output;
}

/// Runs `kernel` compiled for `isa`.
///
/// # Safety
/// `isa` is at most [`Isa::detect`], and whatever the kernel asks for.
pub unsafe fn dispatch_pairs<K: PairKernel>(isa: Isa, kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => avx512::run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::run_pairs(kernel),
            _ => kernel.run::<Emulated<Portable>>(),
        }
    }
}

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

    #[inline(always)]
    unsafe fn store(to: *mut f32, sums: Self::V) {
        // SAFETY: as above.
        unsafe { to.cast::<Self::V>().write_unaligned(sums) }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u32) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Chain<'a>(&'a [[u32; PANEL]], &'a [u32]);

    impl PairKernel for Chain<'_> {
        type Output = [u32; PANEL];
        #[inline(always)]
        unsafe fn run<D: PairDot>(self) -> Self::Output {
            let mut out = [0.0; PANEL];
            // SAFETY: all arrays hold PANEL elements.
            unsafe {
                let mut sums = D::zero();
                for (weights, x) in self.0.iter().zip(self.1) {
                    sums = D::dot(sums, D::load(weights.as_ptr()), x);
                }
                D::store(out.as_mut_ptr(), sums);
            }
            out.map(f32::to_bits)
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
            let run = |isa: Isa| unsafe { dispatch_pairs(isa.min(Isa::detect()), Chain(&weights, &x)) };
            let expected = run(Isa::Portable);
            assert_eq!(run(Isa::Avx2), expected);
            assert_eq!(run(Isa::Avx512Bf16), expected);
        }
    }
}
