//! What kernels ask of an instruction set, and the choice of one at run time.
//!
//! A kernel is written once, generic over [`Simd`], as a struct with a [`Kernel::run`] that is always inlined;
//! [`dispatch`] compiles it once per instruction set inside a function that enables its features.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bytes;
pub mod bytes;
pub mod pairs;
pub(crate) mod panel;
mod portable;
pub(crate) mod rows;

use std::sync::OnceLock;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the target's baseline is.
    Portable,
    /// AVX2 with FMA and F16C (x86-64 since 2013).
    Avx2,
    /// AVX-512 with VNNI (Intel since 2019, AMD since 2022); what has no form of its own for it runs as AVX2.
    Avx512,
    /// The same with dot products of bf16 pairs.
    Avx512Bf16,
}

impl Isa {
    /// The fastest that this machine has. Not always the last of [`Self::available`]: some processors have dot products of
    /// bf16 pairs that are slower than multiply-adds of floats. Both give the same bits, subnormal numbers apart (see [`pairs`]).
    pub fn detect() -> Self {
        static FASTEST: OnceLock<Isa> = OnceLock::new();
        *FASTEST.get_or_init(|| match Self::widest() {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 if !avx512::bf16_is_faster() => Self::Avx512,
            isa => isa,
        })
    }

    /// All that this machine has.
    pub fn available() -> impl Iterator<Item = Self> {
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16]
            .into_iter()
            .filter(|isa| *isa <= Self::widest())
    }

    fn widest() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let has_all = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let has_bytes = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            match (has_all, has_bytes, is_x86_feature_detected!("avx512bf16")) {
                (true, true, true) => return Self::Avx512Bf16,
                (true, true, false) => return Self::Avx512,
                (true, false, _) => return Self::Avx2,
                (false, ..) => {}
            }
        }
        Self::Portable
    }
}

/// Lanes of a vector.
pub const LANES: usize = 8;

/// Vectors of [`LANES`] f32.
///
/// # Safety
/// Every method may be called only on a machine with the instruction set, that is from a [`Kernel`] run by [`dispatch`].
/// Pointers must be valid for [`LANES`] elements, at any alignment.
#[allow(clippy::missing_safety_doc, missing_docs)] // said once, above; the names say the rest
pub unsafe trait Simd: Copy {
    type V: Copy;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// Widens bf16 bits.
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    /// Widens f16 bits.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the instruction set can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// 2 to the power of whole numbers in -126..=127.
    unsafe fn pow2(a: Self::V) -> Self::V;
    /// `v` where `x >= bound`, else 0.
    unsafe fn zero_below(v: Self::V, x: Self::V, bound: f32) -> Self::V;
    /// All lanes, by a fixed tree: halves, then quarters, then pairs.
    unsafe fn sum(v: Self::V) -> f32;
}

/// `e^x` to about 2 ulp; 0 below -87.3, clamped above 88.3. Splits `x = n ln 2 + r` and sums the Taylor series of `e^r`.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    const LOWEST: f32 = -87.3;
    // ln 2 in two parts: the first has few bits, so that n times it is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const COEFFICIENTS: [f32; 8] =
        [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    // SAFETY: the caller's.
    unsafe {
        let clamped = S::max(S::min(x, S::splat(88.3)), S::splat(LOWEST));
        let n = S::round(S::mul(clamped, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-LN2_HIGH), clamped);
        let r = S::fma(n, S::splat(-LN2_LOW), r);
        let mut y = S::splat(COEFFICIENTS[0]);
        for c in &COEFFICIENTS[1..] {
            y = S::fma(y, r, S::splat(*c));
        }
        S::zero_below(S::mul(y, S::pow2(n)), x, LOWEST)
    }
}

/// Loads the last `n < LANES` elements, zeros after them.
///
/// # Safety
/// As for [`Simd`]; `from` must be valid for `n` elements.
#[inline(always)]
pub unsafe fn load_partial<S: Simd>(from: *const f32, n: usize) -> S::V {
    let mut padded = [0f32; LANES];
    // SAFETY: `n < LANES` elements are readable, by contract, and fit.
    unsafe {
        std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), n);
        S::load(padded.as_ptr())
    }
}

/// A piece of work that is compiled for each instruction set.
pub trait Kernel {
    /// What it returns.
    type Output;

    /// The work. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// The machine has `S`'s instruction set; kernels may ask for more.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Runs `kernel` compiled for `isa`.
///
/// # Safety
/// `isa` is at most [`Isa::detect`] or one of [`Isa::available`], and whatever the kernel asks for.
pub unsafe fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => avx2::run(kernel),
            _ => kernel.run::<portable::Portable>(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a [f32; LANES]);

    impl Kernel for Exp<'_> {
        type Output = ([f32; LANES], f32);
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Self::Output {
            let mut out = [0.0; LANES];
            // SAFETY: both arrays hold LANES elements.
            unsafe {
                let y = exp::<S>(S::load(self.0.as_ptr()));
                S::store(out.as_mut_ptr(), y);
                (out, S::sum(y))
            }
        }
    }

    struct Widen<'a>(&'a [u16; LANES]);

    impl Kernel for Widen<'_> {
        type Output = [[f32; LANES]; 2];
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Self::Output {
            let mut out = [[0.0; LANES]; 2];
            // SAFETY: all arrays hold LANES elements.
            unsafe {
                S::store(out[0].as_mut_ptr(), S::load_bf16(self.0.as_ptr()));
                S::store(out[1].as_mut_ptr(), S::load_f16(self.0.as_ptr()));
            }
            out
        }
    }

    #[test]
    fn exp_is_accurate_and_ends_in_zero() {
        for isa in [Isa::Portable, Isa::detect()] {
            for step in 0..20_000 {
                let x = [-87.0 + step as f32 * 0.008; LANES];
                // SAFETY: the instruction set is there.
                let (y, sum) = unsafe { dispatch(isa, Exp(&x)) };
                let expected = f64::from(x[0]).exp();
                assert!((f64::from(y[0]) / expected - 1.0).abs() < 3e-7, "{isa:?}: exp({}) = {}", x[0], y[0]);
                assert!(sum == 8.0 * y[0] || !sum.is_finite());
            }
            let x = [f32::NEG_INFINITY, -1000.0, -88.0, 0.0, 1.0, f32::MIN, -87.4, -0.0];
            // SAFETY: as above.
            let (y, _) = unsafe { dispatch(isa, Exp(&x)) };
            assert_eq!([y[0], y[1], y[2], y[3], y[5], y[6], y[7]], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]);
        }
    }

    #[test]
    fn half_types_widen_exactly() {
        for isa in [Isa::Portable, Isa::detect()] {
            for bits in 0..=u16::MAX {
                // SAFETY: as above.
                let [bf16, f16] = unsafe { dispatch(isa, Widen(&[bits; LANES])) };
                let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                assert!(same(bf16[0], half::bf16::from_bits(bits).to_f32()), "bf16 {bits:#x}");
                assert!(same(f16[7], half::f16::from_bits(bits).to_f32()), "f16 {bits:#x}");
            }
        }
    }
}
