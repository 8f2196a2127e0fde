//! Types that weights and cache are stored in: bits in memory, f32 in registers.

use half::{bf16, f16};

use crate::simd::{LANES, Simd};

/// A storage type.
///
/// # Safety
/// Any bit pattern, zero included, is a value, and the type has no padding.
pub unsafe trait Element: Copy + Default + Send + Sync + 'static {
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

// SAFETY: plain bits.
unsafe impl Element for f32 {
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

// SAFETY: plain bits, `repr(transparent)` over u16.
unsafe impl Element for bf16 {
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

// SAFETY: plain bits, `repr(transparent)` over u16.
unsafe impl Element for f16 {
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
