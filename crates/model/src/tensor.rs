//! A tensor handed out by a checkpoint: borrowed from it, or made for the caller.

use std::borrow::Cow;

use half::{bf16, f16};
use quire_core::{DType, TensorView};

/// A weight, row-major and contiguous. Borrowed from the mapped file where possible; owned where the bytes had to
/// be made (dummy weights, and quirks of a family that are folded into its weights).
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Element type of `data`.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Cow<'a, [usize]>,
    /// `shape.product() * dtype.size()` little-endian bytes, of any alignment.
    pub data: Cow<'a, [u8]>,
}

impl Tensor<'_> {
    /// The form that backends take.
    pub fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: &self.shape, data: &self.data }
    }

    /// Every number and 1, in f32: bf16 has no room for the small numbers beside the 1.
    pub(crate) fn plus_one(&self) -> Tensor<'static> {
        let data = &self.data;
        let values: Vec<f32> = match self.dtype {
            DType::F32 => data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            DType::F16 => {
                data.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect()
            }
            DType::BF16 => {
                data.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect()
            }
            DType::I8 | DType::F8E4M3 => unreachable!("a checkpoint's dtype is f32, f16 or bf16"),
        };
        let data: Vec<u8> = values.iter().flat_map(|x| (1.0 + x).to_le_bytes()).collect();
        Tensor { dtype: DType::F32, shape: self.shape.to_vec().into(), data: data.into() }
    }
}
