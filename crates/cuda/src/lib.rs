//! The CUDA backend. In the making.
