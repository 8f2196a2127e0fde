//! What the engine reports about KV in host memory, and about what preemptions cost.

use metrics::{Counter, Gauge};
use quire_core::metric_names as names;
use quire_scheduler::{HostStats, SchedulerStats};

use crate::metrics::Labels;

/// Handles of one engine.
pub(crate) struct HostMetrics {
    free: Gauge,
    used: Gauge,
    hit_tokens: Counter,
    bytes_out: Counter,
    bytes_in: Counter,
    evictions: Counter,
    swaps: Counter,
    recomputed: Counter,
}

impl HostMetrics {
    pub(crate) fn new(labels: &Labels) -> Self {
        let blocks = |state: &str| labels.gauge(names::HOST_KV_BLOCKS, &[("state", state.to_owned())]);
        let bytes =
            |direction: &str| labels.counter(names::HOST_KV_BYTES, &[("direction", direction.to_owned())]);
        Self {
            free: blocks("free"),
            used: blocks("used"),
            hit_tokens: labels.counter(names::HOST_KV_HIT_TOKENS, &[]),
            bytes_out: bytes("out"),
            bytes_in: bytes("in"),
            evictions: labels.counter(names::HOST_KV_EVICTIONS, &[]),
            swaps: labels.counter(names::PREEMPTIONS_SWAPPED, &[]),
            recomputed: labels.counter(names::RECOMPUTED_TOKENS, &[]),
        }
    }

    pub(crate) fn record(&self, stats: &SchedulerStats) {
        let HostStats { blocks_total, blocks_used, .. } = stats.host;
        self.free.set(blocks_total - blocks_used);
        self.used.set(blocks_used);
        self.hit_tokens.absolute(stats.host.hit_tokens);
        self.bytes_out.absolute(stats.host.bytes_out);
        self.bytes_in.absolute(stats.host.bytes_in);
        self.evictions.absolute(stats.host.num_evictions);
        self.swaps.absolute(stats.host.num_swaps);
        self.recomputed.absolute(stats.num_recomputed_tokens);
    }
}
