//! What a prefix cache of a given size gives on a trace: replay through the production cache, and the optimum that knows
//! the future.

use std::collections::{BTreeMap, BTreeSet};

use quire_core::BlockHash;
use quire_scheduler::{CacheReplay, EvictionPolicy, HostStats, HostTierConfig};

use crate::rng::mix;
use crate::trace::{TRACE_BLOCK_SIZE, TraceRequest};

/// Tokens found and asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HitRate {
    /// Prompt tokens that needed no computation.
    pub hit_tokens: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
}

impl HitRate {
    /// In percent.
    pub fn percent(&self) -> f64 {
        100.0 * self.hit_tokens as f64 / self.prompt_tokens.max(1) as f64
    }

    fn add(&mut self, request: &TraceRequest, num_hit: u64) {
        self.hit_tokens += (num_hit * u64::from(TRACE_BLOCK_SIZE)).min(u64::from(request.input_tokens));
        self.prompt_tokens += u64::from(request.input_tokens);
    }
}

/// Which blocks of a prompt can be found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Full ones, as in the engine.
    FullBlocks,
    /// The last, partial one as well, as traces name it. Published figures of LRU count so.
    AllBlocks,
}

/// Sequential replay through the production cache of `num_blocks` blocks of [`TRACE_BLOCK_SIZE`] tokens.
///
/// # Panics
/// If the pool is smaller than the longest prompt.
pub fn replay_cache(
    trace: &[TraceRequest],
    num_blocks: u32,
    policy: EvictionPolicy,
    sharing: Sharing,
) -> HitRate {
    replay_tiers(trace, num_blocks, policy, sharing, None).0
}

/// The same with a host tier behind it. Also what moved between the tiers.
///
/// # Panics
/// As [`replay_cache`].
pub fn replay_tiers(
    trace: &[TraceRequest],
    num_blocks: u32,
    policy: EvictionPolicy,
    sharing: Sharing,
    host_tier: Option<HostTierConfig>,
) -> (HitRate, HostStats) {
    let mut cache = CacheReplay::with_host_tier(num_blocks, TRACE_BLOCK_SIZE, policy, host_tier);
    let mut rate = HitRate::default();
    let mut hashes = Vec::new();
    for request in trace {
        hashes.clear();
        hashes.extend(request.blocks.iter().map(|&block| address(block)));
        if sharing == Sharing::FullBlocks {
            hashes.truncate((request.input_tokens / TRACE_BLOCK_SIZE) as usize);
        }
        let num_hit = cache.request(request.arrival, &hashes, request.input_tokens, request.output_tokens);
        rate.add(request, u64::from(num_hit));
    }
    (rate, cache.host_stats())
}

/// The address that stands for a block of a trace.
pub(crate) fn address(block: u64) -> BlockHash {
    BlockHash(u128::from(mix(block)) << 64 | u128::from(mix(!block)))
}

/// The optimum: whenever there are too many blocks, those go that are wanted last, deeper ones first among equals, and
/// they may be those just computed (Belady's MIN with bypass; prefixes stay closed).
pub fn replay_optimum(trace: &[TraceRequest], num_blocks: usize) -> HitRate {
    // Per request and block: the next request that wants it.
    let mut next_use: Vec<Vec<usize>> = vec![Vec::new(); trace.len()];
    let mut wanted_by: BTreeMap<u64, usize> = BTreeMap::new();
    for (at, request) in trace.iter().enumerate().rev() {
        next_use[at] =
            request.blocks.iter().map(|&b| wanted_by.insert(b, at).unwrap_or(usize::MAX)).collect();
    }
    // What is kept: (next use, depth, block), and the key of each block.
    let mut order: BTreeSet<(usize, usize, u64)> = BTreeSet::new();
    let mut kept: BTreeMap<u64, (usize, usize, u64)> = BTreeMap::new();
    let mut rate = HitRate::default();
    for (request, next_use) in trace.iter().zip(&next_use) {
        let num_hit = request.blocks.iter().take_while(|&block| kept.contains_key(block)).count();
        rate.add(request, num_hit as u64);
        for (depth, (&block, &next)) in request.blocks.iter().zip(next_use).enumerate() {
            let key = (next, depth, block);
            if let Some(before) = kept.insert(block, key) {
                order.remove(&before);
            }
            order.insert(key);
        }
        while order.len() > num_blocks {
            let Some((_, _, block)) = order.pop_last() else { break };
            kept.remove(&block);
        }
    }
    rate
}
