//! Executes a [`quire_core::SchedulerOutput`]: a mirror of the running batch, one decoder for every model, and the
//! memory they need. Generic over the device, and knows no scheduler, no architecture by name, and no clock.
//!
//! Invariants:
//! * the batch lives here only as a mirror: the scheduler's differences go in, nothing is decided;
//! * buffers are sized from [`RunnerConfig`] at start; a steady step allocates nothing;
//! * how rows are grouped into passes never shows in a result (see [`quire_backend`] on batch invariance);
//! * a plan that contradicts the mirror is an error with the numbers in it, never a silent repair.
//!
//! Reading order: [`model_runner`] (one step), `input_batch.rs` and `block_tables.rs` (the mirror), `pass.rs` (a step
//! as flat arrays), [`decoder`] (the forward pass); then [`config`], `workspace.rs`, [`load`], [`weights`], [`memory`],
//! `measured.rs` (a cache as large as the device allows); for several ranks, `sharding.rs` and [`tensor_parallel`].
#![forbid(unsafe_code)]

mod block_tables;
pub mod config;
pub mod decoder;
mod error;
mod input_batch;
pub mod load;
mod measured;
pub mod memory;
pub mod model_runner;
mod pass;
mod sharding;
pub mod tensor_parallel;
pub mod weights;
mod workspace;

pub use config::RunnerConfig;
pub use decoder::Decoder;
pub use error::RunnerError;
pub use load::LoadProgress;
pub use memory::MemoryPlan;
pub use model_runner::ModelRunner;
pub use tensor_parallel::TensorParallel;
pub use weights::WeightPlan;
