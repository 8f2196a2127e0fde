//! Which algorithm computes a shape.

use cudarc::cublaslt::{result, sys};

use super::{BlasLt, Element, Gemm, Operand, WORKSPACE_BYTES, lt, size_of_bytes};
use crate::driver::{Arena, CudaError, DeviceSlice, Event, Pinned, Stream};

/// Suggestions asked for.
const MAX_CANDIDATES: usize = 8;
/// Rows for which suggestions are asked: an algorithm for all batches should serve decode first.
const SUGGESTION_ROWS: [usize; 3] = [64, 16, 1024];
/// Rows that an algorithm for all batches must support.
const CHECKED_ROWS: [usize; 5] = [1, 7, 64, 513, 8192];
/// Rows of the product that is compared with those of one row.
const COMPARED_ROWS: usize = 21;
/// Timed runs of a candidate, after one that warms up.
const TIMED_RUNS: usize = 5;

/// Numbers of rows that share a timed choice: the next power of two.
pub(super) fn bucket_of(m: usize) -> u32 {
    m.next_power_of_two() as u32
}

impl BlasLt {
    /// The library's suggestions for `m` rows, best first, of those that fit the workspace.
    fn candidates(&self, gemm: &Gemm, m: usize) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CudaError> {
        gemm.set_rows(m)?;
        let preference = lt("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let (pointer, bytes) = size_of_bytes(&WORKSPACE_BYTES);
        let mut found = [const { std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit() };
            MAX_CANDIDATES];
        let mut count = 0;
        // SAFETY: everything described lives; the library writes `count` results, at most `MAX_CANDIDATES`.
        let status = unsafe {
            let set = result::set_matmul_pref_attribute(preference, attribute, pointer, bytes);
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                gemm.desc,
                gemm.a,
                gemm.b,
                gemm.d,
                gemm.d,
                preference,
                MAX_CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &raw mut count,
            );
            let _ = result::destroy_matmul_pref(preference);
            set.and(status.result())
        };
        // No suggestion is an answer, not a failure: another number of rows may have one.
        let count = if status.is_ok() { count as usize } else { 0 };
        let results = found[..count].iter().map(|result| {
            // SAFETY: the library wrote the first `count`.
            unsafe { result.assume_init_read() }
        });
        let works = |r: &sys::cublasLtMatmulHeuristicResult_t| {
            r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS && r.workspaceSize <= WORKSPACE_BYTES
        };
        Ok(results.filter(works).map(|result| result.algo).collect())
    }

    /// The first suggestion that adds along K in one piece, supports every number of rows, and gives a row the same bits
    /// in batches of one and of many.
    pub(super) fn choose_invariant(
        &self,
        gemm: &Gemm,
        stream: &Stream,
    ) -> Result<sys::cublasLtMatmulAlgo_t, CudaError> {
        let sample = Sample::new(self, gemm, stream)?;
        for rows in SUGGESTION_ROWS {
            for algorithm in self.candidates(gemm, rows)? {
                if split_k(&algorithm) <= 1
                    && self.supports_all_rows(gemm, &algorithm)?
                    && sample.is_invariant(self, gemm, &algorithm, stream)?
                {
                    return Ok(algorithm);
                }
            }
        }
        let status = format!("no algorithm gives a row the same bits in every batch for {:?}", gemm.shape);
        Err(CudaError::new("cublasLtMatmulAlgoGetHeuristic", status))
    }

    fn supports_all_rows(
        &self,
        gemm: &Gemm,
        algorithm: &sys::cublasLtMatmulAlgo_t,
    ) -> Result<bool, CudaError> {
        for m in CHECKED_ROWS {
            gemm.set_rows(m)?;
            let mut checked = std::mem::MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit();
            // SAFETY: everything described lives; the result is read only if the call succeeded.
            let works = unsafe {
                let status = sys::cublasLtMatmulAlgoCheck(
                    self.handle,
                    gemm.desc,
                    gemm.a,
                    gemm.b,
                    gemm.d,
                    gemm.d,
                    std::ptr::from_ref(algorithm),
                    checked.as_mut_ptr(),
                );
                status.result().is_ok() && checked.assume_init().workspaceSize <= WORKSPACE_BYTES
            };
            if !works {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The fastest suggestion for `m` rows, timed on the buffers of the call itself.
    pub(super) fn choose_timed(
        &self,
        gemm: &Gemm,
        x: Operand,
        out: DeviceSlice,
        m: usize,
        stream: &Stream,
    ) -> Result<sys::cublasLtMatmulAlgo_t, CudaError> {
        let (start, end) = (Event::timed(&self.context)?, Event::timed(&self.context)?);
        let mut best = None;
        for algorithm in self.candidates(gemm, m)? {
            // What is suggested may still be refused.
            if self.enqueue(gemm, &algorithm, x, out, m, stream).is_err() {
                continue;
            }
            start.record(stream)?;
            for _ in 0..TIMED_RUNS {
                self.enqueue(gemm, &algorithm, x, out, m, stream)?;
            }
            end.record(stream)?;
            end.synchronize()?;
            let time = end.milliseconds_since(&start)?;
            if best.is_none_or(|(shortest, _)| time < shortest) {
                best = Some((time, algorithm));
            }
        }
        best.map(|(_, algorithm)| algorithm).ok_or_else(|| {
            let status = format!("no algorithm for {m} rows of {:?}", gemm.shape);
            CudaError::new("cublasLtMatmulAlgoGetHeuristic", status)
        })
    }
}

/// Into how many pieces an algorithm cuts K.
fn split_k(algorithm: &sys::cublasLtMatmulAlgo_t) -> i32 {
    let attribute = sys::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_SPLITK_NUM;
    let (mut value, mut written) = (1i32, 0);
    // SAFETY: the value has the length given. Where the attribute is unknown, the value stays.
    let _ = unsafe {
        sys::cublasLtMatmulAlgoConfigGetAttribute(
            std::ptr::from_ref(algorithm),
            attribute,
            (&raw mut value).cast(),
            size_of::<i32>(),
            &raw mut written,
        )
    };
    value
}

/// Rows to try an algorithm on, and room for what it makes of them.
struct Sample {
    x: DeviceSlice,
    /// One row of it, at an address as aligned as a layer's input has.
    single: DeviceSlice,
    /// Ones, for fp8.
    scales: DeviceSlice,
    out: DeviceSlice,
    host: std::cell::RefCell<Pinned>,
    /// Frees the slices.
    _arena: Arena,
}

impl Sample {
    fn new(lt: &BlasLt, gemm: &Gemm, stream: &Stream) -> Result<Self, CudaError> {
        let shape = &gemm.shape;
        let x_bytes = COMPARED_ROWS * shape.x_stride * shape.input.size();
        let out_bytes = COMPARED_ROWS * shape.out_stride * shape.output.size();
        let mut arena = Arena::new(lt.context.clone(), 0);
        let (x, single) = (arena.alloc(x_bytes)?, arena.alloc(x_bytes / COMPARED_ROWS)?);
        let out = arena.alloc(out_bytes)?;
        let scales = arena.alloc(COMPARED_ROWS * size_of::<f32>())?;
        let mut host = Pinned::new(&lt.context, x_bytes.max(out_bytes).max(scales.bytes()))?;
        for bytes in host.as_mut_slice().chunks_exact_mut(4) {
            bytes.copy_from_slice(&1f32.to_le_bytes());
        }
        host.upload(scales.bytes(), scales, stream)?;
        stream.synchronize()?;
        for (i, bytes) in host.as_mut_slice().chunks_exact_mut(2).enumerate() {
            // Numbers between -2 and 2, in no particular order.
            let random = (i as u32).wrapping_mul(0x9E37_79B9).rotate_left(13).wrapping_mul(0x85EB_CA6B) >> 16;
            let (mask, bits) = match shape.input {
                Element::E4m3 => (0x8787, 0x3838),
                Element::F16 => (0x807F, 0x3800),
                _ => (0x807F, 0x3F00),
            };
            bytes.copy_from_slice(&((random as u16 & mask) | bits).to_le_bytes());
        }
        host.upload(x_bytes, x, stream)?;
        stream.synchronize()?;
        Ok(Self { x, single, scales, out, host: host.into(), _arena: arena })
    }

    /// Whether each of some rows comes out of a product of one row as of one of many.
    fn is_invariant(
        &self,
        lt: &BlasLt,
        gemm: &Gemm,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        stream: &Stream,
    ) -> Result<bool, CudaError> {
        let shape = &gemm.shape;
        let x_row = shape.x_stride * shape.input.size();
        let (out_row, out_bytes) = (shape.out_stride * shape.output.size(), shape.n * shape.output.size());
        let mut host = self.host.borrow_mut();
        let operand = |data| Operand { data, scales: self.scales };
        lt.enqueue(gemm, algorithm, operand(self.x), self.out, COMPARED_ROWS, stream)?;
        host.download(self.out, stream)?;
        stream.synchronize()?;
        let many = host.as_slice()[..COMPARED_ROWS * out_row].to_vec();
        for row in [0, 9, COMPARED_ROWS - 1] {
            stream.copy(self.x.part(row * x_row, x_row), self.single)?;
            lt.enqueue(gemm, algorithm, operand(self.single), self.out, 1, stream)?;
            host.download(self.out.part(0, out_bytes), stream)?;
            stream.synchronize()?;
            if host.as_slice()[..out_bytes] != many[row * out_row..][..out_bytes] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
