//! Integration tests of the whole house, in one binary.
// A helper of a test is a test: it may fail, and it may say what it saw.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod batch_invariance;
mod bench_serve;
mod demo_model;
mod golden_engine;
mod prepacked;
mod process;
#[path = "../crates/tenancy/tests/support/redis.rs"]
mod redis;
mod support;
mod tenants;
