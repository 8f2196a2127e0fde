//! Weights in 8 and 4 bits: quantized and packed at load, multiplied by our own kernels, to the bit of
//! [`quire_backend::quant`].

use std::ops::Range;
use std::thread;

use quire_backend::convert::{matrix_shape, to_f32};
use quire_backend::quant::{ACT_GROUP, check_finite};
use quire_backend::{BackendError, LinearSource};
use quire_core::TensorView;

use crate::Cuda;
use crate::blaslt::Element;
use crate::buffers::{CudaBuf, CudaWeight};
use crate::driver::DeviceSlice;
use crate::int_weights::{Bits, IntWeights, PANEL};
use crate::kernels::Kernels;
use crate::load::PIECE;
use crate::ops::Rows;
use crate::params::{IntEmbedParams, IntGemmParams, QuantizeParams};
use crate::step::Layout;

/// A matrix of [`IntWeights`] on the device.
#[derive(Debug)]
pub(crate) struct IntMatrix {
    bits: Bits,
    weights: DeviceSlice,
    /// Null with [`Bits::Eight`].
    steps: DeviceSlice,
    scales: DeviceSlice,
    /// Of [`ACT_GROUP`] inputs.
    groups: usize,
}

/// Activations in 8 bits, of one operation at a time; made at the first use.
#[derive(Debug)]
pub(crate) struct QuantizedRows {
    /// `[rows, groups * 256]`.
    values: DeviceSlice,
    /// `[rows, groups]` f32.
    scales: DeviceSlice,
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
        let rows_of_piece = (PIECE / in_features).max(1).next_multiple_of(PANEL);
        let pieces: Vec<Range<usize>> = (0..out_features)
            .step_by(rows_of_piece)
            .map(|first| first..(first + rows_of_piece).min(out_features))
            .collect();
        let threads = thread::available_parallelism().map_or(1, usize::from);
        for pieces in pieces.chunks(threads) {
            for (rows, packed) in pieces.iter().zip(pack_all(source, bits, pieces, in_features)) {
                let packed = packed?;
                let scales: Vec<u8> = packed.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
                let parts = [&packed.weights, &packed.steps, &scales];
                for ((bytes, slice), size) in parts.into_iter().zip(slices).zip(sizes) {
                    if !bytes.is_empty() {
                        self.send(bytes, slice.part(rows.start / PANEL * size, bytes.len()))?;
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
        self.reserve_quantized_rows(rows.launched, groups)?;
        let QuantizedRows { values, scales } = self.quantized_rows;
        let quantize = QuantizeParams {
            x: x.address(),
            q: values.address(),
            scales: scales.address(),
            num_rows: rows.count,
            in_features: weight.in_features as i32,
            groups: groups as i32,
            x_stride: weight.in_features as i32,
            reserved: 0,
        };
        let shape = Kernels::quantize_shape(rows.launched, groups);
        let launched = self.launch(&self.kernels.quantize, shape, &quantize);
        self.check(launched)?;
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

    /// The step's rows of a table, in f32.
    pub(crate) fn embed_int(
        &mut self,
        table: &CudaWeight,
        matrix: &IntMatrix,
        out: DeviceSlice,
    ) -> Result<(), BackendError> {
        let params = IntEmbedParams {
            weight: matrix.weights.address(),
            steps: matrix.steps.address(),
            w_scales: matrix.scales.address(),
            token_ids: self.step_address(self.layout.token_ids),
            last_tokens: self.slots.last_tokens.address(),
            out: out.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            hidden: table.in_features as i32,
            groups: matrix.groups as i32,
            vocab: table.out_features as i32,
            reserved: 0,
        };
        let kernel = &self.kernels.int(matrix.bits).embed;
        let launched = self.launch(kernel, Kernels::by_row(self.rows), &params);
        self.check(launched)
    }

    fn reserve_quantized_rows(&mut self, rows: usize, groups: usize) -> Result<(), BackendError> {
        let groups = rows.max(self.max_rows) * groups;
        let have = &self.quantized_rows;
        if have.values.bytes() < groups * ACT_GROUP || have.scales.bytes() < groups * size_of::<f32>() {
            self.quantized_rows = QuantizedRows {
                values: self.take("activations", groups * ACT_GROUP)?,
                scales: self.take("activations", groups * size_of::<f32>())?,
            };
        }
        Ok(())
    }
}

/// The pieces of a layer, a thread each.
fn pack_all(
    source: &LinearSource<'_>,
    bits: Bits,
    pieces: &[Range<usize>],
    in_features: usize,
) -> Vec<Result<IntWeights, BackendError>> {
    thread::scope(|scope| {
        let pack = |rows: &Range<usize>| {
            let rows = rows.clone();
            scope.spawn(move || pack(source, bits, rows, in_features))
        };
        let workers: Vec<_> = pieces.iter().map(pack).collect();
        let join = |worker: thread::ScopedJoinHandle<'_, _>| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().map(join).collect()
    })
}

/// Some rows of a layer, counted over all its parts. The first begins a panel.
fn pack(
    source: &LinearSource<'_>,
    bits: Bits,
    rows: Range<usize>,
    in_features: usize,
) -> Result<IntWeights, BackendError> {
    let name = source.name;
    let mut packed = IntWeights::new(bits, rows.len(), in_features);
    let mut part_begin = 0;
    for part in source.parts {
        let (part_rows, _) = matrix_shape(name, &part.weight)?;
        let part_end = part_begin + part_rows;
        let row_bytes = in_features * part.weight.dtype.size();
        for n in rows.start.max(part_begin)..rows.end.min(part_end) {
            let data = &part.weight.data[(n - part_begin) * row_bytes..][..row_bytes];
            let row = to_f32(name, &TensorView { dtype: part.weight.dtype, shape: &[in_features], data })?;
            check_finite(name, n, &row)?;
            packed.set_row(n - rows.start, &row);
        }
        part_begin = part_end;
    }
    Ok(packed)
}
