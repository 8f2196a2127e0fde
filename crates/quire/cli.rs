//! The command line: which commands there are and what they take.

use std::ops::Range;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::args::{CommonArgs, EngineArgs, ServerArgs};
use crate::bench::args::BenchArgs;
use crate::sim_trace::Goals;
use crate::units::Bytes;

const EXAMPLES: &str = "\
Examples:
  quire serve                                    serve the built-in demo model
  quire serve Qwen/Qwen3-0.6B                    download a model from the hub once, then serve it
  quire serve ./my-model --port 9000             serve a local checkpoint
  quire run -p 'Hello!'                          one answer, in the terminal
  quire inspect ./my-model                       what a checkpoint is and what memory it needs
  quire bench latency                            how fast the built-in demo model is here
  quire doctor                                   what this machine offers";

/// High-throughput batched LLM serving: continuous batching, paged KV cache, one binary.
#[derive(Parser, Clone, Debug)]
#[command(name = "quire", version, about, after_help = EXAMPLES, max_term_width = 110, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Serve a model over HTTP (OpenAI's API) and gRPC
    Serve(Box<ServeArgs>),
    /// Chat with a model in the terminal
    Run(RunArgs),
    /// Show a model's architecture, tensors and memory plan without loading its weights
    Inspect(InspectArgs),
    /// Measure speed: of a batch, of many requests, of each operation
    Bench(BenchArgs),
    /// Show what this machine offers: cores, SIMD, memory bandwidth, GPU
    Doctor,
    /// Run the real scheduler and engine on made-up workloads, and check every invariant
    Sim(SimArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell; for bash: source <(quire completions bash)
        shell: Shell,
    },
}

const SERVE_EXAMPLES: &str = "\
Examples:
  quire serve
  quire serve Qwen/Qwen3-0.6B --host 0.0.0.0 --max-num-seqs 32 --kv-cache-memory 2GiB
  quire serve --config quire.toml
  QUIRE_API_KEY=secret quire serve ./my-model

Then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{\"model\": \"quire-demo\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'

Every flag is also a TOML key (max_num_seqs = 32) and an environment variable (QUIRE_MAX_NUM_SEQS=32).";

/// `quire serve`
#[derive(Args, Clone, Debug)]
#[command(after_help = SERVE_EXAMPLES, args_override_self = true)]
pub struct ServeArgs {
    /// What to run.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// How to offer it.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Files and logs.
    #[command(flatten)]
    pub common: CommonArgs,
}

const RUN_EXAMPLES: &str = "\
Examples:
  quire run                                      chat with the built-in demo model
  quire run -p 'What is Quire?'                  one answer to standard output
  cat question.txt | quire run ./my-model        the question comes from a pipe

While chatting: Ctrl-C stops the answer, /clear forgets the conversation, /exit or Ctrl-D leaves.";

/// `quire run`
#[derive(Args, Clone, Debug)]
#[command(after_help = RUN_EXAMPLES, args_override_self = true)]
pub struct RunArgs {
    /// What to run.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Answer this and leave
    #[arg(short, long, value_name = "PROMPT")]
    pub prompt: Option<String>,
    /// Instructions for the whole conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// 0 always takes the most likely token [default: the model's]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Longest answer in tokens [default: what fits]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Makes random choices repeatable
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Files and logs.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// `quire inspect`
#[derive(Args, Clone, Debug)]
#[command(args_override_self = true)]
pub struct InspectArgs {
    /// What to look at.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// List every tensor, not only one layer's
    #[arg(long)]
    pub all_tensors: bool,
    /// Files and logs.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// `quire sim`
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:\n  quire sim --seed 7\n  quire sim --seeds 0..500\n  \
    quire sim --trace conversation.jsonl.gz --policy deadline --gpu h200 --model llama-3.1-8b --capacity")]
pub struct SimArgs {
    /// Run this one seed
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    pub seed: Option<u64>,
    /// Run the seeds from A up to but not including B
    #[arg(long, value_name = "A..B", value_parser = parse_seeds)]
    pub seeds: Option<Range<u64>>,
    /// Serve a recorded trace in virtual time instead: Azure (CSV) or Mooncake (JSON lines), plain or gzip
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "seeds"])]
    pub trace: Option<PathBuf>,
    /// Order of requests: by arrival, or by slack to the latency targets
    #[arg(long, value_enum, default_value = "deadline", requires = "trace")]
    pub policy: SimPolicy,
    /// Which cached blocks go first
    #[arg(long, value_enum, default_value = "learned", requires = "trace")]
    pub eviction: SimEviction,
    /// The device whose speed is simulated
    #[arg(long, default_value = "h200", requires = "trace")]
    pub gpu: String,
    /// The model whose speed is simulated
    #[arg(long, default_value = "llama-3.1-8b", requires = "trace")]
    pub model: String,
    /// Tokens in a step at most [default: 8192]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), requires = "trace")]
    pub max_num_batched_tokens: Option<u32>,
    /// Sequences in a step at most [default: 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), requires = "trace")]
    pub max_num_seqs: Option<u32>,
    /// Device memory for keys and values, such as 20GB [default: what the device has beside the model]
    #[arg(long, value_name = "SIZE", requires = "trace")]
    pub kv_cache_memory: Option<Bytes>,
    /// Host memory for keys and values, such as 500GB; 0: none
    #[arg(long, value_name = "SIZE", default_value = "0", requires = "trace")]
    pub host_cache_memory: Bytes,
    /// Bytes per second between device and host memory
    #[arg(long, value_name = "SIZE", default_value = "50GB", requires = "trace")]
    pub host_bandwidth: Bytes,
    /// Requests per recorded request: 2 is twice the trace's rate
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = parse_scale, requires = "trace")]
    pub rate_scale: f64,
    /// Find the highest rate at which 90 % of the requests are within the targets
    #[arg(long, requires = "trace")]
    pub capacity: bool,
    /// Find the fewest devices that keep these promises, such as "ttft_p99<2s,itl_p99<50ms"; refused requests count as
    /// never answered, devices take requests in turn
    #[arg(long, value_name = "GOALS", requires = "trace", conflicts_with = "capacity")]
    pub plan: Option<Goals>,
    /// Deal the requests out to so many tenants, the k-th of whom sends 1/k of what the first one does
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    #[arg(requires = "trace")]
    pub tenants: u32,
    /// Write plots (SVG) of what clients saw into this directory
    #[arg(long, value_name = "DIR", requires = "trace")]
    pub plot: Option<PathBuf>,
    /// Print the figures as one JSON object
    #[arg(long, requires = "trace")]
    pub json: bool,
}

/// `--policy`
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimPolicy {
    /// First come, first served
    Fcfs,
    /// Least slack first, chunks sized by the cost model, early refusal
    Deadline,
}

/// `--eviction`
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimEviction {
    /// Least recently used
    Lru,
    /// By what was learned of reuse
    Learned,
}

fn parse_scale(text: &str) -> Result<f64, String> {
    let scale: f64 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    let usable = (1e-3..=1e3).contains(&scale);
    if usable { Ok(scale) } else { Err(format!("{scale} is not between 0.001 and 1000")) }
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let wrong = || format!("`{text}` is not a range of seeds; write for example 0..500");
    let (start, end) = text.split_once("..").ok_or_else(wrong)?;
    let range = start.parse().map_err(|_| wrong())?..end.parse().map_err(|_| wrong())?;
    if range.is_empty() { Err(wrong()) } else { Ok(range) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn contract_of_the_command_line() {
        let serve = "quire serve MODEL --host 127.0.0.1 --port 8000 --grpc-port 8001 --served-model-name NAME \
            --device auto --threads 2 --dtype auto --quantize none --load-format auto --executor auto \
            --max-model-len 9 --max-num-seqs 9 --max-num-batched-tokens 9 --max-queued-requests 9 --block-size 16 \
            --no-prefix-cache --batch-invariant auto --kv-cache-memory 4GiB --kv-cache-dtype auto \
            --gpu-memory-utilization 0.92 --tensor-parallel-size 1 --ttft-target 2s --itl-target 50ms \
            --config quire.toml --api-key KEY --tenants tenants.toml --quota-store memory --chat-template FILE \
            --metrics-compat vllm --log-format text --audit-log - --audit-on-full drop --admin-addr 127.0.0.1:9091 --admin-token TOKEN --shutdown-timeout 60s --tls-cert c --tls-key k --tls-client-ca a";
        Cli::try_parse_from(serve.split_whitespace()).unwrap();
        for line in [
            "quire run -p hi",
            "quire inspect MODEL",
            "quire doctor",
            "quire bench latency --json",
            "quire bench throughput --json",
            "quire bench kernels --json",
            "quire sim --seed 1",
            "quire sim --seeds 0..9",
            "quire sim --trace t.csv --policy fcfs --gpu h200 --model llama-3.1-8b --plot plots --tenants 4 --json",
            "quire completions bash",
        ] {
            Cli::try_parse_from(line.split_whitespace()).unwrap();
        }
        for line in [
            "quire serve --portt 1",
            "quire serve --dtype f64",
            "quire sim --seeds 9..9",
            "quire serve --port 70000",
        ] {
            assert!(Cli::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }
}
