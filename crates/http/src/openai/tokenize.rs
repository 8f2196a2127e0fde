//! `/tokenize` and `/detokenize`, in vLLM's shape.

use axum::Json;
use axum::extract::State;
use quire_llm::{ChatPrompt, Prompt, TokenId};
use quire_tenancy::{Permit, Scope};
use serde::Serialize;
use serde_json::Value;

use crate::body::JsonFields;
use crate::error::ApiError;
use crate::fields::{Fields, kind_of};
use crate::openai::caller::Caller;
use crate::openai::messages::take_messages;
use crate::openai::prompts::token_ids;
use crate::openai::take_model;
use crate::state::AppState;

#[derive(Serialize)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize)]
pub(crate) struct Detokenized {
    prompt: String,
}

/// The token ids of a text (`prompt`) or of a conversation (`messages`).
pub(crate) async fn tokenize(
    State(state): State<AppState>,
    caller: Caller,
    JsonFields(mut fields): JsonFields,
) -> Result<Json<Tokenized>, ApiError> {
    let llm = state.llm()?;
    let _permit = enter(&state, &caller).await?;
    take_model(&mut fields, llm, &caller)?;
    let text: Option<String> = fields.take("prompt")?;
    let (prompt, param) = match text {
        Some(text) => (Prompt::Text(text), "prompt"),
        None => (Prompt::Chat(take_chat(&mut fields)?), "messages"),
    };
    let add_special_tokens = fields.take("add_special_tokens")?;
    let return_token_strs = fields.flag("return_token_strs", false)?;
    fields.finish(&[], &[])?;
    let tokens = llm.tokenize(prompt, add_special_tokens).await;
    let tokens = tokens.map_err(|error| ApiError::from(error).with_param("prompt", param))?;
    let spell = |&id: &TokenId| llm.tokenizer().id_to_token(id).unwrap_or_default();
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: llm.max_model_len(),
        token_strs: return_token_strs.then(|| tokens.iter().map(spell).collect()),
        tokens,
    }))
}

/// These calls count as requests, and as nothing else.
async fn enter(state: &AppState, caller: &Caller) -> Result<Permit, ApiError> {
    caller.access.require(Scope::Tokenize)?;
    caller.admit(state.tenancy(), &[]).await
}

/// Takes a conversation and how it is rendered.
pub(crate) fn take_chat(fields: &mut Fields) -> Result<ChatPrompt, ApiError> {
    let messages = take_messages(fields)?;
    let continue_final_message = fields.flag("continue_final_message", false)?;
    let add_generation_prompt = fields.take("add_generation_prompt")?;
    if continue_final_message && add_generation_prompt == Some(true) {
        let message = "cannot be combined with `add_generation_prompt: true`";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    Ok(ChatPrompt {
        messages,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        chat_template_kwargs: fields.take("chat_template_kwargs")?.unwrap_or_default(),
    })
}

/// The text of token ids, special tokens written out.
pub(crate) async fn detokenize(
    State(state): State<AppState>,
    caller: Caller,
    JsonFields(mut fields): JsonFields,
) -> Result<Json<Detokenized>, ApiError> {
    let llm = state.llm()?;
    let _permit = enter(&state, &caller).await?;
    take_model(&mut fields, llm, &caller)?;
    let tokens = match fields.take_value("tokens") {
        Some(Value::Array(values)) => token_ids("tokens", &values)?,
        Some(other) => {
            return Err(ApiError::invalid("tokens", format!("must be a list, got {}", kind_of(&other))));
        }
        None => return Err(ApiError::invalid("tokens", "is required")),
    };
    let skip_special_tokens = fields.flag("skip_special_tokens", false)?;
    fields.finish(&[], &[])?;
    Ok(Json(Detokenized { prompt: llm.detokenize(tokens, skip_special_tokens).await? }))
}
