//! Runs the loop on its own thread and gives async callers a stream of tokens.
//!
//! Invariants:
//! * text never enters: only token ids;
//! * [`EngineCore`] is passive: no thread, no clock, no channel, so that a simulator drives the same code;
//! * the engine thread takes no lock, awaits nothing, and in a steady step allocates nothing; one message per step leaves it;
//! * every accepted continuation ends with exactly one final piece, also when the device fails;
//! * every queue is bounded: admission bounds the inbox and the mailboxes, the step channel has a fixed capacity.
//!
//! Reading order: [`core`], [`thread`], [`dispatch`], [`client`], `queue`, [`sessions`], [`snapshot`], [`metrics`],
//! [`timeline`], [`refusals`].
#![forbid(unsafe_code)]

pub mod client;
pub mod core;
pub mod dispatch;
mod host_metrics;
pub mod metrics;
mod queue;
pub mod refusals;
pub mod sessions;
pub mod snapshot;
pub mod thread;
pub mod timeline;

pub use client::{EngineClient, EngineState, RequestHandle, RequestSpec};
pub use core::EngineCore;
pub use dispatch::{SeqDelta, SeqFinished};
pub use quire_scheduler::WaitCause;
pub use snapshot::EngineSnapshot;
pub use thread::{Engine, EngineConfig};
pub use timeline::{Origin, Timeline};
