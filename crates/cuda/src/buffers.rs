//! What the backend hands out at load: weights, tables, the cache, and buffers of activations. All of it is memory of the
//! backend's arenas, so these are descriptions without a destructor of their own.

use std::cell::OnceCell;

use half::{bf16, f16};
use quire_backend::{BackendError, KvLayout, fp8};
use quire_core::DType;

use crate::blaslt::{Element, Gemm, Operand};
use crate::driver::DeviceSlice;
use crate::quantized::IntMatrix;

/// Activations `[rows, cols]`, rows `stride` elements apart.
#[derive(Debug)]
pub struct CudaBuf {
    pub(crate) slice: DeviceSlice,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
    pub(crate) element: Element,
}

/// A linear layer or a table.
#[derive(Debug)]
pub struct CudaWeight {
    pub(crate) name: String,
    pub(crate) matrix: CudaMatrix,
    /// `[out_features]`, or null: f32 beside integers, of the activations' type beside others.
    pub(crate) bias: DeviceSlice,
    pub(crate) out_features: usize,
    pub(crate) in_features: usize,
}

/// How a matrix lies in device memory.
#[derive(Debug)]
pub(crate) enum CudaMatrix {
    Dense(DenseMatrix),
    /// Of [`Element::E4m3`]; activations are rounded to it, too.
    Fp8(DenseMatrix),
    Int(IntMatrix),
}

/// `[out_features, in_features]`, for cuBLASLt.
#[derive(Debug)]
pub(crate) struct DenseMatrix {
    pub data: Operand,
    pub element: Element,
    /// Elements between rows.
    pub stride: usize,
    /// Its product, described at the first use: into activations, and into f32 (see [`Self::gemm`]).
    pub gemms: [OnceCell<Gemm>; 2],
}

impl DenseMatrix {
    /// The product into elements of this type.
    pub fn gemm(&self, output: Element) -> &OnceCell<Gemm> {
        &self.gemms[usize::from(output == Element::F32)]
    }
}

/// A norm's weight, f32.
#[derive(Debug)]
pub struct CudaNorm {
    pub(crate) slice: DeviceSlice,
    pub(crate) len: usize,
}

/// `[positions, rotary_dim / 2, 2]` f32: cosine, sine.
#[derive(Debug)]
pub struct CudaRope {
    pub(crate) slice: DeviceSlice,
    pub(crate) rotary_dim: usize,
}

/// `[layer][page][2][kv heads][page tokens][head_dim]`.
#[derive(Debug)]
pub struct CudaKv {
    pub(crate) slice: DeviceSlice,
    /// `[layer][page][2][kv heads][page tokens]` f32: the factor of each key and value of an fp8 cache, else null.
    pub(crate) scales: DeviceSlice,
    pub(crate) element: KvElement,
    pub(crate) num_layers: usize,
    pub(crate) num_kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) num_pages: u32,
    pub(crate) page_tokens: u32,
    /// Bytes of a page of one layer.
    pub(crate) page_bytes: usize,
}

/// What keys and values are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvElement {
    /// The activations' type.
    Activation,
    /// E4M3 with a factor for each vector.
    Fp8,
}

impl CudaKv {
    /// Checks what the kernels take; the memory comes later.
    pub(crate) fn describe(layout: &KvLayout, activations: Element) -> Result<Self, BackendError> {
        let refuse = |message: String| Err(BackendError::Tensor { name: "kv cache".into(), message });
        let wanted = if activations == Element::F16 { DType::F16 } else { DType::BF16 };
        let element = match layout.dtype {
            DType::F8E4M3 => KvElement::Fp8,
            dtype if dtype == wanted => KvElement::Activation,
            dtype => {
                return refuse(format!("type {dtype} is not supported on CUDA here, use {wanted} or fp8"));
            }
        };
        if !layout.block_size.is_power_of_two() || layout.block_size < 16 {
            return refuse(format!(
                "block_size {} is not supported on CUDA, use 16, 32 or 64",
                layout.block_size
            ));
        }
        let Some(first) = layout.layers.first() else { return refuse("has no layers".into()) };
        if layout.layers.iter().any(|layer| layer != first) {
            return refuse("layers of different shapes are not supported on CUDA".into());
        }
        if element == KvElement::Fp8 && !first.head_dim.is_multiple_of(16) {
            return refuse(format!(
                "fp8 takes head_dim in multiples of 16, not {}, use {wanted}",
                first.head_dim
            ));
        }
        let bytes = if element == KvElement::Fp8 { 1 } else { activations.size() };
        let per_token = 2 * first.num_kv_heads as usize * first.head_dim as usize;
        Ok(Self {
            slice: DeviceSlice::NULL,
            scales: DeviceSlice::NULL,
            element,
            num_layers: layout.layers.len(),
            num_kv_heads: first.num_kv_heads,
            head_dim: first.head_dim,
            num_pages: layout.num_blocks,
            page_tokens: layout.block_size,
            page_bytes: per_token * layout.block_size as usize * bytes,
        })
    }

    /// Bytes of one layer.
    pub(crate) fn layer_bytes(&self) -> usize {
        self.page_bytes * self.num_pages as usize
    }

    /// Bytes of the factors of a page of one layer.
    pub(crate) fn page_scale_bytes(&self) -> usize {
        match self.element {
            KvElement::Activation => 0,
            KvElement::Fp8 => (2 * self.num_kv_heads * self.page_tokens) as usize * size_of::<f32>(),
        }
    }

    /// Bytes of the factors of one layer.
    pub(crate) fn layer_scale_bytes(&self) -> usize {
        self.page_scale_bytes() * self.num_pages as usize
    }

    /// Address of a layer's first factor.
    pub(crate) fn layer_scales(&self, layer: usize) -> u64 {
        self.scales.part(layer * self.layer_scale_bytes(), self.layer_scale_bytes()).address()
    }

    /// Address of a layer's first page.
    pub(crate) fn layer(&self, layer: usize) -> u64 {
        self.slice.part(layer * self.layer_bytes(), self.layer_bytes()).address()
    }
}

/// Rounds to `element`, little-endian.
pub(crate) fn encode(values: impl Iterator<Item = f32>, element: Element, out: &mut Vec<u8>) {
    match element {
        Element::Bf16 => values.for_each(|v| out.extend_from_slice(&bf16::from_f32(v).to_le_bytes())),
        Element::F16 => values.for_each(|v| out.extend_from_slice(&f16::from_f32(v).to_le_bytes())),
        Element::F32 => values.for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
        Element::E4m3 => values.for_each(|v| out.push(fp8::from_f32(v))),
    }
}

/// Widens what [`encode`] made.
pub(crate) fn decode(bytes: &[u8], element: Element) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter().copied();
    match element {
        Element::Bf16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        Element::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        Element::F32 => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        Element::E4m3 => bytes.iter().map(|&code| fp8::to_f32(code)).collect(),
    }
}
