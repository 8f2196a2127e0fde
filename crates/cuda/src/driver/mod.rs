//! A thin layer over the driver API: what the backend needs, with errors instead of panics, and nothing that
//! synchronises or allocates behind the caller's back.
//!
//! cudarc finds each symbol at its first call, so a binary with this layer starts on machines without a driver;
//! [`presence`] asks first. Objects keep their [`Context`] alive and bind it before they use it, so they may be moved to
//! another thread, but not shared.
//!
//! Reading order: `error`, `presence`, `context`, `memory`, `stream`, `module`, `graph`,
//! `tensor_map`.

pub mod context;
mod error;
pub mod graph;
pub mod memory;
pub mod module;
pub mod presence;
pub mod stream;
pub mod tensor_map;

pub use context::Context;
pub use error::CudaError;
pub(crate) use error::check;
pub use graph::{Capture, Graph};
pub use memory::{Arena, DeviceSlice, Pinned};
pub use module::{Function, LaunchShape, Modules};
pub use presence::{Unavailable, probe};
pub use stream::{Event, Stream};
pub use tensor_map::{BoxedMatrix, TensorMap};
