//! The CUDA backend: our kernels for everything an engine lives on, cuBLASLt for dense products, through a thin layer
//! over the driver that is loaded at run time.
//!
//! The kernels come as images, compiled elsewhere: this crate builds without a CUDA toolkit and its tests run without a
//! GPU, on the same kernels compiled for the host (`tests/common`) under the double of a driver (`tests/mock`).
//!
//! Invariants:
//! * a steady step allocates nothing, on the host or on the device, and waits for nothing before `fetch`;
//! * what a recorded step launches depends on its bucket of rows only: lengths and block tables are read on the device;
//! * with `batch_invariant`, a row has the same bits whoever shares its batch;
//! * once the device has failed, every call fails with the first error.
//!
//! Reading order: [`driver`], [`blaslt`], [`params`], `kernels.rs`, `backend.rs` (a step), `step.rs` and `slots.rs` (what
//! is sent), `ops.rs`, `lora.rs`, `quantized.rs`, `fp8.rs`, `moe.rs`, `attention.rs`, `sampling.rs` (what is launched), `load.rs`
//! and `buffers.rs`; `nccl.rs` and `ranks.rs` for several GPUs; `memory_use.rs` and `timing.rs`.

mod attention;
mod backend;
pub mod blaslt;
mod buffers;
pub mod driver;
mod fp8;
pub mod int_weights;
mod kernels;
mod load;
mod lora;
mod memory_use;
mod moe;
mod nccl;
mod ops;
mod options;
pub mod params;
mod quantized;
mod ranks;
mod sampling;
mod slots;
mod source_rows;
mod staging;
mod step;
mod timing;

pub use backend::Cuda;
pub use buffers::{CudaBuf, CudaKv, CudaNorm, CudaRope, CudaWeight};
pub use driver::{Unavailable, probe};
pub use lora::CudaLora;
pub use memory_use::MemoryUse;
pub use options::{CudaOptions, KernelSet};
pub use timing::Peaks;
