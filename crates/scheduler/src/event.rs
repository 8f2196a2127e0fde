//! What happened to a sequence: the scheduler's answer to its caller, by reference into the step's output.

use quire_core::{FinishReason, RequestId, TokenId, Usage};

/// Something that happened to continuation `index` of `request`. Small, because there is one per sequence and step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeqEvent {
    /// The request.
    pub request: RequestId,
    /// Which of its `n` continuations.
    pub index: u32,
    /// What happened.
    pub kind: SeqEventKind,
}

/// The kinds of events, in the order in which a sequence sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SeqEventKind {
    /// Scheduled for the first time.
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// `ModelRunnerOutput::prompt_logprobs[entry]` belongs to this sequence. Each prompt position is reported once.
    PromptLogprobs {
        /// Index into `ModelRunnerOutput::prompt_logprobs`.
        entry: u32,
    },
    /// The first `num_tokens` tokens of `ModelRunnerOutput::rows[row]` were accepted (a stop token included).
    Tokens {
        /// Index into `ModelRunnerOutput::rows`.
        row: u32,
        /// How many of the row's tokens count.
        num_tokens: u32,
    },
    /// The last event of a sequence; its blocks are free.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The stop token that ended it, if one did.
        stop_token: Option<TokenId>,
        /// What it cost.
        usage: Box<Usage>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_small() {
        assert!(size_of::<SeqEvent>() <= 40);
    }
}
