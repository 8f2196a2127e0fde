//! What runs, and the life of the process.

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use http::StatusCode;
use quire_llm::{LiveRequest, Llm, ServerState};
use quire_tenancy::Trail;
use serde_json::{Value, json};

use super::Admin;
use super::body::Object;
use crate::error::ApiError;

/// Every request that waits or runs, oldest first.
pub(super) async fn requests(State(admin): State<Admin>) -> Response {
    let live = admin.lifecycle.loaded().map(Llm::live_requests).unwrap_or_default();
    let render = |request: &LiveRequest| {
        json!({
            "id": &*request.id,
            "tenant": admin.tenancy.name_of(request.tenant).as_deref(),
            "priority": request.priority,
            "state": if request.waits_for.is_some() { "waiting" } else { "running" },
            "waits_for": request.waits_for,
            "received": request.received,
            "prompt_tokens": request.prompt_tokens,
            "cached_tokens": request.cached_tokens,
            "completion_tokens": request.completion_tokens,
            "preemptions": request.preemptions,
        })
    };
    let data: Vec<Value> = live.iter().map(render).collect();
    Json(json!({ "object": "list", "data": data })).into_response()
}

/// Ends every request of this id; their clients get an error.
pub(super) async fn abort(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Extension(trail): Extension<Trail>,
) -> Result<Response, ApiError> {
    let tenants = admin.lifecycle.loaded().map(|llm| llm.abort(&id)).unwrap_or_default();
    if tenants.is_empty() {
        let message = format!("no request `{id}` waits or runs here");
        return Err(ApiError::admin(StatusCode::NOT_FOUND, "request_not_found", message));
    }
    let names: Vec<_> = tenants.iter().map(|&tenant| admin.tenancy.name_of(tenant)).collect();
    let names: Vec<_> = names.iter().map(Option::as_deref).collect();
    trail.changed(json!({ "action": "request.abort", "request_id": id, "tenants": names }));
    Ok(Json(json!({ "id": id, "aborted": names.len() })).into_response())
}

pub(super) async fn drain(
    State(admin): State<Admin>,
    Extension(trail): Extension<Trail>,
) -> Result<Response, ApiError> {
    let before = admin.lifecycle.state();
    admin.lifecycle.pause().map_err(wrong_state)?;
    Ok(moved(&admin, &trail, "drain", before))
}

pub(super) async fn undrain(
    State(admin): State<Admin>,
    Extension(trail): Extension<Trail>,
) -> Result<Response, ApiError> {
    let before = admin.lifecycle.state();
    admin.lifecycle.resume().map_err(wrong_state)?;
    Ok(moved(&admin, &trail, "undrain", before))
}

fn moved(admin: &Admin, trail: &Trail, action: &str, before: ServerState) -> Response {
    let after = admin.lifecycle.state();
    trail.changed(json!({ "action": action, "before": before.name(), "after": after.name() }));
    Json(render_state(admin)).into_response()
}

fn wrong_state(state: ServerState) -> ApiError {
    let message = format!("the server is {}; that cannot be changed here", state.name());
    ApiError::admin(StatusCode::CONFLICT, "conflict", message)
}

/// From now on, nothing that was computed before is found in the prefix cache.
pub(super) async fn reset_cache(
    State(admin): State<Admin>,
    Extension(trail): Extension<Trail>,
) -> Result<Response, ApiError> {
    let llm = admin.lifecycle.loaded().ok_or_else(|| wrong_state(admin.lifecycle.state()))?;
    llm.reset_cache();
    trail.changed(json!({ "action": "cache.reset" }));
    Ok(StatusCode::NO_CONTENT.into_response())
}

pub(super) async fn log_level(State(admin): State<Admin>) -> Response {
    Json(json!({ "level": admin.log_filter.level() })).into_response()
}

/// More or less is logged, until this is called again or the process ends.
pub(super) async fn set_log_level(
    State(admin): State<Admin>,
    Extension(trail): Extension<Trail>,
    Object(mut body): Object,
) -> Result<Response, ApiError> {
    let level = body.remove("level");
    if let Some(name) = body.keys().next() {
        return Err(ApiError::unknown_field(name));
    }
    let level = level.as_ref().and_then(Value::as_str);
    let level = level.ok_or_else(|| ApiError::invalid("level", "must be a string, such as info or debug"))?;
    let before = admin.log_filter.level();
    admin.log_filter.set_level(level).map_err(|message| ApiError::invalid("level", message))?;
    let after = admin.log_filter.level();
    trail.changed(json!({ "action": "log.level", "before": before, "after": after }));
    Ok(Json(json!({ "level": after })).into_response())
}

pub(super) async fn config(State(admin): State<Admin>) -> Response {
    Json(&admin.settings).into_response()
}

pub(super) async fn state(State(admin): State<Admin>) -> Response {
    Json(render_state(&admin)).into_response()
}

fn render_state(admin: &Admin) -> Value {
    let llm = admin.lifecycle.loaded();
    let engine = llm.map(|llm| llm.engine().snapshot()).unwrap_or_default();
    json!({
        "state": admin.lifecycle.state().name(),
        "version": admin.version,
        "uptime_s": admin.inner.started.elapsed().as_secs(),
        "models": llm.map(Llm::names).unwrap_or_default(),
        "running": engine.num_running,
        "waiting": engine.num_waiting,
        "kv_usage": engine.kv_usage,
        "requires_key": admin.tenancy.requires_key(),
        "limits_shared": admin.tenancy.shares_limits(),
    })
}
