//! Weights in 8 and 4 bits, activations in 8: the codecs that define the numbers of quantized layers.
//!
//! All products are of 8-bit integers, so their sums are exact and any order of summation gives the same bits; floats
//! appear once per [`ACT_GROUP`] inputs and once per output channel. With `a` the scales of the activations and `w` the
//! scale of channel `n`,
//!
//! ```text
//! y[n] = (Σ_g a[g] · Σ_{k in g} x[k] · v[n][k]) · w[n] + bias[n]      in f32, g ascending, each term a fused multiply-add
//! ```
//!
//! * int8: `v` is the stored byte; one scale per channel, by the largest weight.
//! * int4: `v = step · (q - zero)` with an unsigned 4-bit code `q`. Step and zero are *integers* of 4 bits, one pair per
//!   [`INT4_GROUP`] inputs, so `v` fits a byte as well. Per-group scales that are multiples of a row's scale are the idea
//!   of llama.cpp's K-quants; here the multiples are small enough for the whole weight to be an 8-bit integer.
//!   4.25 bits a weight, and a scale a row.
//!
//! With fp8, weights and activations are of [`fp8`], with one scale per channel and one per row, by the largest:
//!
//! ```text
//! y[n] = (Σ_k x[k] · v[n][k]) · a · w[n] + bias[n]      the sum in f32, in any order
//! ```
//!
//! Of experts in fp8 only the weights are: `x` stays as it is, and `a` is 1. Few rows go to each, so that their weights'
//! bytes are what they cost, and activations need not be rounded for it.
//!
//! Numbers below [`TINY`] count as zero, so that no reciprocal overflows.

use quire_core::{DType, QuantFormat};

use crate::convert::tensor_error;
use crate::{BackendError, fp8};

/// Inputs that share an int4 step and zero.
pub const INT4_GROUP: usize = 32;
/// Inputs that share an activation scale; a multiple of [`INT4_GROUP`]. The integer sum over one group is below 2^24 and
/// so exact in f32.
pub const ACT_GROUP: usize = 256;
/// 2^-100: rows and groups whose largest magnitude is smaller are stored as zeros.
pub const TINY: f32 = 7.888_609e-31;

/// The largest magnitude of a quantized value.
const LIMIT: f32 = 127.0;
/// The largest 4-bit code, step and zero.
const MAX_CODE: f32 = 15.0;
/// 1.5 * 2^23: a number of small magnitude that is added to it is rounded to an integer, ties to even.
const ULP_IS_ONE: f32 = 12_582_912.0;
/// Row scales that are tried, relative to the one at which the widest group just fits its 16 codes at step 15.
const ROW_SCALES: [f32; 4] = [0.94, 1.0, 1.06, 1.12];
/// Steps that are tried per group, from the one that covers the whole group downwards: finer steps that clip its ends.
const STEPS: usize = 2;

/// Quantizes a row of weights: `weight ≈ scale * q` with `q` in `-127..=127`. Returns the scale, `max|w| / 127`.
///
/// # Panics
/// If `q` is not as long as `row`.
#[inline]
pub fn quantize_int8(row: &[f32], q: &mut [i8]) -> f32 {
    assert_eq!(row.len(), q.len(), "one code per weight");
    quantize_group(row, q)
}

/// Quantizes a row of activations in groups of [`ACT_GROUP`]: `scales[g] = max|x| / 127` and
/// `q = round_ties_even(x * (127 / max|x|))`. A group with a number that is not finite gets a scale that is not finite,
/// and its `q` mean nothing.
///
/// # Panics
/// If `q` is not as long as `x`, or `scales` as `x` has groups.
#[inline]
pub fn quantize_activations(x: &[f32], q: &mut [i8], scales: &mut [f32]) {
    assert_eq!(x.len(), q.len(), "one code per activation");
    assert_eq!(x.len().div_ceil(ACT_GROUP), scales.len(), "one scale per group");
    for ((x, q), scale) in x.chunks(ACT_GROUP).zip(q.chunks_mut(ACT_GROUP)).zip(scales) {
        *scale = quantize_group(x, q);
    }
}

/// The int8 code of weights and activations alike.
#[inline(always)]
fn quantize_group(x: &[f32], q: &mut [i8]) -> f32 {
    let max = max_magnitude(x);
    if max < TINY {
        q.fill(0);
        return 0.0;
    }
    let inverse = LIMIT / max;
    for (q, x) in q.iter_mut().zip(x) {
        // The low byte of a number whose unit in the last place is 1.
        *q = (x * inverse + ULP_IS_ONE).to_bits() as i8;
    }
    max / LIMIT
}

/// Quantizes a row of weights or of activations: `x ≈ scale * q` with `q` in e4m3, the largest at 448. Returns the scale,
/// `max|x| / 448`; it is not finite if a number is not, and `q` then mean nothing.
///
/// # Panics
/// If `q` is not as long as `x`.
pub fn quantize_fp8(x: &[f32], q: &mut [u8]) -> f32 {
    assert_eq!(x.len(), q.len(), "one code per number");
    let max = max_magnitude(x);
    if max < TINY {
        q.fill(0);
        return 0.0;
    }
    let inverse = fp8::MAX / max;
    for (q, x) in q.iter_mut().zip(x) {
        *q = fp8::from_f32(x * inverse);
    }
    max / fp8::MAX
}

/// `step * (q - zero)` of an int4 code, in `-127..=127` for every code that [`quantize_int4`] makes.
pub fn int4_value(groups_byte: u8, q: u8) -> i32 {
    let (step, zero) = (i32::from(groups_byte & 15), i32::from(groups_byte >> 4));
    step * (i32::from(q) - zero)
}

/// Quantizes a row of weights: `weight ≈ scale * step * (q - zero)`. `q` gets one code in `0..=15` per weight, `groups`
/// one byte `step | zero << 4` per [`INT4_GROUP`] weights, of which the last may be fewer. Returns the scale.
///
/// A row with a number that is not finite becomes zeros; [`check_finite`] finds it first.
///
/// Row scale, steps and zeros are searched for the least squared error; at last the scale is fitted to the codes.
/// (Weighing large weights more, as llama.cpp does for some formats, made predictions worse on the models of the tests.)
///
/// # Panics
/// If `q` is not as long as `row`, or `groups` as `row` has groups.
#[inline]
pub fn quantize_int4(row: &[f32], q: &mut [u8], groups: &mut [u8]) -> f32 {
    assert_eq!(row.len(), q.len(), "one code per weight");
    assert_eq!(row.len().div_ceil(INT4_GROUP), groups.len(), "one step and zero per group");
    let max = max_magnitude(row);
    if max < TINY || !max.is_finite() {
        q.fill(0);
        groups.fill(0);
        return 0.0;
    }
    let unit = fitting_row_scale(row, max);
    let scale = best_row_scale(row, unit);
    let (mut dot, mut norm) = (0.0, 0.0);
    for ((row, q), group) in row.chunks(INT4_GROUP).zip(q.chunks_mut(INT4_GROUP)).zip(groups) {
        let weights = Group::new(row, 1.0 / unit);
        let grid = weights.search(scale).0;
        *group = grid.step as u8 | (grid.zero as u8) << 4;
        for (q, x) in q.iter_mut().zip(weights.x) {
            let code = grid.nearest(x * grid.inverse);
            let value = f64::from(grid.step * code);
            *q = (code + grid.zero) as u8;
            dot += f64::from(x) * value;
            norm += value * value;
        }
    }
    // The factor that brings the values closest to the weights.
    if norm > 0.0 { (f64::from(unit) * (dot / norm)) as f32 } else { 0.0 }
}

/// The smallest scale at which no group of the row has to be clipped. Later steps count in it.
#[inline(always)]
fn fitting_row_scale(row: &[f32], max: f32) -> f32 {
    let mut widest = 0.0f32;
    for group in row.chunks(INT4_GROUP) {
        let Group { low, high, .. } = Group::new(group, 1.0 / max);
        widest = widest.max(high - low);
    }
    max * (widest / (MAX_CODE * MAX_CODE)).max(1.0 / LIMIT)
}

/// The best of [`ROW_SCALES`].
#[inline(always)]
fn best_row_scale(row: &[f32], unit: f32) -> f32 {
    let mut errors = [0.0; ROW_SCALES.len()];
    for group in row.chunks(INT4_GROUP) {
        let group = Group::new(group, 1.0 / unit);
        for (error, scale) in errors.iter_mut().zip(ROW_SCALES) {
            *error += group.search(scale).1;
        }
    }
    let (mut best, mut least) = (1.0, f32::INFINITY);
    for (scale, error) in ROW_SCALES.into_iter().zip(errors) {
        if error < least {
            (best, least) = (scale, error);
        }
    }
    best
}

/// Step and zero of a group.
#[derive(Clone, Copy, Debug, Default)]
struct Grid {
    step: f32,
    zero: f32,
    /// Of step times row scale.
    inverse: f32,
    /// The least and the greatest `q - zero`: `q` is a code, and `step * (q - zero)` stays within `LIMIT`.
    low: f32,
    high: f32,
}

impl Grid {
    #[inline(always)]
    fn new(step: f32, zero: f32, scale: f32) -> Self {
        let reach = (LIMIT / step) as i32 as f32;
        let (low, high) = (-reach.min(zero), reach.min(MAX_CODE - zero));
        Self { step, zero, inverse: 1.0 / (step * scale), low, high }
    }

    /// `q - zero` of the nearest code, for a weight in units of step and row scale.
    #[inline(always)]
    fn nearest(&self, x: f32) -> f32 {
        // Comparisons of this form are one instruction each; `f32::clamp` also minds NaN.
        let x = round(x);
        let x = if x > self.low { x } else { self.low };
        if x < self.high { x } else { self.high }
    }
}

/// The weights of a group in some unit; a short group is filled up with zeros, which every grid holds exactly.
struct Group {
    x: [f32; INT4_GROUP],
    /// The least and the greatest of the weights and zero.
    low: f32,
    high: f32,
}

impl Group {
    #[inline(always)]
    fn new(weights: &[f32], inverse: f32) -> Self {
        let mut x = [0.0; INT4_GROUP];
        for (x, w) in x.iter_mut().zip(weights) {
            *x = w * inverse;
        }
        let (mut low, mut high) = ([0.0f32; 8], [0.0f32; 8]);
        for x in x.as_chunks::<8>().0 {
            for lane in 0..8 {
                low[lane] = if x[lane] < low[lane] { x[lane] } else { low[lane] };
                high[lane] = if x[lane] > high[lane] { x[lane] } else { high[lane] };
            }
        }
        for lane in 1..8 {
            low[0] = if low[lane] < low[0] { low[lane] } else { low[0] };
            high[0] = if high[lane] > high[0] { high[lane] } else { high[0] };
        }
        Self { x, low: low[0], high: high[0] }
    }

    /// The best step and zero at a row scale, and the squared error.
    #[inline(always)]
    fn search(&self, scale: f32) -> (Grid, f32) {
        let mut best = (Grid::default(), f32::INFINITY);
        let fitting = (self.high - self.low) / (MAX_CODE * scale);
        let widest = (fitting as i32 as f32 + 1.0).min(MAX_CODE);
        for finer in 0..STEPS {
            let step = widest - finer as f32;
            if step < 1.0 {
                break;
            }
            // The zeros at which the lowest and the highest weight keep their place, and the one between that clips both.
            let inverse = 1.0 / (step * scale);
            let keeps_low = round(-self.low * inverse).min(MAX_CODE);
            let keeps_high = (MAX_CODE - round(self.high * inverse)).max(0.0);
            let distinct = match keeps_high - keeps_low {
                gap if gap <= 0.0 => 1,
                gap if gap <= 1.0 => 2,
                _ => 3,
            };
            for &zero in &[keeps_low, keeps_high, round(0.5 * (keeps_low + keeps_high))][..distinct] {
                let grid = Grid::new(step, zero, scale);
                let error = self.error(&grid) * (step * scale) * (step * scale);
                if error < best.1 {
                    best = (grid, error);
                }
            }
        }
        best
    }

    /// The sum of squared errors, in units of step and row scale.
    #[inline(always)]
    fn error(&self, grid: &Grid) -> f32 {
        let mut squares = [0.0; INT4_GROUP];
        for (square, x) in squares.iter_mut().zip(&self.x) {
            let x = x * grid.inverse;
            let error = x - grid.nearest(x);
            *square = error * error;
        }
        // Halves onto halves, so that sums can be vectors.
        for half in [16, 8, 4, 2, 1] {
            let (low, high) = squares.split_at_mut(half);
            for (low, high) in low.iter_mut().zip(high) {
                *low += *high;
            }
        }
        squares[0]
    }
}

/// NaN if there is one: as integers, magnitudes are ordered like the numbers, infinity and NaN last.
#[inline(always)]
fn max_magnitude(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().map(|x| x.to_bits() & 0x7FFF_FFFF).max().unwrap_or(0))
}

/// To the nearest integer, ties to even, for magnitudes below 2^22. Two additions on any processor, where
/// `f32::round_ties_even` may be a call.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + ULP_IS_ONE) - ULP_IS_ONE
}

/// Bytes of a row of weights: those of the checkpoint's type, or codes, steps, zeros and scale as described here.
/// Backends may add padding of their own.
pub const fn row_bytes(dtype: DType, quant: QuantFormat, in_features: usize) -> usize {
    match quant {
        QuantFormat::None => in_features * dtype.size(),
        QuantFormat::Int8 | QuantFormat::Fp8 => in_features + size_of::<f32>(),
        QuantFormat::Int4 => in_features.div_ceil(INT4_GROUP) * (INT4_GROUP / 2 + 1) + size_of::<f32>(),
    }
}

/// Refuses a row of weights that cannot be quantized.
///
/// # Errors
/// [`BackendError::Tensor`] with the first weight that is infinite or not a number.
pub fn check_finite(name: &str, row: usize, weights: &[f32]) -> Result<(), BackendError> {
    if max_magnitude(weights).is_finite() {
        return Ok(());
    }
    let column = weights.iter().position(|w| !w.is_finite()).unwrap_or(0);
    let weight = weights[column];
    Err(tensor_error(name, format!("row {row}, column {column} is {weight}, which cannot be quantized")))
}

#[cfg(test)]
#[path = "quant_tests.rs"]
mod tests;
