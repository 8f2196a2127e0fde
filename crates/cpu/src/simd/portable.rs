//! Arrays of eight that the compiler turns into whatever vectors the target has.

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY: needs no instruction set; pointers are read unaligned.
unsafe impl Simd for Portable {
    type V = V;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: valid for LANES elements, by the trait's contract.
        unsafe { from.cast::<V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> V {
        // SAFETY: as above.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> V {
        // SAFETY: as above.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| half::f16::from_bits(b).to_f32_const())
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        // SAFETY: as above.
        unsafe { to.cast::<V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn round(a: V) -> V {
        a.map(|x| (x + 12_582_912.0) - 12_582_912.0) // 1.5 * 2^23: no fraction bits are left
    }

    #[inline(always)]
    unsafe fn pow2(a: V) -> V {
        a.map(|x| f32::from_bits(((x as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    unsafe fn zero_below(v: V, x: V, bound: f32) -> V {
        zip(v, x, |v, x| if x >= bound { v } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        let [a, b, c, d] = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
        (a + c) + (b + d)
    }
}
