//! A server without a socket, and what to ask it.

use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use quire_core::{
    AdapterId, BlockHasher, ExecError, Executor, ExecutorLimits, LateInputs, Limits, ModelRunnerOutput,
    SchedulerOutput, StepId,
};
use quire_engine::{Engine, EngineConfig};
use quire_http::{AppState, HttpConfig, router};
use quire_llm::{GenerationDefaults, Llm, LlmConfig};
use quire_scheduler::SchedulerConfig;
use quire_sim::{MockExecutor, MockTiming};
use quire_tenancy::{AuditLog, Keys, Tenancy};
use quire_tokenizer::{ChatTemplate, Tokenizer};
use serde_json::Value;
use tower::ServiceExt;

pub const MODEL: &str = "quire-demo";
pub const MAX_MODEL_LEN: u32 = 512;
pub const VOCAB_SIZE: u32 = 2048;

const TOKENIZER_CONFIG: &[u8] = quire_demo_model::TOKENIZER_CONFIG_JSON.as_bytes();

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    Tokenizer::from_parts(quire_demo_model::TOKENIZER_JSON.as_bytes(), Some(TOKENIZER_CONFIG)).unwrap()
});

/// What a test changes.
pub struct Setup {
    pub keys: &'static [&'static str],
    /// Time of one engine step.
    pub step: Duration,
    pub max_num_seqs: u32,
    pub max_queued_requests: u32,
    pub num_blocks: u32,
    pub keep_alive: Duration,
    /// The device fails at this step.
    pub fails_at: Option<u64>,
    pub metrics_without_key: bool,
    /// Their names.
    pub adapters: &'static [&'static str],
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            keys: &[],
            step: Duration::ZERO,
            max_num_seqs: 16,
            max_queued_requests: 256,
            num_blocks: 1024,
            keep_alive: Duration::from_secs(10),
            fails_at: None,
            metrics_without_key: false,
            adapters: &[],
        }
    }
}

pub struct Server {
    pub state: AppState,
    pub llm: Llm,
    pub app: Router,
    /// Those of the sequences that entered the batch, in order.
    pub seen_adapters: SeenAdapters,
    _engine: Engine,
}

/// An answer with its body.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.body);
        self.json()
    }

    /// The JSON of every event; the stream must end with `[DONE]`.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.body);
        assert_eq!(self.headers["content-type"], "text/event-stream; charset=utf-8");
        let mut events = data_of(&self.body);
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// The `data:` of a stream's events; comments are left out.
pub fn data_of(body: &str) -> Vec<String> {
    assert!(body.is_empty() || body.ends_with("\n\n"), "a cut event: {body:?}");
    let events = body.split("\n\n").filter(|event| !event.is_empty() && !event.starts_with(':'));
    events.map(|event| event.strip_prefix("data: ").expect("only data events").to_owned()).collect()
}

pub type SeenAdapters = Arc<Mutex<Vec<Option<AdapterId>>>>;

/// A mock that may fail.
struct TestExecutor {
    mock: MockExecutor,
    seen_adapters: SeenAdapters,
    fails_at: Option<u64>,
    steps: u64,
}

impl Executor for TestExecutor {
    fn limits(&self) -> ExecutorLimits {
        self.mock.limits()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        self.steps += 1;
        if Some(self.steps) == self.fails_at {
            return Err(ExecError { device: "test".into(), message: "failed on purpose".into() });
        }
        self.seen_adapters.lock().unwrap().extend(plan.new.iter().map(|new| new.adapter));
        self.mock.submit(plan)
    }

    fn sample(&mut self, step: StepId, late: &LateInputs) -> Result<(), ExecError> {
        self.mock.sample(step, late)
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        self.mock.collect(step, out)
    }
}

fn start_engine(setup: &Setup, seen_adapters: SeenAdapters) -> Engine {
    let limits = ExecutorLimits {
        block_size: 16,
        num_blocks: setup.num_blocks,
        max_num_seqs: setup.max_num_seqs,
        max_num_batched_tokens: 256,
        max_model_len: MAX_MODEL_LEN,
        vocab_size: VOCAB_SIZE,
        max_steps_in_flight: 1,
        kv_groups: vec![None],
    };
    let hasher = BlockHasher::new((1, 2), limits.block_size);
    let timing = MockTiming { fixed: setup.step, per_token: Duration::ZERO };
    let mock = MockExecutor::new(limits.clone(), timing);
    let config = EngineConfig {
        limits: Limits {
            vocab_size: limits.vocab_size,
            max_model_len: limits.max_model_len,
            max_num_seqs: limits.max_num_seqs,
            max_num_batched_tokens: limits.max_num_batched_tokens,
            max_queued_requests: setup.max_queued_requests,
            block_size: limits.block_size,
            num_blocks: limits.num_blocks,
            ..Limits::default()
        },
        scheduler: SchedulerConfig::new(limits, hasher),
        hasher,
        model_name: MODEL.into(),
    };
    let executor = TestExecutor { mock, seen_adapters, fails_at: setup.fails_at, steps: 0 };
    Engine::start(config, Box::new(executor), &tokio::runtime::Handle::current()).unwrap()
}

/// The state before a model is there.
pub fn loading(setup: &Setup) -> AppState {
    loading_with(setup, Keys::new(setup.keys).unwrap().into(), AuditLog::default())
}

fn loading_with(setup: &Setup, tenancy: Tenancy, audit: AuditLog) -> AppState {
    let metrics = Arc::new(|| "quire_up 1\n".to_owned());
    let mut config = HttpConfig::new(tenancy, metrics, "1.2.3");
    config.audit = audit;
    config.keep_alive = setup.keep_alive;
    config.metrics_without_key = setup.metrics_without_key;
    AppState::new(config)
}

impl Server {
    pub fn start(setup: &Setup) -> Self {
        Self::with(setup, Keys::new(setup.keys).unwrap().into())
    }

    /// With tenants of its own instead of the setup's keys.
    pub fn with(setup: &Setup, tenancy: Tenancy) -> Self {
        Self::audited(setup, tenancy, AuditLog::default())
    }

    /// With an audit log, too.
    pub fn audited(setup: &Setup, tenancy: Tenancy, audit: AuditLog) -> Self {
        let seen_adapters = SeenAdapters::default();
        let engine = start_engine(setup, seen_adapters.clone());
        let llm = Llm::new(LlmConfig {
            adapters: setup.adapters.iter().map(|&name| name.into()).collect(),
            served_model_names: vec![MODEL.into(), "org/alias".into()],
            engine: engine.client(),
            tokenizer: TOKENIZER.clone(),
            chat_template: Some(ChatTemplate::from_config(TOKENIZER_CONFIG).unwrap().unwrap().unwrap()),
            defaults: GenerationDefaults { eos_token_ids: vec![0], ..GenerationDefaults::default() },
            tokenizer_threads: 2,
        });
        let state = loading_with(setup, tenancy, audit);
        state.lifecycle().ready(llm.clone());
        Self { app: router(state.clone()), state, llm, seen_adapters, _engine: engine }
    }

    pub async fn get(&self, path: &str) -> Answer {
        ask(&self.app, Method::GET, path, &[], "").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, &[], body).await
    }

    pub async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let mut all = vec![("content-type", "application/json")];
        all.extend_from_slice(headers);
        ask(&self.app, Method::POST, path, &all, &body.to_string()).await
    }

    pub async fn complete(&self, body: Value) -> Answer {
        self.post("/v1/completions", &body).await
    }

    pub async fn chat(&self, body: Value) -> Answer {
        self.post("/v1/chat/completions", &body).await
    }

    /// Waits until the engine holds nothing.
    pub async fn wait_idle(&self) {
        tokio::time::timeout(Duration::from_secs(20), self.llm.engine().idle()).await.expect("requests end");
    }
}

/// One request through the router.
pub async fn ask(app: &Router, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::from(body.to_owned())).unwrap();
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    Answer { status: parts.status, headers: parts.headers, body: String::from_utf8(bytes.into()).unwrap() }
}

/// Polls a condition until it holds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it never happened: {what}");
}
