//! The device interface: what a model needs from hardware, as about fifteen coarse, fused operations.
//!
//! [`Backend`] is static (generic code is compiled per backend), works on the caller's buffers and only enqueues, so
//! that a CUDA backend can record the very same calls as a graph. [`reference::RefBackend`] is the slow, readable
//! definition of each operation; [`conformance`] holds every other backend against it.
//!
//! Invariants every implementation keeps (the batch cannot be seen in the bytes):
//! * a row of any result depends on that row's tokens and absolute positions only, never on how many other rows share
//!   the step, on chunk boundaries, on block ids, or on the number of threads;
//! * a GEMM adds along K in one order for every M; attention cuts keys at fixed absolute positions and merges in index
//!   order;
//! * nothing is allocated after start.
//!
//! Reading order: [`step_input`], [`ops`], [`lora`], [`backend`], [`mod@reference`] with [`sampling_rng`], [`quant`], [`conformance`];
//! [`convert`] helps to load, [`collective`] to compute on several ranks; [`fp8`] has the numbers of that type.
#![forbid(unsafe_code)]

pub mod backend;
pub mod collective;
pub mod conformance;
pub mod convert;
pub mod fp8;
pub mod lora;
pub mod ops;
pub mod quant;
pub mod reference;
pub mod sampling_rng;
pub mod step_input;

pub use backend::{Backend, BackendError, BufRole};
pub use collective::{CollectiveError, Communicator};
pub use lora::{LoraPart, LoraSource};
pub use ops::{
    Activation, AddLora, AddNorm, AllGather, AllReduce, Attention, AttnShape, Embed, GraphKey, KvLayerShape,
    KvLayout, Linear, LinearPart, LinearSource, Logits, MAX_EXPERTS, Mlp, MlpShape, Moe, MoeScratch,
    RopeAndCache, RopeTable,
};
pub use step_input::{LogitKind, LogitRow, ON_DEVICE, SeqState, StepBuffer, StepInput};
