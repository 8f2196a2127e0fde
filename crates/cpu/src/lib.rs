//! The CPU backend: SIMD kernels over a barrier thread pool.
//!
//! Invariants:
//! * a dot product has one order of additions (lane `i % LANES`, then a fixed tree), whatever the number of rows, the
//!   tile it is computed in, or the thread that computes it; so the thread count never changes a bit;
//! * attention cuts keys at multiples of [`ops::attention::TILE`] absolute positions, and over packed pages begins a new
//!   partial result at fixed ones, whatever the block size;
//! * weights keep the checkpoint's values and stream through memory once for a whole group of tokens; with
//!   [`Precision::Bf16`], those in bf16 are packed, and activations, queries, keys, values and weights of attention are
//!   rounded to bf16 on their way into a product, whose sum is one f32 chain on every instruction set;
//! * quantized weights are multiplied in integers, exactly, as [`quire_backend::quant`] defines;
//! * what is stored in packed pages is finite, so that a masked key leaves nothing;
//! * a panic in a kernel becomes a [`quire_core::ExecError`], never a hang; indices from a step are checked before a
//!   pointer is made of them.
//!
//! Reading order: [`pool`] with `spread`; [`simd`] (what an instruction set must offer), [`element`], [`buffer`]; [`weights`] with
//! `packed`, `quantized`, `activations` and [`prepacked`]; [`kv`] with `pages`, `store` and `populate`; [`ops`], in it `tiles`, `gemm`, `int_gemm`, `sink`, `paged` for
//! what runs fast; [`backend`] ties them to the trait; `peak` is what all of it is held against. A new instruction set is
//! one more file in `simd` and one more arm in [`simd::dispatch`] and [`simd::pairs::dispatch_bytes`].
// Register tiles are small matrices; `acc[r][m] += w[r] * x[m]` reads best with its indices.
#![allow(clippy::needless_range_loop)]

mod activations;
pub mod backend;
pub mod buffer;
pub mod element;
pub mod kv;
pub mod ops;
mod packed;
mod pages;
mod peak;
pub mod pool;
mod populate;
pub mod prepacked;
mod quantized;
pub mod simd;
mod spread;
mod store;
pub mod weights;

pub use backend::{CpuBackend, CpuConfig, Precision};
pub use buffer::CpuBuf;
pub use kv::CpuKv;
pub use peak::Peaks;
pub use pool::default_threads;
pub use populate::KvMemory;
pub use prepacked::{PackError, PackFile, PackKey, Packing, Prepacked};
pub use simd::Isa;
pub use weights::CpuWeight;
