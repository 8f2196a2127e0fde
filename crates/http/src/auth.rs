//! The door: every route behind it needs a key, once one is configured.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http::header::AUTHORIZATION;
use quire_tenancy::{AuthError, Tenant, bearer};

use crate::error::ApiError;
use crate::state::AppState;

/// Lets a request through with its tenant as an extension, or answers 401.
pub(crate) async fn authenticate(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Response {
    match tenant(&state, request.headers()) {
        Ok(tenant) => {
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    }
}

fn tenant(state: &AppState, headers: &HeaderMap) -> Result<Tenant, AuthError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let header = values.next();
    if values.next().is_some() {
        // Which of two would a proxy in front of us have checked?
        return Err(AuthError::Invalid);
    }
    let token = header.and_then(|value| value.to_str().ok()).and_then(bearer);
    state.config().keys.authenticate(token)
}
