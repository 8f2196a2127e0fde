//! The HTTP front end: OpenAI's API, health, metrics.
//!
//! Invariants:
//! * the server answers from process start: health at once, inference with 503 until the model is there;
//! * every field of a body is either honoured, known to change nothing, or refused by its name; nothing is truncated
//!   or dropped in silence;
//! * every error is JSON in OpenAI's shape, whatever layer it comes from;
//! * once a key is configured, every route but health needs one, unknown routes too (the check wraps the router, it
//!   does not look at paths);
//! * the admin API is never on the public port, and neither's credentials open the other;
//! * a slow client never holds up the engine: a stream is pulled by its socket, and what came meanwhile is sent at once;
//!   a client that goes away drops its stream, which cancels the request;
//! * a panic fails the request it happened in.
//!
//! Reading order: [`state`], `router`, [`server`] with `protocol`; `openai/chat` and `openai/completions` with `fields` and
//! `openai/sampling`; then `sse`, [`error`], `health`, `observe`, `timeline`; [`admin`].
#![forbid(unsafe_code)]

pub mod admin;
mod auth;
mod body;
pub mod error;
mod fields;
mod health;
mod id_list;
mod observe;
mod openai;
mod protocol;
mod router;
pub mod server;
mod sse;
pub mod state;
mod timeline;

pub use error::ApiError;
pub use router::router;
pub use server::serve;
pub use state::{AppState, HttpConfig};
