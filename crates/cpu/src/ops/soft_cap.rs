//! Soft caps: `cap * tanh(x / cap)` (Gemma 2, arXiv 2408.00118, section 2).

use crate::simd::{Kernel, LANES, Simd, exp, load_partial};

/// `cap * tanh(x / cap)`, by tanh y = 1 - 2 / (e^2y + 1); within about `1e-7 * cap`.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn soft_cap<S: Simd>(x: S::V, cap: f32) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let one = S::splat(1.0);
        let power = exp::<S>(S::mul(x, S::splat(2.0 / cap)));
        S::fma(S::splat(-2.0 * cap), S::div(one, S::add(power, one)), S::splat(cap))
    }
}

/// Caps every number of a row.
pub(crate) struct CapRow<'a> {
    pub row: &'a mut [f32],
    pub cap: f32,
}

impl Kernel for CapRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let full = self.row.len() - self.row.len() % LANES;
        let (vectors, rest) = self.row.split_at_mut(full);
        // SAFETY: a vector and the padded rest hold LANES numbers; the rest is the caller's.
        unsafe {
            for vector in vectors.as_chunks_mut::<LANES>().0 {
                S::store(vector.as_mut_ptr(), soft_cap::<S>(S::load(vector.as_ptr()), self.cap));
            }
            let mut padded = [0.0; LANES];
            let last = load_partial::<S>(rest.as_ptr(), rest.len());
            S::store(padded.as_mut_ptr(), soft_cap::<S>(last, self.cap));
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
}
