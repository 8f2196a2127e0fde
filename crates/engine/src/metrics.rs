//! What the engine reports about itself. All handles are looked up once, at start; every series exists from then on.
//!
//! The engine thread records nothing: it fills a `StepStats`, and the dispatcher records it and the step's events. What
//! must be remembered of a live request lies in its mailbox. The clock of all durations is the engine's.

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use quire_core::metric_names::{self as names, ENGINE, FIRST_ENGINE, Family, MODEL_NAME};
use quire_core::{FinishReason, Micros, Request, Usage};
use quire_scheduler::{SchedulerStats, SeqEvent, SeqEventKind};
use smallvec::SmallVec;

use crate::core::StepStats;
use crate::host_metrics::HostMetrics;

/// Values of the label `state` of `quire_engine_state`, in the order of an engine's life.
pub const ENGINE_STATES: [&str; 4] = ["loading", "ready", "draining", "dead"];

/// Why a request was refused before it was queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The queue is full.
    QueueFull,
    /// The engine drains or is dead.
    Unavailable,
}

/// Labels of one engine's series.
#[derive(Clone, Debug)]
pub(crate) struct Labels {
    model_name: String,
}

impl Labels {
    fn with(&self, more: &[(&'static str, String)]) -> Vec<(&'static str, String)> {
        let own = [(MODEL_NAME, self.model_name.clone()), (ENGINE, FIRST_ENGINE.to_owned())];
        own.into_iter().chain(more.iter().cloned()).collect()
    }

    pub(crate) fn counter(&self, family: Family, more: &[(&'static str, String)]) -> Counter {
        let handle = counter!(family.name, &self.with(more));
        handle.increment(0);
        handle
    }

    /// Makes a counter appear with 0.
    fn register(&self, family: Family, more: &[(&'static str, String)]) {
        drop(self.counter(family, more));
    }

    pub(crate) fn gauge(&self, family: Family, more: &[(&'static str, String)]) -> Gauge {
        gauge!(family.name, &self.with(more))
    }

    fn histogram(&self, family: Family, more: &[(&'static str, String)]) -> Histogram {
        histogram!(family.name, &self.with(more))
    }
}

/// Handles of one engine.
pub struct EngineMetrics {
    queue: QueueMetrics,
    cache: CacheMetrics,
    host: HostMetrics,
    tokens: TokenMetrics,
    requests: RequestMetrics,
    steps: StepMetrics,
}

/// What must be remembered of a request to measure it, until its last continuation has ended.
pub(crate) struct LiveRequest {
    arrival: Micros,
    prompt_tokens: u32,
    /// Tokens of all continuations so far.
    pub(crate) generated: u32,
    /// Continuations that have not ended.
    open: u32,
    /// Tokens of the longest continuation that has.
    longest: u32,
    /// When each continuation got its latest token.
    last_token: SmallVec<[Option<Micros>; 1]>,
}

impl LiveRequest {
    pub(crate) fn new(request: &Request) -> Self {
        Self {
            arrival: request.arrival,
            prompt_tokens: request.prompt.len() as u32,
            generated: 0,
            open: request.params.n,
            longest: 0,
            last_token: SmallVec::from_elem(None, request.params.n as usize),
        }
    }
}

impl EngineMetrics {
    /// Registers every series of the engine that serves `model_name`. Calling it again gives the same series.
    pub fn new(model_name: &str) -> Self {
        let labels = Labels { model_name: model_name.to_owned() };
        register_constant(&labels);
        Self {
            queue: QueueMetrics::new(&labels),
            cache: CacheMetrics::new(&labels),
            host: HostMetrics::new(&labels),
            tokens: TokenMetrics::new(&labels),
            requests: RequestMetrics::new(&labels),
            steps: StepMetrics::new(&labels),
        }
    }

    /// A request was accepted and is about to be sent to the engine.
    pub(crate) fn accepted(&self, request: &Request) {
        self.requests.params_n.record(request.params.n);
        self.requests.params_max_tokens.record(request.params.max_tokens);
    }

    /// A request was refused.
    pub(crate) fn rejected(&self, why: Rejection) {
        match why {
            Rejection::QueueFull => self.queue.rejected_full.increment(1),
            Rejection::Unavailable => self.queue.rejected_unavailable.increment(1),
        }
    }

    /// What a step did as a whole.
    pub(crate) fn record_step(&self, stats: &StepStats) {
        self.queue.record(&stats.scheduler);
        self.cache.record(&stats.scheduler);
        self.host.record(&stats.scheduler);
        self.steps.record(stats);
    }

    /// Tokens that a step generated, over all its events.
    pub(crate) fn record_generated(&self, num_tokens: u64) {
        self.tokens.generation.increment(num_tokens);
    }

    /// One event of a step; returns its tokens, for [`Self::record_generated`].
    pub(crate) fn record(&self, event: &SeqEvent, now: Micros, request: &mut LiveRequest) -> u64 {
        match &event.kind {
            &SeqEventKind::Started { cached_tokens } => {
                self.tokens.prompt.increment(request.prompt_tokens.into());
                self.tokens.cached.increment(cached_tokens.into());
            }
            SeqEventKind::PromptLogprobs { .. } => {}
            &SeqEventKind::Tokens { num_tokens, .. } => {
                self.record_tokens(request, event.index, num_tokens, now);
                return num_tokens.into();
            }
            SeqEventKind::Finished { reason, usage, .. } => {
                self.requests.finished(*reason, usage);
                request.open = request.open.saturating_sub(1);
                request.longest = request.longest.max(usage.generated_tokens);
                if request.open == 0 {
                    self.requests.max_generation_tokens.record(request.longest);
                }
            }
        }
        0
    }

    /// The first token of a continuation counts from the request's arrival, later ones from the one before.
    fn record_tokens(&self, request: &mut LiveRequest, index: u32, num_tokens: u32, now: Micros) {
        let Some(last) = request.last_token.get_mut(index as usize) else { return };
        match last.replace(now) {
            None => self.tokens.time_to_first.record(now.since(request.arrival).as_secs_f64()),
            Some(before) if num_tokens > 0 => {
                // Tokens of one step come at once; each gets its share of the step.
                let each = now.since(before).as_secs_f64() / f64::from(num_tokens);
                self.tokens.inter_token.record_many(each, num_tokens as usize);
            }
            Some(_) => {}
        }
    }
}

/// Sets `quire_engine_state` of the engine that serves `model_name`.
pub fn set_engine_state(model_name: &str, state: &str) {
    let labels = Labels { model_name: model_name.to_owned() };
    for name in ENGINE_STATES {
        let value = if name == state { 1.0 } else { 0.0 };
        labels.gauge(names::ENGINE_STATE, &[("state", name.to_owned())]).set(value);
    }
}

/// Publishes how the KV cache is configured. Called before the first step, when every block is free.
pub fn set_cache_config(
    model_name: &str,
    block_size: u32,
    num_blocks: u32,
    dtype: &str,
    prefix_caching: bool,
) {
    let labels = Labels { model_name: model_name.to_owned() };
    // Python's spelling of booleans: the tools that read this label expect it.
    let prefix_caching = if prefix_caching { "True" } else { "False" };
    let config = [
        ("block_size", block_size.to_string()),
        ("num_gpu_blocks", num_blocks.to_string()),
        ("cache_dtype", dtype.to_owned()),
        ("enable_prefix_caching", prefix_caching.to_owned()),
    ];
    labels.gauge(names::CACHE_CONFIG_INFO, &config).set(1.0);
    // Until the first step says otherwise.
    labels.gauge(names::KV_BLOCKS, &[("state", "free".to_owned())]).set(num_blocks);
}

/// Counts a fatal error of the device.
pub fn count_device_error(model_name: &str) {
    Labels { model_name: model_name.to_owned() }.counter(names::DEVICE_ERRORS, &[]).increment(1);
}

/// Publishes how long ago the last step ended while there is work; zero while there is none.
pub fn set_last_step_age(model_name: &str, seconds: f64) {
    Labels { model_name: model_name.to_owned() }.gauge(names::WATCHDOG_LAST_STEP_AGE, &[]).set(seconds);
}

/// Series that never change while there are no adapters, no speculation and no sleep.
fn register_constant(labels: &Labels) {
    for (state, value) in [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)] {
        labels.gauge(names::ENGINE_SLEEP_STATE, &[("sleep_state", state.to_owned())]).set(value);
    }
    let adapters = [
        ("max_lora", "0".to_owned()),
        ("running_lora_adapters", String::new()),
        ("waiting_lora_adapters", String::new()),
    ];
    labels.gauge(names::LORA_REQUESTS_INFO, &adapters).set(0.0);
    for family in [names::SPEC_DECODE_DRAFTS, names::SPEC_DECODE_DRAFT_TOKENS, names::SPEC_DECODE_ACCEPTED] {
        labels.register(family, &[]);
    }
    labels.register(names::SPEC_DECODE_ACCEPTED_PER_POS, &[("position", "0".to_owned())]);
    labels.register(names::DEVICE_ERRORS, &[]);
    labels.gauge(names::WATCHDOG_LAST_STEP_AGE, &[]).set(0.0);
    for state in ENGINE_STATES {
        // A gauge that exists keeps its value: registering again must not turn a ready engine into a loading one.
        labels.gauge(names::ENGINE_STATE, &[("state", state.to_owned())]).increment(0.0);
    }
}

struct QueueMetrics {
    running: Gauge,
    waiting: Gauge,
    waiting_for_capacity: Gauge,
    rejected_full: Counter,
    rejected_unavailable: Counter,
    preemptions: Counter,
}

impl QueueMetrics {
    fn new(labels: &Labels) -> Self {
        let reason = |reason: &str| [("reason", reason.to_owned())];
        labels.gauge(names::REQUESTS_WAITING_BY_REASON, &reason("deferred")).set(0.0);
        // The name of the reason that alerts written for vLLM look for; nothing limits queued tokens here.
        labels.register(names::ADMISSION_REJECTIONS, &reason("max_num_queued_tokens"));
        Self {
            running: labels.gauge(names::REQUESTS_RUNNING, &[]),
            waiting: labels.gauge(names::REQUESTS_WAITING, &[]),
            waiting_for_capacity: labels.gauge(names::REQUESTS_WAITING_BY_REASON, &reason("capacity")),
            rejected_full: labels.counter(names::ADMISSION_REJECTIONS, &reason("max_num_queued_reqs")),
            rejected_unavailable: labels.counter(names::ADMISSION_REJECTIONS, &reason("unavailable")),
            preemptions: labels.counter(names::PREEMPTIONS_TOTAL, &[]),
        }
    }

    fn record(&self, stats: &SchedulerStats) {
        self.running.set(stats.running);
        self.waiting.set(stats.waiting);
        self.waiting_for_capacity.set(stats.waiting);
        self.preemptions.absolute(stats.num_preemptions);
    }
}

struct CacheMetrics {
    usage: Gauge,
    free: Gauge,
    used: Gauge,
    cached: Gauge,
    quarantined: Gauge,
    queries: Counter,
    hits: Counter,
    evictions: Counter,
}

impl CacheMetrics {
    fn new(labels: &Labels) -> Self {
        let blocks = |state: &str| labels.gauge(names::KV_BLOCKS, &[("state", state.to_owned())]);
        Self {
            usage: labels.gauge(names::KV_CACHE_USAGE, &[]),
            free: blocks("free"),
            used: blocks("used"),
            cached: blocks("cached"),
            quarantined: blocks("quarantined"),
            queries: labels.counter(names::PREFIX_CACHE_QUERIES, &[]),
            hits: labels.counter(names::PREFIX_CACHE_HITS, &[]),
            evictions: labels.counter(names::KV_BLOCK_EVICTIONS, &[]),
        }
    }

    fn record(&self, stats: &SchedulerStats) {
        self.usage.set(stats.kv_usage);
        self.free.set(stats.kv_blocks_free);
        self.used.set(stats.kv_blocks_used);
        self.cached.set(stats.kv_blocks_cached);
        self.quarantined.set(stats.kv_blocks_quarantined);
        self.queries.absolute(stats.prefix_cache_queries);
        self.hits.absolute(stats.prefix_cache_hits);
        self.evictions.absolute(stats.num_evictions);
    }
}

struct TokenMetrics {
    prompt: Counter,
    cached: Counter,
    generation: Counter,
    time_to_first: Histogram,
    inter_token: Histogram,
}

impl TokenMetrics {
    fn new(labels: &Labels) -> Self {
        Self {
            prompt: labels.counter(names::PROMPT_TOKENS, &[]),
            cached: labels.counter(names::PROMPT_TOKENS_CACHED, &[]),
            generation: labels.counter(names::GENERATION_TOKENS, &[]),
            time_to_first: labels.histogram(names::TIME_TO_FIRST_TOKEN, &[]),
            inter_token: labels.histogram(names::INTER_TOKEN_LATENCY, &[]),
        }
    }
}

struct RequestMetrics {
    params_n: Histogram,
    params_max_tokens: Histogram,
    finished: [Counter; FinishReason::ALL.len()],
    e2e: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    time_per_output_token: Histogram,
    prompt_tokens: Histogram,
    generation_tokens: Histogram,
    max_generation_tokens: Histogram,
    computed_tokens: Histogram,
    preemptions: Histogram,
}

impl RequestMetrics {
    fn new(labels: &Labels) -> Self {
        let histogram = |family| labels.histogram(family, &[]);
        let finished = |reason: FinishReason| {
            labels.counter(names::REQUESTS_FINISHED, &[("finished_reason", reason.name().to_owned())])
        };
        Self {
            params_n: histogram(names::REQUEST_PARAMS_N),
            params_max_tokens: histogram(names::REQUEST_PARAMS_MAX_TOKENS),
            finished: FinishReason::ALL.map(finished),
            e2e: histogram(names::E2E_REQUEST_LATENCY),
            queue: histogram(names::REQUEST_QUEUE_TIME),
            inference: histogram(names::REQUEST_INFERENCE_TIME),
            prefill: histogram(names::REQUEST_PREFILL_TIME),
            decode: histogram(names::REQUEST_DECODE_TIME),
            time_per_output_token: histogram(names::REQUEST_TIME_PER_OUTPUT_TOKEN),
            prompt_tokens: histogram(names::REQUEST_PROMPT_TOKENS),
            generation_tokens: histogram(names::REQUEST_GENERATION_TOKENS),
            max_generation_tokens: histogram(names::REQUEST_MAX_NUM_GENERATION_TOKENS),
            computed_tokens: histogram(names::REQUEST_PREFILL_KV_COMPUTED_TOKENS),
            preemptions: histogram(names::REQUEST_NUM_PREEMPTIONS),
        }
    }

    /// Phases of a sequence that never got a token have no end, so only its reason counts.
    fn finished(&self, reason: FinishReason, usage: &Usage) {
        let index = FinishReason::ALL.iter().position(|&other| other == reason);
        if let Some(counter) = index.and_then(|index| self.finished.get(index)) {
            counter.increment(1);
        }
        if usage.generated_tokens == 0 {
            return;
        }
        let seconds = |from: Micros, to: Micros| to.since(from).as_secs_f64();
        self.e2e.record(seconds(usage.arrival, usage.finished));
        self.queue.record(seconds(usage.arrival, usage.first_scheduled));
        self.inference.record(seconds(usage.first_scheduled, usage.finished));
        self.prefill.record(seconds(usage.first_scheduled, usage.first_token));
        let decode = seconds(usage.first_token, usage.finished);
        self.decode.record(decode);
        if usage.generated_tokens > 1 {
            self.time_per_output_token.record(decode / f64::from(usage.generated_tokens - 1));
        }
        self.prompt_tokens.record(usage.prompt_tokens);
        self.generation_tokens.record(usage.generated_tokens);
        self.computed_tokens.record(usage.prompt_tokens.saturating_sub(usage.cached_tokens));
        self.preemptions.record(usage.num_preemptions);
    }
}

struct StepMetrics {
    tokens: Histogram,
    prefill: Histogram,
    decode: Histogram,
    mixed: Histogram,
    time_error: Gauge,
}

impl StepMetrics {
    fn new(labels: &Labels) -> Self {
        let duration = |kind: &str| labels.histogram(names::STEP_DURATION, &[("kind", kind.to_owned())]);
        Self {
            tokens: labels.histogram(names::STEP_TOKENS_COMPUTED, &[]),
            prefill: duration("prefill"),
            decode: duration("decode"),
            mixed: duration("mixed"),
            time_error: labels.gauge(names::STEP_TIME_ERROR, &[]),
        }
    }

    fn record(&self, stats: &StepStats) {
        if stats.num_rows == 0 {
            return;
        }
        let (prefill, decode) = (stats.scheduler.prefill_tokens, stats.scheduler.decode_tokens);
        self.tokens.record(prefill + decode);
        let duration = match (prefill > 0, decode > 0) {
            (true, false) => &self.prefill,
            (true, true) => &self.mixed,
            _ => &self.decode,
        };
        duration.record(stats.duration_us as f64 / 1e6);
        self.time_error.set(stats.scheduler.step_time_error_p90);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use metrics_util::CompositeKey;
    use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
    use quire_core::{CacheSalt, RequestId, SamplingParams, TenantId};

    use super::*;

    fn request(id: u64, n: u32) -> Request {
        Request {
            id: RequestId(id),
            prompt: Arc::from([1, 2, 3]),
            block_hashes: Arc::from([]),
            salt: CacheSalt(0),
            adapter: None,
            params: Arc::new(SamplingParams { n, max_tokens: 9, ..SamplingParams::default() }),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(1_000_000),
            deadline: None,
        }
    }

    /// Records the events of one step of request 1.
    fn step(metrics: &EngineMetrics, live: &mut LiveRequest, at: u64, events: &[(u32, SeqEventKind)]) {
        let record = |(index, kind): &(u32, SeqEventKind)| {
            let event = SeqEvent { request: RequestId(1), index: *index, kind: kind.clone() };
            metrics.record(&event, Micros(at), live)
        };
        metrics.record_generated(events.iter().map(record).sum());
    }

    /// Runs `record` against a recorder of its own and returns what it recorded, by family and the last label.
    fn recorded(record: impl FnOnce(&EngineMetrics)) -> HashMap<(String, String), DebugValue> {
        let recorder = DebuggingRecorder::new();
        let snapshotter: Snapshotter = recorder.snapshotter();
        metrics::with_local_recorder(&recorder, || {
            let metrics = EngineMetrics::new("m");
            record(&metrics);
        });
        let name = |key: &CompositeKey| {
            let labels: Vec<_> = key.key().labels().collect();
            let own = labels.get(2).map_or(String::new(), |label| label.value().to_owned());
            (key.key().name().to_owned(), own)
        };
        snapshotter.snapshot().into_vec().into_iter().map(|(key, _, _, value)| (name(&key), value)).collect()
    }

    fn histogram_of(recorded: &HashMap<(String, String), DebugValue>, family: Family) -> Vec<f64> {
        match &recorded[&(family.name.to_owned(), String::new())] {
            DebugValue::Histogram(values) => values.iter().map(|value| value.into_inner()).collect(),
            other => panic!("{} is {other:?}", family.name),
        }
    }

    fn counter_of(recorded: &HashMap<(String, String), DebugValue>, family: Family, label: &str) -> u64 {
        match recorded[&(family.name.to_owned(), label.to_owned())] {
            DebugValue::Counter(value) => value,
            ref other => panic!("{} is {other:?}", family.name),
        }
    }

    #[test]
    fn a_request_is_measured_from_arrival_to_end() {
        let usage = Usage {
            prompt_tokens: 3,
            cached_tokens: 2,
            generated_tokens: 3,
            num_preemptions: 1,
            arrival: Micros(1_000_000),
            first_scheduled: Micros(1_100_000),
            first_token: Micros(1_500_000),
            finished: Micros(1_900_000),
        };
        let tokens = |num_tokens| SeqEventKind::Tokens { row: 0, num_tokens };
        let finished =
            SeqEventKind::Finished { reason: FinishReason::Stop, stop_token: None, usage: Box::new(usage) };
        let recorded = recorded(|metrics| {
            let request = request(1, 1);
            metrics.accepted(&request);
            let mut live = LiveRequest::new(&request);
            let started = SeqEventKind::Started { cached_tokens: 2 };
            step(metrics, &mut live, 1_500_000, &[(0, started), (0, tokens(1))]);
            step(metrics, &mut live, 1_900_000, &[(0, tokens(2)), (0, finished)]);
        });
        let histogram = |family| histogram_of(&recorded, family);
        assert_eq!(histogram(names::TIME_TO_FIRST_TOKEN), [0.5]);
        assert_eq!(histogram(names::INTER_TOKEN_LATENCY), [0.2, 0.2], "two tokens share the step of 0.4 s");
        assert_eq!(histogram(names::E2E_REQUEST_LATENCY), [0.9]);
        assert_eq!(histogram(names::REQUEST_QUEUE_TIME), [0.1]);
        assert_eq!(histogram(names::REQUEST_PREFILL_TIME), [0.4]);
        assert_eq!(histogram(names::REQUEST_TIME_PER_OUTPUT_TOKEN), [0.2]);
        assert_eq!(histogram(names::REQUEST_PREFILL_KV_COMPUTED_TOKENS), [1.0]);
        assert_eq!(histogram(names::REQUEST_NUM_PREEMPTIONS), [1.0]);
        assert_eq!(histogram(names::REQUEST_MAX_NUM_GENERATION_TOKENS), [3.0]);
        assert_eq!(histogram(names::REQUEST_PARAMS_MAX_TOKENS), [9.0]);
        assert_eq!(counter_of(&recorded, names::PROMPT_TOKENS, ""), 3);
        assert_eq!(counter_of(&recorded, names::GENERATION_TOKENS, ""), 3);
        assert_eq!(counter_of(&recorded, names::REQUESTS_FINISHED, "stop"), 1);
        assert_eq!(counter_of(&recorded, names::REQUESTS_FINISHED, "abort"), 0);
    }

    #[test]
    fn continuations_are_measured_apart_and_cancelled_ones_have_no_latency() {
        let finished = |generated_tokens, reason| {
            let usage = Usage { generated_tokens, arrival: Micros(1_000_000), ..Usage::default() };
            SeqEventKind::Finished { reason, stop_token: None, usage: Box::new(usage) }
        };
        let tokens = || SeqEventKind::Tokens { row: 0, num_tokens: 1 };
        let recorded = recorded(|metrics| {
            let mut live = LiveRequest::new(&request(1, 3));
            step(metrics, &mut live, 1_250_000, &[(0, tokens())]);
            step(metrics, &mut live, 1_500_000, &[(1, tokens()), (0, tokens())]);
            let ends = [(0, finished(2, FinishReason::Length)), (1, finished(1, FinishReason::Stop))];
            step(metrics, &mut live, 1_600_000, &ends);
            step(metrics, &mut live, 1_700_000, &[(2, finished(0, FinishReason::Abort))]);
            metrics.rejected(Rejection::QueueFull);
        });
        assert_eq!(histogram_of(&recorded, names::TIME_TO_FIRST_TOKEN), [0.25, 0.5]);
        assert_eq!(histogram_of(&recorded, names::INTER_TOKEN_LATENCY), [0.25]);
        assert_eq!(histogram_of(&recorded, names::E2E_REQUEST_LATENCY).len(), 2, "not the cancelled one");
        assert_eq!(histogram_of(&recorded, names::REQUEST_MAX_NUM_GENERATION_TOKENS), [2.0]);
        assert_eq!(counter_of(&recorded, names::REQUESTS_FINISHED, "abort"), 1);
        assert_eq!(counter_of(&recorded, names::ADMISSION_REJECTIONS, "max_num_queued_reqs"), 1);
    }
}
