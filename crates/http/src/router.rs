//! Which path leads where.

use axum::extract::{Request, State};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::header::CONTENT_TYPE;
use http::{Method, Uri};
use quire_tenancy::{Access, Scope};
use serde_json::json;

use crate::auth::authenticate;
use crate::error::ApiError;
use crate::health;
use crate::observe::observe;
use crate::openai::{chat, completions, models, tokenize};
use crate::state::AppState;
use crate::timeline;

/// The whole front end. What needs a key and what does not is decided by the group a route is in.
pub fn router(state: AppState) -> Router {
    let open = Router::new()
        .route("/health", get(health::ready))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/health/started", get(health::started))
        .route("/ping", get(health::ready).post(health::ready));
    let metrics = Router::new().route("/metrics", get(metrics));
    let guarded = Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/requests/{id}/timeline", get(timeline::show))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/version", get(version));
    let (open, guarded) = match state.config().metrics_without_key {
        true => (open.merge(metrics), guarded),
        false => (open, guarded.merge(metrics)),
    };
    let door = from_fn_with_state(state.clone(), authenticate);
    let guarded = guarded.fallback(not_found).method_not_allowed_fallback(wrong_method).layer(door);
    let open = open.method_not_allowed_fallback(wrong_method);
    guarded.merge(open).layer(from_fn(observe)).with_state(state)
}

async fn metrics(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    // Not there where the page needs no key.
    if let Some(access) = request.extensions().get::<Access>() {
        access.require(Scope::Metrics)?;
    }
    let page = (state.config().metrics)();
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response())
}

async fn version(State(state): State<AppState>) -> Response {
    Json(json!({ "version": state.config().version })).into_response()
}

pub(crate) async fn not_found(uri: Uri) -> ApiError {
    ApiError::route_not_found(uri.path())
}

pub(crate) async fn wrong_method(method: Method) -> ApiError {
    ApiError::method_not_allowed(&method)
}
