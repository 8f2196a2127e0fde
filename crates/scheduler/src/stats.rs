//! Numbers about the scheduler, cheap to read after every step.

/// A snapshot. Counters count since start; the rest is the state now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SchedulerStats {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences that wait for a place: new, preempted, or for their prompt to be computed by a sibling.
    pub waiting: u32,
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
    /// Accepted requests that were refused later, because they could no longer be served in time.
    pub num_rejected: u64,
    /// Relative error of predicted step times that nine in ten steps stay below; 0 without latency targets.
    pub step_time_error_p90: f64,
    /// Prompt (or recomputed) tokens in the latest step.
    pub prefill_tokens: u32,
    /// Sequences that computed exactly their newest token in the latest step.
    pub decode_tokens: u32,
}
