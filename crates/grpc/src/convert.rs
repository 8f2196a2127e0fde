//! Between the wire's messages and `llm`'s types.

use quire_core::{FinishReason, RequestError};
use quire_llm::{
    ChatMessage, ChatPrompt, ChoiceDelta, Finish, GenerateRequest, Prompt, SamplingOptions, StopReason,
    TokenLogprob, TokenUsage,
};

use crate::proto;

/// A request in terms of text. Tenant and timeout are the caller's to set.
///
/// # Errors
/// No prompt, or a number outside its type, by field name.
pub fn request(message: proto::GenerateRequest) -> Result<GenerateRequest, RequestError> {
    let mut request = GenerateRequest::new(prompt(message.prompt)?);
    let stopping = message.stopping.unwrap_or_default();
    let response = message.response.unwrap_or_default();
    request.sampling = sampling(message.sampling.unwrap_or_default(), &stopping);
    request.stop = stopping.stop;
    request.stop_token_ids = stopping.stop_token_ids;
    request.ignore_eos = stopping.ignore_eos;
    request.include_stop_str_in_output = stopping.include_stop_str_in_output;
    request.logprobs = response.logprobs;
    request.prompt_logprobs = response.prompt_logprobs;
    request.skip_special_tokens = !response.keep_special_tokens;
    request.return_token_ids = true;
    request.priority = i8::try_from(message.priority).map_err(|_| {
        RequestError::invalid("priority", format!("must be between -128 and 127, got {}", message.priority))
    })?;
    request.cache_salt = (!message.cache_salt.is_empty()).then_some(message.cache_salt);
    Ok(request)
}

fn prompt(prompt: Option<proto::generate_request::Prompt>) -> Result<Prompt, RequestError> {
    use proto::generate_request::Prompt as Wire;
    match prompt {
        Some(Wire::Text(text)) => Ok(Prompt::Text(text)),
        Some(Wire::TokenIds(tokens)) => Ok(Prompt::Tokens(tokens.ids)),
        Some(Wire::Chat(chat)) => {
            let messages = chat.messages.into_iter().map(|m| ChatMessage::new(m.role, m.content)).collect();
            Ok(Prompt::Chat(ChatPrompt::new(messages)))
        }
        None => Err(RequestError::invalid("prompt", "set one of text, token_ids and chat")),
    }
}

fn sampling(sampling: proto::Sampling, stopping: &proto::Stopping) -> SamplingOptions {
    SamplingOptions {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
        n: sampling.n,
        max_tokens: stopping.max_tokens,
        min_tokens: Some(stopping.min_tokens),
        logit_bias: sampling.logit_bias.into_iter().collect(),
    }
}

/// A piece of a choice, or all of it.
pub fn choice(delta: ChoiceDelta) -> proto::Choice {
    proto::Choice {
        index: delta.index,
        text: delta.text,
        token_ids: delta.token_ids,
        logprobs: delta.logprobs.iter().map(token_logprob).collect(),
        finish: delta.finish.map(finish),
    }
}

fn finish(finish: Finish) -> proto::Finish {
    use proto::finish::Stop;
    let reason = match finish.reason {
        FinishReason::Stop => proto::FinishReason::Stop,
        FinishReason::Length => proto::FinishReason::Length,
        FinishReason::Abort | FinishReason::Deadline | FinishReason::Error | FinishReason::Rejected => {
            proto::FinishReason::Cancelled
        }
    };
    let stop = finish.stop_reason.map(|stop| match stop {
        StopReason::Eos(id) | StopReason::Token(id) => Stop::StopTokenId(id),
        StopReason::String(text) => Stop::StopString(text),
    });
    proto::Finish { reason: reason.into(), stop }
}

/// Tokens that were paid for.
pub fn usage(usage: TokenUsage) -> proto::Usage {
    proto::Usage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.cached_tokens,
    }
}

/// Log-probabilities of the prompt: the first token has none and is left out.
pub fn prompt_logprobs(entries: &[Option<TokenLogprob>]) -> Vec<proto::TokenLogprob> {
    entries.iter().flatten().map(token_logprob).collect()
}

fn token_logprob(logprob: &TokenLogprob) -> proto::TokenLogprob {
    let top =
        logprob.top.iter().map(|top| proto::TokenAlternative { token_id: top.id, logprob: top.logprob });
    proto::TokenLogprob {
        token_id: logprob.id,
        logprob: logprob.logprob,
        rank: logprob.rank,
        top: top.collect(),
    }
}
