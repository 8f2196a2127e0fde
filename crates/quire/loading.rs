//! From settings to a model that answers: checkpoint, tokenizer, executor, engine, text-level API.

use std::hash::{BuildHasher, RandomState};
use std::io::IsTerminal;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use quire_core::{BlockHasher, Executor, ExecutorLimits};
use quire_engine::{Engine, EngineConfig, metrics as engine_metrics};
use quire_llm::{GenerationDefaults, Llm, LlmConfig};
use quire_model::{Checkpoint, GenerationConfig, ModelSpec};
use quire_runner::LoadProgress;
use quire_scheduler::{HostTierConfig, SchedulerConfig};
use quire_sim::{MockExecutor, MockTiming};
use quire_tokenizer::{ChatTemplate, TemplateError, Tokenizer};
use tokio::runtime::Handle;

use crate::args::{EngineArgs, ExecutorArg};
use crate::config::{Config, Machine};
use crate::gpu::{self, Gpu};
use crate::inspect::headline;
use crate::lora::{self, LoraModule};
use crate::model::{LocalModel, ModelSource};
use crate::prepack::PackCache;
use crate::ranks::{self, cpu_backends};
use crate::targets::{Targets, first_guess};
use crate::{Failure, Result};

/// Threads that render templates and tokenize, at most.
const MAX_TOKENIZER_THREADS: u32 = 8;
/// Loading is silent for this long; after that its progress is logged, or drawn on a terminal.
const PATIENCE: Duration = Duration::from_secs(2);
/// A terminal need not wait so long: a bar leaves nothing behind.
const PATIENCE_ON_TERMINAL: Duration = Duration::from_millis(300);

const BAR_TEMPLATE: &str = "loading weights {wide_bar} {bytes} of {total_bytes}";

/// Under which names a model is served: itself, and with adapters.
pub(crate) struct Served<'a> {
    pub(crate) name: &'a str,
    pub(crate) lora_modules: &'a [LoraModule],
    pub(crate) to: Audience,
}

/// For whom it is loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Whoever sends requests: the machine is there for them.
    Clients,
    /// Somebody at a terminal, who has other programs.
    Terminal,
}

/// A model that answers. Dropping it stops the engine thread.
pub(crate) struct Loaded {
    pub(crate) llm: Llm,
    pub(crate) engine: Engine,
    pub(crate) config: Config,
    /// What the model is, in one line.
    pub(crate) headline: String,
    /// Where it computes, in one line.
    pub(crate) device: String,
    /// Keeps packed weights for the next start, if they had to be packed. It may run on when the model answers.
    pub(crate) pack_writer: Option<JoinHandle<()>>,
}

/// Loads what `args` describe; `source` is what their MODEL resolved to. Blocks, for as long as a download takes.
///
/// # Errors
/// Whatever stands in the way, in words.
pub(crate) fn load(
    args: &EngineArgs,
    targets: Option<Targets>,
    source: ModelSource,
    served: &Served<'_>,
    runtime: &Handle,
) -> Result<Loaded> {
    let mut stages = Stages::default();
    let local = source.fetch(args.load_format)?;
    stages.done("fetch");
    let checkpoint = lora::open(served.lora_modules, local.open(args.load_format)?)?;
    for tensor in checkpoint.ignored_tensors() {
        tracing::warn!(tensor, "the checkpoint holds a tensor that this architecture does not use");
    }
    let gpu = gpu::choose(args, checkpoint.spec())?;
    let machine = Machine { gpu_memory: gpu.as_ref().map(Gpu::free_memory), ..Machine::detect() };
    let mut config = Config::resolve(args, checkpoint.spec(), &machine)?;
    config.count_adapters(&checkpoint)?;
    if served.to == Audience::Clients {
        config.populate_kv(&machine);
    }
    if let Some(targets) = targets {
        config.policy = targets.policy(&config, checkpoint.spec());
    }
    // Early, so that mapped pages are there when the tokenizer is.
    let cache = match gpu {
        Some(_) => None,
        // The file holds whole layers.
        None if config.tensor_parallel_size > 1 => None,
        None => PackCache::open(args, &local, &checkpoint, config.runner.quant),
    };
    stages.done("open");
    let text = load_text(&local, args)?;
    stages.done("tokenizer");
    let (executor, device, pack_writer) = executor(args, &checkpoint, &mut config, gpu, cache)?;
    stages.done("weights");
    let loaded = assemble(served, &checkpoint, config, text, executor, device, runtime)?;
    stages.done("engine");
    Ok(Loaded { pack_writer, ..loaded })
}

/// Starts the engine and puts the text-level API in front of it.
pub(crate) fn assemble(
    served: &Served<'_>,
    checkpoint: &Checkpoint,
    config: Config,
    (tokenizer, chat_template): Text,
    executor: Box<dyn Executor>,
    device: String,
    runtime: &Handle,
) -> Result<Loaded> {
    let name = served.name;
    let hasher = BlockHasher::new(random_key(), config.limits.block_size);
    let host_tier = (config.num_host_blocks > 0).then(|| HostTierConfig {
        num_blocks: config.num_host_blocks,
        block_bytes: config.memory.kv_block_bytes,
        cost: first_guess(&config, checkpoint.spec()),
    });
    let scheduler = SchedulerConfig {
        host_tier,
        enable_prefix_caching: config.prefix_cache,
        max_queued_requests: config.limits.max_queued_requests,
        policy: config.policy,
        ..SchedulerConfig::new(executor.limits(), hasher)
    };
    let runner = &config.runner;
    let (blocks, dtype) = (runner.num_blocks, runner.kv_dtype.name());
    engine_metrics::set_cache_config(name, runner.block_size, blocks, dtype, config.prefix_cache);
    let engine_config =
        EngineConfig { limits: config.limits.clone(), scheduler, hasher, model_name: name.to_owned() };
    let engine = Engine::start(engine_config, executor, runtime)
        .map_err(|error| Failure(format!("cannot start the engine thread: {error}")))?;
    let spec = checkpoint.spec();
    let llm = Llm::new(LlmConfig {
        served_model_names: vec![name.to_owned()],
        adapters: served.lora_modules.iter().map(|module| module.name.clone()).collect(),
        engine: engine.client(),
        tokenizer,
        chat_template,
        defaults: defaults(checkpoint.generation_config(), spec),
        tokenizer_threads: config.threads.min(MAX_TOKENIZER_THREADS) as usize,
    });
    Ok(Loaded { llm, engine, headline: headline(spec), device, config, pack_writer: None })
}

/// Times of the stages, for the log and `quire_model_load_seconds`.
struct Stages {
    since: Instant,
}

impl Default for Stages {
    fn default() -> Self {
        Self { since: Instant::now() }
    }
}

impl Stages {
    fn done(&mut self, stage: &'static str) {
        let seconds = self.since.elapsed().as_secs_f64();
        self.since = Instant::now();
        tracing::debug!(stage, seconds, "loading");
        metrics::gauge!(quire_core::metric_names::MODEL_LOAD_SECONDS.name, "stage" => stage).set(seconds);
    }
}

/// The tokenizer and, if there is one that compiles, the chat template.
type Text = (Tokenizer, Option<ChatTemplate>);

pub(crate) fn load_text(model: &LocalModel, args: &EngineArgs) -> Result<Text> {
    let (tokenizer, found) = match model {
        LocalModel::Demo => {
            let config = quire_demo_model::TOKENIZER_CONFIG_JSON.as_bytes();
            let json = quire_demo_model::TOKENIZER_JSON.as_bytes();
            (Tokenizer::from_parts(json, Some(config)), ChatTemplate::from_config(config))
        }
        LocalModel::Directory(path) => (Tokenizer::from_dir(path), ChatTemplate::from_dir(path)),
    };
    let tokenizer = tokenizer.map_err(|error| Failure(error.to_string()))?;
    if let Some(file) = &args.chat_template {
        let fail =
            |error: &dyn std::fmt::Display| Failure(format!("--chat-template {}: {error}", file.display()));
        let source = std::fs::read_to_string(file).map_err(|error| fail(&error))?;
        let template = ChatTemplate::new(&source).map_err(|error| fail(&error))?;
        return Ok((tokenizer, Some(template)));
    }
    let found = found.map_err(|error| Failure(error.to_string()))?;
    let usable = |template: std::result::Result<ChatTemplate, TemplateError>| match template {
        Ok(template) => Some(template),
        Err(error) => {
            tracing::warn!(%error, "the model's chat template is not valid; conversations will be refused");
            None
        }
    };
    Ok((tokenizer, found.and_then(usable)))
}

/// The executor, its device in one line, and the thread that keeps packed weights if there is one.
type Built = (Box<dyn Executor>, String, Option<JoinHandle<()>>);

fn executor(
    args: &EngineArgs,
    checkpoint: &Checkpoint,
    config: &mut Config,
    gpu: Option<Gpu>,
    cache: Option<PackCache>,
) -> Result<Built> {
    if args.executor == ExecutorArg::Mock {
        let timing = MockTiming { fixed: args.mock_step_time, ..MockTiming::default() };
        let executor = MockExecutor::new(executor_limits(checkpoint.spec(), config), timing);
        return Ok((Box::new(executor), "mock: made-up tokens".to_owned(), None));
    }
    let fail = |error: &dyn std::fmt::Display| Failure(format!("cannot load the model: {error}"));
    let mut progress = Progress::start();
    if let Some(gpu) = gpu {
        let device = gpu.describe();
        let executor = gpu::load(gpu, checkpoint, args, config, |now| progress.report(now))?;
        return Ok((executor, device, None));
    }
    let (mut backends, device) = cpu_backends(checkpoint.spec().dtype, config)?;
    if let Some(cache) = &cache {
        backends = backends.into_iter().map(|backend| backend.with_prepacked(cache.prepacked())).collect();
    }
    let executor = ranks::load(backends, checkpoint, config, |now| progress.report(now));
    Ok((executor.map_err(|error| fail(&error))?, device, cache.and_then(PackCache::finish)))
}

/// What the real runner would offer.
pub(crate) fn executor_limits(spec: &ModelSpec, config: &Config) -> ExecutorLimits {
    let runner = &config.runner;
    ExecutorLimits {
        block_size: runner.block_size,
        num_blocks: runner.num_blocks,
        max_num_seqs: runner.max_num_seqs,
        max_num_batched_tokens: runner.max_num_batched_tokens,
        max_model_len: runner.max_model_len,
        vocab_size: config.limits.vocab_size,
        max_steps_in_flight: 1,
        kv_groups: spec.kv_groups().iter().map(|group| group.window).collect(),
    }
}

/// Tells how far a load is that takes long: a bar where standard error is a terminal, else a log line every tenth.
enum Progress {
    Bar { start: Instant, bar: ProgressBar },
    Log { start: Instant, logged_tenths: u64 },
}

impl Progress {
    fn start() -> Self {
        let start = Instant::now();
        if !std::io::stderr().is_terminal() {
            return Self::Log { start, logged_tenths: 0 };
        }
        // Hidden until patience ends; it draws on standard error then.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template(BAR_TEMPLATE).expect("the template is constant and correct");
        Self::Bar { start, bar: bar.with_style(style) }
    }

    fn report(&mut self, progress: LoadProgress) {
        match self {
            Self::Bar { start, bar } => {
                let is_done = progress.done_bytes == progress.total_bytes;
                if is_done {
                    bar.finish_and_clear();
                } else if start.elapsed() > PATIENCE_ON_TERMINAL {
                    if bar.is_hidden() {
                        bar.set_draw_target(ProgressDrawTarget::stderr());
                    }
                    bar.set_length(progress.total_bytes);
                    bar.set_position(progress.done_bytes);
                }
            }
            Self::Log { start, logged_tenths } => {
                let tenths = progress.done_bytes * 10 / progress.total_bytes.max(1);
                if start.elapsed() > PATIENCE && tenths > *logged_tenths {
                    *logged_tenths = tenths;
                    tracing::info!(percent = tenths * 10, "loading weights");
                }
            }
        }
    }
}

fn defaults(generation: &GenerationConfig, spec: &ModelSpec) -> GenerationDefaults {
    let greedy = generation.do_sample == Some(false);
    GenerationDefaults {
        temperature: if greedy { Some(0.0) } else { generation.temperature },
        top_p: generation.top_p.filter(|&top_p| top_p > 0.0),
        top_k: generation.top_k,
        min_p: generation.min_p,
        repetition_penalty: generation.repetition_penalty,
        eos_token_ids: spec.eos_token_ids.clone(),
    }
}

/// A key that nobody can foresee, from the one the standard library draws for its own maps.
fn random_key() -> (u64, u64) {
    let state = RandomState::new();
    (state.hash_one(1u8), state.hash_one(2u8))
}
