//! The gRPC front end: `quire.v1.Inference`, `grpc.health.v1` and server reflection, over the same text-level API as HTTP.
//!
//! Invariants:
//! * the same request gives the same tokens as over HTTP: everything but the wire format happens in `llm`;
//! * a client's `grpc-timeout` becomes the request's deadline, and a call that is dropped cancels its request;
//! * every call but health needs a credential once a key is configured.
//!
//! `build.rs` compiles `proto/` with protox, so no protoc is needed.
//!
//! Reading order: `proto/quire/v1/inference.proto`, [`service`], [`convert`], [`status`], [`server`], [`timeline`],
//! `collected`, `incoming`, `observe`, `audit`.
#![forbid(unsafe_code)]

mod audit;
mod collected;
pub mod convert;
mod incoming;
mod observe;
pub mod server;
pub mod service;
pub mod status;
pub mod timeline;

pub use server::{ServerConfig, serve};

/// Messages, client and server generated from `proto/quire/v1`.
#[allow(missing_docs, clippy::all, unused_qualifications)]
pub mod proto {
    tonic::include_proto!("quire.v1");

    /// The encoded descriptors, for reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/quire.v1.descriptors.bin"));
}
