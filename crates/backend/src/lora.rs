//! What LoRA adapters add to a linear layer, as it comes from their files, or what a rank has of it.

use std::ops::Range;

use quire_core::TensorView;

use crate::BackendError;
use crate::convert::{matrix_shape, tensor_error};

/// What one adapter adds to some outputs of a linear layer: `scaling · B (A · x)`.
#[derive(Clone, Copy, Debug)]
pub struct LoraPart<'a> {
    /// The first output that it adds to. A layer may be several merged: q, k and v have parts of their own.
    pub first: usize,
    /// `[rank, in_features]`.
    pub a: TensorView<'a>,
    /// `[outputs, rank]`.
    pub b: TensorView<'a>,
    /// Multiplies `A · x`.
    pub scaling: f32,
}

/// What all adapters add to one linear layer.
#[derive(Clone, Copy, Debug)]
pub struct LoraSource<'a> {
    /// Of the layer, for messages.
    pub name: &'a str,
    /// Columns of the layer.
    pub in_features: usize,
    /// Rows of the layer.
    pub out_features: usize,
    /// By [`quire_core::AdapterId`]: its parts, in the order of their outputs, which do not overlap. Without any: nothing.
    pub adapters: &'a [Vec<LoraPart<'a>>],
}

impl LoraPart<'_> {
    /// The outputs that it adds to.
    pub fn outputs(&self) -> Range<usize> {
        self.first..self.first + self.b.shape[0]
    }

    /// Rows of `A`.
    pub fn rank(&self) -> usize {
        self.a.shape[0]
    }
}

impl LoraSource<'_> {
    /// Checks that the parts fit the layer.
    ///
    /// # Errors
    /// The layer's name, and the first shape that does not.
    pub fn check(&self) -> Result<(), BackendError> {
        for (adapter, parts) in self.adapters.iter().enumerate() {
            let mut free = 0;
            for part in parts {
                let (rank, cols) = matrix_shape(self.name, &part.a)?;
                let (rows, b_rank) = matrix_shape(self.name, &part.b)?;
                let (last, fits) = (part.first + rows, part.first >= free && rank > 0 && b_rank == rank);
                if !fits || cols != self.in_features || last > self.out_features {
                    let (a, b, first) = (part.a.shape, part.b.shape, part.first);
                    let (rows, cols) = (self.out_features, self.in_features);
                    return Err(tensor_error(
                        self.name,
                        format!(
                            "adapter {adapter} has {b:?} times {a:?} from output {first} on; the layer is [{rows}, {cols}]"
                        ),
                    ));
                }
                free = last;
            }
        }
        Ok(())
    }
}
