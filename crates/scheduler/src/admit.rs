//! Prompts in a step: those in the batch and those that wait, by policy.

use std::sync::Arc;

use quire_core::{BlockCopy, NewSeq, SchedulerOutput, TokenId};

use crate::cost::StepShape;
use crate::event::{SeqEvent, SeqEventKind};
use crate::note::{NoteKind, WaitCause};
use crate::policy::OrderKey;
use crate::schedule::Pass;
use crate::scheduler::Scheduler;
use crate::sequence::{SeqIndex, SeqState};
use crate::turn::Turn;

/// Tokens of output for which room is made at admission; longer outputs grow by doubling.
const RESERVED_OUTPUT_TOKENS: usize = 1024;

impl Scheduler {
    /// Under latency targets: the prompts of the batch, once all decodes have their rows. Whoever waits and precedes one
    /// of them goes first, so that a long prompt does not hold up short ones that are due sooner.
    pub(crate) fn schedule_prompts(
        &mut self,
        pass: &mut Pass,
        out: &mut SchedulerOutput,
        events: &mut Vec<SeqEvent>,
    ) {
        pass.prompts = true;
        let mut prompts = std::mem::take(&mut self.prompts);
        prompts.retain(|&seq| self.seqs.hot(seq).state == SeqState::Running);
        for &seq in &prompts {
            self.promise_blocks(seq, pass);
        }
        // A decode that waits for blocks may lose its own to a prompt before it, and goes before those after it.
        let starved = pass.starved.map(|seq| (seq, self.seqs.data(seq).key));
        for &seq in &prompts {
            if self.seqs.hot(seq).state != SeqState::Running {
                continue;
            }
            let key = self.seqs.data(seq).key;
            match starved {
                None => self.admit_waiting(Some(key), pass, out, events),
                // Unless a prompt waits for blocks by now.
                Some((decode, place)) if pass.starved.is_none_or(|seq| seq == decode) => {
                    pass.starved = (place < key).then_some(decode);
                }
                Some(_) => {}
            }
            pass.next = 1 + self.running.partition_point(|&other| self.seqs.data(other).key < key);
            let chunk = self.chunk(seq, pass.tokens, pass);
            let end = self.seqs.hot(seq).num_computed_tokens + chunk;
            let num_blocks = self.seqs.hot(seq).num_blocks;
            if chunk > 0 && self.reserve_blocks(seq, end, pass, out) {
                self.push_row(seq, chunk, pass, out);
                pass.prefill_tokens += chunk;
                let kept = self.seqs.hot(seq).num_blocks - num_blocks;
                pass.promised_blocks = pass.promised_blocks.saturating_sub(kept);
            }
        }
        pass.starved = pass.starved.or(starved.map(|(decode, _)| decode));
        prompts.clear();
        self.prompts = prompts;
    }

    /// Admits from the waiting queue as long as there is room, and as long as the next one precedes `before`.
    pub(crate) fn admit_waiting(
        &mut self,
        before: Option<OrderKey>,
        pass: &mut Pass,
        out: &mut SchedulerOutput,
        events: &mut Vec<SeqEvent>,
    ) {
        if pass.starved.is_some() || pass.preempted {
            pass.blocked = Some(WaitCause::KvPressure);
            return;
        }
        (pass.blocked, self.blocked) = (None, None);
        while pass.tokens > 0 {
            let Some(seq) = self.waiting.first(self.now, &self.fair) else { return };
            if before.is_some_and(|before| self.seqs.data(seq).key > before) {
                return;
            }
            match self.turn(seq) {
                Turn::GoesOn => {}
                Turn::Waits => {
                    pass.blocked = Some(WaitCause::Queue);
                    return self.note_blocked(seq, pass);
                }
                Turn::Over => {
                    self.waiting.end_turn();
                    continue;
                }
            }
            if self.free_slots.is_empty() {
                pass.blocked = Some(WaitCause::BatchFull);
                return self.note_blocked(seq, pass);
            }
            // A preempted sequence whose last token is still on its way: it cannot be recomputed yet.
            if self.seqs.hot(seq).num_in_flight > 0 {
                return;
            }
            let hot = self.seqs.hot(seq);
            let (tenant, whole) = (hot.tenant, self.kv.peak_blocks(hot.num_tokens));
            if self.fair.is_over_share(tenant, whole, self.fair.num_running(tenant)) {
                self.waiting.skip(tenant);
                self.note_wait(seq, WaitCause::KvShare);
                continue;
            }
            // A chunk now, whatever part of the prompt will be found in the cache.
            if self.chunk(seq, pass.tokens, pass) == 0 {
                pass.blocked = Some(WaitCause::LatencyTarget);
                return self.note_blocked(seq, pass);
            }
            let Some(chunk) = self.place(seq, pass, out) else {
                // Parked sequences may hold all there is; with nobody running nothing else would free it.
                if self.num_parked == 0 || self.num_running > 0 || self.kv.pool().num_quarantined() > 0 {
                    pass.blocked = Some(WaitCause::KvPressure);
                    return self.note_blocked(seq, pass);
                }
                self.release_parked();
                continue;
            };
            self.enter_batch(seq, chunk, pass, out, events);
        }
        if let Some(seq) = self.waiting.first(self.now, &self.fair) {
            pass.blocked = Some(WaitCause::TokenBudget);
            self.note_blocked(seq, pass);
        }
    }

    /// Gives the first waiting sequence the blocks for its first row, of so many tokens, if the whole of its tokens fits
    /// beside what was promised to others.
    fn place(&mut self, seq: SeqIndex, pass: &mut Pass, out: &mut SchedulerOutput) -> Option<u32> {
        // A little room to grow, so that admission does not cause preemption at once.
        let spare = if self.num_running == 0 { 0 } else { self.config.limits.num_blocks / 100 };
        let available = self.kv.pool().num_available();
        let room = available.saturating_sub(spare).saturating_sub(pass.promised_blocks);
        let placed = if self.seqs.data(seq).parked {
            self.place_fork(seq, room, out)
        } else {
            self.place_prompt(seq, room, pass, out)
        };
        if !placed {
            return None;
        }
        pass.shape.num_copied_blocks = self.kv.num_planned_copies();
        let chunk = self.longest_row(seq, pass.tokens, pass, true);
        let (hot, data) = self.seqs.both_mut(seq);
        for _ in data.table.blocks.len() as u32..self.kv.blocks_for(hot.num_computed_tokens + chunk) {
            let block = self.kv.allocate();
            data.table.blocks.push(block);
        }
        Some(chunk)
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
        let num_on_device = (hit.num_blocks - hit.first_live) - hit.num_on_host;
        let needed = (whole + hit.num_idle).saturating_sub(num_on_device);
        if needed > room || self.copies_wait(hit.num_on_host, pass) {
            return false;
        }
        let (hot, data) = self.seqs.both_mut(seq);
        let block_size = self.config.limits.block_size;
        hot.num_computed_tokens = hit.num_blocks * block_size;
        self.kv.take_hit(hit, &mut data.table);
        data.table.visit = self.kv.visit(data.hashes(), hot.num_tokens, hit);
        // What was held for it goes on where it ended.
        if let Some(address) = data.held_tail.take() {
            let num_tokens = data.num_lost_tokens.min(limit);
            if num_tokens / block_size == hit.num_blocks && num_tokens > hot.num_computed_tokens {
                let took = self.kv.take_own(address, &mut data.table);
                hot.num_computed_tokens = if took { num_tokens } else { hot.num_computed_tokens };
            }
            self.kv.unhold(address, true);
        }
        // All is cached but for the rule that the last token is computed: it is, into a copy of the last block.
        if hot.num_computed_tokens == hit.num_blocks * block_size
            && hot.num_computed_tokens + block_size == hot.num_tokens
            && limit + 1 == hot.num_tokens
            && needed < room
            && let Some(copy) = self.kv.copy_cached(data.hash(hit.num_blocks as usize), &mut data.table)
        {
            out.block_copies.push(copy);
            self.copy_sources.push(copy.src);
            hot.num_computed_tokens = limit;
        }
        let lost = std::mem::take(&mut data.num_lost_tokens);
        self.stats.num_recomputed_tokens += u64::from(lost.saturating_sub(hot.num_computed_tokens));
        if !data.started && data.is_shared() {
            self.stats.host.hit_tokens += u64::from(hit.num_on_host * block_size);
            data.usage.cached_tokens = hot.num_computed_tokens;
            self.stats.prefix_cache_queries += u64::from(data.prompt_len());
            self.stats.prefix_cache_hits += u64::from(hot.num_computed_tokens);
        }
        true
    }

    fn enter_batch(
        &mut self,
        seq: SeqIndex,
        chunk: u32,
        pass: &mut Pass,
        out: &mut SchedulerOutput,
        events: &mut Vec<SeqEvent>,
    ) {
        let slot = self.free_slots.pop().expect("admission checked that a slot is free");
        self.seqs.flush_tail(seq);
        let block_size = self.config.limits.block_size;
        let (hot, data) = self.seqs.both_mut(seq);
        let (key, cached_tokens) = (data.key, hot.num_computed_tokens);
        self.waiting.serve(&key, &self.fair);
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
        self.fair.note_cost(hot.tenant, hot.num_tokens - hot.num_computed_tokens, 0);
        self.fair.entered(hot.tenant, data.table.live().len() as u32);
        out.new.push(NewSeq {
            slot,
            request: hot.request,
            index: hot.index,
            tokens: known_tokens(&data.prompt, &data.generated),
            prompt_len: data.prompt_len(),
            params: data.params.clone(),
            adapter: data.adapter,
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
        let entry = data.request;
        self.note(seq, NoteKind::Entered { cached_tokens });
        if let Some(next) = self.waiting.head_of(&key) {
            self.ask_why(next);
        }
        let at = self.running.partition_point(|&other| self.seqs.data(other).key < key);
        self.running.insert(at, seq);
        self.num_running += 1;
        self.num_prefilling += 1;
        let entry = self.entry_mut(entry);
        let first = !std::mem::replace(&mut entry.started, true);
        let (id, due) = (entry.request.id, entry.due);
        if let (Some(pacing), Some(due)) = (&mut self.pacing, &due) {
            pacing.started(id, due);
        }
        self.num_queued -= u32::from(first);
        self.push_row(seq, chunk, pass, out);
        pass.prefill_tokens += chunk;
        self.promise_blocks(seq, pass);
    }

    /// The longest row of a prompt for which there are tokens and time. 0: it waits.
    pub(crate) fn chunk(&self, seq: SeqIndex, room: u32, pass: &Pass) -> u32 {
        self.longest_row(seq, room, pass, pass.prefill_tokens == 0)
    }

    /// The same; `first`: it must advance whatever the time.
    fn longest_row(&self, seq: SeqIndex, room: u32, pass: &Pass, first: bool) -> u32 {
        let hot = self.seqs.hot(seq);
        let max_tokens = hot.num_schedulable().min(room).min(self.config.max_prefill_chunk);
        let start = hot.num_computed_tokens;
        let Some(pacing) = &self.pacing else { return max_tokens };
        let shape = StepShape { num_copied_blocks: self.kv.num_planned_copies(), ..pass.shape };
        let chunk = pacing.chunk(&shape, pass.limit_us, start, max_tokens, first);
        // The blocks that it takes may have to go to the host tier first.
        match self.kv.num_copies_for(self.kv.blocks_for(chunk)) {
            0 => chunk,
            num_copies => {
                let limit_us = pass.limit_us - f64::from(num_copies) * self.copy_time();
                pacing.chunk(&shape, limit_us, start, chunk, first)
            }
        }
    }
}

fn known_tokens(prompt: &Arc<[TokenId]>, generated: &[TokenId]) -> Arc<[TokenId]> {
    if generated.is_empty() {
        return prompt.clone();
    }
    prompt.iter().chain(generated).copied().collect()
}
