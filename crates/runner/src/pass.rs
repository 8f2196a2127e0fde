//! One pass over the model as flat arrays. A step is one pass, unless it wants more rows of logits than the buffer
//! holds (log-probabilities of long prompts); then it is cut, in order, into several.

use quire_backend::{LogitKind, LogitRow, ON_DEVICE, SeqState, StepInput};
use quire_core::{AdapterId, BlockCopy, LogitRows, Scheduled, SchedulerOutput, Slot, StepId, TokenId};

use crate::RunnerConfig;
use crate::error::PlanError;
use crate::input_batch::InputBatch;

/// How much of a step has been put into passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Index into `scheduled`.
    row: usize,
    /// Tokens of that row.
    tokens: u32,
}

impl Cursor {
    /// Whether nothing is left.
    pub fn at_end(&self, plan: &SchedulerOutput) -> bool {
        self.row >= plan.scheduled.len()
    }
}

/// The arrays of [`StepInput`], reused.
#[derive(Debug)]
pub(crate) struct Pass {
    token_ids: Vec<TokenId>,
    positions: Vec<u32>,
    slot_mapping: Vec<u32>,
    cu_seqlens_q: Vec<u32>,
    seq_lens: Vec<u32>,
    seq_slots: Vec<Slot>,
    seq_adapters: Vec<Option<AdapterId>>,
    block_tables: Vec<u32>,
    logit_rows: Vec<LogitRow>,
    block_copies: Vec<BlockCopy>,
    block_size: u32,
    max_blocks_per_seq: u32,
    max_num_batched_tokens: u32,
    max_logit_rows: usize,
}

impl Pass {
    pub fn new(config: &RunnerConfig) -> Self {
        let tokens = config.max_num_batched_tokens as usize;
        let seqs = config.max_num_seqs as usize;
        let max_logit_rows = config.max_logit_rows() as usize;
        Self {
            token_ids: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            slot_mapping: Vec::with_capacity(tokens),
            cu_seqlens_q: Vec::with_capacity(seqs + 1),
            seq_lens: Vec::with_capacity(seqs),
            seq_slots: Vec::with_capacity(seqs),
            seq_adapters: Vec::with_capacity(seqs),
            block_tables: Vec::with_capacity(seqs * config.max_blocks_per_seq() as usize),
            logit_rows: Vec::with_capacity(max_logit_rows),
            block_copies: Vec::new(),
            block_size: config.block_size,
            max_blocks_per_seq: config.max_blocks_per_seq(),
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_logit_rows,
        }
    }

    /// Checks a plan, before any of it runs, against the batch it was applied to.
    pub fn check(&self, plan: &SchedulerOutput, batch: &InputBatch) -> Result<(), PlanError> {
        let tokens: u64 = plan.scheduled.iter().map(|row| u64::from(row.num_new_tokens)).sum();
        if tokens > u64::from(self.max_num_batched_tokens) {
            return Err(PlanError::TooManyTokens { tokens, max: self.max_num_batched_tokens });
        }
        plan.scheduled.iter().try_for_each(|row| self.check_row(row, batch))
    }

    fn check_row(&self, row: &Scheduled, batch: &InputBatch) -> Result<(), PlanError> {
        let slot = row.slot;
        let known = batch.num_tokens(slot)?;
        let (start, end) =
            (row.num_computed_tokens, row.num_computed_tokens.saturating_add(row.num_new_tokens));
        if start >= end || end as usize > known {
            return Err(PlanError::UnknownTokens { slot, start, end, known });
        }
        let capacity = (batch.block_table(slot).len() as u32).saturating_mul(self.block_size);
        if end > capacity {
            return Err(PlanError::NoBlocks { slot, start, end, capacity });
        }
        if row.sample && end as usize != known {
            return Err(PlanError::SampleInside { slot, end, known });
        }
        Ok(())
    }

    /// Fills the arrays with what follows `cursor`, as far as the logits buffer allows; returns where the next pass
    /// begins. Rows keep the order of the plan, so whatever an earlier row writes, later ones find.
    pub fn fill(
        &mut self,
        plan: &SchedulerOutput,
        batch: &InputBatch,
        mut cursor: Cursor,
    ) -> Result<Cursor, PlanError> {
        self.clear();
        if cursor == Cursor::default() {
            self.block_copies.extend_from_slice(&plan.block_copies);
        }
        while let Some(row) = plan.scheduled.get(cursor.row) {
            let left = row.num_new_tokens - cursor.tokens;
            let taken = self.tokens_that_fit(row, left);
            if taken > 0 {
                self.push(row, cursor.tokens, taken, batch)?;
            }
            if taken < left {
                cursor.tokens += taken;
                return Ok(cursor);
            }
            cursor = Cursor { row: cursor.row + 1, tokens: 0 };
        }
        Ok(cursor)
    }

    /// The arrays as a backend takes them.
    pub fn as_step_input<'a>(&'a self, step: StepId, seqs: &'a [Option<SeqState>]) -> StepInput<'a> {
        StepInput {
            step,
            token_ids: &self.token_ids,
            positions: &self.positions,
            slot_mapping: &self.slot_mapping,
            cu_seqlens_q: &self.cu_seqlens_q,
            seq_lens: &self.seq_lens,
            seq_slots: &self.seq_slots,
            seq_adapters: &self.seq_adapters,
            block_tables: &self.block_tables,
            max_blocks_per_seq: self.max_blocks_per_seq,
            logit_rows: &self.logit_rows,
            block_copies: &self.block_copies,
            seqs,
        }
    }

    /// Whether every sequence computes one token and samples the next: such passes differ in what they read only.
    pub fn is_decode(&self) -> bool {
        let rows = self.token_ids.len();
        rows > 0
            && rows == self.seq_slots.len()
            && rows == self.logit_rows.len()
            && self.block_copies.is_empty()
    }

    /// Whether a row has an adapter.
    pub fn has_adapters(&self) -> bool {
        self.seq_adapters.iter().any(Option::is_some)
    }

    /// Rows of logits in this pass.
    pub fn num_logit_rows(&self) -> usize {
        self.logit_rows.len()
    }

    fn clear(&mut self) {
        self.token_ids.clear();
        self.positions.clear();
        self.slot_mapping.clear();
        self.cu_seqlens_q.clear();
        self.cu_seqlens_q.push(0);
        self.seq_lens.clear();
        self.seq_slots.clear();
        self.seq_adapters.clear();
        self.block_tables.clear();
        self.logit_rows.clear();
        self.block_copies.clear();
    }

    /// How many of `left` tokens of a row still fit: a token wants at most one row of logits.
    fn tokens_that_fit(&self, row: &Scheduled, left: u32) -> u32 {
        let room = (self.max_logit_rows - self.logit_rows.len()) as u32;
        match row.logits {
            LogitRows::All => left.min(room),
            LogitRows::Last | LogitRows::None if row.sample && room == 0 => 0,
            LogitRows::Last | LogitRows::None => left,
        }
    }

    /// Appends `taken` tokens of a row, after the `skipped` that earlier passes took.
    fn push(
        &mut self,
        row: &Scheduled,
        skipped: u32,
        taken: u32,
        batch: &InputBatch,
    ) -> Result<(), PlanError> {
        let seq = batch.seq(row.slot)?;
        let table = batch.block_table(row.slot);
        let start = row.num_computed_tokens + skipped;
        let end = start + taken;
        let last = row.num_computed_tokens + row.num_new_tokens - 1;
        for position in start..end {
            if let Some(kind) = logit_kind(row, seq, position, last) {
                let index = self.token_ids.len() as u32;
                self.logit_rows.push(LogitRow { row: index, slot: row.slot, position: position + 1, kind });
            }
            let block = table[(position / self.block_size) as usize];
            // Checked before: what is not known here was sampled in a step in flight.
            self.token_ids.push(seq.tokens.get(position as usize).copied().unwrap_or(ON_DEVICE));
            self.positions.push(position);
            self.slot_mapping.push(block * self.block_size + position % self.block_size);
        }
        self.cu_seqlens_q.push(self.token_ids.len() as u32);
        self.seq_lens.push(end);
        self.seq_slots.push(row.slot);
        self.seq_adapters.push(batch.adapter(row.slot));
        let used = end.div_ceil(self.block_size) as usize;
        self.block_tables.extend_from_slice(&table[..used]);
        self.block_tables.resize(self.seq_slots.len() * self.max_blocks_per_seq as usize, 0);
        Ok(())
    }
}

/// What the logits at `position` are for, if for anything.
fn logit_kind(row: &Scheduled, seq: &SeqState, position: u32, last: u32) -> Option<LogitKind> {
    if position == last && row.sample {
        return Some(LogitKind::Sample);
    }
    let next = position + 1;
    if row.logits == LogitRows::All && next < seq.prompt_len {
        return Some(LogitKind::PromptLogprob { target: seq.tokens[next as usize] });
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quire_core::{BlockId, DType, NewSeq, QuantFormat, RequestId, SamplingParams};

    use super::*;

    const CONFIG: RunnerConfig = RunnerConfig {
        max_num_seqs: 3,
        max_num_batched_tokens: 12,
        max_model_len: 16,
        block_size: 4,
        num_blocks: 30,
        kv_dtype: DType::F32,
        quant: QuantFormat::None,
    };

    /// Slot s: a prompt of `lens[s]` tokens 100 s, 100 s + 1, …, in blocks 10 s + 3, 10 s + 2, ….
    fn plan(lens: &[u32]) -> SchedulerOutput {
        let new = |(slot, &len): (usize, &u32)| NewSeq {
            slot: Slot(slot as u32),
            request: RequestId(0),
            index: 0,
            tokens: (0..len).map(|i| 100 * slot as u32 + i).collect(),
            prompt_len: len,
            params: Arc::new(SamplingParams::greedy(8)),
            adapter: None,
            seed: 0,
            block_tables: vec![(0..len.div_ceil(4)).map(|i| BlockId(10 * slot as u32 + 3 - i)).collect()],
            num_computed_tokens: 0,
        };
        SchedulerOutput { new: lens.iter().enumerate().map(new).collect(), ..SchedulerOutput::default() }
    }

    fn row(slot: u32, start: u32, count: u32, logits: LogitRows, sample: bool) -> Scheduled {
        Scheduled { slot: Slot(slot), num_computed_tokens: start, num_new_tokens: count, logits, sample }
    }

    fn set_up(lens: &[u32], scheduled: &[Scheduled]) -> (Pass, InputBatch, SchedulerOutput) {
        let mut plan = plan(lens);
        plan.scheduled = scheduled.to_vec();
        let mut batch = InputBatch::new(&CONFIG, 1, 0);
        batch.apply(&plan).unwrap();
        (Pass::new(&CONFIG), batch, plan)
    }

    #[test]
    fn rows_become_flat_arrays() {
        let rows = [row(1, 3, 3, LogitRows::Last, true), row(0, 0, 2, LogitRows::None, false)];
        let (mut pass, batch, plan) = set_up(&[5, 6], &rows);
        pass.check(&plan, &batch).unwrap();
        let end = pass.fill(&plan, &batch, Cursor::default()).unwrap();
        assert!(end.at_end(&plan));
        let input = pass.as_step_input(StepId(1), batch.seqs());
        assert_eq!(input.token_ids, [103, 104, 105, 0, 1]);
        assert_eq!(input.positions, [3, 4, 5, 0, 1]);
        assert_eq!(input.slot_mapping, [13 * 4 + 3, 12 * 4, 12 * 4 + 1, 3 * 4, 3 * 4 + 1]);
        assert_eq!(input.cu_seqlens_q, [0, 3, 5]);
        assert_eq!(input.seq_lens, [6, 2]);
        assert_eq!(input.seq_slots, [Slot(1), Slot(0)]);
        assert_eq!(input.block_tables, [13, 12, 0, 0, 3, 0, 0, 0]);
        let sample = LogitRow { row: 2, slot: Slot(1), position: 6, kind: LogitKind::Sample };
        assert_eq!(input.logit_rows, [sample]);
    }

    #[test]
    fn steps_are_cut_where_the_logits_buffer_is_full() {
        let rows = [
            row(0, 0, 5, LogitRows::All, true),
            row(1, 0, 3, LogitRows::None, false),
            row(2, 0, 4, LogitRows::Last, true),
        ];
        let (mut pass, batch, mut plan) = set_up(&[5, 6, 4], &rows);
        plan.block_copies.push(BlockCopy { group: 0, src: BlockId(1), dst: BlockId(2) });
        pass.check(&plan, &batch).unwrap();
        pass.max_logit_rows = 3;
        let target = |row, position, target| LogitRow {
            row,
            slot: Slot(0),
            position,
            kind: LogitKind::PromptLogprob { target },
        };
        let sample =
            |row, slot, position| LogitRow { row, slot: Slot(slot), position, kind: LogitKind::Sample };

        let cursor = pass.fill(&plan, &batch, Cursor::default()).unwrap();
        assert!(!cursor.at_end(&plan));
        assert_eq!(pass.token_ids, [0, 1, 2]);
        assert_eq!(pass.logit_rows, [target(0, 1, 1), target(1, 2, 2), target(2, 3, 3)]);
        assert_eq!(pass.block_copies.len(), 1);

        let cursor = pass.fill(&plan, &batch, cursor).unwrap();
        assert!(cursor.at_end(&plan));
        assert_eq!(pass.token_ids, [3, 4, 100, 101, 102, 200, 201, 202, 203]);
        assert_eq!(pass.seq_lens, [5, 3, 4]);
        assert_eq!(pass.logit_rows, [target(0, 4, 4), sample(1, 0, 5), sample(8, 2, 4)]);
        assert!(pass.block_copies.is_empty(), "they are done once");

        pass.max_logit_rows = 2;
        let mut cursor = Cursor::default();
        let mut sizes = Vec::new();
        while !cursor.at_end(&plan) {
            cursor = pass.fill(&plan, &batch, cursor).unwrap();
            sizes.push((pass.token_ids.len(), pass.num_logit_rows()));
        }
        assert_eq!(sizes, [(2, 2), (2, 2), (8, 2)]);
    }

    #[test]
    fn prompt_logprobs_end_where_the_prompt_ends() {
        let (mut pass, batch, plan) = set_up(&[3], &[row(0, 0, 3, LogitRows::All, false)]);
        pass.fill(&plan, &batch, Cursor::default()).unwrap();
        assert_eq!(pass.logit_rows.iter().map(|row| row.position).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn largest_step_fits_the_first_buffers() {
        let rows = [0, 1, 2].map(|slot| row(slot, 0, 4, LogitRows::Last, true));
        let (mut pass, batch, plan) = set_up(&[4, 4, 4], &rows);
        let before = (pass.token_ids.as_ptr(), pass.block_tables.as_ptr(), pass.cu_seqlens_q.as_ptr());
        pass.fill(&plan, &batch, Cursor::default()).unwrap();
        assert_eq!(pass.token_ids.len(), CONFIG.max_num_batched_tokens as usize);
        let after = (pass.token_ids.as_ptr(), pass.block_tables.as_ptr(), pass.cu_seqlens_q.as_ptr());
        assert_eq!(before, after);
    }

    #[test]
    fn contradictions_are_errors() {
        let check = |rows: &[Scheduled]| {
            let (pass, batch, plan) = set_up(&[5, 9], rows);
            pass.check(&plan, &batch).unwrap_err()
        };
        let last = LogitRows::Last;
        assert_eq!(check(&[row(2, 0, 1, last, true)]), PlanError::SlotEmpty(Slot(2)));
        assert_eq!(
            check(&[row(0, 0, 5, last, true), row(1, 0, 8, LogitRows::None, false)]),
            PlanError::TooManyTokens { tokens: 13, max: 12 }
        );
        let unknown = PlanError::UnknownTokens { slot: Slot(0), start: 4, end: 6, known: 5 };
        assert_eq!(check(&[row(0, 4, 2, last, true)]), unknown);
        let empty = PlanError::UnknownTokens { slot: Slot(0), start: 4, end: 4, known: 5 };
        assert_eq!(check(&[row(0, 4, 0, last, true)]), empty);
        let inside = PlanError::SampleInside { slot: Slot(0), end: 4, known: 5 };
        assert_eq!(check(&[row(0, 0, 4, last, true)]), inside);

        let (pass, mut batch, mut plan) = set_up(&[4], &[row(0, 4, 1, last, true)]);
        let mut out = quire_core::ModelRunnerOutput::default();
        out.push_row(Slot(0), &[1], []);
        let mut sampled = Vec::new();
        batch.expect_sampled(&plan, &mut sampled);
        batch.append_sampled(&out, &sampled).unwrap();
        plan.new.clear();
        let no_blocks = PlanError::NoBlocks { slot: Slot(0), start: 4, end: 5, capacity: 4 };
        assert_eq!(pass.check(&plan, &batch).unwrap_err(), no_blocks);
    }
}
