//! Linear layers and embedding tables as they lie in memory: row-major in the checkpoint's own type, or packed where
//! products are of bf16.

use half::{bf16, f16};
use quire_backend::convert::{check_tensor, matrix_shape, tensor_error, to_f32};
use quire_backend::{BackendError, LinearSource};
use quire_core::{DType, QuantFormat};

use crate::backend::Precision;
use crate::buffer::Aligned;
use crate::element::Element;
use crate::packed::Packed;
use crate::pool::Pool;
use crate::prepacked::{self, Layout, Prepacked};
use crate::quantized::{Quantized, codes_of};

/// A linear layer `[out_features, in_features]`.
pub struct CpuWeight {
    pub(crate) matrix: Matrix,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
}

/// Its elements.
pub(crate) enum Matrix {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    Bf16(Aligned<bf16>),
    Packed(Packed),
    Quantized(Quantized),
}

impl CpuWeight {
    /// Concatenates the parts of `source`. Parts of different types are widened to f32. What is packed may come from
    /// `prepacked`; then the data of the parts is not read.
    pub(crate) fn load(
        pool: &mut Pool,
        precision: Precision,
        prepacked: Option<&Prepacked>,
        source: &LinearSource<'_>,
    ) -> Result<Self, BackendError> {
        let name = source.name;
        let codes = codes_of(source.quant);
        if codes.is_none() && source.quant != QuantFormat::None {
            let message =
                format!("quantization {:?} is not supported on cpu, use int8 or int4", source.quant);
            return Err(tensor_error(name, message));
        }
        let first = source.parts.first().ok_or_else(|| tensor_error(name, "has no parts"))?;
        let (_, in_features) = matrix_shape(name, &first.weight)?;
        let mut out_features = 0;
        for part in source.parts {
            let (rows, cols) = matrix_shape(name, &part.weight)?;
            if cols != in_features {
                return Err(tensor_error(name, format!("parts have {in_features} and {cols} columns")));
            }
            check_tensor(name, &part.weight)?;
            out_features += rows;
        }
        let dtype = first.weight.dtype;
        let uniform = source.parts.iter().all(|part| part.weight.dtype == dtype);
        let len = out_features * in_features;
        let layout = match (codes, dtype) {
            (Some(codes), _) => Some(Layout::Quantized(codes)),
            (None, DType::BF16) if uniform && precision == Precision::Bf16 => Some(Layout::Bf16),
            _ => None,
        };
        let matrix = match (layout, dtype) {
            (Some(layout), _) => {
                let shape = [out_features, in_features];
                match prepacked {
                    Some(prepacked) => prepacked.load(pool, source, layout, shape)?,
                    None => prepacked::pack(pool, source, layout, shape)?,
                }
            }
            (None, DType::BF16) if uniform => Matrix::Bf16(concat(source, len, bf16::from_le_bytes)?),
            (None, DType::F16) if uniform => Matrix::F16(concat(source, len, f16::from_le_bytes)?),
            _ => Matrix::F32(widen(source, len)?),
        };
        let bias = load_bias(source, out_features)?;
        Ok(Self { matrix, bias, out_features, in_features })
    }
}

/// Copies parts of 16-bit elements.
fn concat<T: Element>(
    source: &LinearSource<'_>,
    len: usize,
    from_le_bytes: impl Fn([u8; 2]) -> T,
) -> Result<Aligned<T>, BackendError> {
    let mut matrix = Aligned::zeroed(len, source.name)?;
    let elements = source.parts.iter().flat_map(|part| part.weight.data.as_chunks::<2>().0);
    matrix.iter_mut().zip(elements).for_each(|(to, from)| *to = from_le_bytes(*from));
    Ok(matrix)
}

fn widen(source: &LinearSource<'_>, len: usize) -> Result<Aligned<f32>, BackendError> {
    let mut matrix = Aligned::zeroed(len, source.name)?;
    let mut done = 0;
    for part in source.parts {
        let values = to_f32(source.name, &part.weight)?;
        matrix[done..done + values.len()].copy_from_slice(&values);
        done += values.len();
    }
    Ok(matrix)
}

/// The biases of all parts, zero where a part has none; `None` if no part has one.
fn load_bias(source: &LinearSource<'_>, out_features: usize) -> Result<Option<Vec<f32>>, BackendError> {
    if source.parts.iter().all(|part| part.bias.is_none()) {
        return Ok(None);
    }
    let mut all = Vec::with_capacity(out_features);
    for part in source.parts {
        let rows = part.weight.shape[0];
        match &part.bias {
            Some(bias) if bias.num_elements() == rows => all.extend(to_f32(source.name, bias)?),
            Some(bias) => {
                let shape = bias.shape;
                return Err(tensor_error(source.name, format!("bias has shape {shape:?} for {rows} rows")));
            }
            None => all.resize(all.len() + rows, 0.0),
        }
    }
    Ok(Some(all))
}
