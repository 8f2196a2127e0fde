//! Weights in 8 and 4 bits: quantized and packed at load, multiplied by our own kernels, to the bit of
//! [`quire_backend::quant`].

use std::ops::Range;

use quire_backend::quant::ACT_GROUP;
use quire_backend::{BackendError, Embed, LinearSource};

use crate::Cuda;
use crate::blaslt::Element;
use crate::buffers::{CudaBuf, CudaWeight};
use crate::driver::DeviceSlice;
use crate::int_weights::{Bits, IntWeights, PANEL};
use crate::kernels::Kernels;
use crate::ops::Rows;
use crate::params::{IntEmbedParams, IntGemmParams, QuantizeParams};
use crate::source_rows::{for_each_row, on_all_cores, pieces};
use crate::step::Layout;

/// A matrix of [`IntWeights`] on the device.
#[derive(Debug)]
pub(crate) struct IntMatrix {
    pub bits: Bits,
    pub weights: DeviceSlice,
    /// Null with [`Bits::Eight`].
    pub steps: DeviceSlice,
    pub scales: DeviceSlice,
    /// Of [`ACT_GROUP`] inputs.
    pub groups: usize,
}

/// Activations in 8 bits, of one operation at a time; made at the first use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantizedRows {
    /// A byte an input, rows padded as the product wants it.
    pub values: DeviceSlice,
    /// f32: of a row in fp8, or of each of its groups in integers.
    pub scales: DeviceSlice,
}

impl Default for QuantizedRows {
    fn default() -> Self {
        Self { values: DeviceSlice::NULL, scales: DeviceSlice::NULL }
    }
}

impl Cuda {
    /// Quantizes on all cores, piece by piece, while the device waits: loading is bound by the search for int4 grids.
    pub(crate) fn int_matrix(
        &mut self,
        source: &LinearSource<'_>,
        bits: Bits,
        out_features: usize,
        in_features: usize,
    ) -> Result<IntMatrix, BackendError> {
        let name = source.name;
        let panel = IntWeights::new(bits, PANEL, in_features);
        let (groups, panels) = (panel.groups(), out_features.div_ceil(PANEL));
        let sizes = [panel.weights.len(), panel.steps.len(), size_of::<f32>() * PANEL];
        let mut slices = [DeviceSlice::NULL; 3];
        for (slice, bytes) in slices.iter_mut().zip(sizes).filter(|(_, bytes)| *bytes > 0) {
            *slice = self.take(name, panels * bytes)?;
        }
        let pack = |rows: Range<usize>| {
            let mut packed = IntWeights::new(bits, rows.len(), in_features);
            for_each_row(source, rows.clone(), |n, row| packed.set_row(n - rows.start, row))?;
            Ok((rows.start / PANEL, packed))
        };
        for pieces in pieces(out_features, in_features, PANEL) {
            for packed in on_all_cores(&pieces, pack) {
                let (panel, packed) = packed?;
                let scales: Vec<u8> = packed.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                let parts = [&packed.weights, &packed.steps, &scales];
                for ((bytes, slice), size) in parts.into_iter().zip(slices).zip(sizes) {
                    if !bytes.is_empty() {
                        self.send(bytes, slice.part(panel * size, bytes.len()))?;
                    }
                }
            }
        }
        let [weights, steps, scales] = slices;
        Ok(IntMatrix { bits, weights, steps, scales, groups })
    }

    /// `out = x · weightᵀ + bias` for dense rows of `x`, which are quantized first.
    pub(crate) fn int_product(
        &mut self,
        x: DeviceSlice,
        weight: &CudaWeight,
        matrix: &IntMatrix,
        out: &CudaBuf,
        rows: Rows,
    ) -> Result<(), BackendError> {
        let groups = matrix.groups;
        let QuantizedRows { values, scales } = self.quantize(x, weight.in_features, rows, 1)?;
        let params = IntGemmParams {
            q: values.address(),
            x_scales: scales.address(),
            weight: matrix.weights.address(),
            steps: matrix.steps.address(),
            w_scales: matrix.scales.address(),
            bias: weight.bias.address(),
            out: out.slice.address(),
            num_rows: rows.count,
            groups: groups as i32,
            out_features: weight.out_features as i32,
            out_stride: out.stride as i32,
            reserved: 0,
        };
        let kernels = self.kernels.int(matrix.bits);
        let gemms = if out.element == Element::F32 { &kernels.into_f32 } else { &kernels.into_activations };
        let (kernel, shape) = gemms.choose(rows.launched, weight.out_features, self.context.sm_count());
        let launched = self.launch(kernel, shape, &params);
        self.check(launched)
    }

    /// Rows of `x` in 8 bits: `times` those that `rows` says. What was quantized before is overwritten.
    pub(crate) fn quantize(
        &mut self,
        x: DeviceSlice,
        in_features: usize,
        rows: Rows,
        times: usize,
    ) -> Result<QuantizedRows, BackendError> {
        let (groups, launched) = (in_features.div_ceil(ACT_GROUP), rows.launched * times);
        let most = launched.max(self.max_rows * times);
        let room = self.quantized_rows(most, groups * ACT_GROUP, groups)?;
        let params = QuantizeParams {
            x: x.address(),
            q: room.values.address(),
            scales: room.scales.address(),
            num_rows: rows.count,
            in_features: in_features as i32,
            groups: groups as i32,
            x_stride: in_features as i32,
            rows_per_count: times as i32,
        };
        let shape = Kernels::quantize_shape(launched, groups);
        let launched = self.launch(&self.kernels.quantize, shape, &params);
        self.check(launched)?;
        Ok(room)
    }

    /// The step's rows of a table, in f32.
    pub(crate) fn embed_int(&mut self, op: &Embed<'_, Self>, matrix: &IntMatrix) -> Result<(), BackendError> {
        let params = IntEmbedParams {
            weight: matrix.weights.address(),
            steps: matrix.steps.address(),
            w_scales: matrix.scales.address(),
            token_ids: self.step_address(self.layout.token_ids),
            last_tokens: self.slots.last_tokens.address(),
            out: op.out.slice.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            hidden: op.table.in_features as i32,
            groups: matrix.groups as i32,
            vocab: op.table.out_features as i32,
            scale: op.scale,
        };
        let kernel = &self.kernels.int(matrix.bits).embed;
        let launched = self.launch(kernel, Kernels::by_row(self.rows), &params);
        self.check(launched)
    }

    /// Room for rows of so many bytes and so many scales.
    pub(crate) fn quantized_rows(
        &mut self,
        rows: usize,
        row_bytes: usize,
        row_scales: usize,
    ) -> Result<QuantizedRows, BackendError> {
        let rows = rows.max(self.max_rows);
        let (values, scales) = (rows * row_bytes, rows * row_scales * size_of::<f32>());
        let have = self.quantized_rows;
        if have.values.bytes() < values {
            self.quantized_rows.values = self.take("activations", values)?;
        }
        if have.scales.bytes() < scales {
            self.quantized_rows.scales = self.take("activations", scales)?;
        }
        Ok(self.quantized_rows)
    }
}
