//! Errors that cross crate edges. Front ends map them to statuses with one table each.

use std::time::Duration;

/// Why a request was refused or ended early.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// A field has a wrong value (400 / INVALID_ARGUMENT).
    #[error("{field}: {message}")]
    Invalid {
        /// The offending field, by its name in the API.
        field: &'static str,
        /// What is wrong with it and what is allowed.
        message: String,
    },
    /// Prompt and requested output do not fit the model (400 / INVALID_ARGUMENT, code `context_length_exceeded`).
    #[error(
        "this model's maximum context length is {max_model_len} tokens, but the request needs {needed} \
         ({prompt_tokens} in the prompt); shorten the prompt or lower max_tokens"
    )]
    TooLong {
        /// Tokens in the prompt.
        prompt_tokens: u64,
        /// Tokens of prompt plus requested output.
        needed: u64,
        /// The limit.
        max_model_len: u32,
    },
    /// The queue is full (429 / RESOURCE_EXHAUSTED with Retry-After).
    #[error(
        "the server is at capacity: {queued} requests are waiting (limit {limit}); retry after {retry_after:?}"
    )]
    Overloaded {
        /// Requests waiting now.
        queued: u32,
        /// The bound of the queue.
        limit: u32,
        /// Estimated time until a place is free.
        retry_after: Duration,
    },
    /// It could not be answered within the latency targets, or a higher priority took its place (429 / RESOURCE_EXHAUSTED
    /// with Retry-After).
    #[error("the server is too busy to answer in time; retry after {retry_after:?}")]
    Late {
        /// Estimated time until it could.
        retry_after: Duration,
    },
    /// The deadline passed before the answer was complete (504 / DEADLINE_EXCEEDED).
    #[error("the request's deadline passed")]
    DeadlineExceeded,
    /// Not ready: loading, draining or dead (503 / UNAVAILABLE with Retry-After).
    #[error("the server is {state} and takes no new requests")]
    Unavailable {
        /// `loading`, `draining` or `dead`.
        state: &'static str,
    },
    /// The client went away (499 / CANCELLED).
    #[error("the request was cancelled")]
    Cancelled,
    /// A fault on our side (500 / INTERNAL).
    #[error("internal error: {0}")]
    Internal(String),
}

impl RequestError {
    /// [`RequestError::Invalid`] with less typing.
    pub fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { field, message: message.into() }
    }
}

/// The device failed. Fatal: the engine fails every stream and the process ends, because device state is unknown.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{device}: {message}")]
pub struct ExecError {
    /// Which device, for example `cpu` or `cuda:0`.
    pub device: String,
    /// What it reported.
    pub message: String,
}
