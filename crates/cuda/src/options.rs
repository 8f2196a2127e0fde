//! How to use a GPU.

use std::path::PathBuf;

use crate::blaslt::Element;

/// Which kernels are taken where there are several for the same work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KernelSet {
    /// Those that run on every architecture.
    #[default]
    Generic,
    /// On Hopper, those with its own instructions: prefill attention for 16-bit heads of 128.
    Sm90a,
}

/// Options of [`crate::Cuda`], fixed at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Index of the GPU.
    pub ordinal: u32,
    /// Of weights, activations and an unquantized cache: [`Element::Bf16`] or [`Element::F16`].
    pub activations: Element,
    /// Whether a row has the same bits whoever shares its batch: one GEMM algorithm for all batches.
    pub batch_invariant: bool,
    /// Without `batch_invariant`: the folder where timed GEMM algorithms are kept.
    pub algorithm_cache: Option<PathBuf>,
    /// Which kernels.
    pub kernels: KernelSet,
    /// Whether steps with a key are recorded and replayed.
    pub graphs: bool,
    /// Device memory is taken in pieces of at least this many bytes; 0: every tensor by itself, for tests.
    pub arena_chunk: usize,
    /// Whether keys and values are written back beside the queries too, for tests that read them there.
    pub write_back: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            ordinal: 0,
            activations: Element::Bf16,
            batch_invariant: true,
            algorithm_cache: None,
            kernels: KernelSet::default(),
            graphs: true,
            arena_chunk: 256 << 20,
            write_back: false,
        }
    }
}
