//! What an operator asks of a running model: what runs, to end it, to forget what was cached.

use std::sync::Arc;

use quire_core::TenantId;
use quire_engine::timeline::Timeline;

use crate::Llm;
use crate::story::Clock;

/// A request that waits or runs.
#[derive(Clone, Debug, PartialEq)]
pub struct LiveRequest {
    /// The id under which its client knows it.
    pub id: Arc<str>,
    /// Whose it is.
    pub tenant: TenantId,
    /// Higher runs first.
    pub priority: i8,
    /// Seconds since 1970, to a millisecond.
    pub received: f64,
    /// What a choice of it waits for; `None`: all run.
    pub waits_for: Option<&'static str>,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Those of them found in the prefix cache.
    pub cached_tokens: u32,
    /// Tokens of all its choices so far.
    pub completion_tokens: u32,
    /// Times that it lost its place.
    pub preemptions: u32,
}

impl Llm {
    /// Every request that waits or runs, oldest first.
    pub fn live_requests(&self) -> Vec<LiveRequest> {
        let clock = Clock::of(self.engine());
        let tell = |timeline: &Timeline| LiveRequest {
            id: Arc::clone(&timeline.origin.name),
            tenant: timeline.tenant,
            priority: timeline.priority,
            received: clock.unix(timeline.origin.received),
            waits_for: timeline.waiting().next().map(|(_, cause, _)| cause.name()),
            prompt_tokens: timeline.prompt_tokens,
            cached_tokens: timeline.cached_tokens,
            completion_tokens: timeline.generated_so_far(),
            preemptions: timeline.num_preemptions,
        };
        self.engine().live().iter().map(tell).collect()
    }

    /// Ends the requests of this id, which their clients hear of as an error; tells whose they were.
    pub fn abort(&self, id: &str) -> Vec<TenantId> {
        self.engine().abort(id)
    }
}
