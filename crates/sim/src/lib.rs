//! Drives the real [`quire_engine::EngineCore`] with seeded random workloads in virtual time, and proves its invariants.
//!
//! A seed fixes configuration, requests, aborts and timing, hence every decision: [`run_seed`] with the same seed gives
//! the same trace hash on every machine. The executor is fake but strict: [`shadow_kv::ShadowKv`] knows which token
//! every KV slot stands for, and sampled tokens are a function of what a sequence reads there, so that any wrong block
//! shows. [`MockExecutor`] is its careless cousin for live servers (`--executor mock`).
//!
//! What is checked, and where:
//! * `executor`: budgets, slots, tables, no shared block written, no block of a step in flight taken;
//! * [`shadow_kv`]: every block table reproduces its sequence's hash chain, salted per prefix-cache namespace;
//! * `checker`: each continuation gets exactly the tokens of the closed form and ends exactly once, in order and in
//!   bounded time;
//! * `Scheduler::check_invariants` after every step.
//!
//! Reading order: [`oracle`], [`shadow_kv`], `executor`, `workload`, `checker`, [`run`], then [`mock`], [`bench_scheduler`].
#![forbid(unsafe_code)]

pub mod bench_scheduler;
mod checker;
mod executor;
pub mod mock;
pub mod oracle;
mod rng;
pub mod run;
pub mod shadow_kv;
mod workload;

pub use mock::{MockExecutor, MockTiming};
pub use run::{Failure, Report, run_seed};
