//! What `quire bench` takes. Flags that `vllm bench` has too mean the same here.

use clap::{Args, Subcommand};

use super::serve::args::ServeLoadArgs;
use crate::args::{CommonArgs, EngineArgs, LogFormat};

/// `quire bench`
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

impl BenchArgs {
    /// How log lines look: those that measure a model read settings as other commands do.
    pub(crate) fn log_format(&self) -> LogFormat {
        match &self.command {
            BenchCommand::Latency(args) => args.model.common.log_format,
            BenchCommand::Throughput(args) => args.model.common.log_format,
            BenchCommand::Kernels(args) => args.model.common.log_format,
            BenchCommand::Serve(_) | BenchCommand::Scheduler(_) => LogFormat::Text,
        }
    }
}

/// The measurements.
#[derive(Subcommand, Clone, Debug)]
pub enum BenchCommand {
    /// Requests to a server over HTTP: latency, throughput, goodput, CPU time per streamed token
    Serve(Box<ServeLoadArgs>),
    /// One batch at a time: prefill and decode speed, time of a decode step
    Latency(LatencyArgs),
    /// Many requests at once: requests and tokens per second of the whole engine
    Throughput(ThroughputArgs),
    /// Where a step's time goes, operation by operation, against what this machine can do
    Kernels(KernelsArgs),
    /// What the scheduler itself costs: a step at up to 16,384 sequences, a long prompt, a token on its way to a reader
    Scheduler(SchedulerArgs),
}

const SCHEDULER_HELP: &str = "\
Planning a step and taking its results, with prefix cache, stop checks, fair shares and counters on and nothing on the
device, in CPU time of the thread. Rows, as in the JSON:
  step_us/SEQUENCES                     one step in which so many sequences decode, median
  prompt_16k_hash_us|admit_us|...       a prompt of 16,384 tokens: addresses of its blocks, admission, a full hit, release
  prompt_131k_...                       the same of 131,072 tokens
and then what a token costs from the scheduler to who reads it in this process, in time: one thread for the engine with a
device that takes none, one for as many readers:
  engine_token_us/READERS               time a token, the metrics of a server included
  engine_tokens_per_event/READERS       1: each was read by itself";

/// `quire bench scheduler`
#[derive(Args, Clone, Debug)]
#[command(after_help = SCHEDULER_HELP, args_override_self = true)]
pub struct SchedulerArgs {
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

const LATENCY_HELP: &str = "\
Examples:
  quire bench latency                                        the built-in demo model
  quire bench latency ./my-model --batch-size 1,8,32
  quire bench latency benches/shapes/qwen3-0.6b --load-format dummy --json

For each batch size the prompts are computed once; decode passes then find their KV in the prefix cache, so that all
sequences decode together from the first step on and no prompt disturbs the figures. Rows, as in the JSON:
  prefill_tok_s/MODEL/INPUT_LEN/DTYPE   prompt tokens per second at the smallest batch size
  decode_tok_s/MODEL/BATCH/DTYPE        generated tokens per second of steps in which the whole batch decodes
  step_us_p50|p90/MODEL/BATCH/DTYPE     time of such a step
  latency_ms/MODEL/BATCH/DTYPE          from the prompts to the last token of the batch
MODEL is the served name in lower case without the organisation; DTYPE that of the weights.";

/// `quire bench latency`
#[derive(Args, Clone, Debug)]
#[command(after_help = LATENCY_HELP, args_override_self = true)]
pub struct LatencyArgs {
    /// Which model.
    #[command(flatten)]
    pub model: BenchModelArgs,
    /// Sequences in the batch; several sizes may be listed
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Load")]
    pub batch_size: Vec<u32>,
    /// Tokens of each prompt, drawn at random from a fixed seed
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Load")]
    pub input_len: u32,
    /// Tokens generated for each sequence, greedily; nothing ends a sequence earlier
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u32).range(2..), help_heading = "Load")]
    pub output_len: u32,
    /// Repetitions before those that count
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=10_000), help_heading = "Load")]
    pub num_iters_warmup: u32,
    /// Repetitions that count; throughputs are their median
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = "Load")]
    pub num_iters: u32,
}

const THROUGHPUT_HELP: &str = "\
Examples:
  quire bench throughput
  quire bench throughput ./my-model --num-prompts 64 --input-len 512 --output-len 128

All requests are submitted at the start, and the clock stops with the last token. Rows, as in the JSON:
  requests_s/MODEL/INPUTxOUTPUT/DTYPE     requests per second
  total_tok_s/MODEL/INPUTxOUTPUT/DTYPE    prompt and generated tokens per second
  output_tok_s/MODEL/INPUTxOUTPUT/DTYPE   generated tokens per second";

/// `quire bench throughput`
#[derive(Args, Clone, Debug)]
#[command(after_help = THROUGHPUT_HELP, args_override_self = true)]
pub struct ThroughputArgs {
    /// Which model.
    #[command(flatten)]
    pub model: BenchModelArgs,
    /// Requests
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Load")]
    pub num_prompts: u32,
    /// Tokens of each prompt, drawn at random from a fixed seed
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Load")]
    pub input_len: u32,
    /// Tokens generated for each request, greedily; nothing ends one earlier
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Load")]
    pub output_len: u32,
}

const KERNELS_HELP: &str = "\
Examples:
  quire bench kernels
  quire bench kernels benches/shapes/qwen3-0.6b --load-format dummy --batch-size 1,8

At the start the machine is measured with all threads: DRAM read bandwidth, and the peaks of multiply-adds in f32 and of
dot products of bf16 and of bytes, on registers. Then real steps of the real model run, one prefill of INPUT_LEN tokens
and decode steps at each batch size, and each operation's time is taken. `of limit` is the least time that the operation
could take, by its bytes from memory or by its operations at the peak of the units it uses, over the time it took; more
than 100 % means that caches helped. Operations on activations alone have no such limit. Rows, as in the JSON, where STEP is
prefill-INPUT_LEN or decode-BATCH:
  op_us/OP/MODEL/STEP/DTYPE          time in one step, all layers
  op_share/OP/MODEL/STEP/DTYPE       part of the step
  op_of_limit/OP/MODEL/STEP/DTYPE    part of what the machine could do
  step_us/MODEL/STEP/DTYPE           the whole step
mlp is gate, up, activation and down; qkv, o and lm_head are linear layers; rope includes QK-norm and the write to the
KV cache; other is what happens between operations.";

/// `quire bench kernels`
#[derive(Args, Clone, Debug)]
#[command(after_help = KERNELS_HELP, args_override_self = true)]
pub struct KernelsArgs {
    /// Which model.
    #[command(flatten)]
    pub model: BenchModelArgs,
    /// Sequences in the decode steps; several sizes may be listed
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,32", value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Load")]
    pub batch_size: Vec<u32>,
    /// Tokens of the prefill step, and of each sequence's context in the decode steps
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Load")]
    pub input_len: u32,
    /// Steps of each kind that count
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000), help_heading = "Load")]
    pub num_iters: u32,
}

/// The model, and the form of the report.
#[derive(Args, Clone, Debug)]
pub struct BenchModelArgs {
    /// What to run.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Files and logs.
    #[command(flatten)]
    pub common: CommonArgs,
    /// The model's name in the rows [default: the hub id, the directory's name, or quire-demo]
    #[arg(long, value_name = "NAME", help_heading = "Report")]
    pub served_model_name: Option<String>,
    /// Print one JSON object, {"machine": {…}, "rows": [{"name": …, "value": …, "unit": …}]}, and nothing else
    #[arg(long, help_heading = "Report")]
    pub json: bool,
}
