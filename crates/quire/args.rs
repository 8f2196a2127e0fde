//! Every setting, once: as a flag, and by the same name as a TOML key and an environment variable (see `layers.rs`).
//!
//! What is `Option` here has a default that depends on the model or the machine; `config.rs` decides it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use quire_core::{DType, QuantFormat};

use crate::lora::LoraModule;
use crate::units::{Bytes, parse_duration};

/// Where a command finds its settings beside the command line.
#[derive(Args, Clone, Debug)]
pub struct CommonArgs {
    /// Read settings from this TOML file; its keys are the names of the flags. Environment variables
    /// (QUIRE_MAX_NUM_SEQS=8) override the file, and flags override both
    #[arg(long, value_name = "FILE", help_heading = "General")]
    pub config: Option<PathBuf>,
    /// How log lines look; QUIRE_LOG sets their level (error, warn, info, debug, trace)
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = "General")]
    pub log_format: LogFormat,
}

/// What to run and how: shared by `serve`, `run` and `inspect`.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    /// A directory with config.json and safetensors files, or a hub id such as Qwen/Qwen3-0.6B (downloaded once;
    /// HF_ENDPOINT, HF_HOME and HF_TOKEN are honoured). Nothing: the built-in demo model
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,
    /// Where to run
    #[arg(long, default_value = "auto", help_heading = "Model")]
    pub device: Device,
    /// Compute threads [default: the cores this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Model")]
    pub threads: Option<u32>,
    /// Element type of weights and activations; auto keeps the checkpoint's
    #[arg(long, default_value = "auto", help_heading = "Model")]
    pub dtype: DTypeArg,
    /// Store linear weights, and compute with them, in fewer bits: int8 halves what bf16 needs, int4 is near a
    /// quarter; fp8 halves it on a GPU of compute capability 9.0
    #[arg(long, value_name = "FORMAT", default_value = "none", help_heading = "Model")]
    pub quantize: Quantize,
    /// dummy: random weights of the shape in config.json
    #[arg(long, value_name = "FORMAT", default_value = "auto", help_heading = "Model")]
    pub load_format: LoadFormat,
    /// Keep weights as they are packed or quantized for this machine in a file beside the model, or else in the user's
    /// cache folder, so that the next start need not pack them; auto does if they are large or slow to pack
    #[arg(long, value_name = "MODE", default_value = "auto", help_heading = "Model")]
    pub prepack: Switch,
    /// mock: made-up tokens instead of a model's, for tests of everything around it
    #[arg(long, value_name = "EXECUTOR", default_value = "auto", help_heading = "Model")]
    pub executor: ExecutorArg,
    /// How long a step of --executor mock takes, whatever is in it
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_duration, help_heading = "Model")]
    pub mock_step_time: Duration,
    /// Use this Jinja file instead of the model's own chat template
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    pub chat_template: Option<PathBuf>,
    /// Longest sequence in tokens, prompt and answer [default: the model's, if the KV cache can hold it]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Batching")]
    pub max_model_len: Option<u32>,
    /// Sequences in one batch [default: 64 on CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536), help_heading = "Batching")]
    pub max_num_seqs: Option<u32>,
    /// Tokens computed in one step, over all sequences [default: 512 on CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1048576), help_heading = "Batching")]
    pub max_num_batched_tokens: Option<u32>,
    /// Requests that may wait; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Batching")]
    pub max_queued_requests: u32,
    /// The same bytes for the same request, whoever shares the batch; always so on CPU
    #[arg(long, value_name = "MODE", default_value = "auto", help_heading = "Batching")]
    pub batch_invariant: Switch,
    /// Tokens in one KV block, a power of two
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=256), help_heading = "KV cache")]
    pub block_size: u32,
    /// Do not reuse the KV of prompts that begin alike
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", help_heading = "KV cache")]
    pub no_prefix_cache: bool,
    /// Memory for keys and values, such as 4GiB, on each rank [default: what the limits can use, at most 4 GiB and 40 % of
    /// free RAM; on a GPU what --gpu-memory-utilization leaves]
    #[arg(long, value_name = "SIZE", help_heading = "KV cache")]
    pub kv_cache_memory: Option<Bytes>,
    /// Host memory for keys and values that do not fit in --kv-cache-memory, such as 4GiB: what is evicted waits there and
    /// is copied back when it is wanted, unless computing it again is faster. 0: none
    #[arg(long, value_name = "SIZE", default_value = "0", help_heading = "KV cache")]
    pub host_cache_memory: Bytes,
    /// Element type of keys and values; auto follows --dtype
    #[arg(long, value_name = "DTYPE", default_value = "auto", help_heading = "KV cache")]
    pub kv_cache_dtype: KvDType,
    /// Share of GPU memory to use; no effect on CPU
    #[arg(long, value_name = "SHARE", default_value_t = 0.92, help_heading = "KV cache")]
    pub gpu_memory_utilization: f64,
    /// Ranks to split the model over; on CPU they divide the threads among them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Model")]
    pub tensor_parallel_size: u32,
}

/// What only a server needs.
#[derive(Args, Clone, Debug)]
pub struct ServerArgs {
    /// Address to listen on; 0.0.0.0 for every interface
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Server")]
    pub host: IpAddr,
    /// HTTP port; 0 takes a free one and prints it
    #[arg(long, value_name = "PORT", default_value_t = 8000, help_heading = "Server")]
    pub port: u16,
    /// gRPC port; 0 takes a free one and prints it
    #[arg(long, value_name = "PORT", default_value_t = 8001, help_heading = "Server")]
    pub grpc_port: u16,
    /// The model's name in the API [default: the hub id, the directory's name, or quire-demo]
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    pub served_model_name: Option<String>,
    /// LoRA adapters of the model, as PEFT saves them: requests whose `model` is NAME are answered with the one in the
    /// directory PATH. Several are separated by commas or spaces, or the flag is repeated
    #[arg(long, value_name = "NAME=PATH", num_args = 1.., value_delimiter = ',', help_heading = "Server")]
    pub lora_modules: Vec<LoraModule>,
    /// Clients must send this key (Authorization: Bearer KEY); better in QUIRE_API_KEY, where `ps` does not show it
    #[arg(long, value_name = "KEY", help_heading = "Server")]
    pub api_key: Option<String>,
    /// How long running answers may take to finish after SIGTERM or Ctrl-C
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration, help_heading = "Server")]
    pub shutdown_timeout: Duration,
    /// vllm: /metrics also has the names that tools for vLLM look for
    #[arg(long, value_name = "SET", default_value = "vllm", help_heading = "Server")]
    pub metrics_compat: MetricsCompat,
    /// Tenants with their keys, limits and weights, as in docs/tenants.md; changes are taken while the server runs
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pub tenants: Option<PathBuf>,
    /// Where limits are counted: memory (each server by itself), or redis://HOST:PORT, which several servers share;
    /// with a password better in QUIRE_QUOTA_STORE
    #[arg(long, value_name = "STORE", default_value = "memory", help_heading = "Server")]
    pub quota_store: String,
    /// Keep an audit log: one JSON line for each request and refusal, with tenant, key id, tokens and outcome, never with
    /// a key or what was said. - is standard output; SIGHUP opens the file again, for log rotation [default: none]
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pub audit_log: Option<PathBuf>,
    /// When the audit log cannot keep up: block lets new requests wait, so that no record is lost; drop loses records
    /// and counts them in quire_audit_records_total
    #[arg(long, value_name = "WHAT", default_value = "block", help_heading = "Server")]
    pub audit_on_full: AuditOnFull,
    /// Serve the admin API, and ask for this token there (Authorization: Bearer TOKEN); better in QUIRE_ADMIN_TOKEN, where
    /// `ps` does not show it. It opens nothing on the public port, and no key of that opens the admin API [default: none]
    #[arg(long, value_name = "TOKEN", help_heading = "Server")]
    pub admin_token: Option<String>,
    /// Where the admin API listens, once there is a token; port 0 takes a free one and prints it
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9091", help_heading = "Server")]
    pub admin_addr: SocketAddr,
    /// Goal for the time to the first token, such as 2s: requests go by what is due first, and what cannot be in time
    /// is refused with 429 at once [with --itl-target; default: by arrival]
    #[arg(long, value_name = "TIME", value_parser = parse_duration, help_heading = "Batching")]
    pub ttft_target: Option<Duration>,
    /// Goal for the time between tokens, such as 50ms: prompts are computed in pieces that keep to it
    #[arg(long, value_name = "TIME", value_parser = parse_duration, help_heading = "Batching")]
    pub itl_target: Option<Duration>,
    /// Encrypt every listener, HTTP, gRPC and admin alike, with the certificate in this PEM file, its issuers behind it; a
    /// changed file is taken while the server runs [with --tls-key; default: no encryption]
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM, without a passphrase)
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pub tls_key: Option<PathBuf>,
    /// Clients must show a certificate of one of the authorities in this PEM file, beside their key if one is needed
    /// [default: they need none]
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    pub tls_client_ca: Option<PathBuf>,
}

/// Defines a set of words for one flag.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
        pub enum $name {
            $($(#[$variant_doc])* #[value(name = $word)] $variant),*
        }

        impl $name {
            /// The word on the command line.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }
    };
}

words! {
    /// `--device`
    Device {
        /// The best there is
        Auto = "auto",
        /// The processor
        Cpu = "cpu",
        /// NVIDIA GPUs
        Cuda = "cuda",
    }
}
words! {
    /// `--dtype`
    DTypeArg {
        /// The checkpoint's
        Auto = "auto",
        /// bfloat16
        Bf16 = "bf16",
        /// IEEE half
        F16 = "f16",
        /// IEEE single
        F32 = "f32",
    }
}
words! {
    /// `--kv-cache-dtype`
    KvDType {
        /// As --dtype
        Auto = "auto",
        /// IEEE single
        F32 = "f32",
        /// bfloat16
        Bf16 = "bf16",
        /// IEEE half
        F16 = "f16",
        /// 8-bit integers
        Int8 = "int8",
        /// 8-bit floats
        Fp8 = "fp8",
    }
}
words! {
    /// `--quantize`
    Quantize {
        /// As in the checkpoint
        None = "none",
        /// 8-bit integers
        Int8 = "int8",
        /// 4-bit integers
        Int4 = "int4",
        /// 8-bit floats
        Fp8 = "fp8",
    }
}
words! {
    /// `--load-format`
    LoadFormat {
        /// The checkpoint's files
        Auto = "auto",
        /// Random weights
        Dummy = "dummy",
    }
}
words! {
    /// `--executor`
    ExecutorArg {
        /// The model
        Auto = "auto",
        /// Made-up tokens
        Mock = "mock",
    }
}
words! {
    /// `--batch-invariant`, `--prepack`
    Switch {
        /// As is best
        Auto = "auto",
        /// Always
        On = "on",
        /// Never
        Off = "off",
    }
}
words! {
    /// `--metrics-compat`
    MetricsCompat {
        /// quire_* and vllm:* names
        Vllm = "vllm",
        /// quire_* names alone
        None = "none",
    }
}
words! {
    /// `--audit-on-full`
    AuditOnFull {
        /// New requests wait
        Block = "block",
        /// Records are lost
        Drop = "drop",
    }
}
words! {
    /// `--log-format`
    LogFormat {
        /// For people
        Text = "text",
        /// One JSON object a line
        Json = "json",
    }
}

impl DTypeArg {
    /// The type, unless it is left to the checkpoint.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::Auto => None,
            Self::Bf16 => Some(DType::BF16),
            Self::F16 => Some(DType::F16),
            Self::F32 => Some(DType::F32),
        }
    }
}

impl Quantize {
    /// How linear layers are stored.
    pub const fn format(self) -> QuantFormat {
        match self {
            Self::None => QuantFormat::None,
            Self::Int8 => QuantFormat::Int8,
            Self::Int4 => QuantFormat::Int4,
            Self::Fp8 => QuantFormat::Fp8,
        }
    }
}

impl KvDType {
    /// The type, unless it follows the model.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(DType::F32),
            Self::Bf16 => Some(DType::BF16),
            Self::F16 => Some(DType::F16),
            Self::Int8 => Some(DType::I8),
            Self::Fp8 => Some(DType::F8E4M3),
        }
    }
}
