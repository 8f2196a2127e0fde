//! Loading: checkpoint bytes to device memory, in the backend's element type.

use std::cell::OnceCell;

use quire_backend::convert::{check_tensor, matrix_shape, tensor_error, to_f32};
use quire_backend::{BackendError, BufRole, KvLayout, LinearSource, RopeTable};
use quire_core::{DType, QuantFormat, TensorView};

use crate::Cuda;
use crate::blaslt::Element;
use crate::buffers::{
    CudaBuf, CudaKv, CudaMatrix, CudaNorm, CudaRope, CudaWeight, DenseMatrix, KvElement, encode,
};
use crate::driver::DeviceSlice;
use crate::int_weights::Bits;
use crate::options::KernelSet;

/// Elements converted at once.
pub(crate) const PIECE: usize = 1 << 20;

/// Outputs and inputs of all parts together, which are what they should be.
fn features(source: &LinearSource<'_>) -> Result<(usize, usize), BackendError> {
    let name = source.name;
    let first = source.parts.first().ok_or_else(|| tensor_error(name, "has no parts"))?;
    let (_, in_features) = matrix_shape(name, &first.weight)?;
    let mut out_features = 0;
    for part in source.parts {
        let (rows, cols) = matrix_shape(name, &part.weight)?;
        if cols != in_features {
            return Err(tensor_error(name, format!("parts have {in_features} and {cols} columns")));
        }
        if let Some(bias) = part.bias.filter(|bias| bias.num_elements() != rows) {
            return Err(tensor_error(name, format!("bias has shape {:?} for {rows} rows", bias.shape)));
        }
        check_tensor(name, &part.weight)?;
        out_features += rows;
    }
    Ok((out_features, in_features))
}

impl Cuda {
    pub(crate) fn linear_from(&mut self, source: &LinearSource<'_>) -> Result<CudaWeight, BackendError> {
        let name = source.name;
        let (out_features, in_features) = features(source)?;
        let matrix = match source.quant {
            QuantFormat::None => CudaMatrix::Dense(self.dense_matrix(source, out_features, in_features)?),
            QuantFormat::Int8 => {
                CudaMatrix::Int(self.int_matrix(source, Bits::Eight, out_features, in_features)?)
            }
            QuantFormat::Int4 => {
                CudaMatrix::Int(self.int_matrix(source, Bits::Four, out_features, in_features)?)
            }
            QuantFormat::Fp8 => CudaMatrix::Fp8(self.fp8_matrix(source, out_features, in_features)?),
        };
        let bias_element = match matrix {
            CudaMatrix::Dense(_) | CudaMatrix::Fp8(_) => self.options.activations,
            CudaMatrix::Int(_) => Element::F32,
        };
        let bias = self.bias_of(source, out_features, bias_element)?;
        Ok(CudaWeight { name: name.to_owned(), matrix, bias, out_features, in_features })
    }

    fn dense_matrix(
        &mut self,
        source: &LinearSource<'_>,
        out_features: usize,
        in_features: usize,
    ) -> Result<DenseMatrix, BackendError> {
        let name = source.name;
        let element = self.options.activations;
        let data = self.take(name, out_features * in_features * element.size())?;
        let mut done = 0;
        for part in source.parts {
            let bytes = part.weight.num_elements() * element.size();
            self.send_tensor(name, &part.weight, data.part(done, bytes))?;
            done += bytes;
        }
        let gemms = [const { OnceCell::new() }; 2];
        Ok(DenseMatrix { data: data.into(), element, stride: in_features, gemms })
    }

    /// The biases of all parts; zeros where a part has none. Null if none has.
    fn bias_of(
        &mut self,
        source: &LinearSource<'_>,
        out_features: usize,
        element: Element,
    ) -> Result<DeviceSlice, BackendError> {
        if source.parts.iter().all(|part| part.bias.is_none()) {
            return Ok(DeviceSlice::NULL);
        }
        let mut values = Vec::with_capacity(out_features);
        for part in source.parts {
            match &part.bias {
                Some(bias) => values.extend(to_f32(source.name, bias)?),
                None => values.resize(values.len() + part.weight.shape[0], 0.0),
            }
        }
        self.store(source.name, values.into_iter(), element)
    }

    pub(crate) fn norm_from(
        &mut self,
        name: &str,
        weight: &TensorView<'_>,
    ) -> Result<CudaNorm, BackendError> {
        let values = to_f32(name, weight)?;
        let len = values.len();
        Ok(CudaNorm { slice: self.store(name, values.into_iter(), Element::F32)?, len })
    }

    pub(crate) fn rope_from(&mut self, table: &RopeTable) -> Result<CudaRope, BackendError> {
        let half = table.inv_freq.len();
        let rows = 0..table.max_positions;
        let values = rows.flat_map(|position| {
            (0..half).flat_map(move |i| {
                let (sin, cos) = table.sin_cos(position, i);
                [cos, sin]
            })
        });
        Ok(CudaRope { slice: self.store("rotary table", values, Element::F32)?, rotary_dim: 2 * half })
    }

    pub(crate) fn buffer(
        &mut self,
        role: BufRole,
        rows: usize,
        cols: usize,
    ) -> Result<CudaBuf, BackendError> {
        let (element, stride) = match role {
            BufRole::Residual => (Element::F32, cols),
            BufRole::Hidden => (self.options.activations, cols),
            // The sampler reads four logits at once.
            BufRole::Logits => (Element::F32, cols.next_multiple_of(4)),
        };
        if role != BufRole::Logits {
            self.max_rows = self.max_rows.max(rows);
        }
        let slice = self.take("activations", rows * stride * element.size())?;
        Ok(CudaBuf { slice, rows, cols, stride, element })
    }

    pub(crate) fn kv_from(&mut self, layout: &KvLayout) -> Result<CudaKv, BackendError> {
        let mut kv = CudaKv::describe(layout, self.options.activations)?;
        kv.slice = self.take("kv cache", kv.layer_bytes() * kv.num_layers)?;
        if kv.element == KvElement::Fp8 {
            kv.scales = self.take("kv cache", kv.layer_scale_bytes() * kv.num_layers)?;
        }
        if self.options.kernels == KernelSet::Sm90a {
            // What is copied by boxes is not cut at a sequence's end: a weight of zero needs a finite value.
            let zeroed = self.stream.fill(kv.slice, 0);
            self.check(zeroed)?;
        }
        self.page_tokens = kv.page_tokens as usize;
        Ok(kv)
    }

    /// Memory for start-up. What was recorded before may hold other addresses of the same names.
    pub(crate) fn take(&mut self, what: &str, bytes: usize) -> Result<DeviceSlice, BackendError> {
        self.alive()?;
        self.graphs.clear();
        match self.arena.alloc(bytes) {
            Err(error) if error.is_out_of_memory => {
                Err(BackendError::OutOfMemory { what: what.to_owned(), bytes })
            }
            other => {
                self.ledger.note(what, bytes);
                self.check(other)
            }
        }
    }

    /// Rounds and uploads numbers.
    pub(crate) fn store(
        &mut self,
        what: &str,
        mut values: impl Iterator<Item = f32>,
        element: Element,
    ) -> Result<DeviceSlice, BackendError> {
        let mut bytes = Vec::new();
        encode(&mut values, element, &mut bytes);
        let slice = self.take(what, bytes.len())?;
        self.send(&bytes, slice)?;
        Ok(slice)
    }

    /// A tensor in the backend's element type.
    fn send_tensor(
        &mut self,
        name: &str,
        view: &TensorView<'_>,
        to: DeviceSlice,
    ) -> Result<(), BackendError> {
        let element = self.options.activations;
        let is_same =
            matches!((view.dtype, element), (DType::BF16, Element::Bf16) | (DType::F16, Element::F16));
        if is_same {
            return self.send(view.data, to);
        }
        let size = view.dtype.size();
        let mut bytes = Vec::with_capacity(PIECE * element.size());
        for (i, piece) in view.data.chunks(PIECE * size).enumerate() {
            let count = piece.len() / size;
            let view = TensorView { dtype: view.dtype, shape: &[count], data: piece };
            bytes.clear();
            encode(to_f32(name, &view)?.into_iter(), element, &mut bytes);
            self.send(&bytes, to.part(i * PIECE * element.size(), bytes.len()))?;
        }
        Ok(())
    }

    /// Uploads and waits.
    pub(crate) fn send(&mut self, bytes: &[u8], to: DeviceSlice) -> Result<(), BackendError> {
        let sent = self.staging.upload(bytes, to, &self.stream).and_then(|()| self.stream.synchronize());
        self.check(sent)?;
        let turned = self.staging.next(&self.stream);
        self.check(turned)
    }
}
