//! What became of a request, as messages.

use quire_llm::{Rejected, Stories, Story, StoryEvent};

use crate::proto;

/// All that goes by one id.
pub fn message(stories: Stories) -> proto::RequestTimeline {
    proto::RequestTimeline {
        id: stories.id,
        accepted: stories.accepted.into_iter().map(accepted).collect(),
        refused: stories.refused.into_iter().map(refused).collect(),
    }
}

fn accepted(story: Story) -> proto::AcceptedRequest {
    proto::AcceptedRequest {
        received: story.received,
        state: story.state.to_owned(),
        finish_reason: story.finish_reason.unwrap_or_default().to_owned(),
        prompt_tokens: story.prompt_tokens,
        cached_tokens: story.cached_tokens,
        completion_tokens: story.completion_tokens,
        preemptions: story.preemptions,
        started_ms: story.started_ms,
        first_token_ms: story.first_token_ms,
        ended_ms: story.ended_ms,
        waited_ms: story.waited_ms.into_iter().map(|(cause, ms)| (cause.to_owned(), ms)).collect(),
        events: story.events.into_iter().map(event).collect(),
        events_left_out: story.events_left_out,
    }
}

fn event(event: StoryEvent) -> proto::TimelineEvent {
    proto::TimelineEvent {
        at_ms: event.at_ms,
        event: event.name.to_owned(),
        choice: event.choice,
        cause: event.cause.unwrap_or_default().to_owned(),
        cached_tokens: event.cached_tokens,
        tokens: event.tokens,
        chunks: event.chunks,
        last_at_ms: event.last_at_ms,
        finish_reason: event.finish_reason.unwrap_or_default().to_owned(),
    }
}

fn refused(refusal: Rejected) -> proto::RefusedRequest {
    proto::RefusedRequest {
        received: refusal.received,
        refused_ms: refusal.refused_ms,
        code: refusal.code.to_owned(),
        message: refusal.message,
        retry_after: refusal.retry_after.map(|after| after.as_secs_f64()),
    }
}
