//! One pass over the model as flat arrays. A step is one pass, unless it wants more rows of logits than the buffer
//! holds (log-probabilities of long prompts); then it is cut, in order, into several.

use quire_backend::{LogitKind, LogitRow, SeqState, StepInput};
use quire_core::{BlockCopy, LogitRows, Scheduled, SchedulerOutput, Slot, StepId, TokenId};

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
        let known = batch.seq(slot)?.tokens.len();
        let (start, end) = (row.num_computed_tokens, row.num_computed_tokens.saturating_add(row.num_new_tokens));
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
            block_tables: &self.block_tables,
            max_blocks_per_seq: self.max_blocks_per_seq,
            logit_rows: &self.logit_rows,
            block_copies: &self.block_copies,
            seqs,
        }
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
    fn push(&mut self, row: &Scheduled, skipped: u32, taken: u32, batch: &InputBatch) -> Result<(), PlanError> {
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
            self.token_ids.push(seq.tokens[position as usize]);
            self.positions.push(position);
            self.slot_mapping.push(block * self.block_size + position % self.block_size);
        }
        self.cu_seqlens_q.push(self.token_ids.len() as u32);
        self.seq_lens.push(end);
        self.seq_slots.push(row.slot);
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
