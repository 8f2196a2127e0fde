//! Integration tests of the whole house, in one binary.
// A helper of a test is a test: it may fail, and it may say what it saw.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod admin;
mod audit;
mod batch_invariance;
mod bench_serve;
#[path = "../crates/cuda/tests/common/build.rs"]
#[cfg(feature = "cuda")]
#[allow(dead_code, reason = "a part is used")]
mod build;
#[path = "../crates/tls/tests/support/certs.rs"]
mod certs;
mod demo_model;
#[path = "../crates/cuda/tests/common/double.rs"]
#[cfg(feature = "cuda")]
mod double;
mod golden_engine;
#[cfg(feature = "cuda")]
mod gpu_process;
mod lora;
mod overload;
mod prepacked;
mod process;
#[path = "../crates/tenancy/tests/support/redis.rs"]
mod redis;
mod support;
mod tenants;
mod tls;
