//! The one table from our errors to gRPC statuses.

use std::time::Duration;

use quire_core::RequestError;
use quire_tenancy::{AuthError, Denied, Standing};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Seconds a client should wait before it tries an unavailable server again.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);

/// The status of an error. What will pass with time carries `retry-after` in seconds, and `google.rpc.RetryInfo`.
pub fn of(error: &RequestError) -> Status {
    let message = error.to_string();
    match error {
        RequestError::Invalid { .. } | RequestError::TooLong { .. } => Status::invalid_argument(message),
        RequestError::Overloaded { retry_after, .. } | RequestError::Late { retry_after } => {
            retry(Code::ResourceExhausted, message, *retry_after)
        }
        RequestError::DeadlineExceeded => Status::deadline_exceeded(message),
        RequestError::Unavailable { .. } => retry(Code::Unavailable, message, RETRY_UNAVAILABLE),
        RequestError::Cancelled => Status::cancelled(message),
        RequestError::Internal(_) => Status::internal(message),
    }
}

/// The status of a credential that opens nothing.
pub fn unauthenticated(error: &AuthError) -> Status {
    match error {
        AuthError::Address => Status::permission_denied(error.to_string()),
        AuthError::Missing | AuthError::Invalid | AuthError::Expired => {
            Status::unauthenticated(error.to_string())
        }
    }
}

/// The status of a refusal by the tenant's key or limits.
pub fn denied(denied: &Denied) -> Status {
    let message = denied.to_string();
    match denied {
        Denied::Scope(_) => Status::permission_denied(message),
        Denied::TooLarge { .. } => Status::resource_exhausted(message),
        Denied::Limited { retry_after, standing, .. } => {
            let mut status = retry(Code::ResourceExhausted, message, *retry_after);
            insert_standing(status.metadata_mut(), standing);
            status
        }
    }
}

/// Adds how it stands with the caller's limits, under the names that HTTP has for it.
pub fn insert_standing(metadata: &mut MetadataMap, standing: &Standing) {
    for (name, value) in standing.headers() {
        if let Ok(value) = value.parse() {
            metadata.insert(name, value);
        }
    }
}

/// What [`retry`] says, as far as HTTP would: in seconds.
pub(crate) fn retry_after(status: &Status) -> Option<Duration> {
    let seconds = status.metadata().get("retry-after")?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn retry(code: Code, message: String, after: Duration) -> Status {
    let mut metadata = MetadataMap::new();
    let seconds = u64::try_from(after.as_nanos().div_ceil(1_000_000_000)).unwrap_or(u64::MAX).max(1);
    metadata.insert("retry-after", MetadataValue::from(seconds));
    let details = ErrorDetails::with_retry_info(Some(after));
    Status::with_error_details_and_metadata(code, message, details, metadata)
}
