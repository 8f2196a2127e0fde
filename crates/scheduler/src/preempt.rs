//! Who loses its blocks: to whom the pool is too small, to whom its tenant's share is, or to a tenant that was served far
//! less.

use crate::note::{NoteKind, WaitCause};
use crate::schedule::Pass;
use crate::scheduler::Scheduler;
use crate::sequence::{SeqIndex, SeqState};

/// Sequences that give up their place in one step.
const MAX_YIELDED: u32 = 16;

impl Scheduler {
    /// Takes blocks from parked sequences, then from the batch, last in order first. Blocks in quarantine count as
    /// found, because they come back by themselves. A sequence without anybody after it waits; it keeps what it has.
    pub(crate) fn make_room(&mut self, seq: SeqIndex, needed: u32, pass: &mut Pass) {
        self.release_parked();
        while self.kv.pool().num_available() + self.kv.pool().num_quarantined() < needed {
            match self.victim(pass) {
                Some(at) => self.preempt(at, WaitCause::KvPressure, pass),
                None => break,
            }
        }
        debug_assert_eq!(self.running[pass.next - 1], seq);
        pass.starved = (self.kv.pool().num_available() < needed).then_some(seq);
    }

    /// Among the sequences from place `from` on: of the lowest priority, of the tenant that was served most, the last.
    fn victim(&self, pass: &Pass) -> Option<usize> {
        let from = pass.next;
        let lowest = self.seqs.data(*self.running.get(from..)?.last()?).key.priority();
        let of_lowest = self.running.partition_point(|&seq| self.seqs.data(seq).key.priority() > lowest);
        let counter = |&at: &usize| self.fair.counter(self.seqs.hot(self.running[at]).tenant);
        let candidates = (of_lowest.max(from)..self.running.len()).filter(|&at| self.may_lose(at, pass));
        candidates.max_by_key(counter)
    }

    /// Whether the sequence at this place, after the one in turn, has no row in this step yet.
    fn may_lose(&self, at: usize, pass: &Pass) -> bool {
        let seq = self.running[at];
        !pass.prompts || self.seqs.hot(seq).prefilling || pass.step.rows.iter().all(|row| row.seq != seq)
    }

    /// Keeps a tenant within its share of the blocks, at the expense of its own sequences after this one. False: it has
    /// none after this one, and must wait for those before.
    pub(crate) fn keep_share(&mut self, seq: SeqIndex, needed: u32, pass: &mut Pass) -> bool {
        let tenant = self.seqs.hot(seq).tenant;
        while self.fair.is_over_share(tenant, needed, self.fair.num_running(tenant) - 1) {
            let own =
                |&at: &usize| self.seqs.hot(self.running[at]).tenant == tenant && self.may_lose(at, pass);
            match (pass.next..self.running.len()).rfind(own) {
                Some(at) => self.preempt(at, WaitCause::KvShare, pass),
                None => return false,
            }
        }
        true
    }

    /// The sequence that has to give up its place for `waiting`: of the tenant that was served most, in no higher
    /// priority, the last; if that tenant is too far ahead.
    fn unfair(&self, waiting: SeqIndex) -> Option<usize> {
        let priority = self.seqs.data(waiting).key.priority();
        let from = self.running.partition_point(|&seq| self.seqs.data(seq).key.priority() > priority);
        let tenant = |at: usize| self.seqs.hot(self.running[at]).tenant;
        // A prompt that is being computed has cost something and brought nothing yet: it may go on.
        let decodes = |&at: &usize| !self.seqs.hot(self.running[at]).prefilling;
        let candidates = (from..self.running.len()).filter(decodes);
        let at = candidates.max_by_key(|&at| self.fair.counter(tenant(at)))?;
        let ceiling = self.fair.ceiling(self.seqs.hot(waiting).tenant);
        (self.fair.counter(tenant(at)) > ceiling).then_some(at)
    }

    /// There is no slot, block or token for the first waiting sequence. If that is unfair, tenants too far ahead stand
    /// still in the next step, or make place: in this one the sequences of the batch have their rows.
    pub(crate) fn note_blocked(&mut self, waiting: SeqIndex, pass: &Pass) {
        let waiting = self.waiting.least_served(&self.seqs.data(waiting).key, &self.fair).unwrap_or(waiting);
        self.blocked = Some(self.seqs.data(waiting).key);
        if self.fair.num_tenants() > 1
            && self.is_idle(pass)
            && let Some(at) = self.unfair(waiting)
        {
            let ahead = self.seqs.hot(self.running[at]).tenant;
            self.num_owed_places = self.fair.places_owed(ahead, self.seqs.hot(waiting).tenant);
        }
    }

    /// Makes place for the first waiting sequence, at the expense of tenants that are too far ahead.
    pub(crate) fn yield_places(&mut self, num_owed: u32, pass: &mut Pass) {
        self.waiting.end_turn();
        let Some(waiting) = self.waiting.first(self.now, &self.fair) else { return };
        let needed = self.kv.peak_blocks(self.seqs.hot(waiting).num_tokens);
        for num_yielded in 0..MAX_YIELDED {
            let fits = self.kv.pool().num_available() + self.kv.pool().num_quarantined() >= needed;
            if num_yielded >= num_owed && fits {
                break;
            }
            let Some(at) = self.unfair(waiting) else { break };
            self.preempt(at, WaitCause::Fairness, pass);
        }
        // These made room for somebody else; the others did not suffer from pressure.
        pass.preempted = false;
    }

    /// Sends a sequence of the batch, at a place not visited yet, back to the queue. Its tokens stay; their KV is kept in
    /// the host tier as far as it makes room, if that is cheaper ([`Scheduler::prepare_swap`]), or else computed anew.
    fn preempt(&mut self, at: usize, cause: WaitCause, pass: &mut Pass) {
        debug_assert!(at >= pass.next, "it may have a row in this step");
        let victim = self.running.remove(at);
        if !self.seqs.hot(victim).prefilling && !pass.prompts {
            pass.decodes_left -= 1;
        }
        self.seqs.flush_tail(victim);
        let swap = self.prepare_swap(victim);
        self.leave_batch(victim, swap);
        let (hot, data) = self.seqs.both_mut(victim);
        hot.state = SeqState::Waiting;
        data.num_lost_tokens = hot.num_computed_tokens;
        hot.num_computed_tokens = 0;
        hot.epoch = hot.epoch.wrapping_add(1);
        data.usage.num_preemptions += 1;
        data.wait_cause = cause;
        if data.is_shared() {
            data.extend_hashes(data.salt, &self.config.hasher, &mut self.block_tokens);
        }
        self.note(victim, NoteKind::Preempted(cause));
        self.enqueue(victim);
        self.stats.num_preemptions += 1;
        pass.preempted = true;
    }
}
