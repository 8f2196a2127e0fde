//! Linear layers and the embedding table.

use crate::convert::{matrix_shape, tensor_error, to_f32};
use crate::{BackendError, LinearSource};
use quire_core::{QuantFormat, Shard};

/// A linear layer in f32.
#[derive(Clone, Debug)]
pub struct RefWeight {
    /// `[out_features, in_features]`, row-major.
    pub weight: Vec<f32>,
    /// `[out_features]`; zero where the checkpoint has none.
    pub bias: Vec<f32>,
    /// Columns.
    pub in_features: usize,
}

impl RefWeight {
    /// Concatenates the parts along the output.
    pub(super) fn load(source: &LinearSource<'_>) -> Result<Self, BackendError> {
        let name = source.name;
        if source.quant != QuantFormat::None {
            return Err(tensor_error(name, format!("quantization {:?} is not supported here", source.quant)));
        }
        if source.shard != Shard::WHOLE {
            return Err(tensor_error(name, format!("{:?} is not supported here", source.shard)));
        }
        let first = source.parts.first().ok_or_else(|| tensor_error(name, "has no parts"))?;
        let (_, in_features) = matrix_shape(name, &first.weight)?;
        let mut loaded = Self { weight: Vec::new(), bias: Vec::new(), in_features };
        for part in source.parts {
            let (rows, cols) = matrix_shape(name, &part.weight)?;
            if cols != in_features {
                return Err(tensor_error(name, format!("parts have {in_features} and {cols} columns")));
            }
            loaded.weight.extend(to_f32(name, &part.weight)?);
            match &part.bias {
                Some(bias) if bias.num_elements() == rows => loaded.bias.extend(to_f32(name, bias)?),
                Some(bias) => {
                    let shape = bias.shape;
                    return Err(tensor_error(name, format!("bias has shape {shape:?} for {rows} rows")));
                }
                None => loaded.bias.resize(loaded.bias.len() + rows, 0.0),
            }
        }
        Ok(loaded)
    }

    /// Rows.
    pub fn out_features(&self) -> usize {
        self.bias.len()
    }

    /// Row `i` of the matrix.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.weight[i * self.in_features..(i + 1) * self.in_features]
    }

    /// `out = weight · x + bias`, summed in f64 from the first column to the last.
    pub(super) fn apply(&self, x: &[f32], out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            let dot: f64 = self.row(i).iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
            *out = (dot + f64::from(self.bias[i])) as f32;
        }
    }
}
