//! The invariants, recounted from scratch. For tests and the simulator: it touches everything.

use crate::scheduler::Scheduler;
use crate::sequence::{SeqIndex, SeqState, Sequence, SequenceData, TAIL_LEN};

impl Scheduler {
    /// Recounts blocks, references, slots and queues.
    ///
    /// # Errors
    /// The first broken invariant, in words.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.kv.check(self.seqs.iter().map(|(_, _, data)| &data.table))?;
        self.waiting.check()?;
        let mut accounts = vec![(0, 0); self.fair.num_tenants()];
        let mut counts = [0_u32; 3];
        let (mut parked, mut prefilling, mut decode_context) = (0, 0, 0);
        let mut slots = vec![false; self.config.limits.max_num_seqs as usize];
        for (seq, hot, data) in self.seqs.iter() {
            self.check_sequence(seq, hot, data)?;
            match hot.state {
                SeqState::Vacant => return Err(format!("sequence {seq} is vacant but has data")),
                SeqState::Follower => counts[0] += 1,
                SeqState::Waiting => counts[1] += 1,
                SeqState::Running => {
                    counts[2] += 1;
                    let account = &mut accounts[hot.tenant.0 as usize];
                    decode_context += if hot.prefilling { 0 } else { u64::from(hot.num_computed_tokens) };
                    *account = (account.0 + data.table.live().len() as u32, account.1 + 1);
                    if std::mem::replace(&mut slots[hot.slot as usize], true) {
                        return Err(format!("slot {} is taken twice", hot.slot));
                    }
                }
            }
            parked += u32::from(data.parked);
            prefilling += u32::from(hot.prefilling);
        }
        let kept = [self.num_followers, self.waiting.len() as u32, self.num_running];
        if counts != kept {
            return Err(format!("followers, waiting, running: {counts:?} but counted {kept:?}"));
        }
        if parked != self.num_parked || prefilling != self.num_prefilling {
            return Err(format!(
                "{parked} parked and {prefilling} prefilling, but counted {} and {}",
                self.num_parked, self.num_prefilling
            ));
        }
        for slot in &self.free_slots {
            if std::mem::replace(&mut slots[slot.0 as usize], true) {
                return Err(format!("slot {slot} is both free and taken"));
            }
        }
        if !slots.iter().all(|&known| known) {
            return Err("a slot is neither free nor taken".into());
        }
        self.fair.check(&accounts)?;
        if decode_context != self.decode_context {
            return Err(format!("decodes have {decode_context} tokens, counted {}", self.decode_context));
        }
        let queued = self.pacing.as_ref().map_or(self.num_queued as usize, |pacing| pacing.num_queued());
        if queued != self.num_queued as usize {
            return Err(format!("{queued} requests wait to start, counted {}", self.num_queued));
        }
        if self.pacing.as_ref().is_some_and(|pacing| pacing.backlog_len() < queued) {
            return Err(format!("the backlog does not hold all of {queued} requests that wait to start"));
        }
        self.check_order()
    }

    fn check_sequence(&self, seq: SeqIndex, hot: &Sequence, data: &SequenceData) -> Result<(), String> {
        let fail = |what: &str| Err(format!("request {} continuation {}: {what}", hot.request, hot.index));
        let num_unflushed = hot.num_tokens.checked_sub(data.prompt_len() + data.generated.len() as u32);
        if num_unflushed.is_none_or(|num| num > TAIL_LEN) {
            return fail("num_tokens is not prompt, generated and tail");
        }
        if hot.has_output != (hot.num_tokens > data.prompt_len()) {
            return fail("has_output is wrong");
        }
        if hot.num_tokens >= hot.max_total_tokens {
            return fail("it has all its tokens and still lives");
        }
        if hot.num_blocks as usize != data.table.blocks.len() {
            return fail("num_blocks is not the length of the table");
        }
        match hot.state {
            SeqState::Running => {
                if hot.num_computed_tokens > hot.num_existing_tokens() {
                    return fail("more tokens computed than exist");
                }
                if hot.num_blocks < self.kv.blocks_for(hot.num_computed_tokens) {
                    return fail("computed tokens without a block");
                }
                if data.table.first_live > self.kv.first_visible_block(hot.num_computed_tokens) {
                    return fail("a visible block was given back");
                }
                if data.table.live().len() as u32 > self.kv.peak_blocks(hot.num_existing_tokens()) {
                    return fail("it holds blocks that no row can see");
                }
                if !self.running.contains(&seq) {
                    return fail("it runs but is not in the batch");
                }
            }
            SeqState::Waiting if self.waiting.get(&data.key) != Some(seq) => {
                return fail("it waits but is not in the queue");
            }
            SeqState::Waiting if data.parked != (hot.num_blocks > 0) => {
                return fail("it waits with blocks but is not parked");
            }
            SeqState::Follower if hot.num_blocks > 0 => return fail("a follower holds blocks"),
            _ => {}
        }
        Ok(())
    }

    fn check_order(&self) -> Result<(), String> {
        let live = |&seq: &SeqIndex| self.seqs.hot(seq).state == SeqState::Running;
        let mut running = self.running.iter().copied().filter(live).map(|seq| self.seqs.data(seq).key);
        if !running.by_ref().is_sorted() {
            return Err("the batch is not in policy order".into());
        }
        let in_flight: usize = self.in_flight.len() + self.spare_steps.len();
        if in_flight != self.config.limits.max_steps_in_flight as usize {
            return Err(format!("{in_flight} step buffers"));
        }
        if !self.to_publish.is_empty() {
            return Err("full blocks were not published".into());
        }
        if self.seqs.len() == 0 && self.in_flight.is_empty() && self.kv.pool().num_referenced() > 0 {
            return Err("idle, but blocks are still referenced".into());
        }
        Ok(())
    }
}
