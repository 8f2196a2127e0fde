//! `/v1/requests/{id}/timeline`: why a request took as long as it did, or was refused.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use quire_llm::{Rejected, Stories, Story, StoryEvent};
use quire_tenancy::Scope;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::caller::Caller;
use crate::state::AppState;

/// The requests of this id that belong to the caller; with the scope `admin`, all of this id.
pub(crate) async fn show(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let llm = state.lifecycle().loaded().ok_or_else(|| ApiError::request_not_found(&id))?;
    let sees_all = caller.access.require(Scope::Admin).is_ok();
    if !sees_all {
        caller.access.require(Scope::Infer)?;
    }
    let tenant = (!sees_all).then(|| caller.access.tenant().id());
    let Some(Stories { id, accepted, refused }) = llm.stories(&id, tenant) else {
        return Err(ApiError::request_not_found(&id));
    };
    let requests: Vec<Value> =
        accepted.iter().map(render).chain(refused.iter().map(render_refusal)).collect();
    Ok(Json(json!({ "object": "request.timeline", "id": id, "requests": requests })).into_response())
}

fn render(story: &Story) -> Value {
    let waited: Map<_, _> =
        story.waited_ms.iter().map(|&(cause, ms)| (cause.to_owned(), ms.into())).collect();
    let events: Vec<Value> = story.events.iter().map(render_event).collect();
    json!({
        "received": story.received,
        "state": story.state,
        "finish_reason": story.finish_reason,
        "prompt_tokens": story.prompt_tokens,
        "cached_tokens": story.cached_tokens,
        "completion_tokens": story.completion_tokens,
        "preemptions": story.preemptions,
        "started_ms": story.started_ms,
        "first_token_ms": story.first_token_ms,
        "ended_ms": story.ended_ms,
        "waited_ms": waited,
        "events": events,
        "events_left_out": story.events_left_out,
    })
}

fn render_event(event: &StoryEvent) -> Value {
    let mut fields = Map::new();
    fields.insert("at_ms".into(), event.at_ms.into());
    fields.insert("event".into(), event.name.into());
    let more = [
        ("choice", (event.choice > 0).then(|| event.choice.into())),
        ("for", event.cause.map(Value::from)),
        ("cached_tokens", event.cached_tokens.map(Value::from)),
        ("finish_reason", event.finish_reason.map(Value::from)),
        ("tokens", event.tokens.map(Value::from)),
        ("chunks", event.chunks.map(Value::from)),
        ("last_at_ms", event.last_at_ms.map(Value::from)),
    ];
    fields.extend(more.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    Value::Object(fields)
}

fn render_refusal(refusal: &Rejected) -> Value {
    json!({
        "received": refusal.received,
        "state": "refused",
        "refused_ms": refusal.refused_ms,
        "code": refusal.code,
        "message": refusal.message,
        "retry_after_s": refusal.retry_after.map(|after| after.as_secs_f64()),
    })
}
