//! The one table from our errors to gRPC statuses.

use std::time::Duration;

use quire_core::RequestError;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// Seconds a client should wait before it tries an unavailable server again.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);

/// The status of an error; `RESOURCE_EXHAUSTED` and `UNAVAILABLE` carry `retry-after` in seconds.
pub fn of(error: &RequestError) -> Status {
    let message = error.to_string();
    match error {
        RequestError::Invalid { .. } | RequestError::TooLong { .. } => Status::invalid_argument(message),
        RequestError::Overloaded { retry_after, .. } => retry(Code::ResourceExhausted, message, *retry_after),
        RequestError::DeadlineExceeded => Status::deadline_exceeded(message),
        RequestError::Unavailable { .. } => retry(Code::Unavailable, message, RETRY_UNAVAILABLE),
        RequestError::Cancelled => Status::cancelled(message),
        RequestError::Internal(_) => Status::internal(message),
    }
}

fn retry(code: Code, message: String, after: Duration) -> Status {
    let mut metadata = MetadataMap::new();
    metadata.insert("retry-after", MetadataValue::from(after.as_secs().max(1)));
    Status::with_metadata(code, message, metadata)
}
