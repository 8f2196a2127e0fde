//! `/v1/completions`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use quire_llm::{
    ChoiceDelta, Finish, GenerateRequest, Generation, Llm, Prepared, Prompt, RequestError, TokenId,
};
use quire_tenancy::{Permit, Scope, Standing};
use serde::Serialize;
use serde_json::Value;

use crate::body::JsonFields;
use crate::error::{ApiError, with_standing};
use crate::fields::Fields;
use crate::openai::caller::{Caller, start};
use crate::openai::logprobs::{TextLogprobs, prompt_logprobs};
use crate::openai::prompts::take_prompts;
use crate::openai::sampling::{StreamOptions, take_common, take_stream};
use crate::openai::stream::{self, Answer, Shape};
use crate::openai::unsupported::{IGNORED, UNSUPPORTED};
use crate::openai::usage::Usage;
use crate::openai::{StopReasonJson, stop_reason, take_model, unix_time};
use crate::state::AppState;

/// A body, understood.
struct CompletionRequest {
    model: String,
    prompts: Vec<Prompt>,
    stream: StreamOptions,
    /// The client asked for `prompt_logprobs` itself (`echo` with `logprobs` needs them, too).
    prompt_logprobs: bool,
    /// For every prompt; its own prompt is a placeholder.
    generate: GenerateRequest,
}

impl CompletionRequest {
    fn parse(mut fields: Fields, llm: &Llm, caller: &Caller) -> Result<Self, ApiError> {
        let model = take_model(&mut fields, llm, caller)?;
        let prompts = take_prompts(&mut fields)?;
        let mut generate = GenerateRequest::new(Prompt::Tokens(Vec::new()));
        take_common(&mut fields, &mut generate)?;
        caller.sign(&mut generate, prompts.len());
        generate.adapter = llm.adapter(&model);
        generate.logprobs = fields.take("logprobs")?;
        generate.echo = fields.flag("echo", false)?;
        let stream = take_stream(&mut fields)?;
        let prompt_logprobs = generate.prompt_logprobs.is_some();
        if stream.stream && prompt_logprobs {
            return Err(ApiError::unsupported("prompt_logprobs", "prompt log-probabilities in a stream are"));
        }
        if generate.echo {
            generate.prompt_logprobs = generate.prompt_logprobs.max(generate.logprobs);
        }
        fields.finish(UNSUPPORTED, IGNORED)?;
        Ok(Self { model, prompts, stream, prompt_logprobs, generate })
    }

    /// Turns every prompt into tokens.
    async fn prepare(&mut self, llm: &Llm) -> Result<Vec<Prepared>, ApiError> {
        let prompts = std::mem::take(&mut self.prompts);
        let several = prompts.len() > 1;
        let mut prepared = Vec::with_capacity(prompts.len());
        for (index, prompt) in prompts.into_iter().enumerate() {
            let request = GenerateRequest { prompt, ..self.generate.clone() };
            prepared.push(llm.prepare(request).await.map_err(|error| in_prompt(error, index, several))?);
        }
        Ok(prepared)
    }
}

/// Submits every prompt. If one is refused the others are cancelled.
async fn submit(llm: &Llm, permit: &Permit, prompts: Vec<Prepared>) -> Result<Vec<Generation>, ApiError> {
    let several = prompts.len() > 1;
    let mut generations = Vec::with_capacity(prompts.len());
    for (index, prompt) in prompts.into_iter().enumerate() {
        let generation = start(llm, permit, prompt).await;
        generations.push(generation.map_err(|error| in_prompt(error, index, several))?);
    }
    Ok(generations)
}

/// Names the prompt that is wrong, where there are several.
fn in_prompt(error: RequestError, index: usize, several: bool) -> ApiError {
    let error = ApiError::from(error);
    if several { error.in_element("prompt", index) } else { error }
}

/// From the body to answers in the making.
async fn enter(
    state: &AppState,
    llm: &Llm,
    caller: &Caller,
    fields: Fields,
) -> Result<(CompletionRequest, Vec<Generation>, Standing), ApiError> {
    caller.knock(Scope::Infer, state.tenancy())?;
    let mut request = CompletionRequest::parse(fields, llm, caller)?;
    caller.note_question(&request.model, &request.generate);
    let prompts = request.prepare(llm).await?;
    let permit = caller.admit(state.tenancy(), &prompts).await?;
    let generations = submit(llm, &permit, prompts).await?;
    Ok((request, generations, *permit.standing()))
}

/// Continues texts.
pub(crate) async fn create(
    State(state): State<AppState>,
    caller: Caller,
    JsonFields(fields): JsonFields,
) -> Result<Response, ApiError> {
    let llm = state.llm()?;
    let entered = enter(&state, llm, &caller, fields).await;
    let (request, generations, standing) = entered.inspect_err(|error| caller.note_refusal(llm, error))?;
    let answer = Answer {
        id: format!("cmpl-{}", caller.request_id.0),
        created: unix_time(),
        model: request.model,
        system_fingerprint: state.fingerprint().to_owned(),
        with_logprobs: request.generate.logprobs.is_some(),
        with_token_ids: request.generate.return_token_ids,
    };
    if request.stream.stream {
        let shape = Shape::Text { echo: request.generate.echo };
        let events = stream::Chunks::new(generations, answer, shape, request.stream.include_usage);
        return Ok(with_standing(crate::sse::response(events, state.config().keep_alive), &standing));
    }
    let rendering =
        Rendering { echo: request.generate.echo, prompt_logprobs: request.prompt_logprobs, answer };
    Ok(with_standing(rendering.whole(generations).await?, &standing))
}

/// The log-probabilities of an echoed prompt, at the start of a choice's lists.
pub(crate) fn push_prompt(generation: &Generation, lists: &mut TextLogprobs) {
    for entry in generation.prompt_logprobs() {
        match entry {
            Some(token) => lists.push(token),
            None => lists.push_first(&generation.first_prompt_token_text()),
        }
    }
}

#[derive(Serialize)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Usage,
    system_fingerprint: &'a str,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReasonJson<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

/// How the answer is to look.
struct Rendering {
    answer: Answer,
    echo: bool,
    prompt_logprobs: bool,
}

impl Rendering {
    async fn whole(&self, mut generations: Vec<Generation>) -> Result<Response, ApiError> {
        let mut answers = Vec::with_capacity(generations.len());
        for generation in &mut generations {
            answers.push(generation.collect().await?);
        }
        let mut choices = Vec::new();
        for (generation, answers) in generations.iter().zip(&answers) {
            for choice in answers {
                choices.push(self.render(choices.len() as u32, generation, choice));
            }
        }
        let body = Completion {
            id: &self.answer.id,
            object: "text_completion",
            created: self.answer.created,
            model: &self.answer.model,
            choices,
            usage: Usage::sum(generations.iter().map(Generation::usage)),
            system_fingerprint: &self.answer.system_fingerprint,
        };
        Ok(Json(body).into_response())
    }

    fn render<'a>(&self, index: u32, generation: &'a Generation, choice: &'a ChoiceDelta) -> Choice<'a> {
        let logprobs = self.answer.with_logprobs.then(|| {
            let mut lists = TextLogprobs::default();
            if self.echo {
                push_prompt(generation, &mut lists);
            }
            choice.logprobs.iter().for_each(|token| lists.push(token));
            lists
        });
        let ids = self.answer.with_token_ids;
        Choice {
            index,
            text: &choice.text,
            logprobs,
            finish_reason: choice.finish.as_ref().map(|finish: &Finish| finish.reason.name()),
            stop_reason: choice.finish.as_ref().and_then(stop_reason),
            prompt_logprobs: self.prompt_logprobs.then(|| prompt_logprobs(generation.prompt_logprobs())),
            prompt_token_ids: ids.then_some(generation.prompt_token_ids()),
            token_ids: ids.then_some(&choice.token_ids),
        }
    }
}
