//! The door: every route behind it needs a key, once one is configured.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use quire_tenancy::{Access, AuthError, bearer};

use crate::error::ApiError;
use crate::state::AppState;

/// Lets a request through with who asks as an extension, or answers 401 (403 from a wrong address).
pub(crate) async fn authenticate(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    match access(&state, request.headers(), peer) {
        Ok(access) => {
            request.extensions_mut().insert(access);
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    }
}

/// The connection's other end, as the accept loop notes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

fn access(state: &AppState, headers: &HeaderMap, peer: Option<IpAddr>) -> Result<Access, AuthError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let header = values.next();
    if values.next().is_some() {
        // Which of two would a proxy in front of us have checked?
        return Err(AuthError::Invalid);
    }
    let token = header.and_then(|value| value.to_str().ok()).and_then(bearer);
    state.tenancy().authenticate(token, peer)
}
