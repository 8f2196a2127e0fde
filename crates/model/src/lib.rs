//! A checkpoint on disk -> a [`ModelSpec`] and its weights by name. No compute, no device.
//!
//! Invariants:
//! * a [`Checkpoint`] that opened is consistent: every tensor of the spec is there, in the right shape and a known
//!   dtype, inside its file; nothing in a layer is left unexplained;
//! * architecture names mean something only in `arch/`; everything behind it is a [`ModelSpec`];
//! * input is hostile until checked: no file content can cause a panic or an unbounded allocation;
//! * `unsafe` is in `mmap.rs` only.
//!
//! Reading order: [`spec`] (what a model is), [`weights`] (its tensors), `arch/llama.rs` and `arch/mod.rs` (from
//! `config.json`), [`rope`]; then [`checkpoint`], with `safetensors.rs`, `store.rs` and `experts.rs` below it;
//! [`memory`], and [`lora`] for adapters.
#![deny(unsafe_code)]

mod arch;
mod check;
pub mod checkpoint;
mod config;
mod dummy;
pub mod error;
mod experts;
pub mod generation;
pub mod lora;
pub mod memory;
mod mmap;
pub mod rope;
mod safetensors;
pub mod spec;
mod store;
mod tensor;
pub mod weights;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use error::{ModelError, Result};
pub use generation::GenerationConfig;
pub use lora::{LORA_TARGETS, LoraAdapter, LoraPair, MAX_LORA_RANK};
pub use rope::{RopeScaling, RopeSpec};
pub use spec::{
    Activation, DenseFfn, Ffn, FfnShape, GqaSpec, Head, KvGroupSpec, LayerSpec, Mixer, ModelSpec, MoeFfn,
    NormPlacement, QkNorm,
};
pub use tensor::Tensor;
pub use weights::{GlobalTensor, LayerTensor};
