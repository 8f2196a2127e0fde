//! Reading a request's body: JSON, bounded in bytes and in time.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::state::AppState;

/// A body that is not here by then never comes.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// An extractor: the fields of a JSON object.
pub(crate) struct JsonFields(pub(crate) Fields);

impl FromRequest<AppState> for JsonFields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        // Before the body is read: who waits for a model to load need not send it.
        state.llm()?;
        check_content_type(request.headers())?;
        let limit = state.config().max_body_bytes;
        if declared_length(request.headers()).is_some_and(|length| length > limit as u64) {
            return Err(ApiError::body_too_large(limit));
        }
        let read = tokio::time::timeout(READ_TIMEOUT, read(request.into_body(), limit));
        let bytes = read.await.map_err(|_| ApiError::body_too_slow())??;
        Ok(Self(Fields::parse(&bytes)?))
    }
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(CONTENT_TYPE).map_or("none", |value| value.to_str().unwrap_or("unreadable"));
    let essence = value.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::unsupported_media_type(value))
}

async fn read(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::body_too_large(limit)),
        Err(error) => Err(ApiError::malformed(format!("the body cannot be read: {error}"))),
    }
}
