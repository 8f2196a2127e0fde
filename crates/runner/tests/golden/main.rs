//! The runner against independent implementations: tiny random checkpoints of every family with what Hugging Face
//! transformers makes of them (`tests/data/golden/`), and two small trained models (`../shared/data/models`).
//!
//! `driver.rs` plays the scheduler by hand, so that each way of cutting, placing and sharing can be asked for.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "clippy knows the bodies of tests, not their helpers"
)]

/// Runs each of these generic functions as a test on every backend.
macro_rules! test_on_each_backend {
    ($($name:ident),* $(,)?) => {
        mod reference {
            $(#[test] fn $name() { super::$name::<quire_runner::ModelRunner<quire_backend::reference::RefBackend>>(); })*
        }
        mod cpu {
            $(#[test] fn $name() { super::$name::<quire_runner::ModelRunner<quire_cpu::CpuBackend>>(); })*
        }
    };
}

mod bf16;
mod checkpoints;
mod contract;
mod driver;
mod families;
mod invariance;
mod lora;
mod prepacked;
mod quantized;
mod tensor_parallel;
mod trained;
