//! Types that weights and cache are stored in: bits in memory, f32 in registers.

use half::{bf16, f16};

use crate::simd::{LANES, Simd};

/// What an array can be made of.
///
/// # Safety
/// Any bit pattern, zero included, is a value, and the type has no padding.
pub unsafe trait Plain: Copy + Default + Send + Sync + 'static {}

// SAFETY: plain bits; so are all below (the half types are `repr(transparent)` over u16).
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for bf16 {}
// SAFETY: as above.
unsafe impl Plain for f16 {}

/// A type that weights or cache are stored in.
pub trait Element: Plain {
    /// Widens [`LANES`] elements.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;

    /// Rounds to nearest, ties to even.
    fn from_f32(x: f32) -> Self;

    /// Widens, exactly.
    fn to_f32(self) -> f32;

    /// Widens the last `n < LANES` elements, zeros after them.
    ///
    /// # Safety
    /// As for [`Simd`]; `from` must be valid for `n` elements.
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(from: *const Self, n: usize) -> S::V {
        let mut padded = [Self::default(); LANES];
        // SAFETY: `n < LANES` elements are readable, by contract, and fit.
        unsafe {
            std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), n);
            Self::load::<S>(padded.as_ptr())
        }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(from) }
    }

    fn from_f32(x: f32) -> Self {
        x
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_bf16(from.cast()) }
    }

    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_f16(from.cast()) }
    }

    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}
