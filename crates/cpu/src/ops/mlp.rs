//! Feed-forward layers: two linear layers with the nonlinearity fused into the first.

use quire_backend::{Activation, MlpShape};
use quire_core::ExecError;

use super::grain;
use super::linear::{Input, Rows, linear, linear_rows};
use crate::buffer::{CpuBuf, SharedRows};
use crate::pool::Pool;
use crate::simd::{Isa, Kernel, LANES, Simd, dispatch, exp};
use crate::weights::CpuWeight;

/// Rows of `up` (and of the gate) that a thread takes at once.
const PIECE: usize = 8;

/// A feed-forward layer of `tokens` rows.
pub(crate) struct MlpArgs<'a> {
    pub x: &'a CpuBuf,
    pub tokens: usize,
    pub shape: MlpShape,
    pub up: &'a CpuWeight,
    pub down: &'a CpuWeight,
    pub activation: Activation,
    pub scratch: &'a mut CpuBuf,
    pub out: SharedRows<'a>,
}

/// The whole operation. The hidden activations end up in the first columns of `scratch`.
pub(crate) fn mlp(pool: &mut Pool, isa: Isa, args: MlpArgs<'_>) -> Result<(), ExecError> {
    let MlpArgs { x, tokens, shape, up, down, activation, scratch, out } = args;
    let intermediate = down.in_features;
    let gated = shape == MlpShape::Gated;
    let x = Input::new(x, Rows::First(tokens));
    let hidden = scratch.shared();

    let pieces = intermediate.div_ceil(PIECE);
    let work = PIECE * up.in_features * tokens * if gated { 2 } else { 1 };
    pool.split(pieces, grain(pieces, work, pool.num_threads()), |_, pieces| {
        let columns = pieces.start * PIECE..(pieces.end * PIECE).min(intermediate);
        // SAFETY: `isa` was detected; the columns, and those of the other half, belong to this thread.
        unsafe {
            linear_rows(isa, up, columns.clone(), x, hidden);
            if gated {
                let others = columns.start + intermediate..columns.end + intermediate;
                linear_rows(isa, up, others, x, hidden);
            }
            for t in 0..tokens {
                let values = hidden.part(t, columns.start, columns.len());
                let up = gated.then(|| &*hidden.part(t, intermediate + columns.start, columns.len()));
                dispatch(isa, Activate { activation, values, up });
            }
        }
    })?;
    linear(pool, isa, down, Input::new(scratch, Rows::First(tokens)), out)
}

/// `values = activation(values)`, times `up` if gated.
struct Activate<'a> {
    activation: Activation,
    values: &'a mut [f32],
    up: Option<&'a [f32]>,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        if self.activation == Activation::Silu {
            // SAFETY: the caller's.
            unsafe { silu::<S>(self.values) };
        } else {
            self.values.iter_mut().for_each(|x| *x = self.activation.apply(*x));
        }
        if let Some(up) = self.up {
            self.values.iter_mut().zip(up).for_each(|(x, up)| *x *= up);
        }
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
unsafe fn silu<S: Simd>(values: &mut [f32]) {
    for chunk in values.chunks_mut(LANES) {
        let mut padded = [0.0; LANES];
        padded[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: `padded` holds LANES elements; the rest is the caller's.
        unsafe {
            let x = S::load(padded.as_ptr());
            let one = S::splat(1.0);
            let y = S::div(x, S::add(one, exp::<S>(S::mul(x, S::splat(-1.0)))));
            S::store(padded.as_mut_ptr(), y);
        }
        chunk.copy_from_slice(&padded[..chunk.len()]);
    }
}
