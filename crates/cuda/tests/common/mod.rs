//! What the tests of this crate share: the kernels built for the host, the double of a driver that runs them, and how to
//! build other C++.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]

pub mod build;
pub mod double;
pub mod kernels;
pub mod mock;

pub use kernels::{HostKernels, under_sanitizers};
pub use mock::MockGpu;
