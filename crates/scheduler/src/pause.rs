//! Who stands still in a step, because its tenant was served far more than one that waits for a place.
//!
//! A sequence that stands still keeps its blocks and loses nothing but time, so what it costs is a smaller batch; one
//! that is preempted is computed again. Its tenant's counter stands still with it, so a lead ends where pausing begins.
//! Only where so much of the batch would stand still that the device has little to do are places given up
//! ([`Scheduler::note_blocked`]).

use quire_core::TenantId;

use crate::fair::Counter;
use crate::policy::OrderKey;
use crate::schedule::Pass;
use crate::scheduler::Scheduler;
use crate::sequence::SeqIndex;

/// Of the batch, the part that may stand still; beyond it, sequences give up their places.
const MAX_PAUSED: f64 = 0.1;

/// Whose sequences stand still.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pause {
    /// Of tenants whose counter is beyond.
    ceiling: Counter,
    /// Of no higher priority.
    priority: i8,
}

impl Scheduler {
    /// The rule for a step, if somebody waits for whom there was no room in the one before.
    pub(crate) fn pause(&mut self) -> Option<Pause> {
        let key: OrderKey = self.blocked?;
        if self.fair.num_tenants() < 2 || self.waiting.get(&key).is_none() {
            return None;
        }
        // The step may have changed who was served least.
        let least = self.waiting.least_served(&key, &self.fair).map(|seq| self.seqs.hot(seq).tenant);
        let may_run = |&tenant: &TenantId| !self.fair.is_over_share(tenant, 1, self.fair.num_running(tenant));
        let behind = least.filter(may_run).unwrap_or(key.queue().1);
        Some(Pause { ceiling: self.fair.ceiling(behind), priority: key.priority() })
    }

    /// Whether the sequence stands still in this step.
    pub(crate) fn is_paused(&self, seq: SeqIndex, pass: &Pass) -> bool {
        pass.pause.is_some_and(|pause| {
            self.fair.counter(self.seqs.hot(seq).tenant) > pause.ceiling
                && self.seqs.data(seq).key.priority() <= pause.priority
        })
    }

    /// Passes over a sequence of the batch that stands still.
    pub(crate) fn skip_paused(&self, seq: SeqIndex, pass: &mut Pass) {
        pass.num_paused += 1;
        let hot = self.seqs.hot(seq);
        if hot.prefilling {
            return self.promise_blocks(seq, pass);
        }
        pass.decodes_left -= 1;
        pass.shape.num_rows -= 1;
        pass.shape.num_tokens -= 1;
        pass.shape.num_context_tokens -= u64::from(hot.num_computed_tokens);
    }

    /// Whether so many stand still that the one they wait for had better get their places.
    pub(crate) fn is_idle(&self, pass: &Pass) -> bool {
        f64::from(pass.num_paused) >= MAX_PAUSED * f64::from(self.num_running)
    }

    /// Nobody has anything to do but those that stand still: they go on. True if there are any.
    pub(crate) fn resume(&self, pass: &mut Pass) -> bool {
        if pass.num_paused == 0 {
            return false;
        }
        (pass.pause, pass.num_paused) = (None, 0);
        (pass.starved, pass.prompts, pass.next) = (None, false, 0);
        pass.decodes_left = self.num_running - self.num_prefilling;
        pass.promised_blocks = 0;
        pass.shape = self.decode_shape();
        true
    }
}
