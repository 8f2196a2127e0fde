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
//! Traces are the other kind of input: [`trace`] reads recorded ones, [`generate`] makes some from a seed. [`replay`]
//! measures the prefix cache alone on them; [`serve_trace`] serves them with the whole engine under the cost model, for
//! [`capacity`] to find out how much of one a device takes, and for [`mod@plan`] how many devices it needs.
//!
//! Reading order: [`oracle`], [`shadow_kv`], `executor`, `workload`, `checker`, [`run`], then [`mock`],
//! [`bench_scheduler`], [`bench_engine`], [`trace`], [`replay`], [`serve_trace`], [`service`].
#![forbid(unsafe_code)]

pub mod bench_engine;
pub mod bench_scheduler;
pub mod capacity;
mod checker;
mod executor;
pub mod generate;
pub mod mock;
pub mod oracle;
pub mod plan;
pub mod replay;
mod rng;
pub mod run;
pub mod serve_report;
pub mod serve_trace;
pub mod service;
pub mod shadow_kv;
pub mod trace;
mod workload;

pub use capacity::capacity;
pub use generate::{Workload as GeneratedWorkload, generate};
pub use mock::{MockExecutor, MockTiming};
pub use plan::{Goal, Latency, plan};
pub use replay::{HitRate, Sharing, replay_cache, replay_optimum, replay_tiers};
pub use run::{Failure, Report, run_seed, run_seed_without_host_tier};
pub use serve_report::{Bucket, KvReport, ServeReport, Waits};
pub use serve_trace::{ServeConfig, serve_fleet, serve_trace};
pub use service::{Fairness, MAX_TENANTS};
pub use trace::{TRACE_BLOCK_SIZE, TraceError, TraceRequest, read_trace};
