//! How long a tenant stays in turn where the pool does not hold the prefixes that are waited for.
//!
//! Each turn then begins with a prefix that has to be computed, and what follows finds it: the longer the turns, the less
//! is computed twice. So a turn lasts as long as the bound on the gap between tenants allows, counting what the tenant's
//! running sequences have still to come and what is not cached of the next.

use quire_core::TenantId;

use crate::scheduler::Scheduler;
use crate::sequence::{SeqIndex, SeqState};

/// What becomes of a turn, once the next sequence of the tenant has been looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The sequence may enter.
    GoesOn,
    /// The prefix is being computed by another: the sequence finds it in the next step.
    Waits,
    /// It would take its tenant too far ahead of another that waits.
    Over,
}

impl Scheduler {
    /// Looks the sequence up in the cache only where turns are long; elsewhere the counters alone decide.
    pub(crate) fn turn(&mut self, seq: SeqIndex) -> Turn {
        if !self.fair.is_crowded() || !self.waiting.has_turn() || self.free_slots.is_empty() {
            return Turn::GoesOn;
        }
        let (hot, data) = self.seqs.both_mut(seq);
        let (tenant, key, num_tokens) = (hot.tenant, data.key, hot.num_tokens);
        let num_cached = self.kv.lookup(data.hashes(), num_tokens - 1).num_blocks;
        let num_shared = self.waiting.shared_blocks_of(&key).max(num_cached);
        let block_size = self.config.limits.block_size;
        let num_new = |num_blocks: u32| num_tokens - (num_blocks * block_size).min(num_tokens);
        if self.is_ahead(seq, num_new(num_shared)) {
            Turn::Over
        } else if num_shared > num_cached && self.computes_prompt(tenant) {
            Turn::Waits
        } else if self.is_ahead(seq, num_new(num_cached)) {
            Turn::Over
        } else {
            Turn::GoesOn
        }
    }

    /// Whether the sequence, of which `num_new_tokens` are computed, would take its tenant too far ahead.
    fn is_ahead(&mut self, seq: SeqIndex, num_new_tokens: u32) -> bool {
        let counter = self.fair.committed(self.seqs.hot(seq).tenant, num_new_tokens);
        self.waiting.is_ahead(&self.seqs.data(seq).key, counter, &self.fair)
    }

    /// Whether a prompt of this tenant is being computed.
    fn computes_prompt(&self, tenant: TenantId) -> bool {
        self.running
            .iter()
            .map(|&seq| self.seqs.hot(seq))
            .any(|hot| hot.tenant == tenant && hot.state == SeqState::Running && !hot.has_output)
    }
}
