//! Weights and activations in fp8: rounded here, multiplied by cuBLASLt, which applies a scale for each row of either.
//!
//! A scale for each row and not one for all keeps a row apart from those that share its batch. The library has that for
//! compute capability 9.0 only (the mode `OUTER_VEC_32F`, since CUDA 12.9).

use std::cell::OnceCell;
use std::ops::Range;

use quire_backend::convert::tensor_error;
use quire_backend::{BackendError, Embed, LinearSource, quant};

use crate::Cuda;
use crate::blaslt::{Element, Operand};
use crate::buffers::{CudaBuf, CudaWeight, DenseMatrix};
use crate::driver::DeviceSlice;
use crate::kernels::Kernels;
use crate::ops::Rows;
use crate::params::{Fp8EmbedParams, Fp8QuantizeParams};
use crate::quantized::QuantizedRows;
use crate::source_rows::{for_each_row, on_all_cores, pieces};
use crate::step::Layout;

/// What inputs are padded to and outputs must be a multiple of: 16 bytes of a row.
const MULTIPLE: usize = 16;

impl Cuda {
    pub(crate) fn fp8_matrix(
        &mut self,
        source: &LinearSource<'_>,
        out_features: usize,
        in_features: usize,
    ) -> Result<DenseMatrix, BackendError> {
        let name = source.name;
        let (major, minor) = self.context.compute_capability();
        if (major, minor) != (9, 0) {
            let message =
                format!("fp8 weights need compute capability 9.0, this GPU has {major}.{minor}; use int8");
            return Err(tensor_error(name, message));
        }
        if !out_features.is_multiple_of(MULTIPLE) {
            let message =
                format!("fp8 takes outputs in multiples of {MULTIPLE}, not {out_features}; use int8");
            return Err(tensor_error(name, message));
        }
        let stride = in_features.next_multiple_of(MULTIPLE);
        let data = self.take(name, out_features * stride)?;
        let scales = self.take(name, out_features * size_of::<f32>())?;
        let round = |rows: Range<usize>| {
            let (mut codes, mut scales) = (vec![0; rows.len() * stride], Vec::with_capacity(4 * rows.len()));
            for_each_row(source, rows.clone(), |n, row| {
                let scale = quant::quantize_fp8(row, &mut codes[(n - rows.start) * stride..][..in_features]);
                scales.extend_from_slice(&scale.to_le_bytes());
            })?;
            Ok((rows.start, codes, scales))
        };
        for pieces in pieces(out_features, in_features, 1) {
            for rounded in on_all_cores(&pieces, round) {
                let (first, codes, row_scales) = rounded?;
                self.send(&codes, data.part(first * stride, codes.len()))?;
                self.send(&row_scales, scales.part(first * size_of::<f32>(), row_scales.len()))?;
            }
        }
        let gemms = [const { OnceCell::new() }; 2];
        Ok(DenseMatrix { data: Operand { data, scales }, element: Element::E4m3, stride, gemms })
    }

    /// `out = x · weightᵀ + bias` for dense rows of `x`, which are rounded first.
    pub(crate) fn fp8_product(
        &mut self,
        x: DeviceSlice,
        weight: &CudaWeight,
        matrix: &DenseMatrix,
        out: &CudaBuf,
        rows: Rows,
    ) -> Result<(), BackendError> {
        let QuantizedRows { values, scales } = self.quantized_rows(rows.launched, matrix.stride, 1)?;
        let params = Fp8QuantizeParams {
            x: x.address(),
            q: values.address(),
            scales: scales.address(),
            num_rows: rows.count,
            in_features: weight.in_features as i32,
            x_stride: weight.in_features as i32,
            q_stride: matrix.stride as i32,
            reserved: 0,
        };
        let launched = self.launch(&self.kernels.quantize_fp8, Kernels::by_row(rows.launched), &params);
        self.check(launched)?;
        self.dense_product(Operand { data: values, scales }, weight, matrix, out, rows.launched)
    }

    /// The step's rows of a table, in f32.
    pub(crate) fn embed_fp8(
        &mut self,
        op: &Embed<'_, Self>,
        matrix: &DenseMatrix,
    ) -> Result<(), BackendError> {
        let params = Fp8EmbedParams {
            weight: matrix.data.data.address(),
            w_scales: matrix.data.scales.address(),
            token_ids: self.step_address(self.layout.token_ids),
            last_tokens: self.slots.last_tokens.address(),
            out: op.out.slice.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            hidden: op.table.in_features as i32,
            stride: matrix.stride as i32,
            vocab: op.table.out_features as i32,
            scale: op.scale,
        };
        let launched = self.launch(&self.kernels.embed_fp8, Kernels::by_row(self.rows), &params);
        self.check(launched)
    }
}
