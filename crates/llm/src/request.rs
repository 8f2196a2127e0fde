//! What a front end asks for, in terms of text.

use std::sync::Arc;
use std::time::Duration;

use quire_core::{AdapterId, TenantId, TokenId};
use serde_json::{Map, Value, json};

/// One request. [`GenerateRequest::new`] gives the defaults; set what the client set.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// How to sample.
    pub sampling: SamplingOptions,
    /// Strings that end a choice; at most [`GenerateRequest::MAX_STOP`] of at most
    /// [`GenerateRequest::MAX_STOP_BYTES`] bytes. They are looked for in text after the first `min_tokens` tokens.
    pub stop: Vec<String>,
    /// Token ids that end a choice, besides the model's own.
    pub stop_token_ids: Vec<TokenId>,
    /// Whether the stop string (or the text of a stop token) is part of the answer's text.
    pub include_stop_str_in_output: bool,
    /// Whether the model's end-of-sequence tokens do not end a choice.
    pub ignore_eos: bool,
    /// Whether special tokens add nothing to the text. True by default.
    pub skip_special_tokens: bool,
    /// Whether the tokenizer adds what the model expects around a text (a BOS token). By default it does for
    /// [`Prompt::Text`] and does not for [`Prompt::Chat`], whose template writes it.
    pub add_special_tokens: Option<bool>,
    /// Whether each choice's text begins with the prompt's; allows `max_tokens` 0.
    pub echo: bool,
    /// `Some(k)`: log-probabilities of the generated tokens and of the k most likely ones at each place.
    pub logprobs: Option<u32>,
    /// `Some(k)`: the same for the prompt's tokens.
    pub prompt_logprobs: Option<u32>,
    /// Whether each token is to be reported as soon as it is there, also while it adds no text yet.
    pub return_token_ids: bool,
    /// The name under which its timeline is kept; without one, none is.
    pub request_id: Option<Arc<str>>,
    /// Who asks.
    pub tenant: TenantId,
    /// Which adapter is put on the model, if any: see [`crate::Llm::adapter`].
    pub adapter: Option<AdapterId>,
    /// The prefix-cache namespace of whoever asks; requests share cached prefixes only if this and `cache_salt` are equal.
    pub cache_namespace: Vec<u8>,
    /// Bounds an answer whose client names no `max_tokens`.
    pub default_max_tokens: Option<u32>,
    /// Higher runs first; 0 is normal.
    pub priority: i8,
    /// Time from now after which the answer is worthless.
    pub timeout: Option<Duration>,
    /// Splits that namespace further.
    pub cache_salt: Option<String>,
    /// Names the conversation that this is a turn of; the next turn's prompt is then hashed from where it differs.
    pub session: Option<String>,
}

impl GenerateRequest {
    /// Stop strings of one request.
    pub const MAX_STOP: usize = 16;
    /// Bytes of one stop string.
    pub const MAX_STOP_BYTES: usize = 256;

    /// How it is to be answered, in one spelling for every front end: a JSON object with its keys in alphabetical order,
    /// as the client chose, without what is to be answered, without who asks, and without how he is to see the answer.
    pub fn canonical_params(&self) -> String {
        let SamplingOptions { temperature, top_p, top_k, min_p, seed, n, max_tokens, min_tokens, .. } =
            self.sampling;
        let mut logit_bias = self.sampling.logit_bias.clone();
        logit_bias.sort_by_key(|&(id, _)| id);
        json!({
            "add_special_tokens": self.add_special_tokens,
            "echo": self.echo,
            "frequency_penalty": self.sampling.frequency_penalty,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "logit_bias": logit_bias,
            "logprobs": self.logprobs,
            "max_tokens": max_tokens,
            "min_p": min_p,
            "min_tokens": min_tokens.unwrap_or(0),
            "n": n.unwrap_or(1),
            "presence_penalty": self.sampling.presence_penalty,
            "prompt_logprobs": self.prompt_logprobs,
            "repetition_penalty": self.sampling.repetition_penalty,
            "seed": seed,
            "skip_special_tokens": self.skip_special_tokens,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        })
        .to_string()
    }

    /// A request with every default.
    pub fn new(prompt: Prompt) -> Self {
        Self {
            prompt,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            skip_special_tokens: true,
            add_special_tokens: None,
            echo: false,
            logprobs: None,
            prompt_logprobs: None,
            return_token_ids: false,
            request_id: None,
            tenant: TenantId::default(),
            adapter: None,
            cache_namespace: Vec::new(),
            default_max_tokens: None,
            priority: 0,
            timeout: None,
            cache_salt: None,
            session: None,
        }
    }
}

/// What to continue.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Text, tokenized here.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<TokenId>),
    /// A conversation, rendered by the model's chat template.
    Chat(ChatPrompt),
}

/// A conversation.
#[derive(Clone, Debug, Default)]
pub struct ChatPrompt {
    /// In order, at least one.
    pub messages: Vec<ChatMessage>,
    /// Whether the prompt ends with the opening of an assistant's turn.
    pub add_generation_prompt: bool,
    /// Whether the answer goes on with the last message. Not together with `add_generation_prompt`.
    pub continue_final_message: bool,
    /// Further variables of the template, for example `enable_thinking`.
    pub chat_template_kwargs: Map<String, Value>,
}

impl ChatPrompt {
    /// A conversation that the assistant is to answer.
    pub fn new(messages: Vec<ChatMessage>) -> Self {
        Self { messages, add_generation_prompt: true, ..Self::default() }
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or whatever else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
    /// The participant's name, if one was given.
    pub name: Option<String>,
}

impl ChatMessage {
    /// A message without a name.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), name: None }
    }
}

/// Sampling parameters as the client gave them. `None` takes the model's default (`generation_config.json`), then the
/// neutral value. Meanings and ranges are those of [`quire_core::SamplingParams`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingOptions {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// `(0, 1]`.
    pub top_p: Option<f32>,
    /// 0 is off.
    pub top_k: Option<u32>,
    /// `[0, 1]`.
    pub min_p: Option<f32>,
    /// `[-2, 2]`.
    pub presence_penalty: Option<f32>,
    /// `[-2, 2]`.
    pub frequency_penalty: Option<f32>,
    /// Above 0.
    pub repetition_penalty: Option<f32>,
    /// Random when absent.
    pub seed: Option<u64>,
    /// Choices; 1 when absent.
    pub n: Option<u32>,
    /// The rest of the context when absent.
    pub max_tokens: Option<u32>,
    /// 0 when absent.
    pub min_tokens: Option<u32>,
    /// Token id and what is added to its logit; in any order, ids distinct.
    pub logit_bias: Vec<(TokenId, f32)>,
}
