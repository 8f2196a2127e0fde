//! Settings, model and machine -> one frozen [`Config`]: every default decided, every contradiction refused.

use std::fmt;

use quire_core::{DType, Limits, Micros, QuantFormat};
use quire_cpu::KvMemory;
use quire_model::{Checkpoint, Mixer, ModelSpec, RopeScaling};
use quire_runner::{MemoryPlan, RunnerConfig, WeightPlan};
use quire_scheduler::{LatencyTargets, Policy};

use crate::args::{Device, EngineArgs, Quantize, ServerArgs, Switch};
use crate::gpu;
use crate::machine;
use crate::units::{Bytes, grouped};

/// Default of `--max-num-seqs` on CPU: more sequences than this no longer share one read of the weights cheaply.
const CPU_MAX_NUM_SEQS: u32 = 64;
/// Default of `--max-num-batched-tokens` on CPU: a step of some tens of milliseconds for a model of a few hundred
/// million parameters, so that decoding sequences do not stall behind a prompt.
const CPU_MAX_NUM_BATCHED_TOKENS: u32 = 512;
/// The same on a GPU, where a step of one sequence costs nearly what one of hundreds does.
const GPU_MAX_NUM_SEQS: u32 = 512;
/// Tokens of a step there: enough that prefill is bound by arithmetic.
const GPU_MAX_NUM_BATCHED_TOKENS: u32 = 8192;
/// Default bound of `--kv-cache-memory`.
const MAX_DEFAULT_KV: u64 = 4 << 30;
/// Default share of free memory for keys and values.
const DEFAULT_KV_SHARE: f64 = 0.4;

/// A setting that cannot be met.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag}: {message}")]
pub struct ConfigError {
    /// The flag to change.
    pub flag: &'static str,
    /// What is wrong and what would do.
    pub message: String,
}

/// What the machine offers, as far as defaults depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Cores this process may use.
    pub cores: u32,
    /// Memory that can be used now.
    pub available_memory: Bytes,
    /// Free memory of the GPU that the model goes to; `None`: it stays on the processor.
    pub gpu_memory: Option<Bytes>,
}

impl Machine {
    /// This machine. Where the system does not say how much memory is free, 4 GiB are assumed.
    pub fn detect() -> Self {
        let available_memory = machine::available_memory().unwrap_or(Bytes(4 << 30));
        Self { cores: machine::usable_cores(), available_memory, gpu_memory: None }
    }
}

/// How one engine runs. Nothing in it is optional.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Compute threads of all ranks together.
    pub threads: u32,
    /// Ranks that the model is split over.
    pub tensor_parallel_size: u32,
    /// Sizes of the runner.
    pub runner: RunnerConfig,
    /// How weights are stored.
    pub weights: WeightPlan,
    /// Where the memory of each rank goes.
    pub memory: MemoryPlan,
    /// When the memory of a KV cache on CPU becomes present.
    pub kv_memory: KvMemory,
    /// Blocks of the KV cache's second tier, in host memory; 0 without one.
    pub num_host_blocks: u32,
    /// Bounds of requests.
    pub limits: Limits,
    /// Whether prompts that begin alike share their KV.
    pub prefix_cache: bool,
    /// Tokens of context the model itself could take.
    pub model_context: u32,
    /// Who goes first, and how prompts are cut.
    pub policy: Policy,
}

impl Config {
    /// Decides everything.
    ///
    /// # Errors
    /// A setting names a feature that this build does not have, contradicts another, or does not fit the model or memory.
    pub fn resolve(args: &EngineArgs, spec: &ModelSpec, machine: &Machine) -> Result<Self, ConfigError> {
        check_supported(args, spec, machine)?;
        let (seqs, tokens) = match machine.gpu_memory {
            Some(_) => (GPU_MAX_NUM_SEQS, GPU_MAX_NUM_BATCHED_TOKENS),
            None => (CPU_MAX_NUM_SEQS, CPU_MAX_NUM_BATCHED_TOKENS),
        };
        let max_num_seqs = args.max_num_seqs.unwrap_or(seqs);
        let max_num_batched_tokens = args.max_num_batched_tokens.unwrap_or_else(|| tokens.max(max_num_seqs));
        if max_num_batched_tokens < max_num_seqs {
            let message = format!(
                "{max_num_batched_tokens} is less than one token for each of {max_num_seqs} sequences; raise it or lower \
                 --max-num-seqs"
            );
            return Err(error("max-num-batched-tokens", message));
        }
        let model_context = u32::try_from(spec.max_model_len()).unwrap_or(u32::MAX);
        let wanted_len = wanted_model_len(args, spec, model_context)?;
        let mut runner = RunnerConfig {
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len: wanted_len,
            block_size: args.block_size,
            num_blocks: 1,
            kv_dtype: match machine.gpu_memory {
                Some(_) => gpu::kv_dtype(args, spec.dtype),
                None => args.kv_cache_dtype.dtype().unwrap_or_else(|| default_kv_dtype(spec.dtype)),
            },
            quant: args.quantize.format(),
        };
        runner.num_blocks = num_blocks(args, spec, &runner, machine)?;
        runner.max_model_len = fitting_model_len(args, &runner)?;
        let memory = plan(args, spec, &runner)?;
        let limits = Limits {
            vocab_size: u32::try_from(spec.vocab_size).unwrap_or(u32::MAX),
            max_model_len: runner.max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            max_queued_requests: args.max_queued_requests,
            block_size: runner.block_size,
            num_blocks: runner.num_blocks,
            ..Limits::default()
        };
        Ok(Self {
            threads: threads(args, machine)?,
            tensor_parallel_size: args.tensor_parallel_size,
            weights: WeightPlan::new(spec, runner.quant),
            num_host_blocks: num_host_blocks(args, &memory, machine)?,
            kv_memory: KvMemory::OnUse,
            memory,
            runner,
            limits,
            prefix_cache: !args.no_prefix_cache,
            model_context,
            policy: Policy::default(),
        })
    }

    /// Counts the adapters, which are not part of the model's shape.
    ///
    /// # Errors
    /// The model cannot be split over so many ranks.
    pub fn count_adapters(&mut self, checkpoint: &Checkpoint) -> Result<(), ConfigError> {
        self.memory = MemoryPlan::of_checkpoint(checkpoint, &self.runner, self.tensor_parallel_size)
            .map_err(|refused| error("tensor-parallel-size", refused.to_string()))?;
        Ok(())
    }

    /// For a server: keys and values get their memory before requests wait for it, unless that is most of what is free.
    pub fn populate_kv(&mut self, machine: &Machine) {
        if self.memory.kv_bytes().saturating_mul(self.tensor_parallel_size.into())
            <= machine.available_memory.0 / 2
        {
            self.kv_memory = KvMemory::WhenIdle;
        }
    }

    /// A GPU's memory, measured after the largest step, leaves `budget` for keys and values, of which `num_blocks` blocks
    /// were made.
    ///
    /// # Errors
    /// The user asked for a larger cache, or for longer sequences than this one holds.
    pub fn take_measured_pool(
        &mut self,
        args: &EngineArgs,
        num_blocks: u32,
        budget: Bytes,
    ) -> Result<(), ConfigError> {
        if args.kv_cache_memory.is_some() && num_blocks < self.runner.num_blocks {
            let message = format!(
                "weights and activations leave {budget} of this GPU's memory for it; lower it, or raise \
                 --gpu-memory-utilization"
            );
            return Err(error("kv-cache-memory", message));
        }
        self.runner.num_blocks = num_blocks;
        self.runner.max_model_len = fitting_model_len(args, &self.runner)?;
        self.memory.num_blocks = num_blocks;
        self.limits.num_blocks = num_blocks;
        self.limits.max_model_len = self.runner.max_model_len;
        Ok(())
    }

    /// The KV cache's second tier, of all ranks.
    pub fn host_bytes(&self) -> u64 {
        u64::from(self.num_host_blocks) * self.memory.kv_block_bytes * u64::from(self.tensor_parallel_size)
    }

    /// Of quantized weights: `int4: 4.28 bits per weight (304.1 MiB); left as they are: norms (256 KiB)`.
    pub fn quantized(&self) -> Option<String> {
        let WeightPlan { quant, bytes, unquantized_bytes, unquantized, .. } = &self.weights;
        let (total, rest) = (Bytes(*bytes), Bytes(*unquantized_bytes));
        let (bits, kinds) = (self.weights.bits_per_weight(), unquantized.join(", "));
        let text = format!(
            "{}: {bits:.2} bits per weight ({total}); left as they are: {kinds} ({rest})",
            quant.name()
        );
        (*quant != QuantFormat::None).then_some(text)
    }
}

/// Refuses server settings that cannot be meant.
///
/// # Errors
/// The first of them.
pub fn check_server(args: &ServerArgs) -> Result<(), ConfigError> {
    let message = match (&args.tls_cert, &args.tls_key, &args.tls_client_ca) {
        (Some(_), None, _) => Some(("tls-cert", "needs --tls-key, the file with its private key")),
        (None, Some(_), _) => Some(("tls-key", "needs --tls-cert, the file with its certificate")),
        (None, None, Some(_)) => Some(("tls-client-ca", "needs --tls-cert and --tls-key")),
        _ => None,
    };
    match message {
        Some((flag, message)) => Err(error(flag, message.into())),
        None if args.api_key.as_ref().is_some_and(|key| key.trim().is_empty()) => {
            Err(error("api-key", "must not be empty".into()))
        }
        None => Ok(()),
    }
}

fn check_supported(args: &EngineArgs, spec: &ModelSpec, machine: &Machine) -> Result<(), ConfigError> {
    let fail = |flag, message: &str| Err(error(flag, message.into()));
    let is_on_gpu = machine.gpu_memory.is_some();
    if args.device == Device::Cuda && !is_on_gpu {
        return fail(
            "device",
            "no GPU can be used here; use cpu, or a build with --features cuda on a machine with one",
        );
    }
    if args.quantize == Quantize::Fp8 && !is_on_gpu {
        return fail("quantize", "fp8 weights are not supported on cpu; use int8 or int4");
    }
    if args.batch_invariant == Switch::Off && !is_on_gpu {
        return fail("batch-invariant", "the CPU backend is always batch invariant; use auto or on");
    }
    if is_on_gpu && args.host_cache_memory.0 > 0 {
        return fail(
            "host-cache-memory",
            "keys and values in host memory are not supported on a GPU yet; leave it out",
        );
    }
    if !(args.gpu_memory_utilization > 0.0 && args.gpu_memory_utilization <= 1.0) {
        return fail("gpu-memory-utilization", "must be above 0 and at most 1");
    }
    if !args.block_size.is_power_of_two() {
        return fail("block-size", "must be a power of two");
    }
    if let Some(dtype) = args.dtype.dtype().filter(|&dtype| dtype != spec.dtype) {
        let stored = spec.dtype;
        let message = format!(
            "{dtype} differs from the checkpoint's {stored}, and converting is not supported yet; use auto"
        );
        return Err(error("dtype", message));
    }
    if args.kv_cache_dtype.dtype() == Some(DType::F8E4M3) && !is_on_gpu {
        let message = "fp8 keys and values are not supported on cpu; use auto, int8, bf16, f16 or f32".into();
        return Err(error("kv-cache-dtype", message));
    }
    Ok(())
}

/// Where the memory of each rank goes; refuses numbers of ranks that the model cannot be split over.
fn plan(args: &EngineArgs, spec: &ModelSpec, runner: &RunnerConfig) -> Result<MemoryPlan, ConfigError> {
    MemoryPlan::of_rank(spec, runner, args.tensor_parallel_size)
        .map_err(|refused| error("tensor-parallel-size", refused.to_string()))
}

/// The cores, or what the user says; on the processor every rank needs one.
fn threads(args: &EngineArgs, machine: &Machine) -> Result<u32, ConfigError> {
    let (threads, ranks) = (args.threads.unwrap_or(machine.cores), args.tensor_parallel_size);
    if machine.gpu_memory.is_none() && threads < ranks {
        let message = format!("{ranks} ranks need a thread each, but there are {threads}; raise --threads");
        return Err(error("tensor-parallel-size", message));
    }
    Ok(threads)
}

/// What the user asked for, or else what the model was made for.
fn wanted_model_len(args: &EngineArgs, spec: &ModelSpec, model_context: u32) -> Result<u32, ConfigError> {
    let Some(wanted) = args.max_model_len else { return Ok(model_context) };
    let Mixer::Gqa(gqa) = &spec.layers[0].mixer;
    // Dynamic scaling adapts to any length; every other kind is fixed by the checkpoint.
    let extends = matches!(gqa.rope.scaling, RopeScaling::Dynamic { .. });
    if wanted > model_context && !extends {
        let message = format!("{wanted} is more than the {model_context} positions this model knows");
        return Err(error("max-model-len", message));
    }
    Ok(wanted)
}

/// bf16 models keep bf16 keys and values; for others f32 costs memory but no accuracy.
fn default_kv_dtype(model: DType) -> DType {
    if model == DType::BF16 { DType::BF16 } else { DType::F32 }
}

/// Blocks in the pool: as many as the user's memory holds, or else as many as the limits can use within the default budget.
fn num_blocks(
    args: &EngineArgs,
    spec: &ModelSpec,
    runner: &RunnerConfig,
    machine: &Machine,
) -> Result<u32, ConfigError> {
    let plan = plan(args, spec, runner)?;
    let ranks = u64::from(args.tensor_parallel_size);
    let blocks = match args.kv_cache_memory {
        Some(budget) => plan.num_blocks_in(budget.0),
        None => {
            let share = match machine.gpu_memory {
                // Less when weights and adapters are there: see `take_measured_pool`.
                Some(free) => free.0,
                None => default_kv_bytes(machine) / ranks,
            };
            let useful = u64::from(runner.max_num_seqs) * u64::from(runner.max_blocks_per_seq());
            plan.num_blocks_in(share).min(u32::try_from(useful).unwrap_or(u32::MAX))
        }
    };
    // With one block, a sequence of one block could never be copied or preempted; two are the least that can work.
    if blocks < 2 {
        let needed = Bytes(2 * plan.kv_block_bytes);
        return Err(error(
            "kv-cache-memory",
            format!("two KV blocks of this model need {needed}; give it more memory"),
        ));
    }
    Ok(blocks)
}

/// Of main memory, for the KV cache of all ranks.
fn default_kv_bytes(machine: &Machine) -> u64 {
    ((machine.available_memory.0 as f64 * DEFAULT_KV_SHARE) as u64).min(MAX_DEFAULT_KV)
}

/// Blocks in host memory: as many as the user's memory holds.
fn num_host_blocks(args: &EngineArgs, memory: &MemoryPlan, machine: &Machine) -> Result<u32, ConfigError> {
    let Bytes(wanted) = args.host_cache_memory;
    if wanted == 0 {
        return Ok(0);
    }
    let ranks = u64::from(args.tensor_parallel_size);
    let blocks = memory.num_blocks_in(wanted / ranks);
    if blocks == 0 {
        let needed = Bytes(memory.kv_block_bytes * ranks);
        return Err(error("host-cache-memory", format!("one KV block of this model needs {needed}")));
    }
    let free = machine.available_memory;
    if wanted > free.0 {
        let message = format!("{} is more than the {free} of memory that are free", Bytes(wanted));
        return Err(error("host-cache-memory", message));
    }
    Ok(blocks)
}

/// The longest sequence the pool can hold, unless the user insists on a longer one.
fn fitting_model_len(args: &EngineArgs, runner: &RunnerConfig) -> Result<u32, ConfigError> {
    let pool = u64::from(runner.num_blocks) * u64::from(runner.block_size);
    let wanted = u64::from(runner.max_model_len);
    if wanted <= pool {
        return Ok(runner.max_model_len);
    }
    if args.max_model_len.is_some() {
        let message = format!(
            "{wanted} tokens do not fit the KV cache, which holds {pool}; lower it or raise --kv-cache-memory"
        );
        return Err(error("max-model-len", message));
    }
    Ok(pool as u32)
}

fn error(flag: &'static str, message: String) -> ConfigError {
    ConfigError { flag, message }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (runner, memory) = (&self.runner, &self.memory);
        if let Some(format) = self.quantized() {
            writeln!(f, "weights  {format}")?;
        }
        writeln!(
            f,
            "memory   {}weights {}{}, KV cache {} ({} tokens in {} blocks of {}, {}){}, workspace {}",
            match self.tensor_parallel_size {
                1 => String::new(),
                ranks => format!("{ranks} ranks, each: "),
            },
            Bytes(memory.weight_bytes),
            match memory.adapter_bytes {
                0 => String::new(),
                bytes => format!(", adapters {}", Bytes(bytes)),
            },
            Bytes(memory.kv_bytes()),
            grouped(memory.kv_tokens()),
            grouped(runner.num_blocks.into()),
            runner.block_size,
            runner.kv_dtype,
            match self.num_host_blocks {
                0 => String::new(),
                blocks => {
                    format!(
                        ", behind it {} of host memory ({} blocks)",
                        Bytes(self.host_bytes()),
                        grouped(blocks.into())
                    )
                }
            },
            Bytes(memory.workspace_bytes),
        )?;
        write!(f, "limits   {} tokens a sequence", grouped(runner.max_model_len.into()))?;
        if runner.max_model_len < self.model_context {
            write!(f, " (of the model's {})", grouped(self.model_context.into()))?;
        }
        write!(
            f,
            ", {} sequences and {} tokens a step, {} requests queued; prefix cache {}",
            runner.max_num_seqs,
            grouped(runner.max_num_batched_tokens.into()),
            self.limits.max_queued_requests,
            if self.prefix_cache { "on" } else { "off" },
        )?;
        if let Policy::DeadlineSlack(LatencyTargets { ttft, itl, .. }) = &self.policy {
            let seconds = |time: Micros| time.0 as f64 / 1e6;
            let (ttft, itl) = (seconds(*ttft), seconds(*itl));
            write!(
                f,
                "\ntargets  first token in {ttft} s, then one in {itl} s; what cannot be in time is refused"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command, ServeArgs};

    fn args(flags: &str) -> ServeArgs {
        let line = ["quire", "serve"].into_iter().chain(flags.split_whitespace());
        match Cli::try_parse_from(line).unwrap().command {
            Command::Serve(args) => *args,
            other => panic!("expected serve, got {other:?}"),
        }
    }

    /// 2 layers, 2 KV heads of 16, bf16: 256 bytes of KV a token, 4 KiB a block of 16.
    fn spec() -> ModelSpec {
        ModelSpec::from_config_json(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
                "max_position_embeddings": 256, "torch_dtype": "bfloat16", "tie_word_embeddings": true}"#,
        )
        .unwrap()
    }

    const ROOMY: Machine = Machine { cores: 6, available_memory: Bytes(1 << 40), gpu_memory: None };

    fn resolve(flags: &str, machine: &Machine) -> Result<Config, ConfigError> {
        Config::resolve(&args(flags).engine, &spec(), machine)
    }

    #[test]
    fn defaults_come_from_model_and_machine() {
        let config = resolve("", &ROOMY).unwrap();
        assert_eq!(config.threads, 6);
        assert_eq!((config.limits.max_model_len, config.limits.vocab_size), (256, 100));
        assert_eq!(config.runner.num_blocks, 64 * 256 / 16, "what the limits can use, not more");
        assert_eq!(config.runner.kv_dtype, DType::BF16);
        assert!(config.prefix_cache);
        let f32_spec = ModelSpec { dtype: DType::F16, ..spec() };
        let config = Config::resolve(&args("").engine, &f32_spec, &ROOMY).unwrap();
        assert_eq!(config.runner.kv_dtype, DType::F32);
    }

    #[test]
    fn little_memory_shortens_sequences() {
        let small = Machine { cores: 1, available_memory: Bytes(100 << 10), ..ROOMY };
        let config = resolve("", &small).unwrap();
        assert_eq!(config.runner.num_blocks, 10, "40 % of 100 KiB in blocks of 4 KiB");
        assert_eq!(config.limits.max_model_len, 160);
        assert!(config.to_string().contains("(of the model's 256)"), "{config}");
        let error = resolve("--max-model-len 256", &small).unwrap_err();
        assert!(error.flag == "max-model-len" && error.message.contains("holds 160"), "{error}");
        let none = Machine { cores: 1, available_memory: Bytes(4096), ..ROOMY };
        assert_eq!(resolve("", &none).unwrap_err().flag, "kv-cache-memory");
    }

    #[test]
    fn a_gpu_says_how_large_its_cache_is() {
        let gpu = Machine { gpu_memory: Some(Bytes(1 << 40)), ..ROOMY };
        let measured = |flags: &str, num_blocks| {
            let mut config = resolve(flags, &gpu).unwrap();
            let taken = config.take_measured_pool(&args(flags).engine, num_blocks, Bytes(1 << 20));
            taken.map(|()| config)
        };
        assert_eq!(resolve("", &gpu).unwrap().runner.num_blocks, 512 * 256 / 16, "what the limits can use");
        let config = measured("", 100).unwrap();
        assert_eq!((config.memory.kv_bytes(), config.limits.num_blocks), (100 * 4096, 100));
        assert_eq!(config.limits.max_model_len, 256);
        assert_eq!(measured("", 10).unwrap().limits.max_model_len, 160, "what the pool holds");
        assert_eq!(measured("--max-model-len 256", 10).unwrap_err().flag, "max-model-len");
        let error = measured("--kv-cache-memory 64MiB", 100).unwrap_err();
        assert!(error.flag == "kv-cache-memory" && error.message.contains("leave 1 MiB"), "{error}");
    }

    #[test]
    fn explicit_memory_is_used_in_full() {
        let config = resolve("--kv-cache-memory 64MiB", &ROOMY).unwrap();
        assert_eq!(
            config.memory.kv_bytes(),
            64 << 20,
            "what running sequences leave serves the prefix cache"
        );
        assert_eq!(resolve("--kv-cache-memory 5KiB", &ROOMY).unwrap_err().flag, "kv-cache-memory");
    }

    #[test]
    fn host_memory_is_off_unless_asked_for() {
        let config = resolve("", &ROOMY).unwrap();
        assert_eq!(config.num_host_blocks, 0);
        assert!(!config.to_string().contains("host"), "{config}");
        let config = resolve("--host-cache-memory 64MiB", &ROOMY).unwrap();
        assert_eq!(config.host_bytes(), 64 << 20);
        assert!(config.to_string().contains("behind it 64 MiB of host memory (16,384 blocks)"), "{config}");
        assert_eq!(resolve("--host-cache-memory 5B", &ROOMY).unwrap_err().flag, "host-cache-memory");
        let small = Machine { cores: 1, available_memory: Bytes(1 << 20), gpu_memory: None };
        let error = resolve("--host-cache-memory 2MiB", &small).unwrap_err();
        assert!(error.message.contains("2 MiB is more than the 1 MiB"), "{error}");
    }

    #[test]
    fn ranks_share_threads_and_memory() {
        let (whole, split) =
            (resolve("", &ROOMY).unwrap(), resolve("--tensor-parallel-size 2", &ROOMY).unwrap());
        assert_eq!((split.threads, split.tensor_parallel_size), (6, 2));
        assert_eq!(split.memory.kv_block_bytes * 2, whole.memory.kv_block_bytes, "a head of two each");
        let small = Machine { cores: 2, available_memory: Bytes(100 << 10), ..ROOMY };
        let blocks = |flags: &str| resolve(flags, &small).unwrap().runner.num_blocks;
        assert_eq!(blocks("--tensor-parallel-size 2"), blocks(""), "half the bytes for half the heads");
        assert_eq!(blocks("--tensor-parallel-size 2 --kv-cache-memory 40KiB"), 20, "on each");
        let host = resolve("--tensor-parallel-size 2 --host-cache-memory 64KiB", &ROOMY).unwrap();
        assert_eq!(host.host_bytes(), 64 << 10, "of both together");
        let text = split.to_string();
        assert!(text.starts_with("memory   2 ranks, each: weights "), "{text}");
        let error = resolve("--tensor-parallel-size 3", &ROOMY).unwrap_err();
        assert!(error.message.contains("query heads: 4") && error.message.ends_with("1, 2, 4"), "{error}");
    }

    #[test]
    fn quantization_is_planned_and_announced() {
        let plain = resolve("", &ROOMY).unwrap();
        assert!(!plain.to_string().contains("bits per weight"), "{plain}");
        for (format, bits) in [("int8", 8.5..8.8), ("int4", 4.8..5.2)] {
            let config = resolve(&format!("--quantize {format}"), &ROOMY).unwrap();
            assert_eq!(config.runner.quant.name(), format);
            assert_eq!(config.memory.weight_bytes, config.weights.bytes);
            // Scales weigh more on rows of 64 than on a real model's.
            assert!(bits.contains(&config.weights.bits_per_weight()), "{config}");
            let text = config.to_string();
            let line = text.lines().next().unwrap();
            assert!(line.starts_with(&format!("weights  {format}: ")), "{line}");
            assert!(line.ends_with("left as they are: norms (1.2 KiB)"), "{line}");
        }
    }

    #[test]
    fn a_gpu_keeps_fp8_keys_and_values_in_half_the_memory() {
        let gpu = Machine { gpu_memory: Some(Bytes(1 << 40)), ..ROOMY };
        let plain = resolve("", &gpu).unwrap();
        let fp8 = resolve("--kv-cache-dtype fp8 --quantize int4", &gpu).unwrap();
        assert_eq!((plain.runner.kv_dtype, fp8.runner.kv_dtype), (DType::BF16, DType::F8E4M3));
        // An element and its share of a factor of four bytes for each vector.
        let (bf16, head_dim) = (plain.memory.kv_block_bytes, 16);
        assert_eq!(fp8.memory.kv_block_bytes * 2 * head_dim, bf16 * (head_dim + 4));
    }

    #[test]
    fn every_missing_feature_names_its_flag() {
        for (flags, flag) in [
            ("--device cuda", "device"),
            ("--tensor-parallel-size 3", "tensor-parallel-size"),
            ("--tensor-parallel-size 4 --threads 3", "tensor-parallel-size"),
            ("--quantize fp8", "quantize"),
            ("--batch-invariant off", "batch-invariant"),
            ("--dtype f16", "dtype"),
            ("--kv-cache-dtype fp8", "kv-cache-dtype"),
            ("--gpu-memory-utilization 1.5", "gpu-memory-utilization"),
            ("--block-size 12", "block-size"),
            ("--max-model-len 257", "max-model-len"),
            ("--max-num-seqs 64 --max-num-batched-tokens 63", "max-num-batched-tokens"),
        ] {
            assert_eq!(resolve(flags, &ROOMY).unwrap_err().flag, flag, "{flags}");
        }
        for (flags, flag) in [
            ("--tls-cert a", "tls-cert"),
            ("--tls-key a", "tls-key"),
            ("--tls-client-ca a", "tls-client-ca"),
            ("--api-key=", "api-key"),
        ] {
            assert_eq!(check_server(&args(flags).server).unwrap_err().flag, flag, "{flags}");
        }
        resolve(
            "--device cpu --dtype bf16 --quantize none --batch-invariant on --kv-cache-dtype f32",
            &ROOMY,
        )
        .unwrap();
        check_server(&args("--api-key k --quota-store memory --tenants a").server).unwrap();
    }
}
