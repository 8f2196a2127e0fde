//! Every metric Quire exports: name, kind, help, labels, buckets, and the `vllm:` name some tools expect instead.
//!
//! This list is the contract: the exporter describes and pre-creates exactly these families, and dashboards, alerts and
//! tests are checked against it. A name without a family here must not be recorded. Names follow the Prometheus
//! conventions (base units, `_total` on counters). Aliases and the buckets they must keep are those of vLLM 0.33.

/// How a family behaves over time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts observations by upper bound; ascending, without `+Inf`.
    Histogram(&'static [f64]),
}

/// One family of time series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Family {
    /// The canonical name.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// One sentence, shown as `# HELP`.
    pub help: &'static str,
    /// Whether its series carry the engine's labels [`MODEL_NAME`] and [`ENGINE`].
    pub per_engine: bool,
    /// Its other labels.
    pub labels: &'static [&'static str],
    /// The same values under names of vLLM.
    pub aliases: &'static [Alias],
}

/// A second name for a family.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Alias {
    /// The name, colon included.
    pub name: &'static str,
    /// The buckets to show, a subset of the family's; empty for counters and gauges.
    pub buckets: &'static [f64],
}

/// Label: the served model's name.
pub const MODEL_NAME: &str = "model_name";
/// Label: the index of the engine, as a string.
pub const ENGINE: &str = "engine";
/// Value of [`ENGINE`] where there is one engine.
pub const FIRST_ENGINE: &str = "0";

/// vLLM's bounds for the time to the first token.
const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's bounds for the time between tokens.
const ITL: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// [`ITL`] with what a small model on a fast device needs below it.
const ITL_FINE: &[f64] = &[
    0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// vLLM's bounds for durations of a whole request or a phase of it.
const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// [`LATENCY`] with what short requests need below it.
const LATENCY_FINE: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
    50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];
/// Numbers of tokens: the 1-2-5 series.
const TOKENS: &[f64] = &[
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
    500.0,
    1000.0,
    2000.0,
    5000.0,
    10000.0,
    20000.0,
    50000.0,
    100_000.0,
    200_000.0,
    500_000.0,
    1_000_000.0,
];
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const PARAMS_N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];
const TENANT_QUEUE_BUCKETS: &[f64] = &[0.01, 0.1, 0.5, 2.0, 10.0, 60.0];
const STEP_SECONDS: &[f64] = &[
    0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5,
    1.0, 2.0, 5.0, 10.0,
];

const fn family(name: &'static str, kind: Kind, help: &'static str) -> Family {
    Family { name, kind, help, per_engine: true, labels: &[], aliases: &[] }
}

impl Family {
    const fn labels(self, labels: &'static [&'static str]) -> Self {
        Self { labels, ..self }
    }

    const fn aliases(self, aliases: &'static [Alias]) -> Self {
        Self { aliases, ..self }
    }

    /// Not of one engine but of the whole process.
    const fn process_wide(self) -> Self {
        Self { per_engine: false, ..self }
    }
}

/// An alias of a counter or gauge.
macro_rules! alias {
    ($name:literal) => {
        &[Alias { name: $name, buckets: &[] }]
    };
    ($name:literal, $buckets:expr) => {
        &[Alias { name: $name, buckets: $buckets }]
    };
}

macro_rules! families {
    ($($constant:ident = $family:expr;)*) => {
        $(
            #[doc = concat!("`", stringify!($constant), "`: its help text says what it is.")]
            pub const $constant: Family = $family;
        )*
        /// Every family, in the order of the page.
        pub const ALL: &[Family] = &[$($constant),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

families! {
    // What an engine holds now.
    REQUESTS_RUNNING = family("quire_requests_running", Gauge, "Sequences in the running batch.")
        .aliases(alias!("vllm:num_requests_running"));
    REQUESTS_WAITING = family("quire_requests_waiting", Gauge, "Sequences waiting to be scheduled.")
        .aliases(alias!("vllm:num_requests_waiting"));
    REQUESTS_WAITING_BY_REASON = family(
        "quire_requests_waiting_by_reason", Gauge, "Sequences waiting, by what they wait for.",
    ).labels(&["reason"]).aliases(alias!("vllm:num_requests_waiting_by_reason"));
    KV_CACHE_USAGE = family(
        "quire_kv_cache_usage_ratio", Gauge, "Share of KV blocks referenced by sequences, 0 to 1.",
    ).aliases(alias!("vllm:kv_cache_usage_perc"));
    KV_BLOCKS = family("quire_kv_blocks", Gauge, "KV blocks by state.").labels(&["state"]);
    CACHE_CONFIG_INFO = family("quire_cache_config_info", Gauge, "The KV cache's configuration, as labels.")
        .labels(&["block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"])
        .aliases(alias!("vllm:cache_config_info"));
    LORA_REQUESTS_INFO = family(
        "quire_lora_requests_info", Gauge, "Adapters in use, as labels; the value is a Unix time.",
    ).labels(&["max_lora", "running_lora_adapters", "waiting_lora_adapters"])
        .aliases(alias!("vllm:lora_requests_info"));
    ENGINE_STATE = family("quire_engine_state", Gauge, "1 for the state the engine is in, 0 for the others.")
        .labels(&["state"]);
    ENGINE_SLEEP_STATE = family(
        "quire_engine_sleep_state", Gauge, "1 for the sleep state the engine is in; it is always awake.",
    ).labels(&["sleep_state"]).aliases(alias!("vllm:engine_sleep_state"));

    // What went through it.
    PROMPT_TOKENS = family("quire_prompt_tokens_total", Counter, "Prompt tokens of scheduled sequences.")
        .aliases(alias!("vllm:prompt_tokens_total"));
    PROMPT_TOKENS_CACHED = family(
        "quire_prompt_tokens_cached_total", Counter, "Prompt tokens whose KV came from the prefix cache.",
    ).aliases(alias!("vllm:prompt_tokens_cached_total"));
    GENERATION_TOKENS = family("quire_generation_tokens_total", Counter, "Tokens generated.")
        .aliases(alias!("vllm:generation_tokens_total"));
    PREFIX_CACHE_QUERIES = family(
        "quire_prefix_cache_queries_total", Counter, "Prompt tokens looked up in the prefix cache.",
    ).aliases(alias!("vllm:prefix_cache_queries_total"));
    PREFIX_CACHE_HITS = family(
        "quire_prefix_cache_hits_total", Counter, "Prompt tokens found in the prefix cache.",
    ).aliases(alias!("vllm:prefix_cache_hits_total"));
    KV_BLOCK_EVICTIONS = family(
        "quire_kv_block_evictions_total", Counter, "Cached KV blocks given up for new ones.",
    );
    HOST_KV_BLOCKS = family("quire_host_kv_blocks", Gauge, "KV blocks in host memory by state.")
        .labels(&["state"]);
    HOST_KV_HIT_TOKENS = family(
        "quire_host_kv_hit_tokens_total", Counter, "Prompt tokens whose KV was found in host memory.",
    );
    HOST_KV_BYTES = family(
        "quire_host_kv_bytes_total", Counter, "Bytes of KV copied to host memory (out) and back (in).",
    ).labels(&["direction"]);
    HOST_KV_EVICTIONS = family(
        "quire_host_kv_evictions_total", Counter, "KV blocks in host memory given up for others.",
    );
    PREEMPTIONS_SWAPPED = family(
        "quire_preemptions_swapped_total", Counter,
        "Preemptions whose KV blocks were kept for host memory instead of being computed again.",
    );
    RECOMPUTED_TOKENS = family(
        "quire_recomputed_tokens_total", Counter, "Tokens computed again after a preemption.",
    );
    PREEMPTIONS_TOTAL = family("quire_preemptions_total", Counter, "Times a sequence lost its KV blocks.")
        .aliases(alias!("vllm:num_preemptions_total"));
    REQUESTS_FINISHED = family("quire_requests_finished_total", Counter, "Sequences ended, by reason.")
        .labels(&["finished_reason"]).aliases(alias!("vllm:request_success_total"));
    ADMISSION_REJECTIONS = family(
        "quire_admission_rejections_total", Counter, "Requests refused before they were queued, by reason.",
    ).labels(&["reason"]).aliases(alias!("vllm:admission_rejections_total"));
    DEVICE_ERRORS = family("quire_device_errors_total", Counter, "Fatal errors of the device.");
    SPEC_DECODE_DRAFTS = family("quire_spec_decode_num_drafts_total", Counter, "Drafts proposed.")
        .aliases(alias!("vllm:spec_decode_num_drafts_total"));
    SPEC_DECODE_DRAFT_TOKENS = family(
        "quire_spec_decode_num_draft_tokens_total", Counter, "Tokens proposed by drafts.",
    ).aliases(alias!("vllm:spec_decode_num_draft_tokens_total"));
    SPEC_DECODE_ACCEPTED = family(
        "quire_spec_decode_num_accepted_tokens_total", Counter, "Draft tokens accepted.",
    ).aliases(alias!("vllm:spec_decode_num_accepted_tokens_total"));
    SPEC_DECODE_ACCEPTED_PER_POS = family(
        "quire_spec_decode_num_accepted_tokens_per_pos_total", Counter, "Draft tokens accepted, by position in the draft.",
    ).labels(&["position"]).aliases(alias!("vllm:spec_decode_num_accepted_tokens_per_pos_total"));

    // How long it took.
    TIME_TO_FIRST_TOKEN = family(
        "quire_time_to_first_token_seconds", Histogram(TTFT), "From arrival to the first token.",
    ).aliases(alias!("vllm:time_to_first_token_seconds", TTFT));
    INTER_TOKEN_LATENCY = family(
        "quire_inter_token_latency_seconds", Histogram(ITL_FINE), "Between two tokens of one sequence.",
    ).aliases(&[
        Alias { name: "vllm:inter_token_latency_seconds", buckets: ITL },
        Alias { name: "vllm:time_per_output_token_seconds", buckets: ITL },
    ]);
    REQUEST_TIME_PER_OUTPUT_TOKEN = family(
        "quire_request_time_per_output_token_seconds", Histogram(ITL_FINE),
        "Mean time per token after the first, one observation a sequence.",
    ).aliases(alias!("vllm:request_time_per_output_token_seconds", ITL));
    E2E_REQUEST_LATENCY = family(
        "quire_e2e_request_latency_seconds", Histogram(LATENCY_FINE), "From arrival to the last token.",
    ).aliases(alias!("vllm:e2e_request_latency_seconds", LATENCY));
    REQUEST_QUEUE_TIME = family(
        "quire_request_queue_time_seconds", Histogram(LATENCY_FINE), "From arrival to the first step.",
    ).aliases(alias!("vllm:request_queue_time_seconds", LATENCY));
    REQUEST_INFERENCE_TIME = family(
        "quire_request_inference_time_seconds", Histogram(LATENCY_FINE), "From the first step to the last token.",
    ).aliases(alias!("vllm:request_inference_time_seconds", LATENCY));
    REQUEST_PREFILL_TIME = family(
        "quire_request_prefill_time_seconds", Histogram(LATENCY_FINE), "From the first step to the first token.",
    ).aliases(alias!("vllm:request_prefill_time_seconds", LATENCY));
    REQUEST_DECODE_TIME = family(
        "quire_request_decode_time_seconds", Histogram(LATENCY_FINE), "From the first token to the last.",
    ).aliases(alias!("vllm:request_decode_time_seconds", LATENCY));
    STEP_DURATION = family(
        "quire_step_duration_seconds", Histogram(STEP_SECONDS), "Time of one engine step, by what it computed.",
    ).labels(&["kind"]);

    // How big requests and steps are.
    REQUEST_PROMPT_TOKENS = family(
        "quire_request_prompt_tokens", Histogram(TOKENS), "Prompt tokens of a sequence.",
    ).aliases(alias!("vllm:request_prompt_tokens", TOKENS));
    REQUEST_GENERATION_TOKENS = family(
        "quire_request_generation_tokens", Histogram(TOKENS), "Tokens generated by a sequence.",
    ).aliases(alias!("vllm:request_generation_tokens", TOKENS));
    REQUEST_MAX_NUM_GENERATION_TOKENS = family(
        "quire_request_max_num_generation_tokens", Histogram(TOKENS),
        "Tokens generated by the longest sequence of a request.",
    ).aliases(alias!("vllm:request_max_num_generation_tokens", TOKENS));
    REQUEST_PREFILL_KV_COMPUTED_TOKENS = family(
        "quire_request_prefill_kv_computed_tokens", Histogram(TOKENS),
        "Prompt tokens of a sequence whose KV had to be computed.",
    ).aliases(alias!("vllm:request_prefill_kv_computed_tokens", TOKENS));
    REQUEST_PARAMS_MAX_TOKENS = family(
        "quire_request_params_max_tokens", Histogram(TOKENS), "Tokens a request asked for at most.",
    ).aliases(alias!("vllm:request_params_max_tokens", TOKENS));
    REQUEST_PARAMS_N = family(
        "quire_request_params_n", Histogram(PARAMS_N), "Continuations a request asked for.",
    ).aliases(alias!("vllm:request_params_n", PARAMS_N));
    REQUEST_NUM_PREEMPTIONS = family(
        "quire_request_num_preemptions", Histogram(PREEMPTIONS), "Times a sequence lost its KV blocks.",
    ).aliases(alias!("vllm:request_num_preemptions", PREEMPTIONS));
    STEP_TIME_ERROR = family(
        "quire_step_time_error_ratio", Gauge,
        "Relative error of predicted step times that nine in ten steps stay below; 0 without latency targets.",
    );
    STEP_TOKENS_COMPUTED = family(
        "quire_step_tokens", Histogram(STEP_TOKENS), "Tokens computed in one engine step.",
    ).aliases(alias!("vllm:iteration_tokens_total", STEP_TOKENS));

    // Who asks. Tenants are labelled by their configured id, the first hundred of them; the rest are `other`.
    TENANT_REQUESTS = family(
        "quire_tenant_requests_total", Counter, "Requests of a tenant that were admitted or throttled, by how they ended.",
    ).labels(&["tenant", "outcome"]).process_wide();
    TENANT_TOKENS = family(
        "quire_tenant_tokens_total", Counter,
        "Tokens of a tenant's ended requests: of prompts (input), those of them found in the prefix cache (cached), generated (output).",
    ).labels(&["tenant", "kind"]).process_wide();
    TENANT_THROTTLED = family(
        "quire_tenant_throttled_total", Counter, "Requests of a tenant refused by its limits, by limit.",
    ).labels(&["tenant", "limit"]).process_wide();
    TENANT_QUEUE = family(
        "quire_tenant_queue_seconds", Histogram(TENANT_QUEUE_BUCKETS), "From a request's admission to its first step.",
    ).labels(&["tenant"]).process_wide();
    TENANT_RUNNING = family(
        "quire_tenant_running", Gauge, "Answers of a tenant being generated.",
    ).labels(&["tenant"]).process_wide();
    TENANT_WAITING = family(
        "quire_tenant_waiting", Gauge, "Answers of a tenant admitted and not yet scheduled.",
    ).labels(&["tenant"]).process_wide();
    TENANT_SHARE_RATIO = family(
        "quire_tenant_share_ratio", Gauge, "A tenant's part of all tokens, over about the last minute.",
    ).labels(&["tenant"]).process_wide();
    TENANT_BUDGET_TOKENS = family(
        "quire_tenant_budget_tokens", Gauge,
        "Tokens of a tenant's budget in the running period: used, what is reserved included, and left.",
    ).labels(&["tenant", "state"]).process_wide();
    TENANTS_RELOADS = family(
        "quire_tenants_reloads_total", Counter, "Times the changed tenants file was read, by whether it could be used.",
    ).labels(&["result"]).process_wide();
    QUOTA_STORE_ERRORS = family(
        "quire_quota_store_errors_total", Counter,
        "Times the shared quota store did not answer, so that the limits of this replica alone applied.",
    ).process_wide();

    AUDIT_RECORDS = family(
        "quire_audit_records_total", Counter, "Records of the audit log, by whether they were written or lost.",
    ).labels(&["result"]).process_wide();

    // The front ends and the process.
    HTTP_REQUESTS = family(
        "quire_http_requests_total", Counter, "HTTP requests answered; `route` is the route's template or `other`.",
    ).labels(&["route", "method", "code"]).process_wide();
    HTTP_INFLIGHT = family("quire_http_inflight", Gauge, "HTTP requests being answered.").process_wide();
    GRPC_REQUESTS = family("quire_grpc_requests_total", Counter, "gRPC calls answered.")
        .labels(&["rpc", "code"]).process_wide();
    CLIENT_DISCONNECTS = family(
        "quire_client_disconnects_total", Counter, "Clients that went away before their answer was complete.",
    ).process_wide();
    TOKENIZE_SECONDS = family(
        "quire_tokenize_seconds", Histogram(STEP_SECONDS), "Time to turn one prompt into tokens.",
    ).process_wide();
    MODEL_LOAD_SECONDS = family(
        "quire_model_load_seconds", Gauge, "Time the start of the process took, by stage.",
    ).labels(&["stage"]).process_wide();
    BUILD_INFO = family("quire_build_info", Gauge, "What this build is, as labels.")
        .labels(&["version", "commit", "backend"]).process_wide();
    WATCHDOG_LAST_STEP_AGE = family(
        "quire_watchdog_last_step_age_seconds", Gauge, "Time since the last engine step ended, while there is work.",
    );
    PROCESS_CPU_SECONDS = family(
        "process_cpu_seconds_total", Counter, "User and system CPU time spent in seconds.",
    ).process_wide();
    PROCESS_RESIDENT_MEMORY = family(
        "process_resident_memory_bytes", Gauge, "Resident memory size in bytes.",
    ).process_wide();
    PROCESS_VIRTUAL_MEMORY = family(
        "process_virtual_memory_bytes", Gauge, "Virtual memory size in bytes.",
    ).process_wide();
    PROCESS_OPEN_FDS = family("process_open_fds", Gauge, "Number of open file descriptors.").process_wide();
    PROCESS_MAX_FDS = family(
        "process_max_fds", Gauge, "Maximum number of open file descriptors.",
    ).process_wide();
    PROCESS_THREADS = family("process_threads", Gauge, "Number of OS threads in the process.").process_wide();
    PROCESS_START_TIME = family(
        "process_start_time_seconds", Gauge, "Start time of the process since the Unix epoch in seconds.",
    ).process_wide();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_well_formed() {
        let mut seen = HashSet::new();
        for family in ALL {
            assert!(seen.insert(family.name), "{} twice", family.name);
            let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
            assert!(family.name.bytes().all(plain), "{}", family.name);
            assert_eq!(family.kind == Counter, family.name.ends_with("_total"), "{}", family.name);
            assert!(family.help.ends_with('.'), "{}", family.name);
            for alias in family.aliases {
                assert!(alias.name.starts_with("vllm:"));
                assert!(seen.insert(alias.name), "{} twice", alias.name);
            }
        }
    }

    #[test]
    fn buckets_ascend_and_aliases_keep_a_subset() {
        for family in ALL {
            let Histogram(buckets) = family.kind else {
                assert!(family.aliases.iter().all(|alias| alias.buckets.is_empty()), "{}", family.name);
                continue;
            };
            assert!(buckets.windows(2).all(|pair| pair[0] < pair[1]), "{}", family.name);
            for alias in family.aliases {
                assert!(!alias.buckets.is_empty(), "{}", alias.name);
                assert!(alias.buckets.iter().all(|bound| buckets.contains(bound)), "{}", alias.name);
            }
        }
    }
}
