//! The door: every route behind it needs a key, once one is configured.

use std::net::IpAddr;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use quire_tenancy::{Access, Answer, AuditLog, AuthError, Trail, bearer};

use crate::error::{ApiError, ErrorCode};
use crate::observe::{RequestId, known_method};
use crate::state::AppState;

/// Lets a request through with who asks as an extension, or answers 401 (403 from a wrong address).
pub(crate) async fn authenticate(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    let trail = begin(&state.config().audit, "http", &request, peer).await;
    let response = match access(&state, request.headers(), peer) {
        Ok(access) => {
            trail.by(&access);
            request.extensions_mut().insert(access.with_trail(trail.clone()));
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    };
    answered(&trail, &response);
    response
}

/// The trail of a request in the audit log, under its route: a path is a client's words.
pub(crate) fn begin<'log>(
    log: &'log AuditLog,
    protocol: &'static str,
    request: &Request,
    peer: Option<IpAddr>,
) -> impl Future<Output = Trail> + use<'log> {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let id = request.extensions().get::<RequestId>().cloned();
    let method = known_method(request.method());
    async move {
        let route = || format!("{method} {}", path.as_ref().map_or("other", MatchedPath::as_str));
        let trail = log.begin(protocol, route, peer).await;
        id.iter().for_each(|id| trail.named(&id.0));
        trail
    }
}

/// Notes how a request was answered; the answer itself may take longer.
pub(crate) fn answered(trail: &Trail, response: &Response) {
    let error = response.extensions().get::<ErrorCode>().map(|code| code.0);
    trail.answered(Answer::Http(response.status().as_u16()), error);
}

/// The connection's other end, as the accept loop notes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

fn access(state: &AppState, headers: &HeaderMap, peer: Option<IpAddr>) -> Result<Access, AuthError> {
    state.tenancy().authenticate(token(headers)?, peer)
}

/// The bearer token, if there is one.
pub(crate) fn token(headers: &HeaderMap) -> Result<Option<&str>, AuthError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let header = values.next();
    if values.next().is_some() {
        // Which of two would a proxy in front of us have checked?
        return Err(AuthError::Invalid);
    }
    Ok(header.and_then(|value| value.to_str().ok()).and_then(bearer))
}
