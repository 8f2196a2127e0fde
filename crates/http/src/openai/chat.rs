//! `/v1/chat/completions`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use quire_llm::{ChoiceDelta, Finish, GenerateRequest, Generation, Llm, Prompt, TokenId};
use quire_tenancy::{Scope, Standing};
use serde::Serialize;
use serde_json::Value;

use crate::body::JsonFields;
use crate::error::{ApiError, with_standing};
use crate::fields::Fields;
use crate::openai::caller::{Caller, start};
use crate::openai::logprobs::{ChatLogprobs, prompt_logprobs};
use crate::openai::sampling::{StreamOptions, take_common, take_stream};
use crate::openai::stream::{self, Answer, Shape};
use crate::openai::tokenize::take_chat;
use crate::openai::unsupported::{IGNORED, UNSUPPORTED};
use crate::openai::usage::Usage;
use crate::openai::{StopReasonJson, stop_reason, take_model, unix_time};
use crate::state::AppState;

/// A body, understood.
struct ChatCompletionRequest {
    model: String,
    stream: StreamOptions,
    generate: GenerateRequest,
}

impl ChatCompletionRequest {
    fn parse(mut fields: Fields, llm: &Llm, caller: &Caller) -> Result<Self, ApiError> {
        let model = take_model(&mut fields, llm, caller)?;
        let chat = take_chat(&mut fields)?;
        let mut generate = GenerateRequest::new(Prompt::Chat(chat));
        take_common(&mut fields, &mut generate)?;
        caller.sign(&mut generate, 1);
        generate.adapter = llm.adapter(&model);
        generate.logprobs = take_logprobs(&mut fields)?;
        let stream = take_stream(&mut fields)?;
        if stream.stream && generate.prompt_logprobs.is_some() {
            return Err(ApiError::unsupported("prompt_logprobs", "prompt log-probabilities in a stream are"));
        }
        if fields.flag("echo", false)? {
            return Err(ApiError::unsupported("echo", "repeating the conversation in the answer is"));
        }
        drop_unused_tools(&mut fields);
        fields.finish(UNSUPPORTED, IGNORED)?;
        Ok(Self { model, stream, generate })
    }
}

/// `logprobs` says whether, `top_logprobs` how many alternatives.
fn take_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.flag("logprobs", false)?;
    match fields.take("top_logprobs")? {
        Some(top) if wanted => Ok(Some(top)),
        Some(0) | None => Ok(wanted.then_some(0)),
        Some(_) => Err(ApiError::invalid("top_logprobs", "is only allowed together with `logprobs: true`")),
    }
}

/// With `tool_choice: "none"` no tool may be called, so tools change nothing.
fn drop_unused_tools(fields: &mut Fields) {
    for (choice, tools) in [("tool_choice", "tools"), ("function_call", "functions")] {
        if fields.is(choice, &Value::from("none")) {
            fields.take_value(tools);
        }
    }
}

/// From the body to an answer in the making, and how to render it.
async fn enter(
    state: &AppState,
    llm: &Llm,
    caller: &Caller,
    fields: Fields,
) -> Result<(Answer, StreamOptions, Generation, Standing), ApiError> {
    caller.knock(Scope::Infer, state.tenancy())?;
    let request = ChatCompletionRequest::parse(fields, llm, caller)?;
    caller.note_question(&request.model, &request.generate);
    let answer = Answer {
        id: format!("chatcmpl-{}", caller.request_id.0),
        created: unix_time(),
        model: request.model,
        system_fingerprint: state.fingerprint().to_owned(),
        with_logprobs: request.generate.logprobs.is_some(),
        with_token_ids: request.generate.return_token_ids,
    };
    let prompt = llm.prepare(request.generate).await.map_err(chat_error)?;
    let permit = caller.admit(state.tenancy(), std::slice::from_ref(&prompt)).await.map_err(chat_error)?;
    let generation = start(llm, &permit, prompt).await.map_err(chat_error)?;
    Ok((answer, request.stream, generation, *permit.standing()))
}

/// Answers a conversation.
pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    JsonFields(fields): JsonFields,
) -> Result<Response, ApiError> {
    let llm = state.llm()?;
    let entered = enter(&state, llm, &caller, fields).await;
    let (answer, options, generation, standing) =
        entered.inspect_err(|error| caller.note_refusal(llm, error))?;
    let response = if options.stream {
        let events = stream::Chunks::new(vec![generation], answer, Shape::Chat, options.include_usage);
        crate::sse::response(events, state.config().keep_alive)
    } else {
        whole(answer, generation).await?
    };
    Ok(with_standing(response, &standing))
}

/// The engine's names for what a chat client calls otherwise.
fn chat_error(error: impl Into<ApiError>) -> ApiError {
    error.into().with_param("prompt", "messages").with_param("logprobs", "top_logprobs")
}

#[derive(Serialize)]
struct ChatCompletion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
    system_fingerprint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReasonJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

async fn whole(answer: Answer, mut generation: Generation) -> Result<Response, ApiError> {
    let choices = generation.collect().await.map_err(chat_error)?;
    let prompt = generation.prompt_logprobs();
    let body = ChatCompletion {
        id: &answer.id,
        object: "chat.completion",
        created: answer.created,
        model: &answer.model,
        choices: choices.iter().map(|choice| render(&answer, choice)).collect(),
        usage: Usage::sum([generation.usage()]),
        system_fingerprint: &answer.system_fingerprint,
        prompt_logprobs: (!prompt.is_empty()).then(|| prompt_logprobs(prompt)),
        prompt_token_ids: answer.with_token_ids.then_some(generation.prompt_token_ids()),
    };
    Ok(Json(body).into_response())
}

fn render<'a>(answer: &Answer, choice: &'a ChoiceDelta) -> Choice<'a> {
    Choice {
        index: choice.index,
        message: Message { role: "assistant", content: &choice.text, refusal: None },
        logprobs: answer.with_logprobs.then(|| ChatLogprobs::new(&choice.logprobs)),
        finish_reason: choice.finish.as_ref().map(|finish: &Finish| finish.reason.name()),
        stop_reason: choice.finish.as_ref().and_then(stop_reason),
        token_ids: answer.with_token_ids.then_some(&choice.token_ids),
    }
}
