//! What a request asks for, in the units of limits; and why it is not had.

use std::time::Duration;

use crate::budget::{Budget, OverBudget};
use crate::ledger::Standing;
use crate::limits::{Limits, Quota, Scope};

/// What one request asks for: the sum over its prompts. `default()` is a request that generates nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    pub(crate) prompts: u32,
    pub(crate) choices: u32,
    pub(crate) input_tokens: u64,
    pub(crate) output_tokens: u64,
    n: u32,
    max_tokens: u32,
    longest_prompt: u32,
}

impl Demand {
    /// Adds a prompt of so many tokens with `n` answers of at most `max_tokens` each.
    pub fn add(&mut self, prompt_tokens: u32, n: u32, max_tokens: u32) {
        self.prompts = self.prompts.saturating_add(1);
        self.choices = self.choices.saturating_add(n);
        self.input_tokens = self.input_tokens.saturating_add(prompt_tokens.into());
        self.output_tokens = self.output_tokens.saturating_add(u64::from(n) * u64::from(max_tokens));
        self.n = self.n.max(n);
        self.max_tokens = self.max_tokens.max(max_tokens);
        self.longest_prompt = self.longest_prompt.max(prompt_tokens);
    }

    /// In the order of `ledger::RATES`.
    pub(crate) fn costs(&self) -> [u64; 3] {
        [1, self.input_tokens, self.output_tokens]
    }

    /// Tokens that count against a budget.
    pub(crate) fn tokens(&self) -> u64 {
        self.input_tokens.saturating_add(self.output_tokens)
    }

    /// Refuses what no waiting would help: more than one answer, one prompt, all places, a whole minute or a whole
    /// period of the budget may have.
    pub(crate) fn check(&self, limits: &Limits, budget: Option<&Budget>) -> Result<(), Denied> {
        let minute = |rate: Option<crate::gcra::Rate>| rate.map(crate::gcra::Rate::limit);
        let budget = budget.filter(|budget| budget.action == OverBudget::Reject);
        for (limit_name, field, value, limit) in [
            ("n", "n", self.n.into(), limits.n.map(u64::from)),
            ("concurrency", "n", self.choices.into(), limits.concurrency.map(u64::from)),
            ("queued", "n", self.choices.into(), limits.queued.map(u64::from)),
            ("max_tokens", "max_tokens", self.max_tokens.into(), limits.max_tokens.map(u64::from)),
            (
                "max_input_tokens",
                "prompt",
                self.longest_prompt.into(),
                limits.max_input_tokens.map(u64::from),
            ),
            ("queued_tokens", "prompt", self.input_tokens, limits.queued_tokens),
            ("input_tpm", "prompt", self.input_tokens, minute(limits.input_tpm)),
            ("output_tpm", "max_tokens", self.output_tokens, minute(limits.output_tpm)),
            ("budget", "max_tokens", self.tokens(), budget.map(|budget| budget.tokens)),
        ] {
            if let Some(limit) = limit.filter(|&limit| value > limit) {
                return Err(Denied::TooLarge { field, limit_name, value, limit });
            }
        }
        Ok(())
    }
}

/// Why a request may not go on, though we know who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The key is not for this (403, PERMISSION_DENIED).
    #[error("this API key lacks the scope `{0}`")]
    Scope(Scope),
    /// More than this tenant may ever have at once (413, RESOURCE_EXHAUSTED).
    #[error("{field}: {value} is more than this tenant's limit {limit_name} = {limit}")]
    TooLarge {
        /// The field to make smaller.
        field: &'static str,
        /// The limit's name in the tenants file.
        limit_name: &'static str,
        /// What was asked for.
        value: u64,
        /// What is allowed.
        limit: u64,
    },
    /// Later it may (429, RESOURCE_EXHAUSTED).
    #[error("this tenant's limit {quota} = {limit} is reached; retry after {retry_after:?}")]
    Limited {
        /// The limit.
        quota: Quota,
        /// Its value.
        limit: u64,
        /// When to try again.
        retry_after: Duration,
        /// How it stands with the limits.
        standing: Standing,
    },
}
