//! RMSNorm after adding to the residual stream, if there is anything to add.

use crate::CpuBuf;
use crate::buffer::SharedRows;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel};
use crate::simd::panel::{load_some, store_some};

/// `residual += delta`, normalised first if there is `delta_norm`; then `out = residual / rms(residual) * weight`, for
/// some rows, which are the caller's alone.
pub(crate) struct AddNormRows<'a> {
    pub rows: std::ops::Range<usize>,
    pub residual: SharedRows<'a>,
    pub delta: Option<&'a CpuBuf>,
    pub delta_norm: Option<&'a [f32]>,
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: SharedRows<'a>,
}

impl PairKernel for AddNormRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        for t in self.rows {
            // SAFETY: the caller's.
            unsafe {
                let (residual, out) = (self.residual.row(t), self.out.row(t));
                let sum = match (self.delta, self.delta_norm) {
                    (None, _) => sum_of_squares::<D>(residual),
                    (Some(delta), None) => add::<D>(residual, delta.row(t)),
                    (Some(delta), Some(weight)) => {
                        let delta = delta.row(t);
                        let scale = inverse_rms(sum_of_squares::<D>(delta), delta.len(), self.eps);
                        scale_into(out, delta, scale, weight);
                        add::<D>(residual, out)
                    }
                };
                let scale = inverse_rms(sum, residual.len(), self.eps);
                scale_into(out, residual, scale, self.weight);
            }
        }
    }
}

/// Sums at work, so that an addition need not wait for the one before.
const CHAINS: usize = 4;

/// Element `i` of `0..len` is squared and added to lane `i % PANEL` of chain `i / PANEL % CHAINS`; then a fixed tree.
/// `panel` gives those from a place on, [`PANEL`] or the last few.
#[inline(always)]
unsafe fn sum_of<D: ByteDot>(len: usize, mut panel: impl FnMut(usize, usize) -> D::V) -> f32 {
    let whole = len - len % (CHAINS * PANEL);
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [D::zero(); CHAINS];
        for i in (0..whole).step_by(CHAINS * PANEL) {
            for (chain, sum) in sums.iter_mut().enumerate() {
                let x = panel(i + chain * PANEL, PANEL);
                *sum = D::fma(x, x, *sum);
            }
        }
        for (sum, i) in sums.iter_mut().zip((whole..len).step_by(PANEL)) {
            let x = panel(i, PANEL.min(len - i));
            *sum = D::fma(x, x, *sum);
        }
        D::sum(D::add(D::add(sums[0], sums[1]), D::add(sums[2], sums[3])))
    }
}

#[inline(always)]
pub(crate) unsafe fn sum_of_squares<D: ByteDot>(x: &[f32]) -> f32 {
    // SAFETY: the places are within `x`; the rest is the caller's.
    unsafe { sum_of::<D>(x.len(), |i, len| load_some::<D>(x.as_ptr().add(i), len)) }
}

/// `to += x`; returns the sum of the squares.
#[inline(always)]
unsafe fn add<D: ByteDot>(to: &mut [f32], x: &[f32]) -> f32 {
    assert_eq!(to.len(), x.len(), "a row is added to one of its length");
    // SAFETY: the places are within both; the rest is the caller's.
    unsafe {
        sum_of::<D>(x.len(), |i, len| {
            let at = to.as_mut_ptr().add(i);
            let sum = D::add(load_some::<D>(at, len), load_some::<D>(x.as_ptr().add(i), len));
            store_some::<D>(at, len, sum);
            sum
        })
    }
}

#[inline(always)]
fn scale_into(out: &mut [f32], x: &[f32], scale: f32, weight: &[f32]) {
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub(crate) fn inverse_rms(sum_of_squares: f32, len: usize, eps: f32) -> f32 {
    1.0 / (sum_of_squares / len as f32 + eps).sqrt()
}
