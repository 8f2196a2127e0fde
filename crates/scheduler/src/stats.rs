//! Numbers about the scheduler, cheap to read after every step.

/// A snapshot. Counters count since start; the rest is the state now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SchedulerStats {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences that wait for a place: new, preempted, or for their prompt to be computed by a sibling.
    pub waiting: u32,
    /// The lowest priority of those.
    pub lowest_waiting: Option<i8>,
    /// Blocks in the pool; the sum of the next four.
    pub kv_blocks_total: u32,
    /// Blocks without content.
    pub kv_blocks_free: u32,
    /// Blocks that nobody holds but whose content can be hit.
    pub kv_blocks_cached: u32,
    /// Blocks in some sequence's table.
    pub kv_blocks_used: u32,
    /// Blocks that return when the steps in flight are collected.
    pub kv_blocks_quarantined: u32,
    /// `kv_blocks_used / kv_blocks_total`.
    pub kv_usage: f64,
    /// Times a sequence lost its blocks.
    pub num_preemptions: u64,
    /// Prompt tokens looked up in the prefix cache at first admission.
    pub prefix_cache_queries: u64,
    /// Those of them that were found.
    pub prefix_cache_hits: u64,
    /// Cached blocks whose content was given up for new content.
    pub num_evictions: u64,
    /// Tokens that had been computed when their sequence lost its blocks, and had to be computed again.
    pub num_recomputed_tokens: u64,
    /// The host tier; all 0 without one.
    pub host: HostStats,
    /// Accepted requests that were refused later: they could no longer be served in time, or others took their places.
    pub num_rejected: u64,
    /// Relative error of predicted step times that nine in ten steps stay below; 0 without latency targets.
    pub step_time_error_p90: f64,
    /// Prompt (or recomputed) tokens in the latest step.
    pub prefill_tokens: u32,
    /// Sequences that computed exactly their newest token in the latest step.
    pub decode_tokens: u32,
}

/// The host tier. Counters count since start; the rest is the state now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostStats {
    /// Blocks in host memory.
    pub blocks_total: u32,
    /// Those that hold something.
    pub blocks_used: u32,
    /// Blocks copied from the device.
    pub num_copied_out: u64,
    /// Blocks copied to the device.
    pub num_copied_in: u64,
    /// Bytes copied from the device.
    pub bytes_out: u64,
    /// Bytes copied to the device.
    pub bytes_in: u64,
    /// Blocks whose content was given up for new content.
    pub num_evictions: u64,
    /// Prompt tokens found here at first admission.
    pub hit_tokens: u64,
    /// Times a sequence lost its blocks to the host tier, as computing them again would take longer.
    pub num_swaps: u64,
}
