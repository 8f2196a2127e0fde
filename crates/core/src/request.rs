//! What enters an engine: token ids and numbers only, never text.

use std::sync::Arc;

use crate::{
    AdapterId, BlockHash, CacheSalt, Limits, Micros, RequestError, RequestId, SamplingParams, TenantId,
    TokenId,
};

/// One validated request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Unique in the process; given by the client handle of the engine.
    pub id: RequestId,
    /// Prompt token ids, at least one.
    pub prompt: Arc<[TokenId]>,
    /// Addresses of the prompt's full blocks under `salt`, computed off the engine thread. Empty: no prefix caching.
    pub block_hashes: Arc<[BlockHash]>,
    /// Namespace of the prefix cache.
    pub salt: CacheSalt,
    /// Which adapter is put on the model; `None`: none. Blocks of one must never serve another: it is part of `salt`.
    pub adapter: Option<AdapterId>,
    /// How to sample.
    pub params: Arc<SamplingParams>,
    /// Who asks.
    pub tenant: TenantId,
    /// Higher runs first; 0 is normal.
    pub priority: i8,
    /// When it came in.
    pub arrival: Micros,
    /// When its answer becomes worthless.
    pub deadline: Option<Micros>,
}

impl Request {
    /// Checks prompt and parameters against the engine's limits.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] naming the field, or [`RequestError::TooLong`].
    pub fn validate(&self, limits: &Limits) -> Result<(), RequestError> {
        self.params.validate(limits)?;
        validate_prompt(&self.prompt, &self.params, limits)
    }
}

fn validate_prompt(prompt: &[TokenId], params: &SamplingParams, limits: &Limits) -> Result<(), RequestError> {
    if prompt.is_empty() {
        return Err(RequestError::invalid("prompt", "must hold at least one token"));
    }
    // Without an early end, many at once: prompts are long and their ids are right.
    let highest = prompt.iter().copied().fold(0, TokenId::max);
    if highest >= limits.vocab_size {
        let id = prompt.iter().find(|&&id| id >= limits.vocab_size).unwrap_or(&highest);
        return Err(RequestError::invalid(
            "prompt",
            format!("token id {id} is outside the vocabulary of {} tokens", limits.vocab_size),
        ));
    }
    let prompt_tokens = prompt.len() as u64;
    let needed = prompt_tokens + u64::from(params.max_tokens);
    if needed > u64::from(limits.max_model_len) || needed > limits.kv_tokens() {
        let max_model_len = limits.max_model_len.min(limits.kv_tokens() as u32);
        return Err(RequestError::TooLong { prompt_tokens, needed, max_model_len });
    }
    Ok(())
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token was chosen, or the front end matched a stop string.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
    /// The client cancelled or went away.
    Abort,
    /// The deadline passed.
    Deadline,
    /// The engine failed.
    Error,
    /// It could not have been served in time, and was given up before it started; the client may come back later.
    Rejected,
}

impl FinishReason {
    /// All reasons, for metrics that must exist before the first request.
    pub const ALL: [Self; 6] =
        [Self::Stop, Self::Length, Self::Abort, Self::Deadline, Self::Error, Self::Rejected];

    /// Label value in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Deadline => "deadline",
            Self::Error => "error",
            Self::Rejected => "rejected",
        }
    }
}

/// What one sequence cost, reported when it ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens found in the prefix cache at first admission.
    pub cached_tokens: u32,
    /// Tokens generated (the stop token included).
    pub generated_tokens: u32,
    /// Times the sequence lost its blocks.
    pub num_preemptions: u32,
    /// When the request arrived.
    pub arrival: Micros,
    /// When the sequence was first scheduled.
    pub first_scheduled: Micros,
    /// When its first token was accepted; equal to `finished` if it never was.
    pub first_token: Micros,
    /// When it ended.
    pub finished: Micros,
}
