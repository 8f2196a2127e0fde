//! The engine under test: the real `EngineCore` and `ModelRunner`, stepped by the caller, without threads of their own,
//! tokenizer or network.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_backend::Backend;
use quire_core::{
    BlockHash, BlockHasher, CacheSalt, Executor, Micros, Request, RequestId, SamplingParams, TenantId,
    TokenId,
};
use quire_cpu::{CpuBackend, Isa, Precision};
use quire_engine::EngineCore;
use quire_model::Checkpoint;
use quire_runner::LoadProgress;
use quire_scheduler::SchedulerConfig;

use super::args::BenchModelArgs;
use super::report::{format_word, slug};
use super::{Progress, as_failure};
use crate::args::{EngineArgs, ExecutorArg};
use crate::config::{Config, Machine};
use crate::gpu::{self, Gpu};
use crate::machine;
use crate::model::ModelSource;
use crate::ranks::{self, cpu_backends};
use crate::units::Bytes;
use crate::{Failure, Result};

/// Prompts are the same in every run.
const PROMPT_SEED: u64 = 0;
/// Blocks a sequence may need beyond its tokens: the pass before may still hold some of its last ones.
const SPARE_BLOCKS: u32 = 2;

/// A checkpoint and how it runs.
pub(crate) struct Model {
    checkpoint: Checkpoint,
    args: EngineArgs,
    /// Where it runs, if not on the processor.
    gpu: Option<Gpu>,
    pub(crate) config: Config,
    slug: String,
    format: &'static str,
}

/// What a benchmark needs of an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    /// Requests submitted at once.
    pub(crate) num_requests: u32,
    /// Sequences that run together.
    pub(crate) num_seqs: u32,
    /// Tokens of each sequence, prompt and output.
    pub(crate) len: u32,
    /// Whether all of them must have their KV in the cache at once.
    pub(crate) resident: bool,
}

impl Model {
    /// Opens the model, and sizes the engine for `needs` where the user leaves it open.
    pub(crate) fn open(args: &BenchModelArgs, needs: Needs) -> Result<Self> {
        if args.engine.executor == ExecutorArg::Mock {
            return Err(Failure("--executor: a benchmark needs a model; leave it at auto".into()));
        }
        let source = ModelSource::resolve(args.engine.model.as_deref())?;
        let name = args.served_model_name.clone().unwrap_or_else(|| source.default_name());
        let checkpoint = source.fetch(args.engine.load_format)?.open(args.engine.load_format)?;
        let spec = checkpoint.spec();
        let gpu = gpu::choose(&args.engine, spec)?;
        let (args, config) = size(&args.engine, spec, needs, gpu.as_ref())?;
        let (slug, format) = (slug(&name), format_word(spec.dtype, args.quantize));
        Ok(Self { checkpoint, args, gpu, config, slug, format })
    }

    /// A row's name: `what/MODEL/size/DTYPE`.
    pub(crate) fn row(&self, what: &str, size: impl std::fmt::Display) -> String {
        format!("{what}/{}/{size}/{}", self.slug, self.format)
    }

    /// The model for people, in a line, and in another one how its weights are quantized.
    pub(crate) fn headline(&self) -> String {
        let model = format!("model    {} {}", self.slug, self.format);
        match self.config.quantized() {
            Some(format) => format!("{model}\nweights  {format}"),
            None => model,
        }
    }

    /// The GPU that the model goes to, to be loaded by the caller.
    pub(crate) fn take_gpu(&mut self) -> Option<Gpu> {
        self.gpu.take()
    }

    /// An engine on the device that the model goes to, and what that is in words.
    pub(crate) fn start(&mut self, progress: &mut Progress) -> Result<(Harness, String)> {
        let Some(gpu) = self.take_gpu() else {
            let (backends, device) = self.cpu()?;
            return Ok((self.load(backends, progress)?, device));
        };
        let device = gpu.describe();
        let Self { checkpoint, args, config, .. } = self;
        let executor = gpu::load(gpu, checkpoint, args, config, |now| say_loading(progress, now))?;
        Ok((Harness::new(executor, self.config.limits.max_queued_requests), device))
    }

    /// The device under this model's settings, once for each rank, and what it is in words.
    pub(crate) fn cpu(&self) -> Result<(Vec<CpuBackend>, String)> {
        cpu_backends(self.checkpoint.spec().dtype, &self.config)
    }

    /// How products are computed on [`Model::cpu`].
    pub(crate) fn precision(&self) -> Precision {
        Precision::for_checkpoint(self.checkpoint.spec().dtype, Isa::detect())
    }

    /// Loads the weights onto `backends`.
    pub(crate) fn load<B: Backend>(&self, backends: Vec<B>, progress: &mut Progress) -> Result<Harness> {
        let executor = ranks::load(backends, &self.checkpoint, &self.config, |now| {
            say_loading(progress, now);
        });
        Ok(Harness::new(executor.map_err(as_failure)?, self.config.limits.max_queued_requests))
    }

    /// `count` prompts of `len` random tokens.
    pub(crate) fn prompts(&self, count: u32, len: u32) -> Vec<Arc<[TokenId]>> {
        let vocab_size = self.checkpoint.spec().vocab_size as u64;
        let mut random = Random(PROMPT_SEED);
        let mut token = || (random.next() % vocab_size) as TokenId;
        (0..count).map(|_| (0..len).map(|_| token()).collect()).collect()
    }
}

fn say_loading(progress: &mut Progress, now: LoadProgress) {
    progress.say(|| format!("loading weights, {} %", now.done_bytes * 100 / now.total_bytes.max(1)));
}

/// The engine's limits: what the user says, or else exactly what the benchmark needs; with the settings that say so.
fn size(
    args: &EngineArgs,
    spec: &quire_model::ModelSpec,
    needs: Needs,
    gpu: Option<&Gpu>,
) -> Result<(EngineArgs, Config)> {
    let context =
        args.max_model_len.unwrap_or_else(|| u32::try_from(spec.max_model_len()).unwrap_or(u32::MAX));
    if needs.len > context {
        return Err(Failure(format!(
            "prompt and output of {} tokens are more than the {context} this model takes; lower --input-len or --output-len",
            needs.len
        )));
    }
    let mut args = args.clone();
    // An engine has two blocks at least.
    args.max_model_len.get_or_insert(needs.len.max(2 * args.block_size).min(context));
    let num_seqs = *args.max_num_seqs.get_or_insert(needs.num_seqs);
    let is_sized = args.kv_cache_memory.is_some();
    let machine = Machine { gpu_memory: gpu.map(Gpu::free_memory), ..Machine::detect() };
    let mut config = Config::resolve(&args, spec, &machine)?;
    config.limits.max_queued_requests = needs.num_requests;
    if !needs.resident {
        return Ok((args, config));
    }
    if num_seqs < needs.num_seqs {
        return Err(Failure(format!("--max-num-seqs: {num_seqs} cannot hold a batch of {}", needs.num_seqs)));
    }
    let per_seq = needs.len.div_ceil(config.runner.block_size) + SPARE_BLOCKS;
    let wanted = per_seq.saturating_mul(needs.num_seqs);
    let bytes = Bytes(config.memory.kv_block_bytes * u64::from(wanted));
    if is_sized && config.runner.num_blocks < wanted {
        return Err(Failure(format!("--kv-cache-memory: this batch needs {bytes}")));
    }
    if gpu.is_some() {
        // The device says itself what does not fit.
        config.runner.num_blocks = wanted;
        return Ok((args, config));
    }
    if let Some(free) = machine::available_memory().filter(|&free| bytes > free) {
        let needed = format!("the KV cache of this batch needs {bytes}, but {free} are free");
        return Err(Failure(format!("{needed}; lower --batch-size or --input-len")));
    }
    config.runner.num_blocks = config.runner.num_blocks.max(wanted);
    Ok((args, config))
}

/// One step of a pass, from the one before it to its own results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepTime {
    pub(crate) duration: Duration,
    /// Every sequence of the pass computed one token, and nothing else was computed.
    pub(crate) is_decode: bool,
}

/// One load, from its submission to its last token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pass {
    pub(crate) elapsed: Duration,
    pub(crate) steps: Vec<StepTime>,
    /// Tokens generated.
    pub(crate) num_sampled: u64,
}

impl Pass {
    /// Seconds of the steps in which the whole batch decoded.
    pub(crate) fn decode_seconds(&self) -> Vec<f64> {
        self.steps.iter().filter(|step| step.is_decode).map(|step| step.duration.as_secs_f64()).collect()
    }
}

/// An engine with its weights loaded.
pub(crate) struct Harness {
    core: EngineCore,
    hasher: BlockHasher,
    next_id: u64,
    start: Instant,
}

/// A batch to run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load<'a> {
    pub(crate) prompts: &'a [Arc<[TokenId]>],
    /// Tokens to generate for each prompt.
    pub(crate) output_len: u32,
    /// Passes with the same number find one another's prompts in the prefix cache; `None`: nothing is found or kept.
    pub(crate) salt: Option<u32>,
}

impl Harness {
    fn new(executor: Box<dyn Executor>, max_queued_requests: u32) -> Self {
        let limits = executor.limits();
        let hasher = BlockHasher::new((0, 0), limits.block_size);
        let config = SchedulerConfig { max_queued_requests, ..SchedulerConfig::new(limits, hasher) };
        Self { core: EngineCore::new(config, executor), hasher, next_id: 0, start: Instant::now() }
    }

    /// Submits everything at once and steps until all of it is done. `on_step` hears of each step.
    pub(crate) fn run(&mut self, load: Load<'_>, mut on_step: impl FnMut(StepTime)) -> Result<Pass> {
        let params = Arc::new(SamplingParams::greedy(load.output_len));
        let requests: Vec<Request> =
            load.prompts.iter().map(|prompt| self.request(prompt, &params, load.salt)).collect();
        let mut pass = Pass::default();
        let begin = Instant::now();
        for request in requests {
            self.core.add(request).map_err(as_failure)?;
        }
        // Of steps submitted and not collected: there are two where the device computes beside the host.
        let mut kinds = VecDeque::new();
        let mut step_begin = Instant::now();
        while self.core.has_work() {
            let epoch = self.start;
            let outcome =
                self.core.step_with(|| Micros(epoch.elapsed().as_micros() as u64)).map_err(as_failure)?;
            let stats = self.core.stats();
            if outcome.submitted.is_some() {
                let num_decoded = stats.decode_tokens as usize;
                kinds.push_back(stats.prefill_tokens == 0 && num_decoded == load.prompts.len());
            }
            if outcome.collected.is_none() {
                continue;
            }
            let step = StepTime {
                duration: step_begin.elapsed(),
                is_decode: kinds.pop_front().expect("it was submitted before"),
            };
            step_begin = Instant::now();
            pass.num_sampled += u64::from(self.core.step_stats().num_sampled);
            pass.steps.push(step);
            on_step(step);
        }
        pass.elapsed = begin.elapsed();
        let expected = load.prompts.len() as u64 * u64::from(load.output_len);
        if pass.num_sampled < expected {
            let got = pass.num_sampled;
            return Err(Failure(format!("the engine generated {got} of {expected} tokens")));
        }
        Ok(pass)
    }

    fn request(
        &mut self,
        prompt: &Arc<[TokenId]>,
        params: &Arc<SamplingParams>,
        salt: Option<u32>,
    ) -> Request {
        self.next_id += 1;
        let space = CacheSalt(u128::from(salt.unwrap_or(0)) + 1);
        let hashes: Vec<BlockHash> =
            if salt.is_some() { self.hasher.chain(space, prompt) } else { Vec::new() };
        Request {
            id: RequestId(self.next_id),
            prompt: Arc::clone(prompt),
            block_hashes: hashes.into(),
            salt: space,
            adapter: None,
            params: Arc::clone(params),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(self.start.elapsed().as_micros() as u64),
            deadline: None,
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
