//! Decides, deterministically, which tokens run next and in which KV blocks.
//!
//! [`Scheduler`] is a pure state machine: requests, step results and the time go in; steps to run
//! ([`quire_core::SchedulerOutput`]) and events ([`SeqEvent`]) come out. No clock, thread, I/O or random order in here
//! (`clippy.toml` enforces it), so that the same inputs give the same decisions, in production and in simulation.
//!
//! Invariants ([`Scheduler::check_invariants`] recounts them):
//! * free + cached + referenced + quarantined blocks = the pool, and a block's reference count is the number of block
//!   tables that hold it;
//! * a block that a step in flight may touch belongs to nobody else until that step is collected;
//! * a block is shared only whole, immutable and under the same salt; whoever writes has a block of its own;
//! * every accepted request ends with exactly one [`SeqEventKind::Finished`] per continuation;
//! * a sequence takes blocks only from those after it in the order, so the first one always advances;
//! * of two tenants that always have something waiting, neither gets ahead by more than a request or two.
//!
//! Reading order: [`event`], [`note`], [`stats`], [`cost`] (how long a step takes), [`policy`] (the order), [`pacing`] with `backlog` (latency
//! targets), [`fair`] and `waiting` (who is next), `sequence` and `sequence_table` (the state), `block_pool`,
//! `prefix_cache`, `kv_cache` (the blocks), `reuse`, `history`, `duel`, `eviction` (which of them to keep),
//! [`host_tier`], `kv_swap`, `swap` (a second pool in host memory), [`cache_replay`], [`scheduler`] (the parts and the way in), `schedule` (a step goes out), `admit` (prompts in it),
//! `pause` (who stands still), `preempt` (who makes room), `fork` (continuations share a prompt), `update` (its results come back), `finish`,
//! `explain` (why somebody waits), `check`.
#![forbid(unsafe_code)]

mod admit;
mod backlog;
mod block_pool;
pub mod cache_replay;
mod check;
pub mod cost;
mod duel;
pub mod event;
mod eviction;
mod explain;
pub mod fair;
mod finish;
mod fork;
mod history;
pub mod host_tier;
mod kv_cache;
mod kv_swap;
pub mod note;
pub mod pacing;
mod pause;
pub mod policy;
mod preempt;
mod prefix_cache;
mod reuse;
mod schedule;
pub mod scheduler;
mod sequence;
mod sequence_table;
pub mod stats;
mod swap;
mod turn;
mod update;
mod waiting;

#[cfg(test)]
mod explain_tests;
#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod kv_cache_tests;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod tests;

pub use cache_replay::CacheReplay;
pub use cost::{Calibration, CostModel, OnlineCostModel, StepShape};
pub use event::{SeqEvent, SeqEventKind};
pub use eviction::EvictionPolicy;
pub use fair::FairnessConfig;
pub use host_tier::HostTierConfig;
pub use note::{NoteKind, SeqNote, WaitCause};
pub use pacing::LatencyTargets;
pub use policy::Policy;
pub use scheduler::{Scheduler, SchedulerConfig};
pub use stats::{HostStats, SchedulerStats};
