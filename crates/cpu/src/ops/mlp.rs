//! Feed-forward layers: two linear layers with the nonlinearity fused into the first.

use quire_backend::{Activation, BackendError, MlpShape};

use super::gemm::{Gemm, Places};
use super::grain;
use super::int_gemm::IntGemm;
use super::linear::{Input, Inputs, Rows, linear, linear_rows};
use super::lora::{CpuLora, LoraRows, add_lora, shrink};
use super::sink::{Hidden, Sink, ToGated};
use crate::buffer::{CpuBuf, SharedRows};
use crate::pool::Pool;
use crate::simd::pairs::{PANEL, PairDot, exp2};
use crate::simd::{Isa, Kernel, LANES, Simd, dispatch, exp};
use crate::weights::{CpuWeight, Matrix};

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
    pub lora: MlpLora<'a>,
    pub scratch: &'a mut CpuBuf,
    pub out: SharedRows<'a>,
}

/// What adapters add to the two layers.
pub(crate) struct MlpLora<'a> {
    pub up: Option<&'a CpuLora>,
    pub down: Option<&'a CpuLora>,
    pub rows: &'a mut LoraRows,
}

impl MlpLora<'_> {
    fn is_none(&self) -> bool {
        self.up.is_none() && self.down.is_none()
    }
}

/// The whole operation; `inputs` is room to work in.
pub(crate) fn mlp(
    pool: &mut Pool,
    isa: Isa,
    args: MlpArgs<'_>,
    inputs: &mut [Inputs; 2],
) -> Result<(), BackendError> {
    let (gated, [first_inputs, second_inputs]) = (args.shape == MlpShape::Gated, inputs);
    let intermediate = args.down.in_features;
    match (&args.up.matrix, &args.down.matrix) {
        (Matrix::Packed(up), Matrix::Packed(down)) if gated && intermediate.is_multiple_of(PANEL) => {
            let tokens = args.tokens;
            let (x_pairs, hidden_pairs) = (&mut first_inputs.rounded, &mut second_inputs.rounded);
            x_pairs.round(pool, isa, Input::new(args.x, Rows::First(tokens)), args.up.in_features)?;
            let bias = args.up.bias.as_deref();
            let first = Gemm { weight: up, bias, x: x_pairs, tokens, n: intermediate };
            if !args.lora.is_none() {
                return gated_with_lora(pool, isa, args, first, second_inputs);
            }
            let hidden = Hidden::Pairs(hidden_pairs.reset(tokens, intermediate)?);
            first.run_gated(pool, isa, args.activation, None, hidden)?;
            let (bias, n) = (args.down.bias.as_deref(), args.down.out_features);
            let second = Gemm { weight: down, bias, x: hidden_pairs, tokens, n };
            Ok(second.run(pool, isa, args.out)?)
        }
        (Matrix::Quantized(up), _) if gated && intermediate.is_multiple_of(PANEL) => {
            let MlpArgs { x, tokens, down, activation, lora, scratch, out, .. } = args;
            let bias = args.up.bias.as_deref();
            first_inputs.bytes.quantize(
                pool,
                isa,
                Input::new(x, Rows::First(tokens)),
                args.up.in_features,
            )?;
            let first = IntGemm { weight: up, x: &first_inputs.bytes, tokens };
            let expand = lora.up.map(|up| shrink(pool, isa, up, x, lora.rows)?.in_panels()).transpose()?;
            let (lora_rows, hidden) = (expand.as_ref(), Hidden::Rows(scratch.shared()));
            let to = Sink::Gated(ToGated { bias, lora: lora_rows, activation, out: hidden, n: intermediate });
            let (panels, places) = (intermediate / PANEL, Places::gate_and_up(intermediate / PANEL));
            first.run(pool, isa, &mut first_inputs.panels, 2 * panels, places, to)?;
            linear(pool, isa, down, Input::new(scratch, Rows::First(tokens)), second_inputs, out)?;
            lora.down.map_or(Ok(()), |down| add_lora(pool, isa, down, scratch, lora.rows, out))
        }
        (Matrix::Packed(_) | Matrix::Quantized(_), _) => in_turn(pool, isa, args, first_inputs),
        _ if !args.lora.is_none() => in_turn(pool, isa, args, first_inputs),
        _ => by_columns(pool, isa, args, first_inputs),
    }
}

/// The gated case with adapters: the hidden activations stay as they are, for the adapters of the second layer, and are
/// rounded afterwards, which gives the same pairs.
fn gated_with_lora(
    pool: &mut Pool,
    isa: Isa,
    args: MlpArgs<'_>,
    first: Gemm<'_>,
    inputs: &mut Inputs,
) -> Result<(), BackendError> {
    let MlpArgs { x, tokens, down, activation, lora, scratch, out, .. } = args;
    let expand = lora.up.map(|up| shrink(pool, isa, up, x, lora.rows)?.in_panels()).transpose()?;
    first.run_gated(pool, isa, activation, expand.as_ref(), Hidden::Rows(scratch.shared()))?;
    linear(pool, isa, down, Input::new(scratch, Rows::First(tokens)), inputs, out)?;
    lora.down.map_or(Ok(()), |down| add_lora(pool, isa, down, scratch, lora.rows, out))
}

/// First layer, nonlinearity and second layer one after the other. The hidden activations end up in the first columns of
/// `scratch`.
fn in_turn(pool: &mut Pool, isa: Isa, args: MlpArgs<'_>, inputs: &mut Inputs) -> Result<(), BackendError> {
    let MlpArgs { x, tokens, shape, up, down, activation, lora, scratch, out } = args;
    let intermediate = down.in_features;
    let hidden = scratch.shared();
    linear(pool, isa, up, Input::new(x, Rows::First(tokens)), inputs, hidden)?;
    if let Some(up) = lora.up {
        add_lora(pool, isa, up, x, lora.rows, hidden)?;
    }
    pool.split(tokens, grain(tokens, 16 * intermediate, pool.num_threads()), |_, rows| {
        for t in rows {
            // SAFETY: `isa` was detected; row `t` belongs to this piece.
            unsafe {
                let (values, others) = hidden.row(t).split_at_mut(intermediate);
                let up = (shape == MlpShape::Gated).then_some(&*others);
                dispatch(isa, Activate { activation, values, up });
            }
        }
    })?;
    linear(pool, isa, down, Input::new(scratch, Rows::First(tokens)), inputs, out)?;
    lora.down.map_or(Ok(()), |down| add_lora(pool, isa, down, scratch, lora.rows, out))
}

/// A thread takes columns of the hidden layer through both steps. They end up in the first columns of `scratch`.
fn by_columns(pool: &mut Pool, isa: Isa, args: MlpArgs<'_>, inputs: &mut Inputs) -> Result<(), BackendError> {
    let MlpArgs { x, tokens, shape, up, down, activation, scratch, out, .. } = args;
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
            linear_rows(isa, up, 0, columns.clone(), x, hidden);
            if gated {
                let others = columns.start + intermediate..columns.end + intermediate;
                linear_rows(isa, up, 0, others, x, hidden);
            }
            for t in 0..tokens {
                let values = hidden.part(t, columns.start, columns.len());
                let up = gated.then(|| &*hidden.part(t, intermediate + columns.start, columns.len()));
                dispatch(isa, Activate { activation, values, up });
            }
        }
    })?;
    linear(pool, isa, down, Input::new(scratch, Rows::First(tokens)), inputs, out)
}

/// `values = activation(values)`, times `up` if gated.
pub(crate) struct Activate<'a> {
    pub activation: Activation,
    pub values: &'a mut [f32],
    pub up: Option<&'a [f32]>,
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's.
        unsafe { activate::<S>(self.activation, self.values, self.up) };
    }
}

/// The nonlinearity of a panel.
///
/// # Safety
/// As for [`PairDot`].
#[inline(always)]
pub(crate) unsafe fn activate_lanes<D: PairDot>(activation: Activation, x: D::V) -> D::V {
    // SAFETY: the array holds a panel; the rest is the caller's.
    unsafe {
        if activation == Activation::Silu {
            let e = exp2::<D>(D::mul(x, D::splat(-std::f32::consts::LOG2_E)));
            return D::div(x, D::add(D::splat(1.0), e));
        }
        let mut values = [0.0; PANEL];
        D::store(values.as_mut_ptr(), x);
        D::load_sums(values.map(|x| activation.apply(x)).as_ptr())
    }
}

#[inline(always)]
unsafe fn activate<S: Simd>(activation: Activation, values: &mut [f32], up: Option<&[f32]>) {
    if activation == Activation::Silu {
        // SAFETY: the caller's.
        unsafe { silu::<S>(values) };
    } else {
        values.iter_mut().for_each(|x| *x = activation.apply(*x));
    }
    if let Some(up) = up {
        values.iter_mut().zip(up).for_each(|(x, up)| *x *= up);
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
