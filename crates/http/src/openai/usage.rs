//! `usage`.

use quire_llm::TokenUsage;
use serde::Serialize;

/// What an answer cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
    completion_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl Usage {
    /// The sum over the prompts of one request.
    pub(crate) fn sum(parts: impl IntoIterator<Item = TokenUsage>) -> Self {
        let mut sum = TokenUsage::default();
        for part in parts {
            sum.prompt_tokens += part.prompt_tokens;
            sum.cached_tokens += part.cached_tokens;
            sum.completion_tokens += part.completion_tokens;
        }
        Self {
            prompt_tokens: sum.prompt_tokens,
            total_tokens: sum.prompt_tokens + sum.completion_tokens,
            completion_tokens: sum.completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: sum.cached_tokens },
        }
    }
}
