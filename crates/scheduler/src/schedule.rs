//! One step out: sequences in the batch first, then those that wait, under one token budget.

use quire_core::{GrownTable, LogitRows, Micros, Scheduled, SchedulerOutput, Slot, StepId};

use crate::cost::StepShape;
use crate::event::SeqEvent;
use crate::note::{NoteKind, WaitCause};
use crate::pause::Pause;
use crate::scheduler::{InFlightRow, InFlightStep, Scheduler};
use crate::sequence::{SeqIndex, SeqState};

/// What one call of `schedule` has left to give.
pub(crate) struct Pass {
    pub(crate) step: InFlightStep,
    /// The step's token budget.
    pub(crate) tokens: u32,
    /// Decodes not yet visited; prefills leave them a token each.
    pub(crate) decodes_left: u32,
    /// Blocks that admitted prompts will still need.
    pub(crate) promised_blocks: u32,
    /// Place in the batch after the sequence in turn; those from here on have no row yet.
    pub(crate) next: usize,
    /// The decodes have their rows, and prompts are in turn.
    pub(crate) prompts: bool,
    /// Somebody waits for blocks: those after it must not take any, and nobody is admitted.
    pub(crate) starved: Option<SeqIndex>,
    /// Somebody lost its blocks in this step: nobody is admitted.
    pub(crate) preempted: bool,
    /// What keeps out the first that waits.
    pub(crate) blocked: Option<WaitCause>,
    /// Who stands still, and how many did.
    pub(crate) pause: Option<Pause>,
    pub(crate) num_paused: u32,
    pub(crate) prefill_tokens: u32,
    decode_tokens: u32,
    /// All decodes, and the prompts that have their rows.
    pub(crate) shape: StepShape,
    /// How long prompts may make the step, in microseconds.
    pub(crate) limit_us: f64,
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
        self.begin_notes();
        self.kv.advance(now);
        if self.kv.host().is_some() {
            self.update_block_costs();
        }
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
            prompts: false,
            starved: None,
            preempted: false,
            blocked: None,
            pause: self.pause(),
            num_paused: 0,
            prefill_tokens: 0,
            decode_tokens: 0,
            shape: StepShape::default(),
            limit_us: f64::INFINITY,
        };
        self.fair.set_shared_blocks(self.waiting.num_shared_blocks());
        let num_owed = std::mem::take(&mut self.num_owed_places);
        if num_owed > 0 {
            self.yield_places(num_owed, &mut pass);
        }
        pass.shape = self.decode_shape();
        if let Some(pacing) = &self.pacing {
            pass.limit_us = pacing.limit_us(&pass.shape);
        }
        self.schedule_running(&mut pass, out);
        self.schedule_prompts(&mut pass, out, events);
        self.admit_waiting(None, &mut pass, out, events);
        if out.scheduled.is_empty() && self.resume(&mut pass) {
            self.schedule_running(&mut pass, out);
            self.schedule_prompts(&mut pass, out, events);
        }
        self.explain_waiting(pass.blocked);
        self.waiting.end_step();
        self.close_step(pass, out);
    }

    fn close_step(&mut self, pass: Pass, out: &mut SchedulerOutput) {
        let Pass { mut step, prefill_tokens, decode_tokens, mut shape, .. } = pass;
        shape.num_copied_blocks = self.kv.num_planned_copies();
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
        self.kv.step_scheduled(out.step, out);
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
            if self.is_paused(seq, pass) {
                self.skip_paused(seq, pass);
                continue;
            }
            let hot = self.seqs.hot(seq);
            let (prefilling, start) = (hot.prefilling, hot.num_computed_tokens);
            if prefilling && self.pacing.is_some() {
                // Who waits may be in more of a hurry.
                self.prompts.push(seq);
                continue;
            }
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
        let pausing = pass.pause.is_some();
        let mut num_rows = 0;
        for &seq in self.running[from..].iter().take(pass.tokens as usize) {
            if pausing && self.is_paused(seq, pass) {
                break;
            }
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
    pub(crate) fn reserve_blocks(
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
        if pass.starved.is_none() && !self.keep_share(seq, needed, pass) {
            return false;
        }
        if pass.starved.is_none() && self.kv.pool().num_available() < needed {
            self.make_room(seq, needed, pass);
        }
        if pass.starved.is_some() {
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
    pub(crate) fn promise_blocks(&self, seq: SeqIndex, pass: &mut Pass) {
        let hot = self.seqs.hot(seq);
        let held = self.seqs.data(seq).table.live().len() as u32;
        pass.promised_blocks += self.kv.peak_blocks(hot.num_tokens).saturating_sub(held);
    }

    /// Adds the row, for which there are blocks, and moves the sequence past it.
    pub(crate) fn push_row(
        &mut self,
        seq: SeqIndex,
        num_new_tokens: u32,
        pass: &mut Pass,
        out: &mut SchedulerOutput,
    ) {
        let hot = self.seqs.hot_mut(seq);
        let start = hot.num_computed_tokens;
        let end = start + num_new_tokens;
        let sample = end == hot.num_existing_tokens();
        let mut logits = if sample { LogitRows::Last } else { LogitRows::None };
        if hot.prefilling {
            self.note(seq, NoteKind::Chunk { num_tokens: num_new_tokens });
            let hot = self.seqs.hot_mut(seq);
            pass.shape.add_row(start, num_new_tokens);
            if sample {
                hot.prefilling = false;
                self.num_prefilling -= 1;
                self.decode_context += u64::from(start);
            }
            let (index, tenant, rest) = (hot.index, hot.tenant, end..hot.num_tokens);
            if let Some(pacing) = &mut self.pacing {
                let entry = self.requests[self.seqs.data(seq).request as usize].as_ref();
                let entry = entry.expect("a live sequence has a request");
                if let Some(due) = &entry.due {
                    pacing.advanced(entry.request.id, due, rest);
                }
            }
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
