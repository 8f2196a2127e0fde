//! Reading a request's body: JSON, bounded in bytes and in time.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body::Body as _;
use http_body_util::BodyExt;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::state::AppState;

/// A body that is not here by then never comes.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes for which room is made on a client's word; larger bodies grow.
const MAX_ROOM: usize = 1 << 20;

/// Bytes of a body that is too large which are read for the sake of an orderly answer.
const DISCARD_BYTES: usize = 64 << 20;
/// The same in time.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// An extractor: the fields of a JSON object.
pub(crate) struct JsonFields(pub(crate) Fields);

impl FromRequest<AppState> for JsonFields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        // Before the body is read: who waits for a model to load need not send it.
        state.llm()?;
        let bytes = read_json(request, state.config().max_body_bytes).await?;
        Ok(Self(Fields::parse(&bytes)?))
    }
}

/// A body that says it is JSON, and is not too large.
pub(crate) async fn read_json(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    check_content_type(request.headers())?;
    let declared = declared_length(request.headers()).unwrap_or(0);
    if declared > limit as u64 {
        discard(request.into_body()).await;
        return Err(ApiError::body_too_large(limit));
    }
    let room = usize::try_from(declared).map_or(MAX_ROOM, |declared| declared.min(MAX_ROOM));
    let read = tokio::time::timeout(READ_TIMEOUT, read(request.into_body(), room, limit));
    read.await.map_err(|_| ApiError::body_too_slow())?
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

/// All of the body; `room` is made for it at once.
async fn read(mut body: Body, room: usize, limit: usize) -> Result<Bytes, ApiError> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| ApiError::malformed(format!("the body cannot be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            discard(body).await;
            return Err(ApiError::body_too_large(limit));
        }
        // Most bodies come in one piece, which need not be copied.
        if bytes.is_empty() && body.is_end_stream() {
            return Ok(data);
        }
        bytes.reserve(room.saturating_sub(bytes.len()).max(data.len()));
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}

/// Reads on and drops what comes, within bounds: most clients send everything before they look at the answer, and
/// would see a broken pipe instead of it.
async fn discard(mut body: Body) {
    let drop_frames = async {
        let mut left = DISCARD_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    // Whoever is slower or sends more has to live with the broken pipe.
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, drop_frames).await;
}
