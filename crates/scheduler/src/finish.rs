//! How sequences leave: by their client, their deadline, or (from `update`) their last token.

use quire_core::{FinishReason, Micros, RequestId, Slot, TokenId};

use crate::event::{SeqEvent, SeqEventKind};
use crate::scheduler::{ENDED, Scheduler};
use crate::sequence::{SeqIndex, SeqState};

impl Scheduler {
    /// Ends a request, or one of its continuations, now. Unknown ids (it may have just ended) are ignored. The
    /// `Finished` events come with the next `schedule` or `update`.
    pub fn finish(&mut self, id: RequestId, index: Option<u32>, reason: FinishReason) {
        let mut events = std::mem::take(&mut self.ended);
        self.end_request(id, index, reason, &mut events);
        self.ended = events;
    }

    /// Makes a place in a full queue for a request of this priority: ends the newest of the lowest priority that waits and
    /// never ran, if that is lower, as [`FinishReason::Rejected`]. How many continuations that were; 0: there is none.
    pub fn displace(&mut self, priority: i8) -> u32 {
        let never_ran = |seq| !self.entry(self.seqs.data(seq).request).started;
        let Some(seq) = self.waiting.newest_below(priority, never_ran) else { return 0 };
        let num_live = self.entry(self.seqs.data(seq).request).num_live;
        self.finish(self.seqs.hot(seq).request, None, FinishReason::Rejected);
        self.stats.num_rejected += 1;
        num_live
    }

    /// Ends every request, for a device that failed or a drain that ran out of time.
    pub fn finish_all(&mut self, reason: FinishReason) {
        while let Some((&id, _)) = self.by_id.first_key_value() {
            self.finish(id, None, reason);
        }
    }

    /// Takes the events of [`Self::finish`] without waiting for the next step; they count as having happened at `now`.
    pub fn drain_events(&mut self, now: Micros, events: &mut Vec<SeqEvent>) {
        self.now = now;
        for event in &mut self.ended {
            if let SeqEventKind::Finished { usage, .. } = &mut event.kind {
                usage.finished = now;
            }
        }
        events.append(&mut self.ended);
    }

    pub(crate) fn end_request(
        &mut self,
        id: RequestId,
        index: Option<u32>,
        reason: FinishReason,
        events: &mut Vec<SeqEvent>,
    ) {
        let Some(&entry) = self.by_id.get(&id) else { return };
        let num_seqs = self.entry(entry).seqs.len() as u32;
        let range = index.map_or(0..num_seqs, |index| index..num_seqs.min(index.saturating_add(1)));
        for index in range {
            // The entry is gone once its last continuation ended.
            let Some(live) = self.requests[entry as usize].as_ref() else { return };
            let seq = live.seqs[index as usize];
            if seq != ENDED {
                self.end_sequence(seq, reason, None, events);
            }
        }
    }

    /// Takes a sequence out of wherever it is and reports its end.
    pub(crate) fn end_sequence(
        &mut self,
        seq: SeqIndex,
        reason: FinishReason,
        stop_token: Option<TokenId>,
        events: &mut Vec<SeqEvent>,
    ) {
        self.promote_follower(seq);
        match self.seqs.hot(seq).state {
            SeqState::Vacant => return,
            SeqState::Follower => self.num_followers -= 1,
            SeqState::Waiting => {
                let (_, data) = self.seqs.both_mut(seq);
                let key = data.key;
                self.waiting.remove(&key);
                if let Some(next) = self.waiting.head_of(&key) {
                    self.ask_why(next);
                }
                let (_, data) = self.seqs.both_mut(seq);
                self.num_parked -= u32::from(data.parked);
                self.kv.release_table(&mut data.table, data.prompt.len() as u32, 0, 0);
                self.unhold(seq);
            }
            SeqState::Running => {
                self.leave_batch(seq, false);
                self.unhold(seq);
            }
        }
        let hot = self.seqs.hot(seq);
        let (request, index, num_tokens, tenant) = (hot.request, hot.index, hot.num_tokens, hot.tenant);
        let Some(data) = self.seqs.remove(seq) else { return };
        let mut usage = data.usage;
        usage.finished = self.now;
        usage.generated_tokens = num_tokens - data.prompt_len();
        let num_prompt_tokens = if data.started { data.prompt_len() - usage.cached_tokens } else { 0 };
        self.fair.note_cost(tenant, num_prompt_tokens, usage.generated_tokens);
        self.fair.note_output(tenant, usage.generated_tokens);
        if usage.generated_tokens == 0 {
            usage.first_token = self.now;
        }
        if !data.started {
            usage.first_scheduled = self.now;
        }
        events.push(SeqEvent {
            request,
            index,
            kind: SeqEventKind::Finished { reason, stop_token, usage: Box::new(usage) },
        });
        self.forget_continuation(data.request, index);
    }

    fn forget_continuation(&mut self, at: u32, index: u32) {
        let entry = self.entry_mut(at);
        entry.seqs[index as usize] = ENDED;
        entry.num_live -= 1;
        if entry.num_live > 0 {
            return;
        }
        let (id, deadline, started) = (entry.request.id, entry.request.deadline, entry.started);
        let due = entry.due;
        if let (Some(pacing), Some(due)) = (&mut self.pacing, &due) {
            pacing.dequeue(id, due);
        }
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.num_queued -= u32::from(!started);
        self.by_id.remove(&id);
        self.requests[at as usize] = None;
        self.vacant_requests.push(at);
    }

    /// Gives back blocks and slot of a running sequence. The caller sets its next state.
    pub(crate) fn leave_batch(&mut self, seq: SeqIndex, hold: bool) {
        let num_wanted = self.num_shared_blocks(seq);
        let (hot, data) = self.seqs.both_mut(seq);
        self.fair.left(hot.tenant, data.table.live().len() as u32);
        let prompt_tokens = data.prompt_len();
        if hold {
            self.kv.hold_table(&mut data.table);
        } else {
            let output_tokens = hot.num_tokens - prompt_tokens;
            self.kv.release_table(&mut data.table, prompt_tokens, output_tokens, num_wanted);
        }
        hot.num_blocks = 0;
        self.free_slots.push(Slot(hot.slot));
        self.freed_slots.push(Slot(hot.slot));
        self.num_running -= 1;
        self.num_prefilling -= u32::from(hot.prefilling);
        if !hot.prefilling {
            self.decode_context -= u64::from(hot.num_computed_tokens);
        }
        hot.prefilling = false;
    }

    /// Ends the requests whose deadline has passed, and those that can no longer start in time.
    pub(crate) fn expire(&mut self, events: &mut Vec<SeqEvent>) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= self.now
        {
            self.end_request(id, None, FinishReason::Deadline, events);
        }
        while let Some(id) = self.pacing.as_ref().and_then(|pacing| pacing.hopeless(self.now)) {
            if !self.put_off(id) {
                self.end_request(id, None, FinishReason::Rejected, events);
                self.stats.num_rejected += 1;
            }
        }
    }

    /// Lets a request that can no longer start in time wait behind those that can. False: it has waited long enough.
    fn put_off(&mut self, id: RequestId) -> bool {
        let (Some(pacing), Some(&at)) = (&mut self.pacing, self.by_id.get(&id)) else { return false };
        let entry = self.requests[at as usize].as_mut().expect("a known id has a request");
        let Some(due) = entry.due else { return false };
        let Some(later) = pacing.put_off(&due, &entry.request, self.now) else { return false };
        pacing.dequeue(id, &due);
        pacing.enqueue(id, &later);
        entry.due = Some(later);
        let seqs = entry.seqs.clone();
        for seq in seqs.into_iter().filter(|&seq| seq != ENDED) {
            let (hot, data) = self.seqs.both_mut(seq);
            let before = data.key;
            data.key = before.due_at(later.place.due);
            if hot.state == SeqState::Waiting {
                self.waiting.remove(&before);
                // It does not come back from idleness, so its tenant keeps what it is owed.
                let key = self.seqs.data(seq).key;
                self.waiting.insert(key, seq, false, &mut self.fair);
                self.ask_why(seq);
            }
        }
        true
    }
}
