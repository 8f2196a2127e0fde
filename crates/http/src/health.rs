//! What probes ask: alive, started, ready. Never behind a key, and there from process start to end.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use quire_llm::ServerState;
use serde_json::json;

use crate::state::AppState;

/// 503 only when a restart is the cure.
pub(crate) async fn live(State(state): State<AppState>) -> Response {
    answer(state.lifecycle().state(), |state| state != ServerState::Dead)
}

/// Whether loading is over.
pub(crate) async fn started(State(state): State<AppState>) -> Response {
    answer(state.lifecycle().state(), |state| state != ServerState::Loading)
}

/// Whether to send requests here.
pub(crate) async fn ready(State(state): State<AppState>) -> Response {
    answer(state.lifecycle().state(), |state| state == ServerState::Ready)
}

fn answer(state: ServerState, good: impl Fn(ServerState) -> bool) -> Response {
    let status = if good(state) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({ "status": state.name() }))).into_response()
}
