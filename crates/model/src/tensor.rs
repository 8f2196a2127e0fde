//! A tensor handed out by a checkpoint: borrowed from it, or made for the caller.

use std::borrow::Cow;

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
}
