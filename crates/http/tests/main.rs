//! The front end over the real engine and a real tokenizer; only the model is a mock whose tokens are a function of
//! seed and position.

#![allow(clippy::unwrap_used, reason = "a test helper that fails is a test that fails")]

mod admin;
mod audit;
mod auth;
mod chat;
mod completions;
mod errors;
mod harness;
mod lifecycle;
mod lora;
#[path = "../../tenancy/tests/support/redis.rs"]
mod redis;
mod sockets;
mod streams;
mod tenants;
mod timeline;
