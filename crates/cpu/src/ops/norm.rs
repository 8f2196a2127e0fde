//! RMSNorm, alone and after adding to the residual stream.

use crate::simd::{Kernel, LANES, Simd, load_partial};

/// `residual += delta`, normalised first if there is `delta_norm`; then `out = residual / rms(residual) * weight`, for
/// one row.
pub(crate) struct AddNormRow<'a> {
    pub residual: &'a mut [f32],
    pub delta: Option<&'a [f32]>,
    pub delta_norm: Option<&'a [f32]>,
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [f32],
}

impl Kernel for AddNormRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match (self.delta, self.delta_norm) {
            (None, _) => {}
            (Some(delta), None) => self.residual.iter_mut().zip(delta).for_each(|(r, d)| *r += d),
            (Some(delta), Some(weight)) => {
                // SAFETY: the caller's.
                let scale = unsafe { inverse_rms::<S>(delta, self.eps) };
                let residual = self.residual.iter_mut().zip(delta).zip(weight);
                residual.for_each(|((r, d), weight)| *r += d * scale * weight);
            }
        }
        // SAFETY: the caller's.
        let scale = unsafe { inverse_rms::<S>(self.residual, self.eps) };
        for ((out, x), weight) in self.out.iter_mut().zip(&*self.residual).zip(self.weight) {
            *out = x * scale * weight;
        }
    }
}

/// `x = x / rms(x) * weight`, for one head.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn norm_in_place<S: Simd>(x: &mut [f32], weight: &[f32], eps: f32) {
    // SAFETY: the caller's.
    let scale = unsafe { inverse_rms::<S>(x, eps) };
    x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= scale * weight);
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
unsafe fn inverse_rms<S: Simd>(x: &[f32], eps: f32) -> f32 {
    let full = x.len() - x.len() % LANES;
    // SAFETY: offsets stay inside `x`; the rest is the caller's.
    let sum = unsafe {
        let mut acc = S::splat(0.0);
        for i in (0..full).step_by(LANES) {
            let v = S::load(x.as_ptr().add(i));
            acc = S::fma(v, v, acc);
        }
        let v = load_partial::<S>(x.as_ptr().add(full), x.len() - full);
        S::sum(S::fma(v, v, acc))
    };
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}
