//! How the next token is chosen: the request's parameters, and their one validation.
//!
//! The order in which they act on a row of logits is fixed and the same on every backend:
//! `min_tokens` mask, token bitmask, `logit_bias`, repetition / presence / frequency penalties, temperature,
//! `top_k`, `top_p`, `min_p`, then one draw. Log-probabilities are those of the raw logits (before all of it),
//! as OpenAI's and vLLM's are.

use crate::{Limits, RequestError, TokenId};

/// Sampling parameters of one request. `Default` is greedy-free OpenAI behaviour: temperature 1, no truncation.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy. Otherwise logits are divided by it. `0.0..=2.0` by OpenAI's rule; any finite value >= 0 here.
    pub temperature: f32,
    /// Nucleus: keep the smallest set of tokens whose probability reaches this. `(0, 1]`, 1 is off.
    pub top_p: f32,
    /// Keep the k most likely tokens; 0 is off.
    pub top_k: u32,
    /// Keep tokens at least this fraction as likely as the most likely one. `[0, 1]`, 0 is off.
    pub min_p: f32,
    /// Subtracted once from tokens that were generated. `[-2, 2]`.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from tokens that were generated. `[-2, 2]`.
    pub frequency_penalty: f32,
    /// Divides positive (multiplies negative) logits of tokens in prompt or output. `> 0`, 1 is off (CTRL, arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Key of the counter-based random generator. The front end draws one when the client names none.
    pub seed: u64,
    /// Number of continuations; they share the prompt's blocks.
    pub n: u32,
    /// Tokens to generate at most, per continuation; >= 1.
    pub max_tokens: u32,
    /// Tokens before which no stop token may be chosen.
    pub min_tokens: u32,
    /// Ids that end the sequence: the model's end-of-sequence ids (unless `ignore_eos`) and the client's.
    pub stop_token_ids: Vec<TokenId>,
    /// Added to the logits of these tokens. `[-100, 100]` each; ids distinct and ascending.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// `Some(k)`: report the chosen token's log-probability and those of the k most likely.
    pub logprobs: Option<u32>,
    /// `Some(k)`: the same for every prompt token but the first.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
            n: 1,
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            logit_bias: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Greedy decoding of `max_tokens` tokens.
    pub fn greedy(max_tokens: u32) -> Self {
        Self { temperature: 0.0, max_tokens, ..Self::default() }
    }

    /// Whether any penalty needs the token history of the sequence.
    pub fn needs_history(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }

    /// The random key of continuation `index`: continuation 0 is the request itself, so `n = 1` equals the first of n.
    pub fn seed_of(&self, index: u32) -> u64 {
        self.seed.wrapping_add(u64::from(index).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    /// Checks every field against its range and the engine's limits.
    ///
    /// # Errors
    /// [`RequestError::Invalid`] naming the first offending field, its value and the allowed range.
    pub fn validate(&self, limits: &Limits) -> Result<(), RequestError> {
        self.validate_ranges()?;
        self.validate_counts(limits)?;
        self.validate_ids(limits)
    }

    fn validate_ranges(&self) -> Result<(), RequestError> {
        in_range("temperature", self.temperature, 0.0, 100.0)?;
        in_range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)
            .map_err(|_| invalid("top_p", format!("must be in (0, 1], got {}", self.top_p)))?;
        in_range("min_p", self.min_p, 0.0, 1.0)?;
        in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        in_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        for &(id, bias) in &self.logit_bias {
            if !(-100.0..=100.0).contains(&bias) {
                return Err(invalid(
                    "logit_bias",
                    format!("the bias of token {id} must be in [-100, 100], got {bias}"),
                ));
            }
        }
        Ok(())
    }

    fn validate_counts(&self, limits: &Limits) -> Result<(), RequestError> {
        at_most("n", self.n, 1, limits.max_n.min(limits.max_num_seqs))?;
        if self.max_tokens == 0 {
            return Err(invalid("max_tokens", "must be at least 1".into()));
        }
        if self.min_tokens > self.max_tokens {
            return Err(invalid(
                "min_tokens",
                format!("must be at most max_tokens ({}), got {}", self.max_tokens, self.min_tokens),
            ));
        }
        if self.top_k > limits.vocab_size {
            return Err(invalid(
                "top_k",
                format!("must be at most the vocabulary size {}, got {}", limits.vocab_size, self.top_k),
            ));
        }
        at_most("logprobs", self.logprobs.unwrap_or(0), 0, limits.max_logprobs)?;
        at_most("prompt_logprobs", self.prompt_logprobs.unwrap_or(0), 0, limits.max_logprobs)?;
        at_most("logit_bias", self.logit_bias.len() as u32, 0, limits.max_logit_bias)?;
        at_most("stop_token_ids", self.stop_token_ids.len() as u32, 0, limits.max_stop_token_ids)
    }

    fn validate_ids(&self, limits: &Limits) -> Result<(), RequestError> {
        let check = |field, id: TokenId| {
            if id < limits.vocab_size {
                return Ok(());
            }
            Err(invalid(
                field,
                format!("token id {id} is outside the vocabulary of {} tokens", limits.vocab_size),
            ))
        };
        self.logit_bias.iter().try_for_each(|&(id, _)| check("logit_bias", id))?;
        self.stop_token_ids.iter().try_for_each(|&id| check("stop_token_ids", id))?;
        if self.logit_bias.windows(2).any(|w| w[0].0 >= w[1].0) {
            return Err(invalid("logit_bias", "token ids must be distinct".into()));
        }
        Ok(())
    }
}

fn invalid(field: &'static str, message: String) -> RequestError {
    RequestError::invalid(field, message)
}

fn in_range(field: &'static str, value: f32, min: f32, max: f32) -> Result<(), RequestError> {
    // Written so that NaN fails.
    if value >= min && value <= max {
        return Ok(());
    }
    Err(invalid(field, format!("must be a number in [{min}, {max}], got {value}")))
}

fn at_most(field: &'static str, value: u32, min: u32, max: u32) -> Result<(), RequestError> {
    if value >= min && value <= max {
        return Ok(());
    }
    Err(invalid(field, format!("must be between {min} and {max}, got {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of(params: &SamplingParams) -> &'static str {
        match params.validate(&Limits::default()) {
            Err(RequestError::Invalid { field, .. }) => field,
            other => panic!("expected an invalid field, got {other:?}"),
        }
    }

    #[test]
    fn defaults_are_valid() {
        SamplingParams::default().validate(&Limits::default()).unwrap();
        SamplingParams::greedy(1).validate(&Limits::default()).unwrap();
    }

    #[test]
    fn every_range_names_its_field() {
        let d = SamplingParams::default;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.5, 101.0] {
            assert_eq!(field_of(&SamplingParams { temperature: bad, ..d() }), "temperature");
            assert_eq!(field_of(&SamplingParams { min_p: bad, ..d() }), "min_p");
            assert_eq!(field_of(&SamplingParams { repetition_penalty: bad, ..d() }), "repetition_penalty");
        }
        for bad in [0.0, -1.0, 1.01, f32::NAN] {
            assert_eq!(field_of(&SamplingParams { top_p: bad, ..d() }), "top_p");
        }
        for bad in [2.1, -2.1, f32::NAN] {
            assert_eq!(field_of(&SamplingParams { presence_penalty: bad, ..d() }), "presence_penalty");
            assert_eq!(field_of(&SamplingParams { frequency_penalty: bad, ..d() }), "frequency_penalty");
            assert_eq!(field_of(&SamplingParams { logit_bias: vec![(1, bad * 100.0)], ..d() }), "logit_bias");
        }
    }

    #[test]
    fn counts_and_ids_name_their_field() {
        let d = SamplingParams::default;
        let vocab = Limits::default().vocab_size;
        assert_eq!(field_of(&SamplingParams { n: 0, ..d() }), "n");
        assert_eq!(field_of(&SamplingParams { n: u32::MAX, ..d() }), "n");
        assert_eq!(field_of(&SamplingParams { max_tokens: 0, ..d() }), "max_tokens");
        assert_eq!(field_of(&SamplingParams { min_tokens: 17, ..d() }), "min_tokens");
        assert_eq!(field_of(&SamplingParams { top_k: vocab + 1, ..d() }), "top_k");
        assert_eq!(field_of(&SamplingParams { logprobs: Some(21), ..d() }), "logprobs");
        assert_eq!(field_of(&SamplingParams { prompt_logprobs: Some(u32::MAX), ..d() }), "prompt_logprobs");
        assert_eq!(field_of(&SamplingParams { stop_token_ids: vec![vocab], ..d() }), "stop_token_ids");
        assert_eq!(field_of(&SamplingParams { logit_bias: vec![(vocab, 0.0)], ..d() }), "logit_bias");
        assert_eq!(field_of(&SamplingParams { logit_bias: vec![(3, 0.0), (3, 1.0)], ..d() }), "logit_bias");
    }
}
