//! One step out: sequences in the batch first, then those that wait, under one token budget.

use std::sync::Arc;

use quire_core::{
    BlockCopy, GrownTable, LogitRows, Micros, NewSeq, Scheduled, SchedulerOutput, Slot, StepId, TokenId,
};

use crate::cost::StepShape;
use crate::event::{SeqEvent, SeqEventKind};
use crate::scheduler::{InFlightRow, InFlightStep, Scheduler};
use crate::sequence::{SeqIndex, SeqState};

/// Tokens of output for which room is made at admission; longer outputs grow by doubling.
const RESERVED_OUTPUT_TOKENS: usize = 1024;

/// What one call of `schedule` has left to give.
pub(crate) struct Pass {
    step: InFlightStep,
    /// The step's token budget.
    tokens: u32,
    /// Decodes not yet visited; prefills leave them a token each.
    pub(crate) decodes_left: u32,
    /// Blocks that admitted prompts will still need.
    promised_blocks: u32,
    /// Place in the batch after the sequence in turn; those from here on have no row yet.
    pub(crate) next: usize,
    /// Somebody waits for blocks: those after it must not take any, and nobody is admitted.
    pub(crate) starved: bool,
    /// Somebody lost its blocks in this step: nobody is admitted.
    pub(crate) preempted: bool,
    prefill_tokens: u32,
    decode_tokens: u32,
    /// All decodes, and the prompts that have their rows.
    shape: StepShape,
    /// How long prompts may make the step, in microseconds.
    limit_us: f64,
}

impl Scheduler {
    /// Decides the next step. An `out` without rows is empty in every part and consumes no step: nothing can run until
    /// a step in flight is collected or a request comes in.
    ///
    /// # Panics
    /// If `max_steps_in_flight` steps are scheduled and not yet given to `update`.
    pub fn schedule(&mut self, now: Micros, out: &mut SchedulerOutput, events: &mut Vec<SeqEvent>) {
        let mut step =
            self.spare_steps.pop().expect("collect a step before scheduling past max_steps_in_flight");
        out.clear();
        step.rows.clear();
        self.now = now;
        self.kv.advance(now);
        events.append(&mut self.ended);
        self.expire(events);
        if self.running.len() > self.num_running as usize {
            self.running.retain(|&seq| self.seqs.hot(seq).state == SeqState::Running);
        }
        let mut pass = Pass {
            step,
            tokens: self.config.limits.max_num_batched_tokens,
            decodes_left: self.num_running - self.num_prefilling,
            promised_blocks: 0,
            next: 0,
            starved: false,
            preempted: false,
            prefill_tokens: 0,
            decode_tokens: 0,
            shape: StepShape::default(),
            limit_us: f64::INFINITY,
        };
        let num_owed = std::mem::take(&mut self.num_owed_places);
        if num_owed > 0 {
            self.yield_places(num_owed, &mut pass);
        }
        pass.shape = self.decode_shape();
        if let Some(pacing) = &self.pacing {
            pass.limit_us = pacing.limit_us(&pass.shape);
        }
        self.schedule_running(&mut pass, out);
        if !pass.starved && !pass.preempted {
            self.admit_waiting(&mut pass, out, events);
            self.waiting.end_step();
        }
        self.close_step(pass, out);
    }

    fn close_step(&mut self, pass: Pass, out: &mut SchedulerOutput) {
        let Pass { mut step, prefill_tokens, decode_tokens, shape, .. } = pass;
        (step.shape, step.planned) = (shape, self.now);
        self.stats.prefill_tokens = prefill_tokens;
        self.stats.decode_tokens = decode_tokens;
        if out.scheduled.is_empty() {
            self.spare_steps.push(step);
            return;
        }
        out.freed.append(&mut self.freed_slots);
        out.step = self.next_step;
        step.step = self.next_step;
        self.next_step = StepId(self.next_step.0 + 1);
        self.in_flight.push_back(step);
        self.kv.step_scheduled(out.step);
        // Only now: this step reads them.
        for block in self.copy_sources.drain(..) {
            self.kv.release(block);
        }
    }

    fn schedule_running(&mut self, pass: &mut Pass, out: &mut SchedulerOutput) {
        let mut at = 0;
        // The list shrinks at its end when somebody is preempted.
        while at < self.running.len() && pass.tokens > 0 {
            at = self.push_decodes(at, pass, out);
            if pass.tokens == 0 {
                return;
            }
            let Some(&seq) = self.running.get(at) else { return };
            at += 1;
            pass.next = at;
            let hot = self.seqs.hot(seq);
            let (prefilling, start) = (hot.prefilling, hot.num_computed_tokens);
            let num_new_tokens = if prefilling {
                // The first in order advances whatever the others need.
                let room = pass.tokens.saturating_sub(pass.decodes_left).max(u32::from(at == 1));
                self.chunk(seq, room, pass)
            } else {
                pass.decodes_left -= 1;
                hot.num_schedulable()
            };
            if num_new_tokens > 0 && self.reserve_blocks(seq, start + num_new_tokens, pass, out) {
                self.push_row(seq, num_new_tokens, pass, out);
                if prefilling {
                    pass.prefill_tokens += num_new_tokens;
                } else {
                    pass.decode_tokens += num_new_tokens;
                }
            }
            if prefilling {
                self.promise_blocks(seq, pass);
            }
        }
    }

    /// Rows of sequences that decode and have room in their last block, which is nearly all of them: touches nothing
    /// but their hot lines. Starts at `from` in the batch and returns where it stopped.
    fn push_decodes(&mut self, from: usize, pass: &mut Pass, out: &mut SchedulerOutput) -> usize {
        if self.kv.has_window() {
            return from;
        }
        let block_size = self.config.limits.block_size;
        let mut num_rows = 0;
        for &seq in self.running[from..].iter().take(pass.tokens as usize) {
            let hot = self.seqs.hot_mut(seq);
            if !hot.decodes_in_place(block_size) {
                break;
            }
            let start = hot.num_computed_tokens;
            let end = start + 1;
            hot.num_computed_tokens = end;
            hot.num_in_flight += 1;
            let (identity, epoch) = (hot.identity, hot.epoch);
            let slot = Slot(hot.slot);
            let row = InFlightRow { seq, identity, end, slot, epoch, sample: true, prompt_logprobs: false };
            pass.step.rows.push(row);
            out.scheduled.push(Scheduled {
                slot,
                num_computed_tokens: start,
                num_new_tokens: 1,
                logits: LogitRows::Last,
                sample: true,
            });
            num_rows += 1;
        }
        self.decode_context += u64::from(num_rows);
        pass.tokens -= num_rows;
        pass.decodes_left -= num_rows;
        pass.decode_tokens += num_rows;
        from + num_rows as usize
    }

    /// Grows the table of a running sequence to hold `num_tokens` tokens, at the expense of those after it. False: it
    /// must wait.
    fn reserve_blocks(
        &mut self,
        seq: SeqIndex,
        num_tokens: u32,
        pass: &mut Pass,
        out: &mut SchedulerOutput,
    ) -> bool {
        if self.kv.has_window() {
            let (hot, data) = self.seqs.both_mut(seq);
            let first_live = data.table.first_live;
            self.kv.release_below_window(&mut data.table, hot.num_computed_tokens);
            self.fair.gave_blocks(hot.tenant, data.table.first_live - first_live);
        }
        let num_blocks = self.seqs.hot(seq).num_blocks;
        let needed = self.kv.blocks_for(num_tokens).saturating_sub(num_blocks);
        if needed == 0 {
            return true;
        }
        if !pass.starved && !self.keep_share(seq, needed, pass) {
            return false;
        }
        if !pass.starved && self.kv.pool().num_available() < needed {
            self.make_room(seq, needed, pass);
        }
        if pass.starved {
            return false;
        }
        self.fair.took_blocks(self.seqs.hot(seq).tenant, needed);
        let slot = Slot(self.seqs.hot(seq).slot);
        for _ in 0..needed {
            let block = self.kv.allocate();
            self.seqs.push_block(seq, block);
            out.grown.push(GrownTable { slot, group: 0, block });
        }
        true
    }

    /// Remembers the blocks that the rest of this prompt will take, so that no other prompt is admitted to them.
    fn promise_blocks(&self, seq: SeqIndex, pass: &mut Pass) {
        let hot = self.seqs.hot(seq);
        let held = self.seqs.data(seq).table.live().len() as u32;
        pass.promised_blocks += self.kv.peak_blocks(hot.num_tokens).saturating_sub(held);
    }

    fn admit_waiting(&mut self, pass: &mut Pass, out: &mut SchedulerOutput, events: &mut Vec<SeqEvent>) {
        while pass.tokens > 0 {
            let Some(seq) = self.waiting.first(self.now, &self.fair) else { return };
            if self.free_slots.is_empty() {
                return self.note_blocked(seq);
            }
            // A preempted sequence whose last token is still on its way: it cannot be recomputed yet.
            if self.seqs.hot(seq).num_in_flight > 0 {
                return;
            }
            let hot = self.seqs.hot(seq);
            let (tenant, whole) = (hot.tenant, self.kv.peak_blocks(hot.num_tokens));
            if self.fair.is_over_share(tenant, whole, self.fair.num_running(tenant)) {
                self.waiting.skip(tenant);
                continue;
            }
            // A chunk now, whatever part of the prompt will be found in the cache.
            if self.chunk(seq, pass.tokens, pass) == 0 {
                return;
            }
            if !self.place(seq, pass, out) {
                // Parked sequences may hold all there is; with nobody running nothing else would free it.
                if self.num_parked == 0 || self.num_running > 0 || self.kv.pool().num_quarantined() > 0 {
                    return self.note_blocked(seq);
                }
                self.release_parked();
                continue;
            }
            self.enter_batch(seq, pass, out, events);
        }
        if let Some(seq) = self.waiting.first(self.now, &self.fair) {
            self.note_blocked(seq);
        }
    }

    /// Gives the first waiting sequence the blocks for its first row, if the whole of its tokens fits beside what was
    /// promised to others.
    fn place(&mut self, seq: SeqIndex, pass: &Pass, out: &mut SchedulerOutput) -> bool {
        // A little room to grow, so that admission does not cause preemption at once.
        let spare = if self.num_running == 0 { 0 } else { self.config.limits.num_blocks / 100 };
        let available = self.kv.pool().num_available();
        let room = available.saturating_sub(spare).saturating_sub(pass.promised_blocks);
        if self.seqs.data(seq).parked {
            self.place_fork(seq, room, out)
        } else {
            self.place_prompt(seq, room, pass, out)
        }
    }

    fn place_fork(&mut self, seq: SeqIndex, room: u32, out: &mut SchedulerOutput) -> bool {
        if room == 0 {
            return false;
        }
        let (hot, data) = self.seqs.both_mut(seq);
        let dst = self.kv.allocate();
        hot.num_computed_tokens = data.prompt_len() - 1;
        // Whole blocks stay shared; the one that the last prompt token falls into becomes a copy.
        if !hot.num_computed_tokens.is_multiple_of(self.config.limits.block_size) {
            let src = data.table.blocks.pop().expect("a parked table holds the prompt");
            out.block_copies.push(BlockCopy { group: 0, src, dst });
            self.copy_sources.push(src);
        }
        data.table.blocks.push(dst);
        data.parked = false;
        self.num_parked -= 1;
        true
    }

    fn place_prompt(&mut self, seq: SeqIndex, room: u32, pass: &Pass, out: &mut SchedulerOutput) -> bool {
        let (hot, data) = self.seqs.both_mut(seq);
        // The last known token is always computed, since its row gives the next one; so is every row whose
        // log-probabilities are wanted.
        let unreported = data.unreported_rows(hot.index);
        let limit = if unreported.is_empty() { hot.num_tokens - 1 } else { unreported.start };
        let hit = self.kv.lookup(data.hashes(), limit);
        let whole = self.kv.peak_blocks(hot.num_tokens);
        let needed = (whole + hit.num_idle).saturating_sub(hit.num_blocks - hit.first_live);
        if needed > room {
            return false;
        }
        let block_size = self.config.limits.block_size;
        hot.num_computed_tokens = hit.num_blocks * block_size;
        self.kv.take_hit(hit, &mut data.table);
        data.table.visit = self.kv.visit(data.hashes(), hot.num_tokens, hit);
        // All is cached but for the rule that the last token is computed: it is, into a copy of the last block.
        if hot.num_computed_tokens + block_size == hot.num_tokens
            && limit + 1 == hot.num_tokens
            && needed < room
            && let Some(copy) = self.kv.copy_cached(data.hash(hit.num_blocks as usize), &mut data.table)
        {
            out.block_copies.push(copy);
            self.copy_sources.push(copy.src);
            hot.num_computed_tokens = limit;
        }
        let max_chunk = hot.num_schedulable().min(pass.tokens).min(self.config.max_prefill_chunk);
        let start = hot.num_computed_tokens;
        let chunk = self
            .pacing
            .as_ref()
            .map_or(max_chunk, |pacing| pacing.chunk(&pass.shape, pass.limit_us, start, max_chunk, true));
        for _ in data.table.blocks.len() as u32..self.kv.blocks_for(hot.num_computed_tokens + chunk) {
            let block = self.kv.allocate();
            data.table.blocks.push(block);
        }
        if !data.started && !data.prompt_hashes.is_empty() {
            data.usage.cached_tokens = hot.num_computed_tokens;
            self.stats.prefix_cache_queries += u64::from(data.prompt_len());
            self.stats.prefix_cache_hits += u64::from(hot.num_computed_tokens);
        }
        true
    }

    fn enter_batch(
        &mut self,
        seq: SeqIndex,
        pass: &mut Pass,
        out: &mut SchedulerOutput,
        events: &mut Vec<SeqEvent>,
    ) {
        let slot = self.free_slots.pop().expect("admission checked that a slot is free");
        self.seqs.flush_tail(seq);
        let block_size = self.config.limits.block_size;
        let (hot, data) = self.seqs.both_mut(seq);
        self.waiting.serve(&data.key, &self.fair);
        hot.state = SeqState::Running;
        hot.slot = slot.0;
        hot.prefilling = true;
        hot.publish_at = u32::MAX;
        let mut last_hash = self.config.hasher.root(data.salt);
        if self.config.enable_prefix_caching && !data.prompt_hashes.is_empty() {
            let at = (hot.num_computed_tokens / block_size) as usize;
            hot.publish_at = (at as u32 + 1) * block_size;
            let before = at.checked_sub(1).and_then(|before| data.hash(before));
            last_hash = before.unwrap_or(last_hash);
        }
        self.seqs.note_table(seq, last_hash);
        let (hot, data) = self.seqs.both_mut(seq);
        self.fair.entered(hot.tenant, data.table.live().len() as u32);
        out.new.push(NewSeq {
            slot,
            request: hot.request,
            index: hot.index,
            tokens: known_tokens(&data.prompt, &data.generated),
            prompt_len: data.prompt_len(),
            params: data.params.clone(),
            seed: data.params.seed_of(hot.index),
            block_tables: vec![data.table.blocks.clone()],
            num_computed_tokens: hot.num_computed_tokens,
        });
        if !data.started {
            data.started = true;
            data.usage.first_scheduled = self.now;
            let output = (data.params.max_tokens as usize).min(RESERVED_OUTPUT_TOKENS);
            data.generated.reserve(output);
            let blocks = output / block_size as usize + 1;
            data.table.blocks.reserve(blocks);
            let kind = SeqEventKind::Started { cached_tokens: data.usage.cached_tokens };
            events.push(SeqEvent { request: hot.request, index: hot.index, kind });
        }
        let (key, entry) = (data.key, data.request);
        let max_chunk = hot.num_schedulable().min(pass.tokens).min(self.config.max_prefill_chunk);
        let start = hot.num_computed_tokens;
        let chunk = self
            .pacing
            .as_ref()
            .map_or(max_chunk, |pacing| pacing.chunk(&pass.shape, pass.limit_us, start, max_chunk, true));
        let at = self.running.partition_point(|&other| self.seqs.data(other).key < key);
        self.running.insert(at, seq);
        self.num_running += 1;
        self.num_prefilling += 1;
        let entry = self.entry_mut(entry);
        let first = !std::mem::replace(&mut entry.started, true);
        let (id, start_by) = (entry.request.id, entry.start_by);
        if let (Some(pacing), Some(start_by)) = (&mut self.pacing, start_by) {
            pacing.dequeue(id, start_by);
        }
        self.num_queued -= u32::from(first);
        self.push_row(seq, chunk, pass, out);
        pass.prefill_tokens += chunk;
        self.promise_blocks(seq, pass);
    }

    /// The longest row of a prompt for which there are tokens and time. 0: it waits.
    fn chunk(&self, seq: SeqIndex, room: u32, pass: &Pass) -> u32 {
        let hot = self.seqs.hot(seq);
        let max_tokens = hot.num_schedulable().min(room).min(self.config.max_prefill_chunk);
        let first = pass.prefill_tokens == 0;
        let start = hot.num_computed_tokens;
        self.pacing
            .as_ref()
            .map_or(max_tokens, |pacing| pacing.chunk(&pass.shape, pass.limit_us, start, max_tokens, first))
    }

    /// Adds the row, for which there are blocks, and moves the sequence past it.
    fn push_row(&mut self, seq: SeqIndex, num_new_tokens: u32, pass: &mut Pass, out: &mut SchedulerOutput) {
        let hot = self.seqs.hot_mut(seq);
        let start = hot.num_computed_tokens;
        let end = start + num_new_tokens;
        let sample = end == hot.num_existing_tokens();
        let mut logits = if sample { LogitRows::Last } else { LogitRows::None };
        if hot.prefilling {
            pass.shape.add_row(start, num_new_tokens);
            if sample {
                hot.prefilling = false;
                self.num_prefilling -= 1;
                self.decode_context += u64::from(start);
            }
            let (index, tenant) = (hot.index, hot.tenant);
            let data = self.seqs.data_mut(seq);
            // Not what was cached, nor what is computed again.
            let fresh = data.num_charged_tokens.max(start)..end.min(data.prompt_len());
            data.num_charged_tokens = fresh.end.max(data.num_charged_tokens);
            self.fair.charge_prompt(tenant, fresh.len() as u32);
            let rows = data.unreported_rows(index);
            if start < rows.end && rows.start < end && !rows.is_empty() {
                logits = LogitRows::All;
            }
        }
        let hot = self.seqs.hot_mut(seq);
        let slot = Slot(hot.slot);
        if !hot.prefilling {
            self.decode_context += u64::from(num_new_tokens);
        }
        hot.num_computed_tokens = end;
        hot.num_in_flight += u8::from(sample);
        pass.tokens -= num_new_tokens;
        pass.step.rows.push(InFlightRow {
            seq,
            identity: hot.identity,
            end,
            slot,
            epoch: hot.epoch,
            sample,
            prompt_logprobs: logits == LogitRows::All,
        });
        out.scheduled.push(Scheduled { slot, num_computed_tokens: start, num_new_tokens, logits, sample });
    }
}

fn known_tokens(prompt: &Arc<[TokenId]>, generated: &[TokenId]) -> Arc<[TokenId]> {
    if generated.is_empty() {
        return prompt.clone();
    }
    prompt.iter().chain(generated).copied().collect()
}
