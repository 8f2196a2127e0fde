//! The CUDA backend: our kernels for everything an engine lives on, cuBLASLt for dense products, through a thin layer
//! over the driver that is loaded at run time.
//!
//! The kernels come as images, compiled elsewhere: this crate builds without a CUDA toolkit and its tests run without a
//! GPU, on the same kernels compiled for the host (`tests/common`) under the double of a driver (`tests/mock`).
//!
//! Reading order: [`driver`].

pub mod driver;
