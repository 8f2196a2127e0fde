//! What became of a request, as both front ends tell it: times in milliseconds since it came, causes by name.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quire_core::{Micros, TenantId};
use quire_engine::refusals::Refusal;
use quire_engine::timeline::{Entry, EntryKind, Timeline};
use quire_engine::{EngineClient, WaitCause};

use crate::Llm;

/// What HTTP answers put before the id of their request.
const PREFIXES: [&str; 2] = ["chatcmpl-", "cmpl-"];

/// All that goes by one id.
#[derive(Clone, Debug, PartialEq)]
pub struct Stories {
    /// The id, without what an answer put before it.
    pub id: String,
    /// Requests that the engine had, oldest first.
    pub accepted: Vec<Story>,
    /// Those that were refused before, oldest first.
    pub refused: Vec<Rejected>,
}

/// One request that the engine had. Times are in milliseconds since it was received.
#[derive(Clone, Debug, PartialEq)]
pub struct Story {
    /// Seconds since 1970, to a millisecond.
    pub received: f64,
    /// `waiting`, `running` or `ended`.
    pub state: &'static str,
    /// Why it ended, if it did.
    pub finish_reason: Option<&'static str>,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Those of them found in the prefix cache.
    pub cached_tokens: u32,
    /// Tokens of its choices that are over.
    pub completion_tokens: u32,
    /// Times that it lost its place.
    pub preemptions: u32,
    /// When it first had a place in the batch.
    pub started_ms: Option<f64>,
    /// When its first token was there.
    pub first_token_ms: Option<f64>,
    /// When it was over.
    pub ended_ms: Option<f64>,
    /// How long it waited for what, in all; what it still waits for counts until now.
    pub waited_ms: Vec<(&'static str, f64)>,
    /// In order, as far as they were kept.
    pub events: Vec<StoryEvent>,
    /// Events that were not kept.
    pub events_left_out: u32,
}

/// One thing that happened; what does not apply to it is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StoryEvent {
    /// When.
    pub at_ms: f64,
    /// What.
    pub name: &'static str,
    /// To which choice.
    pub choice: u32,
    /// What it waits for.
    pub cause: Option<&'static str>,
    /// Tokens of the prompt that were cached.
    pub cached_tokens: Option<u32>,
    /// Tokens that were computed or generated.
    pub tokens: Option<u32>,
    /// Chunks that this entry stands for, where it is more than one.
    pub chunks: Option<u32>,
    /// When the last of them was.
    pub last_at_ms: Option<f64>,
    /// Why it ended.
    pub finish_reason: Option<&'static str>,
}

/// One request that the engine never had.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejected {
    /// Seconds since 1970, to a millisecond.
    pub received: f64,
    /// When it was refused, in milliseconds since then.
    pub refused_ms: f64,
    /// As the answer had them.
    pub code: &'static str,
    /// As the answer had it.
    pub message: String,
    /// After how long it might come again.
    pub retry_after: Option<Duration>,
}

impl Llm {
    /// What became of the requests of this id, of one tenant or of all; `None` if there are none, or none any more.
    pub fn stories(&self, id: &str, tenant: Option<TenantId>) -> Option<Stories> {
        let clock = Clock::of(self.engine());
        let bare = PREFIXES.iter().find_map(|prefix| id.strip_prefix(prefix));
        std::iter::once(id).chain(bare).find_map(|id| {
            let accepted: Vec<_> =
                self.engine().timelines(id, tenant).iter().map(|timeline| tell(timeline, &clock)).collect();
            let refused: Vec<_> = self
                .engine()
                .refusals(id, tenant)
                .into_iter()
                .map(|refusal| reject(refusal, &clock))
                .collect();
            let is_known = !accepted.is_empty() || !refused.is_empty();
            is_known.then(|| Stories { id: id.to_owned(), accepted, refused })
        })
    }
}

/// The engine's clock beside the calendar's.
pub(crate) struct Clock {
    engine: Micros,
    unix: Duration,
}

impl Clock {
    pub(crate) fn of(engine: &EngineClient) -> Self {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { engine: engine.now(), unix }
    }

    /// Seconds since 1970, to a millisecond.
    pub(crate) fn unix(&self, at: Micros) -> f64 {
        let ago = Duration::from_micros(self.engine.since(at).0);
        (self.unix.saturating_sub(ago).as_secs_f64() * 1e3).round() / 1e3
    }
}

fn ms(time: Micros) -> f64 {
    time.0 as f64 / 1e3
}

fn reject(refusal: Refusal, clock: &Clock) -> Rejected {
    Rejected {
        received: clock.unix(refusal.received),
        refused_ms: ms(refusal.refused.since(refusal.received)),
        code: refusal.code,
        message: refusal.message,
        retry_after: refusal.retry_after,
    }
}

fn tell(timeline: &Timeline, clock: &Clock) -> Story {
    let Timeline { origin, .. } = timeline;
    let at = |time: Micros| ms(time.since(origin.received));
    let (state, finish_reason) = match timeline.ended {
        Some((_, reason)) => ("ended", Some(reason.name())),
        None if timeline.waiting().next().is_some() => ("waiting", None),
        None => ("running", None),
    };
    let before = [
        ("received", origin.received),
        ("prepared", origin.prepared),
        ("admitted", origin.admitted),
        ("queued", timeline.arrival),
    ];
    let before = before.map(|(name, time)| StoryEvent { at_ms: at(time), name, ..StoryEvent::default() });
    let entries = timeline.entries.iter().map(|entry| tell_entry(entry, at));
    Story {
        received: clock.unix(origin.received),
        state,
        finish_reason,
        prompt_tokens: timeline.prompt_tokens,
        cached_tokens: timeline.cached_tokens,
        completion_tokens: timeline.generated_tokens,
        preemptions: timeline.num_preemptions,
        started_ms: timeline.started.map(at),
        first_token_ms: timeline.first_token.map(at),
        ended_ms: timeline.ended.map(|(time, _)| at(time)),
        waited_ms: waits(timeline, clock.engine),
        events: before.into_iter().chain(entries).collect(),
        events_left_out: timeline.num_left_out,
    }
}

fn waits(timeline: &Timeline, now: Micros) -> Vec<(&'static str, f64)> {
    let Timeline { origin, .. } = timeline;
    let mut total = timeline.waited;
    for (_, cause, since) in timeline.waiting() {
        total[cause as usize].0 += now.since(since).0;
    }
    // The blocks of a long prompt are hashed after the limits let it in.
    let hashing = timeline.arrival.since(origin.admitted);
    let outside = [
        ("preparation", Micros(origin.prepared.since(origin.received).0 + hashing.0)),
        ("quota", origin.admitted.since(origin.prepared)),
    ];
    let inside = WaitCause::ALL.into_iter().map(|cause| (cause.name(), total[cause as usize]));
    let all = outside.into_iter().chain(inside).filter(|(_, time)| time.0 > 0);
    all.map(|(name, time)| (name, ms(time))).collect()
}

fn tell_entry(entry: &Entry, at: impl Fn(Micros) -> f64) -> StoryEvent {
    let event = |name| StoryEvent { at_ms: at(entry.at), name, choice: entry.index, ..StoryEvent::default() };
    match entry.kind {
        EntryKind::Waits(cause) => StoryEvent { cause: Some(cause.name()), ..event("waits") },
        EntryKind::Entered { cached_tokens } => {
            StoryEvent { cached_tokens: Some(cached_tokens), ..event("scheduled") }
        }
        EntryKind::Chunks { num_chunks: 1, num_tokens, .. } => {
            StoryEvent { tokens: Some(num_tokens), ..event("chunk") }
        }
        EntryKind::Chunks { num_chunks, num_tokens, last } => StoryEvent {
            tokens: Some(num_tokens),
            chunks: Some(num_chunks),
            last_at_ms: Some(at(last)),
            ..event("chunks")
        },
        EntryKind::Preempted(cause) => StoryEvent { cause: Some(cause.name()), ..event("preempted") },
        EntryKind::FirstToken => event("first_token"),
        EntryKind::Ended { reason, generated_tokens } => StoryEvent {
            finish_reason: Some(reason.name()),
            tokens: Some(generated_tokens),
            ..event("ended")
        },
    }
}
