//! The embedding table's rows.

use quire_core::TokenId;

use crate::buffer::SharedRows;
use crate::element::Element;
use crate::weights::{CpuWeight, Matrix};

/// Copies row `id` of `table` to row `t` of `out`, times `scale`. Panics if there is no such row.
pub(crate) fn embed_row(table: &CpuWeight, scale: f32, id: TokenId, t: usize, out: SharedRows<'_>) {
    let (id, cols) = (id as usize, table.in_features);
    assert!(id < table.out_features, "token id {id} is outside the embedding of {} rows", table.out_features);
    // SAFETY: each row `t` is written by one call.
    let out = unsafe { out.part(t, 0, cols) };
    let range = id * cols..(id + 1) * cols;
    match &table.matrix {
        Matrix::F32(matrix) => widen(&matrix[range], out),
        Matrix::F16(matrix) => widen(&matrix[range], out),
        Matrix::Bf16(matrix) => widen(&matrix[range], out),
        Matrix::Packed(packed) => packed.row(id, out),
        Matrix::Quantized(quantized) => quantized.row(id, out),
    }
    if scale != 1.0 {
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

fn widen<E: Element>(from: &[E], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
}
