//! What a request's headers say: who asks, under which id, until when.

use std::time::Duration;

use axum::extract::FromRequestParts;
use http::request::Parts;
use quire_tenancy::Tenant;

use crate::error::ApiError;
use crate::observe::RequestId;
use crate::state::AppState;

const TIMEOUT: &str = "x-request-timeout-ms";

/// The longest time to live that a client may ask for: a day.
const MAX_TIMEOUT_MS: u64 = 86_400_000;

/// Who asks, and how.
pub(crate) struct Caller {
    pub(crate) tenant: Tenant,
    pub(crate) request_id: RequestId,
    /// From now.
    pub(crate) timeout: Option<Duration>,
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        let (Some(&tenant), Some(request_id)) = (parts.extensions.get(), parts.extensions.get::<RequestId>())
        else {
            return Err(ApiError::internal("the request passed by the door"));
        };
        let timeout =
            parts.headers.get(TIMEOUT).map(|value| parse_timeout(value.to_str().ok())).transpose()?;
        Ok(Self { tenant, request_id: request_id.clone(), timeout })
    }
}

fn parse_timeout(value: Option<&str>) -> Result<Duration, ApiError> {
    match value.and_then(|value| value.trim().parse::<u64>().ok()) {
        Some(ms @ 1..=MAX_TIMEOUT_MS) => Ok(Duration::from_millis(ms)),
        _ => {
            Err(ApiError::invalid(TIMEOUT, format!("must be a whole number between 1 and {MAX_TIMEOUT_MS}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_positive_milliseconds() {
        assert_eq!(parse_timeout(Some("250")).unwrap(), Duration::from_millis(250));
        for bad in [None, Some("0"), Some("-1"), Some("1.5"), Some("soon"), Some("86400001")] {
            assert!(parse_timeout(bad).is_err(), "{bad:?}");
        }
    }
}
