//! OpenAI's API, with the extensions that vLLM's users know.
//!
//! Reading order: `chat` and `completions` (a body to an answer), `sampling` (fields both share), `unsupported`,
//! `stream` (the same answer in pieces), `logprobs`, `usage`; `models` and `tokenize`.

pub(crate) mod caller;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod logprobs;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod prompts;
pub(crate) mod sampling;
pub(crate) mod stream;
pub(crate) mod tokenize;
pub(crate) mod unsupported;
pub(crate) mod usage;

use std::time::{SystemTime, UNIX_EPOCH};

use quire_llm::{Finish, Llm, StopReason};
use serde::Serialize;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::openai::caller::Caller;

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The model a body names, as the answer will name it; the first one when it names none. A name that is hidden from the
/// caller does not exist for him.
pub(crate) fn take_model(fields: &mut Fields, llm: &Llm, caller: &Caller) -> Result<String, ApiError> {
    let names = caller.models(llm);
    match fields.take::<String>("model")? {
        Some(model) if names.contains(&model.as_str()) => Ok(model),
        Some(model) => Err(ApiError::model_not_found(&model, &names)),
        None => names.first().map(|&name| name.to_owned()).ok_or_else(|| ApiError::model_not_found("", &[])),
    }
}

/// `stop_reason`: a stop string or a stop token of the request; `null` for everything else, the model's own end too.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum StopReasonJson<'a> {
    String(&'a str),
    Token(u32),
}

pub(crate) fn stop_reason(finish: &Finish) -> Option<StopReasonJson<'_>> {
    match finish.stop_reason.as_ref()? {
        StopReason::String(text) => Some(StopReasonJson::String(text)),
        StopReason::Token(id) => Some(StopReasonJson::Token(*id)),
        StopReason::Eos(_) => None,
    }
}
