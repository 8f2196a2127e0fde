//! Preempted sequences and the host tier: whether keeping a victim's blocks is cheaper than computing them again.
//!
//! A victim's blocks go back to the pool as the last to be given up; those that do make room are copied to the host tier
//! one by one, as they are needed. So a swap costs what it must and no more, and most of a sequence that soon goes on
//! never leaves the device. On its return the sequence looks its blocks up as any prompt does. Requests that share
//! nothing have addresses of their own for that time.

use quire_core::{BlockHash, BlockHasher, CacheSalt, Micros, RequestId};

use crate::cost::OnlineCostModel;
use crate::host_tier::{BlockCosts, HostTier};
use crate::kv_cache::KvCacheManager;
use crate::schedule::Pass;
use crate::scheduler::{InFlightStep, Scheduler};
use crate::sequence::SeqIndex;
use crate::stats::HostStats;

/// What prompts are taken to be before there was one.
const FIRST_GUESS_TOKENS: u32 = 1024;
/// What a step computes of prompts beside its decodes.
const USUAL_CHUNK: u32 = 2048;

impl Scheduler {
    /// What is known of step times.
    fn step_times(&self) -> Option<&OnlineCostModel> {
        self.pacing.as_ref().map(|pacing| pacing.model()).or(self.step_model.as_deref())
    }

    /// How much longer a row makes a step that has the decodes and a part of some prompt anyway, in microseconds. Beside
    /// decodes alone a few tokens would seem to cost nothing, but they take the place of a prompt's.
    fn added_time(&self, start: u32, len: u32) -> f64 {
        let decodes = self.decode_shape().with_row(0, USUAL_CHUNK);
        let added =
            |model: &OnlineCostModel| model.predict(&decodes.with_row(start, len)) - model.predict(&decodes);
        self.step_times().map_or(0.0, added).max(0.0)
    }

    pub(crate) fn copy_time(&self) -> f64 {
        self.step_times().map_or(0.0, OnlineCostModel::copied_block)
    }

    /// Whether so many copies more would make the step longer than decodes may wait, beside prompts that are in it already.
    pub(crate) fn copies_wait(&self, num_copies: u32, pass: &Pass) -> bool {
        if pass.prefill_tokens == 0 || num_copies == 0 || pass.limit_us == f64::INFINITY {
            return false;
        }
        let mut shape = pass.shape;
        // Each takes a block, which may have to be copied out first.
        shape.num_copied_blocks =
            self.kv.num_planned_copies() + num_copies + self.kv.num_copies_for(num_copies);
        self.step_times().is_some_and(|model| model.predict(&shape) > pass.limit_us)
    }

    /// Tells the cache what blocks cost at present.
    pub(crate) fn update_block_costs(&mut self) {
        let at_first = || self.added_time(0, FIRST_GUESS_TOKENS) / f64::from(FIRST_GUESS_TOKENS);
        let per_token = self.prompt_costs.per_token().unwrap_or_else(at_first);
        let compute = per_token * f64::from(self.config.limits.block_size);
        self.kv.set_costs(BlockCosts { copy: self.copy_time(), compute });
    }

    /// Learns from a prompt that comes in what prompts cost.
    pub(crate) fn learn_prompt_cost(&mut self, num_tokens: u32) {
        let micros = self.added_time(0, num_tokens);
        self.prompt_costs.learn(num_tokens, micros);
    }

    /// Learns from a step, where there is no pacing that does.
    pub(crate) fn learn_step_time(&mut self, step: &InFlightStep, now: Micros) {
        let Some(model) = &mut self.step_model else { return };
        // It had the device from when it was planned, or from when the one before ended.
        let began = step.planned.max(self.last_collected);
        model.observe(&step.shape, now.since(began).0 as f64);
        self.last_collected = now;
    }

    /// Whether the KV of this victim is to be kept: copying its blocks out and in takes less time than computing its
    /// tokens. If so, they can be looked up from here on.
    pub(crate) fn prepare_swap(&mut self, victim: SeqIndex) -> bool {
        if self.kv.host().is_none() {
            return false;
        }
        let (hot, data) = (self.seqs.hot(victim), self.seqs.data(victim));
        let num_copies = 2 * self.kv.num_own_blocks(&data.table);
        let compute = self.added_time(0, hot.num_computed_tokens.max(1));
        if self.copy_time() * f64::from(num_copies) >= compute {
            return false;
        }
        self.publish_computed(victim);
        self.stats.host.num_swaps += 1;
        true
    }

    /// Makes the full blocks of a sequence known; if it shares nothing, under addresses that only it has.
    fn publish_computed(&mut self, seq: SeqIndex) {
        let block_size = self.config.limits.block_size;
        let (hot, data) = self.seqs.both_mut(seq);
        let own = |part: u32| own_salt(&self.config.hasher, hot.request, hot.index, part);
        let salt = if data.is_shared() { data.salt } else { own(0) };
        data.extend_hashes(salt, &self.config.hasher, &mut self.block_tokens);
        // Rows in flight write their KV before any later step reads it.
        let num_computed_tokens = hot.num_computed_tokens.min(hot.num_tokens);
        let num_full = num_computed_tokens / block_size;
        for at in data.table.first_live..num_full {
            if let Some(hash) = data.hash(at as usize) {
                self.kv.publish(hash, data.table.blocks[at as usize]);
            }
        }
        // Before the tail lie blocks that a window hides from it, and that a look-up would take all the same.
        if self.kv.has_window() {
            return;
        }
        // What the last block holds so far, under an address that no block has ever had.
        let tail = data.table.live().last().filter(|_| !num_computed_tokens.is_multiple_of(block_size));
        if let Some(&block) = tail
            && data.table.blocks.len() as u32 == num_full + 1
        {
            let address = BlockHash(own(1 + data.usage.num_preemptions).0);
            data.held_tail = self.kv.publish_own(address, block).then_some(address);
        }
    }

    /// A sequence ends: what is still kept for it is kept no longer.
    pub(crate) fn unhold(&mut self, seq: SeqIndex) {
        let data = self.seqs.data(seq);
        if self.kv.host().is_none() || data.usage.num_preemptions == 0 {
            return;
        }
        let forget = !data.is_shared();
        for hash in data.hashes() {
            self.kv.unhold(hash, forget);
        }
        if let Some(address) = data.held_tail {
            self.kv.unhold(address, true);
        }
    }
}

/// A namespace of one sequence. `part`: which of them.
fn own_salt(hasher: &BlockHasher, request: RequestId, index: u32, part: u32) -> CacheSalt {
    let mut name = [0; 19];
    name[..3].copy_from_slice(b"own");
    name[3..11].copy_from_slice(&request.0.to_le_bytes());
    name[11..15].copy_from_slice(&index.to_le_bytes());
    name[15..].copy_from_slice(&part.to_le_bytes());
    hasher.salt(&name)
}

impl KvCacheManager {
    /// Copies between the tiers in the plan in the making.
    pub(crate) fn num_planned_copies(&self) -> u32 {
        self.host().map_or(0, HostTier::num_planned)
    }

    /// The most copies that taking `num_blocks` blocks brings about.
    pub(crate) fn num_copies_for(&self, num_blocks: u32) -> u32 {
        self.host().map_or(0, |_| num_blocks.saturating_sub(self.pool().num_free()))
    }
}

impl HostTier {
    /// `counted`: what the scheduler counts itself.
    pub(crate) fn stats(&self, counted: HostStats) -> HostStats {
        let counters = self.counters();
        HostStats {
            blocks_total: self.len(),
            blocks_used: self.num_used(),
            num_copied_out: counters.num_copied_out,
            num_copied_in: counters.num_copied_in,
            bytes_out: counters.num_copied_out * self.block_bytes(),
            bytes_in: counters.num_copied_in * self.block_bytes(),
            num_evictions: counters.num_evictions,
            ..counted
        }
    }
}
