//! A model that answers: tokenizer, template, defaults and engine in one handle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use quire_core::metric_names::TOKENIZE_SECONDS;
use quire_core::{AdapterId, CacheSalt, Meter, Micros, RequestError, SamplingParams, TokenId};
use quire_engine::{EngineClient, Origin, RequestSpec};
use quire_tokenizer::{ChatInput, ChatTemplate, TemplateError, Tokenizer};
use serde_json::{Value, json};

use crate::choice::Rules;
use crate::generation::Generation;
use crate::params::{self, GenerationDefaults, SeedSource};
use crate::pool::Pool;
use crate::request::{ChatMessage, ChatPrompt, GenerateRequest, Prompt};

/// Names of template variables that a request may not set through `chat_template_kwargs`.
const RESERVED_KWARGS: [&str; 9] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
    "bos_token",
    "eos_token",
];

/// Token ids of a prompt that are hashed on the spot, and taken over as they are: 2.5 us for a thousand. That is less than
/// reading them from the request took, which nobody does elsewhere either; the way to another thread and back costs some
/// tens of microseconds and two context switches.
const INLINE_TOKENS: usize = 1 << 16;

/// What an [`Llm`] is made of.
pub struct LlmConfig {
    /// The names under which the model is served, the main one first; at least one.
    pub served_model_names: Vec<String>,
    /// The names of the adapters that the engine's model was loaded with, by [`AdapterId`]; none of them is one of those.
    pub adapters: Vec<String>,
    /// The engine that runs it.
    pub engine: EngineClient,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template; without one, conversations are refused.
    pub chat_template: Option<ChatTemplate>,
    /// Its sampling defaults.
    pub defaults: GenerationDefaults,
    /// Requests that may be tokenized at once.
    pub tokenizer_threads: usize,
}

/// A handle to one served model; cheap to clone.
#[derive(Clone)]
pub struct Llm {
    inner: Arc<Inner>,
}

struct Inner {
    /// The model's own, then the adapters'.
    names: Vec<String>,
    first_adapter: usize,
    created: u64,
    engine: EngineClient,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    defaults: GenerationDefaults,
    eos_token_ids: Arc<[TokenId]>,
    seeds: SeedSource,
    pool: Pool,
    /// Times that the prefix cache was reset: part of every namespace.
    cache_epoch: AtomicU64,
}

impl Llm {
    /// Puts the parts together.
    pub fn new(config: LlmConfig) -> Self {
        let limits = config.engine.limits();
        let mut defaults = config.defaults;
        defaults.eos_token_ids.extend(config.tokenizer.eos_token_ids());
        // A tokenizer may know ids that this checkpoint's vocabulary does not have.
        defaults.eos_token_ids.retain(|&id| id < limits.vocab_size);
        defaults.eos_token_ids.sort_unstable();
        defaults.eos_token_ids.dedup();
        let max_waiting = limits.max_num_seqs.saturating_add(limits.max_queued_requests);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let inner = Inner {
            first_adapter: config.served_model_names.len(),
            names: [config.served_model_names, config.adapters].concat(),
            created: now.as_secs(),
            tokenizer: config.tokenizer,
            chat_template: config.chat_template,
            eos_token_ids: defaults.eos_token_ids.as_slice().into(),
            defaults,
            seeds: SeedSource::default(),
            pool: Pool::new(config.tokenizer_threads, max_waiting),
            engine: config.engine,
            cache_epoch: AtomicU64::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The names under which the model is served, the main one first, then those of its adapters.
    pub fn names(&self) -> &[String] {
        &self.inner.names
    }

    /// The main name, as answers report it.
    pub fn name(&self) -> &str {
        self.inner.names.first().map_or("", String::as_str)
    }

    /// Whether requests for `model` are for this one.
    pub fn serves(&self, model: &str) -> bool {
        self.inner.names.iter().any(|name| name == model)
    }

    /// Which adapter a name means; `None`: the model as it is.
    pub fn adapter(&self, name: &str) -> Option<AdapterId> {
        let adapters = &self.inner.names[self.inner.first_adapter..];
        adapters.iter().position(|adapter| adapter == name).map(|id| AdapterId(id as u32))
    }

    /// When the model was loaded, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.inner.created
    }

    /// The engine behind it: limits, state, queue lengths, drain.
    pub fn engine(&self) -> &EngineClient {
        &self.inner.engine
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// Whether it can answer conversations.
    pub fn has_chat_template(&self) -> bool {
        self.inner.chat_template.is_some()
    }

    /// Tokens of prompt plus answer that fit.
    pub fn max_model_len(&self) -> u32 {
        self.inner.engine.limits().max_model_len
    }

    /// Token ids are below this.
    pub fn vocab_size(&self) -> u32 {
        self.inner.engine.limits().vocab_size
    }

    /// Token ids that end an answer.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.inner.eos_token_ids
    }

    /// Prepares the request in the pool and submits it: [`Llm::prepare`] and [`Llm::start`] in one, for callers who ask
    /// nobody in between.
    ///
    /// # Errors
    /// Whatever is wrong with the request, and [`RequestError::Overloaded`], [`RequestError::Unavailable`] or
    /// [`RequestError::DeadlineExceeded`].
    pub async fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        let prepared = self.prepare(request).await?;
        self.start(prepared, None).await
    }

    /// Turns a request into tokens and parameters, in the pool if that is work. What it will cost is known then.
    ///
    /// # Errors
    /// Whatever is wrong with the request, [`RequestError::Overloaded`] and [`RequestError::DeadlineExceeded`].
    pub async fn prepare(&self, request: GenerateRequest) -> Result<Prepared, RequestError> {
        let deadline = request.timeout.map(|timeout| Instant::now() + timeout);
        let received = self.inner.engine.now();
        // Nothing to tokenize.
        if matches!(&request.prompt, Prompt::Tokens(ids) if ids.len() <= INLINE_TOKENS && !request.echo) {
            return self.make_ready(request, deadline, received);
        }
        let llm = self.clone();
        self.within(deadline, move || llm.make_ready(request, deadline, received)).await
    }

    /// Submits what was prepared. The answer feeds `meter`, which is dropped with it, or at once if it is refused.
    ///
    /// # Errors
    /// A parameter is out of range; [`RequestError::Overloaded`], [`RequestError::Unavailable`] or
    /// [`RequestError::DeadlineExceeded`].
    pub async fn start(
        &self,
        prepared: Prepared,
        meter: Option<Box<dyn Meter>>,
    ) -> Result<Generation, RequestError> {
        let mut prepared = prepared;
        if let Some(origin) = &mut prepared.origin {
            origin.admitted = self.inner.engine.now();
        }
        // Submitting hashes the prompt; only for a long one is another thread worth the way there.
        if prepared.token_ids.len() <= INLINE_TOKENS {
            return self.submit(prepared, meter);
        }
        let llm = self.clone();
        self.within(prepared.deadline, move || llm.submit(prepared, meter)).await
    }

    /// Runs `job` in the pool, and waits for it until the deadline.
    async fn within<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        job: impl FnOnce() -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        let outcome = self.inner.pool.run(job);
        match deadline {
            None => outcome.await?,
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), outcome).await {
                Ok(outcome) => outcome?,
                Err(_) => Err(RequestError::DeadlineExceeded),
            },
        }
    }

    /// The prompt's token ids, as [`Llm::generate`] would make them.
    ///
    /// # Errors
    /// As [`Llm::generate`], for the prompt.
    pub async fn tokenize(
        &self,
        prompt: Prompt,
        add_special_tokens: Option<bool>,
    ) -> Result<Vec<TokenId>, RequestError> {
        let llm = self.clone();
        self.inner.pool.run(move || Ok(llm.encode(prompt, add_special_tokens)?.token_ids)).await?
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// An id outside the vocabulary; [`RequestError::Overloaded`].
    pub async fn detokenize(
        &self,
        token_ids: Vec<TokenId>,
        skip_special_tokens: bool,
    ) -> Result<String, RequestError> {
        let vocab_size = self.vocab_size();
        if let Some(id) = token_ids.iter().find(|&&id| id >= vocab_size) {
            let message = format!("token id {id} is outside the vocabulary of {vocab_size} tokens");
            return Err(RequestError::invalid("tokens", message));
        }
        let llm = self.clone();
        self.inner.pool.run(move || llm.tokenizer().decode(&token_ids, skip_special_tokens)).await
    }

    /// The prompt text of a conversation.
    ///
    /// # Errors
    /// The model has no template, or the template refuses the conversation.
    pub async fn render_chat(&self, chat: ChatPrompt) -> Result<String, RequestError> {
        let llm = self.clone();
        self.inner.pool.run(move || llm.render(chat)).await?
    }

    fn make_ready(
        &self,
        request: GenerateRequest,
        deadline: Option<Instant>,
        received: Micros,
    ) -> Result<Prepared, RequestError> {
        let inner = &self.inner;
        params::validate_stop(&request.stop)?;
        let mut request = request;
        let prompt = std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()));
        let started = Instant::now();
        let encoded = self.encode(prompt, request.add_special_tokens)?;
        metrics::histogram!(TOKENIZE_SECONDS.name).record(started.elapsed());
        let limits = inner.engine.limits();
        let params =
            params::resolve(&request, &inner.defaults, encoded.token_ids.len(), limits, &inner.seeds)?;
        // Checked once more with the prompt when it is submitted; here so that nobody reserves for nonsense.
        params.validate(limits)?;
        let token_ids: Arc<[TokenId]> = encoded.token_ids.into();
        let prompt_text = request.echo.then(|| match encoded.text {
            Some(text) => text,
            None => inner.tokenizer.decode(&token_ids, request.skip_special_tokens),
        });
        let (params, now) = (Arc::new(params), inner.engine.now());
        let origin =
            request.request_id.take().map(|name| Origin { name, received, prepared: now, admitted: now });
        Ok(Prepared { request, token_ids, params, prompt_text, deadline, origin })
    }

    fn submit(&self, prepared: Prepared, meter: Option<Box<dyn Meter>>) -> Result<Generation, RequestError> {
        let inner = &self.inner;
        let Prepared { request, token_ids, params, prompt_text, deadline, origin } = prepared;
        let timeout = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if timeout.is_some_and(|left| left.is_zero()) {
            return Err(RequestError::DeadlineExceeded);
        }
        let spec = RequestSpec {
            prompt: Arc::clone(&token_ids),
            params: Arc::clone(&params),
            tenant: request.tenant,
            priority: request.priority,
            session: request.session.as_ref().map(|session| {
                let CacheSalt(name) = inner.engine.hasher().salt(session.as_bytes());
                name as u64
            }),
            cache_salt: Some(self.salt(&request)),
            adapter: request.adapter,
            timeout,
        };
        let handle = inner.engine.submit_from(spec, origin)?;
        let own = inner.eos_token_ids[..] == params.stop_token_ids[..];
        let rules = Rules {
            tokenizer: inner.tokenizer.clone(),
            stop_token_ids: if own {
                Arc::clone(&inner.eos_token_ids)
            } else {
                params.stop_token_ids.as_slice().into()
            },
            min_tokens: params.min_tokens,
            params,
            stop: request.stop,
            include_stop: request.include_stop_str_in_output,
            skip_special: request.skip_special_tokens,
            eos_token_ids: Arc::clone(&inner.eos_token_ids),
            every_token: request.return_token_ids,
            prompt_only: request.echo && request.sampling.max_tokens == Some(0),
        };
        Ok(Generation::new(handle, rules, token_ids, prompt_text.as_deref(), meter))
    }

    /// From now on, no request finds what was computed before. The memory stays taken until somebody needs it.
    pub fn reset_cache(&self) {
        self.inner.cache_epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// The namespace of whoever asks, since the last reset, split further by the client's salt. The length sets the two
    /// apart.
    fn salt(&self, request: &GenerateRequest) -> CacheSalt {
        let mut namespace = self.inner.cache_epoch.load(Ordering::Relaxed).to_le_bytes().to_vec();
        namespace.extend((request.cache_namespace.len() as u64).to_le_bytes());
        namespace.extend(&request.cache_namespace);
        if let Some(salt) = &request.cache_salt {
            namespace.push(1);
            namespace.extend(salt.as_bytes());
        }
        self.inner.engine.hasher().salt(&namespace)
    }

    fn encode(&self, prompt: Prompt, add_special_tokens: Option<bool>) -> Result<Encoded, RequestError> {
        let (text, add_special) = match prompt {
            Prompt::Tokens(token_ids) => return Ok(Encoded { token_ids, text: None }),
            Prompt::Text(text) => (text, true),
            Prompt::Chat(chat) => (self.render(chat)?, false),
        };
        let token_ids = self
            .inner
            .tokenizer
            .encode(&text, add_special_tokens.unwrap_or(add_special))
            .map_err(|error| RequestError::invalid("prompt", error.to_string()))?;
        Ok(Encoded { token_ids, text: Some(text) })
    }

    fn render(&self, chat: ChatPrompt) -> Result<String, RequestError> {
        let invalid = |message: &str| RequestError::invalid("messages", message);
        if chat.messages.is_empty() {
            return Err(invalid("must hold at least one message"));
        }
        if let Some(name) = RESERVED_KWARGS.iter().find(|name| chat.chat_template_kwargs.contains_key(**name))
        {
            return Err(RequestError::invalid(
                "chat_template_kwargs",
                format!("`{name}` cannot be set here"),
            ));
        }
        let template = self.inner.chat_template.as_ref().ok_or_else(|| {
            invalid("this model has no chat template; use a plain prompt, or start the server with --chat-template")
        })?;
        let input = ChatInput {
            messages: chat.messages.into_iter().map(message_value).collect(),
            add_generation_prompt: chat.add_generation_prompt,
            continue_final_message: chat.continue_final_message,
            kwargs: chat.chat_template_kwargs,
            ..ChatInput::default()
        };
        template.render(&input, self.inner.tokenizer.special_tokens()).map_err(|error| match error {
            TemplateError::Continue(message) => RequestError::invalid("continue_final_message", message),
            error => invalid(&error.to_string()),
        })
    }
}

/// A request in tokens, not yet submitted.
pub struct Prepared {
    request: GenerateRequest,
    token_ids: Arc<[TokenId]>,
    params: Arc<SamplingParams>,
    /// What `echo` repeats.
    prompt_text: Option<String>,
    deadline: Option<Instant>,
    /// Where its timeline begins.
    origin: Option<Origin>,
}

impl Prepared {
    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> u32 {
        u32::try_from(self.token_ids.len()).unwrap_or(u32::MAX)
    }

    /// Choices, each of at most [`Prepared::max_tokens`].
    pub fn n(&self) -> u32 {
        self.params.n
    }

    /// Tokens of one choice at most.
    pub fn max_tokens(&self) -> u32 {
        self.params.max_tokens
    }

    /// Higher runs first.
    pub fn priority(&self) -> i8 {
        self.request.priority
    }

    /// The same with another priority.
    pub fn with_priority(mut self, priority: i8) -> Self {
        self.request.priority = priority;
        self
    }
}

/// A prompt as the engine takes it, and the text it was made from, if there was one.
struct Encoded {
    token_ids: Vec<TokenId>,
    text: Option<String>,
}

fn message_value(message: ChatMessage) -> Value {
    let mut value = json!({ "role": message.role, "content": message.content });
    if let Some(name) = message.name {
        value["name"] = name.into();
    }
    value
}
