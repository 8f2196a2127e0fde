//! One step back: tokens are accepted, full blocks become shareable, sequences end.

use quire_core::{FinishReason, Micros, ModelRunnerOutput};

use crate::event::{SeqEvent, SeqEventKind};
use crate::note::NoteKind;
use crate::scheduler::{InFlightRow, InFlightStep, Scheduler};
use crate::sequence::SeqIndex;

impl Scheduler {
    /// Takes the results of the oldest step in flight. Rows of sequences that ended meanwhile are dropped; a row of a
    /// preempted one counts, since its token does not depend on where the KV lives.
    ///
    /// # Panics
    /// If `output` does not answer the oldest step in flight row by row.
    pub fn update(&mut self, now: Micros, output: &ModelRunnerOutput, events: &mut Vec<SeqEvent>) {
        let mut step = self.in_flight.pop_front().expect("update() answers a scheduled step");
        assert_eq!(step.step, output.step, "steps are collected in order");
        self.now = now;
        self.kv.advance(now);
        self.kv.step_collected(step.step);
        if let Some(pacing) = &mut self.pacing {
            pacing.collected(&step.shape, step.planned, now);
        } else if self.step_model.is_some() {
            self.learn_step_time(&step, now);
        }
        events.append(&mut self.ended);
        events.reserve(step.rows.len());
        if !output.prompt_logprobs.is_empty() {
            self.report_prompt_logprobs(&step, output, events);
        }
        let (mut next_row, mut at) = (0, 0);
        while at < step.rows.len() {
            let num_usual = self.accept_usual(&step.rows[at..], next_row, output, events);
            (at, next_row) = (at + num_usual, next_row + num_usual as u32);
            let Some(row) = step.rows.get(at) else { break };
            at += 1;
            let out_row = next_row;
            next_row += u32::from(row.sample);
            let hot = self.seqs.hot(row.seq);
            if hot.identity != row.identity {
                continue;
            }
            if hot.epoch == row.epoch && (row.end >= hot.publish_at || hot.leads) {
                self.publish_and_fork(row);
            }
            if row.sample {
                self.accept(row, out_row, output, events);
            }
        }
        assert_eq!(next_row as usize, output.rows.len(), "one output row per sampled row of {:?}", step.step);
        self.publish_pending();
        step.rows.clear();
        self.spare_steps.push(step);
    }

    /// Takes in tokens as long as nothing but a token is to be taken in, which is nearly always: touches two cache
    /// lines per row. Returns for how many rows.
    fn accept_usual(
        &mut self,
        rows: &[InFlightRow],
        first_out_row: u32,
        output: &ModelRunnerOutput,
        events: &mut Vec<SeqEvent>,
    ) -> usize {
        let answers = output.rows.get(first_out_row as usize..).unwrap_or_default();
        for (at, (row, answer)) in rows.iter().zip(answers).enumerate() {
            if !row.sample || answer.num_tokens != 1 {
                return at;
            }
            let token = output.tokens[answer.start as usize];
            if self.seqs.ends_block(row) && !self.publish_tail(row.seq) {
                return at;
            }
            let Some(hot) = self.seqs.take_in_place(row, token) else { return at };
            assert_eq!(answer.slot, row.slot, "rows are answered in the order of `scheduled`");
            self.fair.charge_output_token(hot.tenant);
            let kind = SeqEventKind::Tokens { row: first_out_row + at as u32, num_tokens: 1 };
            events.push(SeqEvent { request: hot.request, index: hot.index, kind });
        }
        rows.len().min(answers.len())
    }

    /// The row's KV is in place and its sequence still holds the blocks.
    fn publish_and_fork(&mut self, row: &InFlightRow) {
        while row.end >= self.seqs.hot(row.seq).publish_at {
            self.publish_block(row.seq);
        }
        let hot = self.seqs.hot(row.seq);
        if hot.leads && row.end >= self.seqs.data(row.seq).prompt_len() {
            self.park_followers(row.seq);
        }
    }

    /// Publishes a block whose tokens are all in the tail. False: it has others.
    fn publish_tail(&mut self, seq: SeqIndex) -> bool {
        if self.kv.has_window() {
            return false;
        }
        let Some((hash, block)) = self.seqs.block_of_tail(seq, &self.config.hasher) else { return false };
        self.seqs.hot_mut(seq).publish_at += self.config.limits.block_size;
        *self.seqs.last_hash_mut(seq) = hash;
        self.to_publish.push((hash, block));
        true
    }

    fn publish_block(&mut self, seq: SeqIndex) {
        if self.publish_tail(seq) {
            return;
        }
        let block_size = self.config.limits.block_size;
        self.seqs.flush_tail(seq);
        let parent = *self.seqs.last_hash_mut(seq);
        let (hot, data) = self.seqs.both_mut(seq);
        let at = (hot.publish_at / block_size - 1) as usize;
        hot.publish_at += block_size;
        let hash = match data.hash(at) {
            Some(hash) => hash,
            None => data.hash_block(at, parent, &self.config.hasher, &mut self.block_tokens),
        };
        // A block that fell out of the window is no longer ours.
        if at >= data.table.first_live as usize {
            self.to_publish.push((hash, data.table.blocks[at]));
        }
        *self.seqs.last_hash_mut(seq) = hash;
    }

    /// Hands full blocks to the prefix cache: all of a step together, because the look-ups are cache misses that then
    /// overlap. At the latest before any of the blocks is given back.
    fn publish_pending(&mut self) {
        for (hash, block) in self.to_publish.drain(..) {
            self.kv.publish(hash, block);
        }
    }

    fn accept(
        &mut self,
        row: &InFlightRow,
        out_row: u32,
        output: &ModelRunnerOutput,
        events: &mut Vec<SeqEvent>,
    ) {
        let answer = &output.rows[out_row as usize];
        assert_eq!(answer.slot, row.slot, "rows are answered in the order of `scheduled`");
        assert_eq!(answer.num_tokens, 1, "one token per sampled row");
        let token = output.tokens[answer.start as usize];
        let stop = self.seqs.is_stop(row.seq, token);
        self.seqs.push_token(row.seq, token);
        let hot = self.seqs.hot_mut(row.seq);
        hot.num_in_flight -= 1;
        let full = hot.num_tokens >= hot.max_total_tokens;
        let first = !std::mem::replace(&mut hot.has_output, true);
        self.fair.charge_output_token(hot.tenant);
        let kind = SeqEventKind::Tokens { row: out_row, num_tokens: 1 };
        events.push(SeqEvent { request: hot.request, index: hot.index, kind });
        if first {
            self.seqs.data_mut(row.seq).usage.first_token = self.now;
            self.note(row.seq, NoteKind::FirstToken);
        }
        if stop || full {
            self.publish_pending();
        }
        if stop {
            self.end_sequence(row.seq, FinishReason::Stop, Some(token), events);
        } else if full {
            self.end_sequence(row.seq, FinishReason::Length, None, events);
        }
    }

    fn report_prompt_logprobs(
        &mut self,
        step: &InFlightStep,
        output: &ModelRunnerOutput,
        events: &mut Vec<SeqEvent>,
    ) {
        for row in step.rows.iter().filter(|row| row.prompt_logprobs) {
            if self.seqs.hot(row.seq).identity != row.identity {
                continue;
            }
            let (hot, data) = self.seqs.both_mut(row.seq);
            let unreported = data.unreported_rows(hot.index);
            for (entry, (slot, position, _)) in output.prompt_logprobs.iter().enumerate() {
                // Row p speaks about the token at p + 1.
                let wanted = position.checked_sub(1).is_some_and(|at| unreported.contains(&at));
                if *slot == row.slot && wanted {
                    let kind = SeqEventKind::PromptLogprobs { entry: entry as u32 };
                    events.push(SeqEvent { request: hot.request, index: hot.index, kind });
                }
            }
            data.num_reported_rows = data.num_reported_rows.max(row.end.min(data.prompt_len() - 1));
        }
    }
}
