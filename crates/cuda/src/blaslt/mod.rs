//! Dense products by cuBLASLt, with descriptors made once per layer and algorithms chosen once per shape.
//!
//! Row-major `out[m, n] = x[m, k] · weight[n, k]ᵀ + bias[n]` is, column-major as the library sees it,
//! `D[n, m] = Aᵀ · B` with `A = weight` and `B = x`: both K-major, the layout that it is fastest in.
//!
//! A row must not show how many others share the product ([`Selection::Invariant`]): one algorithm per shape serves
//! every `m`, without split-K, and is checked to the bit at load. [`Selection::Timed`] takes the fastest per range of
//! `m` instead and remembers it on disk.
//!
//! Reading order: this file, `algorithm`, `cache`.

mod algorithm;
mod cache;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

use self::algorithm::bucket_of;
use self::cache::AlgorithmCache;
use crate::driver::{Arena, Context, CudaError, DeviceSlice, Stream};

/// What cuBLASLt may use beside its operands: NVIDIA's advice for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Element types of products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Element {
    /// bfloat16.
    Bf16,
    /// Half precision.
    F16,
    /// Single precision.
    F32,
    /// FP8 with a scale for each row.
    E4m3,
}

impl Element {
    /// Bytes of one.
    pub const fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::E4m3 => 1,
        }
    }

    fn raw(self) -> sys::cudaDataType {
        match self {
            Self::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Self::F16 => sys::cudaDataType_t::CUDA_R_16F,
            Self::F32 => sys::cudaDataType_t::CUDA_R_32F,
            Self::E4m3 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        }
    }
}

/// What decides an algorithm, beside the number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GemmShape {
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Elements between rows of `x`; `k` where it is dense.
    pub x_stride: usize,
    /// Elements between rows of the result; `n` where it is dense.
    pub out_stride: usize,
    /// Of `x` and the weight.
    pub input: Element,
    /// Of the result.
    pub output: Element,
    /// Of the bias that is added, if one is.
    pub bias: Option<Element>,
}

/// One side of a product.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Dense rows.
    pub data: DeviceSlice,
    /// f32, one for each row of [`Element::E4m3`]; else null.
    pub scales: DeviceSlice,
}

impl From<DeviceSlice> for Operand {
    fn from(data: DeviceSlice) -> Self {
        Self { data, scales: DeviceSlice::NULL }
    }
}

/// How algorithms are chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// One per shape, the same bits for every number of rows.
    Invariant,
    /// The fastest of the library's suggestions per power of two of rows, timed at the first use.
    Timed {
        /// Where the choices are kept; `None`: timed anew by every process.
        cache: Option<PathBuf>,
    },
}

/// The library, its workspace and the choices made so far. One per stream.
#[derive(Debug)]
pub struct BlasLt {
    handle: sys::cublasLtHandle_t,
    context: Arc<Context>,
    workspace: DeviceSlice,
    selection: Selection,
    choices: HashMap<(GemmShape, u32), sys::cublasLtMatmulAlgo_t>,
    cache: Option<AlgorithmCache>,
}

// SAFETY: the handle may be used by any thread, one at a time.
unsafe impl Send for BlasLt {}

/// A layer's product: descriptor and layouts, made once.
#[derive(Debug)]
pub struct Gemm {
    shape: GemmShape,
    desc: sys::cublasLtMatmulDesc_t,
    weight: Operand,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
}

// SAFETY: host-side descriptions without ties to a thread.
unsafe impl Send for Gemm {}

/// Turns a status of the library into our error.
fn lt<T>(call: &'static str, outcome: Result<T, CublasError>) -> Result<T, CudaError> {
    outcome.map_err(|error| CudaError::new(call, format!("{:?}", error.0)))
}

fn size_of_bytes<T>(value: &T) -> (*const std::ffi::c_void, usize) {
    (std::ptr::from_ref(value).cast(), size_of::<T>())
}

impl BlasLt {
    /// Opens the library; the workspace comes from `arena`.
    ///
    /// # Errors
    /// Out of memory, or the library does not start.
    pub fn new(context: &Arc<Context>, arena: &mut Arena, selection: Selection) -> Result<Self, CudaError> {
        context.bind()?;
        let workspace = arena.alloc(WORKSPACE_BYTES)?;
        let handle = lt("cublasLtCreate", result::create_handle())?;
        // SAFETY: a plain call.
        let version = unsafe { sys::cublasLtGetVersion() };
        let cache = match &selection {
            Selection::Timed { cache: Some(folder) } => {
                Some(AlgorithmCache::open(folder, context.name(), version))
            }
            _ => None,
        };
        let choices = cache.as_ref().map(AlgorithmCache::load).unwrap_or_default();
        Ok(Self { handle, context: context.clone(), workspace, selection, choices, cache })
    }

    /// Describes the product with `weight` (`[n, k]`, dense), chooses its algorithm and, where rows must not show their
    /// number, checks that.
    ///
    /// # Errors
    /// The library does not support the shape, or gives other bits for other numbers of rows.
    pub fn plan(
        &mut self,
        shape: GemmShape,
        weight: impl Into<Operand>,
        bias: DeviceSlice,
        stream: &Stream,
    ) -> Result<Gemm, CudaError> {
        let gemm = Gemm::new(shape, weight.into(), bias)?;
        if self.selection == Selection::Invariant && !self.choices.contains_key(&(shape, 0)) {
            let algorithm = self.choose_invariant(&gemm, stream)?;
            self.choices.insert((shape, 0), algorithm);
        }
        Ok(gemm)
    }

    /// Enqueues `out = x · weightᵀ + bias` for `m` rows. At the first use of a range of `m`, [`Selection::Timed`] times
    /// its candidates, which a stream that is being captured cannot do: run once before.
    ///
    /// # Errors
    /// The library refused it.
    pub fn matmul(
        &mut self,
        gemm: &Gemm,
        x: impl Into<Operand>,
        out: DeviceSlice,
        m: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let x = x.into();
        let bucket = match self.selection {
            Selection::Invariant => 0,
            Selection::Timed { .. } => bucket_of(m),
        };
        let key = (gemm.shape, bucket);
        let algorithm = match self.choices.get(&key) {
            Some(algorithm) => *algorithm,
            None => {
                let algorithm = self.choose_timed(gemm, x, out, m, stream)?;
                self.choices.insert(key, algorithm);
                if let Some(cache) = &self.cache {
                    cache.append(&key, &algorithm);
                }
                algorithm
            }
        };
        self.enqueue(gemm, &algorithm, x, out, m, stream)
    }

    fn enqueue(
        &self,
        gemm: &Gemm,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        x: Operand,
        out: DeviceSlice,
        m: usize,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let shape = &gemm.shape;
        let x_bytes = ((m - 1) * shape.x_stride + shape.k) * shape.input.size();
        assert!(
            x_bytes <= x.data.bytes() && m * shape.n * shape.output.size() <= out.bytes(),
            "{m} rows of {shape:?}"
        );
        if shape.input == Element::E4m3 {
            assert!(m * size_of::<f32>() <= x.scales.bytes(), "scales of {m} rows of {shape:?}");
            gemm.set_x_scales(x.scales)?;
        }
        gemm.set_rows(m)?;
        stream.bind()?;
        let (alpha, beta) = (1.0f32, 0.0f32);
        // SAFETY: the descriptors live, the slices hold what they describe (asserted above for `x` and `out`; the
        // weight in `Gemm::new`), and outlive the work enqueued on them.
        let outcome = unsafe {
            result::matmul(
                self.handle,
                gemm.desc,
                size_of_bytes(&alpha).0,
                size_of_bytes(&beta).0,
                gemm.weight.data.address() as *const _,
                gemm.a,
                x.data.address() as *const _,
                gemm.b,
                out.address() as *const _,
                gemm.d,
                out.address() as *mut _,
                gemm.d,
                std::ptr::from_ref(algorithm),
                self.workspace.address() as *mut _,
                self.workspace.bytes(),
                stream.raw().cast(),
            )
        };
        lt("cublasLtMatmul", outcome)
    }
}

impl Drop for BlasLt {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Gemm {
    fn new(shape: GemmShape, weight: Operand, bias: DeviceSlice) -> Result<Self, CudaError> {
        assert!(shape.n * shape.k * shape.input.size() <= weight.data.bytes(), "weight of {shape:?}");
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let (n, k) = (shape.n as u64, shape.k as u64);
        let layout = |element: Element, rows, cols, ld: usize| {
            lt(
                "cublasLtMatrixLayoutCreate",
                result::create_matrix_layout(element.raw(), rows, cols, ld as i64),
            )
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let desc = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F);
        let gemm = Self {
            shape,
            desc: lt("cublasLtMatmulDescCreate", desc)?,
            weight,
            a: layout(shape.input, k, n, shape.k)?,
            b: layout(shape.input, k, 1, shape.x_stride)?,
            d: layout(shape.output, n, 1, shape.out_stride)?,
        };
        gemm.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &1i32)?;
        if shape.input == Element::E4m3 {
            assert!(shape.n * size_of::<f32>() <= weight.scales.bytes(), "scales of {shape:?}");
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as u32;
            gemm.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
            gemm.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
            gemm.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &weight.scales.address())?;
            // Each product has its own; the library wants one when it is asked for algorithms.
            gemm.set_x_scales(weight.scales)?;
        }
        if let Some(element) = shape.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            gemm.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            gemm.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.address())?;
            gemm.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(element.raw() as u32))?;
        }
        Ok(gemm)
    }

    /// Output features.
    pub fn shape(&self) -> &GemmShape {
        &self.shape
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), CudaError> {
        let (pointer, bytes) = size_of_bytes(value);
        // SAFETY: the descriptor lives, the value has the length given.
        let outcome = unsafe { result::set_matmul_desc_attribute(self.desc, attribute, pointer, bytes) };
        lt("cublasLtMatmulDescSetAttribute", outcome)
    }

    fn set_x_scales(&self, scales: DeviceSlice) -> Result<(), CudaError> {
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER;
        self.set(attribute, &scales.address())
    }

    fn set_rows(&self, m: usize) -> Result<(), CudaError> {
        let columns = sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
        let m = m as u64;
        let (pointer, bytes) = size_of_bytes(&m);
        for layout in [self.b, self.d] {
            // SAFETY: the layout lives, the value has the length given.
            let outcome = unsafe { result::set_matrix_layout_attribute(layout, columns, pointer, bytes) };
            lt("cublasLtMatrixLayoutSetAttribute", outcome)?;
        }
        Ok(())
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once; enqueued products have copied what they need.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in [self.a, self.b, self.d] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
