//! From what the client said, over the model's defaults, to the engine's sampling parameters.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use quire_core::{Limits, RequestError, SamplingParams, TokenId};

use crate::request::GenerateRequest;

/// What a model's authors recommend (`generation_config.json`). `None`: they do not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// 0 is greedy (`do_sample: false`).
    pub temperature: Option<f32>,
    /// `(0, 1]`.
    pub top_p: Option<f32>,
    /// 0 is off. Larger than the vocabulary is off, too.
    pub top_k: Option<u32>,
    /// `[0, 1]`.
    pub min_p: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end an answer, besides those that the tokenizer names.
    pub eos_token_ids: Vec<TokenId>,
}

/// Random keys for requests that name no seed.
#[derive(Default)]
pub(crate) struct SeedSource {
    key: RandomState,
    count: AtomicU64,
}

impl SeedSource {
    fn next(&self) -> u64 {
        self.key.hash_one(self.count.fetch_add(1, Ordering::Relaxed))
    }
}

/// Tokens that are left for an answer after `prompt_len`, at least 1 unless the prompt fills the context.
///
/// # Errors
/// [`RequestError::TooLong`] when nothing is left.
fn rest_of_context(prompt_len: usize, limits: &Limits) -> Result<u32, RequestError> {
    let context = u64::from(limits.max_model_len).min(limits.kv_tokens());
    match context.saturating_sub(prompt_len as u64) {
        0 => Err(RequestError::TooLong {
            prompt_tokens: prompt_len as u64,
            needed: prompt_len as u64 + 1,
            max_model_len: context as u32,
        }),
        rest => Ok(rest as u32),
    }
}

/// Fills in defaults. Ranges are checked later, once, by the engine's client.
pub(crate) fn resolve(
    request: &GenerateRequest,
    defaults: &GenerationDefaults,
    prompt_len: usize,
    limits: &Limits,
    seeds: &SeedSource,
) -> Result<SamplingParams, RequestError> {
    let options = &request.sampling;
    let neutral = SamplingParams::default();
    let max_tokens = match options.max_tokens {
        // Nothing but the prompt is wanted: one token is made and dropped.
        Some(0) if request.echo => 1,
        Some(max_tokens) => max_tokens,
        None => {
            let rest = rest_of_context(prompt_len, limits)?;
            request.default_max_tokens.map_or(rest, |bound| rest.min(bound.max(1)))
        }
    };
    let mut logit_bias = options.logit_bias.clone();
    logit_bias.sort_by_key(|&(id, _)| id);
    Ok(SamplingParams {
        temperature: options.temperature.or(defaults.temperature).unwrap_or(neutral.temperature),
        top_p: options.top_p.or(defaults.top_p).unwrap_or(neutral.top_p),
        top_k: options.top_k.or(defaults.top_k.filter(|&k| k < limits.vocab_size)).unwrap_or(neutral.top_k),
        min_p: options.min_p.or(defaults.min_p).unwrap_or(neutral.min_p),
        presence_penalty: options.presence_penalty.unwrap_or(neutral.presence_penalty),
        frequency_penalty: options.frequency_penalty.unwrap_or(neutral.frequency_penalty),
        repetition_penalty: options
            .repetition_penalty
            .or(defaults.repetition_penalty)
            .unwrap_or(neutral.repetition_penalty),
        seed: options.seed.unwrap_or_else(|| seeds.next()),
        n: options.n.unwrap_or(neutral.n),
        max_tokens,
        min_tokens: options.min_tokens.unwrap_or(neutral.min_tokens),
        stop_token_ids: stop_token_ids(request, defaults),
        logit_bias,
        logprobs: request.logprobs,
        prompt_logprobs: request.prompt_logprobs,
    })
}

/// The client's and, unless ignored, the model's; ascending and distinct.
fn stop_token_ids(request: &GenerateRequest, defaults: &GenerationDefaults) -> Vec<TokenId> {
    let mut ids = request.stop_token_ids.clone();
    if !request.ignore_eos {
        ids.extend(&defaults.eos_token_ids);
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Checks the stop strings, which the engine never sees.
pub(crate) fn validate_stop(stop: &[String]) -> Result<(), RequestError> {
    let (max, max_bytes) = (GenerateRequest::MAX_STOP, GenerateRequest::MAX_STOP_BYTES);
    if stop.len() > max {
        return Err(RequestError::invalid("stop", format!("at most {max} stop strings, got {}", stop.len())));
    }
    for (at, text) in stop.iter().enumerate() {
        if text.is_empty() {
            return Err(RequestError::invalid("stop", format!("stop string {at} is empty")));
        }
        if text.len() > max_bytes {
            let message =
                format!("stop string {at} has {} bytes; at most {max_bytes} are allowed", text.len());
            return Err(RequestError::invalid("stop", message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Prompt;

    fn request() -> GenerateRequest {
        GenerateRequest::new(Prompt::Tokens(vec![1]))
    }

    fn resolved(request: &GenerateRequest, prompt_len: usize) -> Result<SamplingParams, RequestError> {
        let defaults = GenerationDefaults {
            temperature: Some(0.25),
            top_k: Some(1 << 20),
            eos_token_ids: vec![7, 2],
            ..GenerationDefaults::default()
        };
        resolve(request, &defaults, prompt_len, &Limits::default(), &SeedSource::default())
    }

    #[test]
    fn the_client_wins_over_the_model_and_the_model_over_neutral() {
        let mut request = request();
        let params = resolved(&request, 5).unwrap();
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.25, 1.0, 0), "a huge top_k is off");
        request.sampling.temperature = Some(0.0);
        assert_eq!(resolved(&request, 5).unwrap().temperature, 0.0);
    }

    #[test]
    fn max_tokens_defaults_to_the_rest_of_the_context() {
        let limits = Limits::default();
        assert_eq!(resolved(&request(), 48).unwrap().max_tokens, limits.max_model_len - 48);
        let bounded = GenerateRequest { default_max_tokens: Some(7), ..request() };
        assert_eq!(resolved(&bounded, 48).unwrap().max_tokens, 7);
        assert_eq!(resolved(&bounded, limits.max_model_len as usize - 3).unwrap().max_tokens, 3);
        let full = resolved(&request(), limits.max_model_len as usize);
        assert!(matches!(full, Err(RequestError::TooLong { needed: 2049, .. })), "{full:?}");
        let mut zero = request();
        zero.sampling.max_tokens = Some(0);
        assert_eq!(resolved(&zero, 5).unwrap().max_tokens, 0, "left for validation to refuse");
        zero.echo = true;
        assert_eq!(resolved(&zero, 5).unwrap().max_tokens, 1);
    }

    #[test]
    fn stop_ids_are_merged_and_ignore_eos_keeps_the_clients() {
        let mut request = GenerateRequest { stop_token_ids: vec![9, 2, 9], ..request() };
        assert_eq!(resolved(&request, 1).unwrap().stop_token_ids, [2, 7, 9]);
        request.ignore_eos = true;
        assert_eq!(resolved(&request, 1).unwrap().stop_token_ids, [2, 9]);
    }

    #[test]
    fn seeds_differ_unless_given() {
        let seeds = SeedSource::default();
        assert_ne!(seeds.next(), seeds.next());
        let mut request = request();
        request.sampling.seed = Some(3);
        assert_eq!(resolved(&request, 1).unwrap().seed, 3);
    }

    #[test]
    fn stop_strings_are_bounded_and_not_empty() {
        let text = |len| "x".repeat(len);
        assert!(validate_stop(&vec![text(256); 16]).is_ok());
        for bad in [vec![text(1); 17], vec![text(257)], vec![text(1), String::new()]] {
            assert!(
                matches!(validate_stop(&bad), Err(RequestError::Invalid { field: "stop", .. })),
                "{bad:?}"
            );
        }
    }
}
