//! What `quire bench serve` takes. Flags that `vllm bench serve` has too mean the same here.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::units::parse_duration;

const SERVE_HELP: &str = "\
Examples:
  quire bench serve                                           start a server of the demo model, load it, stop it
  quire bench serve -- ./my-model --max-num-seqs 32           the same with these arguments of `quire serve`
  quire bench serve --base-url http://127.0.0.1:8000 --request-rate 4 --burstiness 0.5 --num-prompts 500
  quire bench serve --port 8000 --max-concurrency 32 --goodput ttft:2000 tpot:50 --html report.html
  quire bench serve --dataset-name sharegpt --dataset-path sharegpt.json --endpoint /v1/chat/completions
  quire bench serve --port 8000 --trace conversation_trace.jsonl --speed 2 --num-prompts 500

Every request is streamed. A token is counted when its event is read from the socket:
  TTFT   from the request to its first token          TPOT   time per further token, averaged over a request
  ITL    from event to event of one request           E2EL   from the request to its last token
Rows, as in the JSON:
  requests_s, output_tok_s, total_tok_s               completed requests and their tokens, per second of the run
  ttft_ms_mean|p50|p90|p99|max, tpot_ms_…, itl_ms_…, e2el_ms_…
  goodput_requests_s, goodput_share                   requests that met every --goodput target
  failed_requests, failed_requests/REASON             without those of the next row
  rejected_requests                                   refused with 429 and Retry-After
  tokens_per_event                                    above 1: tokens were coalesced, or had no text of their own
  events_per_read                                     above 1: several events came at once
  all_started_ms                                      until each request of the run had its first token
  sse_cpu_us_per_token                                CPU time of the server process over tokens streamed, whole run
  sse_cpu_us_per_token_steady                         the same while all requests were streaming, if ever they were
  client_cpu_us_per_token                             what this program took
Each CPU time is also split: …/user, …/system (the kernel; over loopback, the way to the client's socket is in it).";

/// `quire bench serve`
#[derive(Args, Clone, Debug)]
#[command(after_help = SERVE_HELP, args_override_self = true)]
pub struct ServeLoadArgs {
    /// Where the server is.
    #[command(flatten)]
    pub target: TargetArgs,
    /// What is sent.
    #[command(flatten)]
    pub dataset: DatasetArgs,
    /// When it is sent.
    #[command(flatten)]
    pub load: LoadArgs,
    /// What is reported.
    #[command(flatten)]
    pub report: ReportArgs,
}

/// Where the server is.
#[derive(Args, Clone, Debug)]
pub struct TargetArgs {
    /// A running server, such as http://127.0.0.1:8000 [default: start one]
    #[arg(long, value_name = "URL", conflicts_with_all = ["host", "port"], help_heading = "Server")]
    pub base_url: Option<String>,
    /// A running server's host [default: 127.0.0.1 if a port is given]
    #[arg(long, value_name = "HOST", help_heading = "Server")]
    pub host: Option<String>,
    /// A running server's port [default: 8000 if a host is given]
    #[arg(long, value_name = "PORT", help_heading = "Server")]
    pub port: Option<u16>,
    /// Start a server for this run, on a free port; what follows `--` are arguments of `quire serve`
    #[arg(long, conflicts_with_all = ["base_url", "host", "port", "server_pid"], help_heading = "Server")]
    pub spawn: bool,
    /// Arguments of `quire serve`
    #[arg(last = true, value_name = "SERVE_ARGS", conflicts_with_all = ["base_url", "host", "port", "server_pid"])]
    pub serve_args: Vec<OsString>,
    /// Process of a running server on this machine, to measure its CPU time
    #[arg(long, value_name = "PID", help_heading = "Server")]
    pub server_pid: Option<u32>,
    /// Protocol to speak; grpc sends prompts of token ids to quire.v1, and a URL then names the gRPC port
    #[arg(long, value_name = "NAME", default_value = "http", help_heading = "Server")]
    pub backend: Backend,
    /// Route to load
    #[arg(long, default_value = "/v1/completions", help_heading = "Server")]
    pub endpoint: Endpoint,
    /// Model to ask for [default: the first of /v1/models]
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    pub model: Option<String>,
    /// Sent as Authorization: Bearer KEY
    #[arg(long, value_name = "KEY", env = "QUIRE_API_KEY", hide_env_values = true, help_heading = "Server")]
    pub api_key: Option<String>,
}

/// What is sent.
#[derive(Args, Clone, Debug)]
pub struct DatasetArgs {
    /// random: prompts of random tokens (of short words for chat); sharegpt: conversations of a file
    #[arg(long, value_name = "NAME", default_value = "random", help_heading = "Prompts")]
    pub dataset_name: DatasetName,
    /// The file of sharegpt: a JSON list of {"conversations": [{"value": PROMPT}, {"value": ANSWER}, …]}
    #[arg(long, value_name = "FILE", required_if_eq("dataset_name", "sharegpt"), help_heading = "Prompts")]
    pub dataset_path: Option<PathBuf>,
    /// Tokens of a random prompt
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Prompts")]
    pub random_input_len: u32,
    /// Tokens generated for a random prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Prompts")]
    pub random_output_len: u32,
    /// Random lengths are uniform in LEN * (1 - R) to LEN * (1 + R); below 1
    #[arg(long, value_name = "R", default_value_t = 0.0, value_parser = parse_range_ratio, help_heading = "Prompts")]
    pub random_range_ratio: f64,
    /// Tokens before those of the prompt that all random prompts have in common
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Prompts")]
    pub random_prefix_len: u32,
    /// Random token ids are below this
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(2..), help_heading = "Prompts")]
    pub random_vocab_size: u32,
    /// Tokens generated for a conversation [default: those of the file's answer]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Prompts")]
    pub sharegpt_output_len: Option<u32>,
    /// Requests; of a trace, the first so many [default: 1000, or the whole trace]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Prompts")]
    pub num_prompts: Option<u32>,
    /// Replay a recorded trace (Azure LLM inference 2023 or Mooncake, perhaps gzipped): its times, its lengths, and
    /// random tokens that agree where the recorded prompts did
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dataset_name", "dataset_path"], help_heading = "Prompts")]
    pub trace: Option<PathBuf>,
    /// Makes prompts, lengths and arrivals repeatable
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Prompts")]
    pub seed: u64,
    /// Generate until the length is reached; always so with random prompts
    #[arg(long, help_heading = "Prompts")]
    pub ignore_eos: bool,
    /// Sampling temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Prompts")]
    pub temperature: f32,
}

/// When requests are sent.
#[derive(Args, Clone, Debug)]
pub struct LoadArgs {
    /// Requests per second; inf sends all at once
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY, value_parser = parse_positive, conflicts_with = "trace", help_heading = "Load")]
    pub request_rate: f64,
    /// Shape of the gamma distribution of the gaps between requests: 1 is a Poisson process, less is burstier, more is
    /// more even, inf is a clock
    #[arg(long, value_name = "B", default_value_t = 1.0, value_parser = parse_positive, conflicts_with = "trace", help_heading = "Load")]
    pub burstiness: f64,
    /// Replay a trace so many times as fast
    #[arg(long, value_name = "X", default_value_t = 1.0, requires = "trace", value_parser = parse_finite, help_heading = "Load")]
    pub speed: f64,
    /// Requests on their way at once; more wait, and their clocks start when they are sent [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Load")]
    pub max_concurrency: Option<u32>,
    /// Requests sent one after the other before the run, not measured
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=10_000), help_heading = "Load")]
    pub num_warmups: u32,
    /// A request that takes longer has failed
    #[arg(long, value_name = "TIME", default_value = "600s", value_parser = parse_duration, help_heading = "Load")]
    pub request_timeout: Duration,
}

/// What is reported, and how.
#[derive(Args, Clone, Debug)]
pub struct ReportArgs {
    /// Targets that a request must meet to count, in milliseconds, such as ttft:2000 tpot:50 e2el:10000
    #[arg(long, value_name = "METRIC:MS", num_args = 1.., help_heading = "Report")]
    pub goodput: Vec<Target>,
    /// Which times are reported
    #[arg(
        long,
        value_name = "METRIC,…",
        value_delimiter = ',',
        default_value = "ttft,tpot,itl,e2el",
        help_heading = "Report"
    )]
    pub percentile_metrics: Vec<Metric>,
    /// Which percentiles of them, beside mean, median and maximum
    #[arg(long, value_name = "P,…", value_delimiter = ',', default_value = "90,99", value_parser = parse_percentile, help_heading = "Report")]
    pub metric_percentiles: Vec<f64>,
    /// Print one JSON object, {"machine": {…}, "rows": [{"name": …, "value": …, "unit": …}]}, and nothing else
    #[arg(long, help_heading = "Report")]
    pub json: bool,
    /// Write that object to a file, too
    #[arg(long, help_heading = "Report")]
    pub save_result: bool,
    /// Folder of that file
    #[arg(long, value_name = "DIR", default_value = ".", requires = "save_result", help_heading = "Report")]
    pub result_dir: PathBuf,
    /// Its name [default: MODEL-RATEqps-TIME.json]
    #[arg(long, value_name = "FILE", requires = "save_result", help_heading = "Report")]
    pub result_filename: Option<PathBuf>,
    /// Write a page with plots: distributions of TTFT and ITL, throughput and concurrency over time
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    pub html: Option<PathBuf>,
}

/// `--backend`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// OpenAI's API
    Http,
    /// `quire.v1` on one connection
    Grpc,
}

/// `--endpoint`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// Prompts as text or token ids
    #[value(name = "/v1/completions")]
    Completions,
    /// Conversations
    #[value(name = "/v1/chat/completions")]
    Chat,
}

impl Endpoint {
    /// The route.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

/// `--dataset-name`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatasetName {
    /// Made up
    Random,
    /// Conversations of a file
    Sharegpt,
}

/// A time that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Metric {
    /// Time to the first token
    Ttft,
    /// Time per further token of a request
    Tpot,
    /// Time between events
    Itl,
    /// End-to-end latency
    E2el,
}

impl Metric {
    /// The word on the command line and in rows.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }
}

/// One of `--goodput`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Of one request; never ITL.
    pub metric: Metric,
    /// At most this many milliseconds.
    pub at_most_ms: f64,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not a target; write ttft, tpot or e2el with milliseconds, as ttft:2000");
        let (word, ms) = text.split_once(':').ok_or_else(wrong)?;
        let metric =
            [Metric::Ttft, Metric::Tpot, Metric::E2el].into_iter().find(|metric| metric.word() == word);
        let at_most_ms = ms.parse().ok().filter(|&ms: &f64| ms > 0.0 && ms.is_finite());
        Ok(Self { metric: metric.ok_or_else(wrong)?, at_most_ms: at_most_ms.ok_or_else(wrong)? })
    }
}

fn parse_positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|&number: &f64| number > 0.0);
    number.ok_or_else(|| format!("`{text}` is not a number above 0, or inf"))
}

fn parse_finite(text: &str) -> Result<f64, String> {
    parse_positive(text)
        .ok()
        .filter(|number| number.is_finite())
        .ok_or(format!("`{text}` is not a number above 0"))
}

fn parse_range_ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio| (0.0..1.0).contains(ratio));
    ratio.ok_or_else(|| format!("`{text}` is not a number from 0 to below 1"))
}

fn parse_percentile(text: &str) -> Result<f64, String> {
    let percentile = text.parse().ok().filter(|percentile| (0.0..=100.0).contains(percentile));
    percentile.ok_or_else(|| format!("`{text}` is not a number from 0 to 100"))
}
