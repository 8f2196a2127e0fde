//! `/v1/requests/{id}/timeline`: why a request took as long as it did.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use quire_core::Micros;
use quire_llm::{Entry, EntryKind, Llm, Timeline, WaitCause};
use quire_tenancy::Scope;
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::openai::caller::Caller;
use crate::state::AppState;

/// What answers put before the id of their request.
const PREFIXES: [&str; 2] = ["chatcmpl-", "cmpl-"];

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
    let find = |id: &str| llm.engine().timelines(id, tenant);
    let bare = PREFIXES.iter().find_map(|prefix| id.strip_prefix(prefix));
    let mut found = find(&id);
    if found.is_empty() {
        found = bare.map(find).unwrap_or_default();
    }
    let Some(first) = found.first() else { return Err(ApiError::request_not_found(&id)) };
    let clock = Clock::of(llm);
    let requests: Vec<Value> = found.iter().map(|timeline| render(timeline, &clock)).collect();
    let body = json!({ "object": "request.timeline", "id": &*first.origin.name, "requests": requests });
    Ok(Json(body).into_response())
}

/// The engine's clock beside the calendar's.
struct Clock {
    engine: Micros,
    unix: Duration,
}

impl Clock {
    fn of(llm: &Llm) -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { engine: llm.engine().now(), unix }
    }

    /// Seconds since 1970, to a millisecond.
    fn unix(&self, at: Micros) -> f64 {
        let ago = Duration::from_micros(self.engine.since(at).0);
        (self.unix.saturating_sub(ago).as_secs_f64() * 1e3).round() / 1e3
    }
}

fn ms(time: Micros) -> f64 {
    time.0 as f64 / 1e3
}

fn render(timeline: &Timeline, clock: &Clock) -> Value {
    let Timeline { origin, .. } = timeline;
    let at = |time: Micros| ms(time.since(origin.received));
    let (state, reason) = match timeline.ended {
        Some((_, reason)) => ("ended", Some(reason.name())),
        None if timeline.waiting().next().is_some() => ("waiting", None),
        None => ("running", None),
    };
    let entries = timeline.entries.iter().map(|entry| render_entry(entry, at));
    let before =
        [("received", origin.received), ("prepared", origin.prepared), ("admitted", origin.admitted)];
    let before = before.into_iter().chain([("queued", timeline.arrival)]);
    let events: Vec<Value> =
        before.map(|(name, time)| json!({ "at_ms": at(time), "event": name })).chain(entries).collect();
    json!({
        "received": clock.unix(origin.received),
        "state": state,
        "finish_reason": reason,
        "prompt_tokens": timeline.prompt_tokens,
        "cached_tokens": timeline.cached_tokens,
        "completion_tokens": timeline.generated_tokens,
        "preemptions": timeline.num_preemptions,
        "started_ms": timeline.started.map(at),
        "first_token_ms": timeline.first_token.map(at),
        "ended_ms": timeline.ended.map(|(time, _)| at(time)),
        "waited_ms": waits(timeline, clock.engine),
        "events": events,
        "events_left_out": timeline.num_left_out,
    })
}

/// How long it waited for what, in all; what it still waits for counts until now.
fn waits(timeline: &Timeline, now: Micros) -> Value {
    let Timeline { origin, .. } = timeline;
    let mut total = timeline.waited;
    for (_, cause, since) in timeline.waiting() {
        total[cause as usize].0 += now.since(since).0;
    }
    // A long prompt goes to the pool twice: to be tokenized, and for its blocks to be hashed.
    let hashing = timeline.arrival.since(origin.admitted);
    let outside = [
        ("preparation", Micros(origin.prepared.since(origin.received).0 + hashing.0)),
        ("quota", origin.admitted.since(origin.prepared)),
    ];
    let inside = WaitCause::ALL.into_iter().map(|cause| (cause.name(), total[cause as usize]));
    let all = outside.into_iter().chain(inside).filter(|(_, time)| time.0 > 0);
    Value::Object(all.map(|(name, time)| (name.to_owned(), ms(time).into())).collect::<Map<_, _>>())
}

fn render_entry(entry: &Entry, at: impl Fn(Micros) -> f64) -> Value {
    let (name, more) = match entry.kind {
        EntryKind::Waits(cause) => ("waits", json!({ "for": cause.name() })),
        EntryKind::Entered { cached_tokens } => ("scheduled", json!({ "cached_tokens": cached_tokens })),
        EntryKind::Chunks { num_chunks: 1, num_tokens, .. } => ("chunk", json!({ "tokens": num_tokens })),
        EntryKind::Chunks { num_chunks, num_tokens, last } => {
            ("chunks", json!({ "tokens": num_tokens, "chunks": num_chunks, "last_at_ms": at(last) }))
        }
        EntryKind::Preempted(cause) => ("preempted", json!({ "for": cause.name() })),
        EntryKind::FirstToken => ("first_token", json!({})),
        EntryKind::Ended { reason, generated_tokens } => {
            ("ended", json!({ "finish_reason": reason.name(), "tokens": generated_tokens }))
        }
    };
    let mut value = json!({ "at_ms": at(entry.at), "event": name });
    if let (Value::Object(fields), Value::Object(more)) = (&mut value, more) {
        if entry.index > 0 {
            fields.insert("choice".into(), entry.index.into());
        }
        fields.extend(more);
    }
    value
}
