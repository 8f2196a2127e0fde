//! Integration tests of the whole house, in one binary.

mod batch_invariance;
mod demo_model;
mod golden_engine;
mod process;
mod support;
