//! Linear layers and the embedding table.

use quire_core::QuantFormat;

use crate::convert::{matrix_shape, tensor_error, to_f32};
use crate::quant::{self, ACT_GROUP, INT4_GROUP};
use crate::{BackendError, LinearSource, fp8};

/// A linear layer.
#[derive(Clone, Debug)]
pub struct RefWeight {
    matrix: Matrix,
    /// `[out_features]`; zero where the checkpoint has none.
    bias: Vec<f32>,
    /// Columns.
    pub in_features: usize,
}

/// `[out_features, in_features]`, row-major.
#[derive(Clone, Debug)]
enum Matrix {
    Float(Vec<f32>),
    /// An element is its value times the scale of its row. Of int4, these are the values, not the codes.
    Quantized {
        values: Vec<i8>,
        scales: Vec<f32>,
    },
    /// The same with numbers of fp8.
    Fp8 {
        values: Vec<f32>,
        scales: Vec<f32>,
    },
}

impl RefWeight {
    /// Concatenates the parts along the output.
    pub(super) fn load(source: &LinearSource<'_>) -> Result<Self, BackendError> {
        let name = source.name;
        let first = source.parts.first().ok_or_else(|| tensor_error(name, "has no parts"))?;
        let (_, in_features) = matrix_shape(name, &first.weight)?;
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for part in source.parts {
            let (rows, cols) = matrix_shape(name, &part.weight)?;
            if cols != in_features {
                return Err(tensor_error(name, format!("parts have {in_features} and {cols} columns")));
            }
            weights.extend(to_f32(name, &part.weight)?);
            match &part.bias {
                Some(bias) if bias.num_elements() == rows => biases.extend(to_f32(name, bias)?),
                Some(bias) => {
                    let shape = bias.shape;
                    return Err(tensor_error(name, format!("bias has shape {shape:?} for {rows} rows")));
                }
                None => biases.resize(biases.len() + rows, 0.0),
            }
        }
        let matrix = match source.quant {
            QuantFormat::None => Matrix::Float(weights),
            QuantFormat::Int8 => Matrix::quantize(name, &weights, in_features, quant::quantize_int8)?,
            QuantFormat::Int4 => Matrix::quantize(name, &weights, in_features, int4_values)?,
            QuantFormat::Fp8 => Matrix::quantize_fp8(name, &weights, in_features)?,
        };
        Ok(Self { matrix, bias: biases, in_features })
    }

    /// Rows.
    pub fn out_features(&self) -> usize {
        self.bias.len()
    }

    /// Row `i` of the matrix, as an embedding table is read.
    pub(super) fn read_row(&self, i: usize, out: &mut [f32]) {
        let range = i * self.in_features..(i + 1) * self.in_features;
        match &self.matrix {
            Matrix::Float(weights) => out.copy_from_slice(&weights[range]),
            Matrix::Quantized { values, scales } => {
                for (out, &value) in out.iter_mut().zip(&values[range]) {
                    *out = scales[i] * f32::from(value);
                }
            }
            Matrix::Fp8 { values, scales } => {
                for (out, &value) in out.iter_mut().zip(&values[range]) {
                    *out = scales[i] * value;
                }
            }
        }
    }

    /// `out = weight · x + bias`.
    pub(super) fn apply(&self, x: &[f32], out: &mut [f32]) {
        self.apply_rows(0, x, out);
    }

    /// The rows of an expert, as many as `out` has elements, from `first` on. In fp8, `x` is not rounded.
    pub(super) fn apply_expert(&self, first: usize, x: &[f32], out: &mut [f32]) {
        let Matrix::Fp8 { values, scales } = &self.matrix else { return self.apply_rows(first, x, out) };
        let rows = values.chunks_exact(self.in_features).zip(scales).skip(first);
        for (out, (row, &scale)) in out.iter_mut().zip(rows) {
            let dot: f64 = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
            *out = (dot * f64::from(scale)) as f32;
        }
    }

    /// As many rows as `out` has elements, from `first` on.
    fn apply_rows(&self, first: usize, x: &[f32], out: &mut [f32]) {
        let (rows, k) = (first..first + out.len(), self.in_features);
        let elements = rows.start * k..rows.end * k;
        let bias = &self.bias[rows.clone()];
        match &self.matrix {
            Matrix::Float(weights) => apply_float(&weights[elements], bias, x, out),
            Matrix::Quantized { values, scales } => {
                apply_quantized(&values[elements], &scales[rows], bias, x, out);
            }
            Matrix::Fp8 { values, scales } => apply_fp8(&values[elements], &scales[rows], bias, x, out),
        }
    }
}

/// Summed in f64 from the first column to the last.
fn apply_float(weights: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) {
    let rows = weights.chunks_exact(x.len());
    for ((out, row), &bias) in out.iter_mut().zip(rows).zip(bias) {
        let dot: f64 = row.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
        *out = (dot + f64::from(bias)) as f32;
    }
}

/// As [`quant`] defines, to the bit.
fn apply_quantized(values: &[i8], scales: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) {
    let (mut q, mut x_scales) = (vec![0; x.len()], vec![0.0; x.len().div_ceil(ACT_GROUP)]);
    quant::quantize_activations(x, &mut q, &mut x_scales);
    for (n, (out, row)) in out.iter_mut().zip(values.chunks_exact(x.len())).enumerate() {
        let mut sum = 0.0f32;
        for ((row, q), &scale) in row.chunks(ACT_GROUP).zip(q.chunks(ACT_GROUP)).zip(&x_scales) {
            let exact: i32 = row.iter().zip(q).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
            sum = scale.mul_add(exact as f32, sum);
        }
        *out = sum * scales[n] + bias[n];
    }
}

/// As [`quant`] defines, with the sum in f64.
fn apply_fp8(values: &[f32], scales: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) {
    let mut codes = vec![0; x.len()];
    let x_scale = f64::from(quant::quantize_fp8(x, &mut codes));
    let rows = values.chunks_exact(x.len());
    let x: Vec<_> = codes.into_iter().map(fp8::to_f32).collect();
    for (n, (out, row)) in out.iter_mut().zip(rows).enumerate() {
        let dot: f64 = row.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
        *out = (dot * x_scale * f64::from(scales[n]) + f64::from(bias[n])) as f32;
    }
}

impl Matrix {
    fn quantize_fp8(name: &str, weights: &[f32], in_features: usize) -> Result<Self, BackendError> {
        let (mut codes, mut scales) = (vec![0; weights.len()], Vec::new());
        let rows = weights.chunks_exact(in_features).zip(codes.chunks_exact_mut(in_features));
        for (i, (row, codes)) in rows.enumerate() {
            quant::check_finite(name, i, row)?;
            scales.push(quant::quantize_fp8(row, codes));
        }
        Ok(Self::Fp8 { values: codes.into_iter().map(fp8::to_f32).collect(), scales })
    }

    /// `row_codec` fills in the values of a row and returns its scale.
    fn quantize(
        name: &str,
        weights: &[f32],
        in_features: usize,
        row_codec: impl Fn(&[f32], &mut [i8]) -> f32,
    ) -> Result<Self, BackendError> {
        let (mut values, mut scales) = (vec![0; weights.len()], Vec::new());
        let rows = weights.chunks_exact(in_features).zip(values.chunks_exact_mut(in_features));
        for (i, (row, values)) in rows.enumerate() {
            quant::check_finite(name, i, row)?;
            scales.push(row_codec(row, values));
        }
        Ok(Self::Quantized { values, scales })
    }
}

fn int4_values(row: &[f32], values: &mut [i8]) -> f32 {
    let (mut codes, mut groups) = (vec![0; row.len()], vec![0; row.len().div_ceil(INT4_GROUP)]);
    let scale = quant::quantize_int4(row, &mut codes, &mut groups);
    for (i, (value, &code)) in values.iter_mut().zip(&codes).enumerate() {
        *value = quant::int4_value(groups[i / INT4_GROUP], code) as i8;
    }
    scale
}
