//! The running batch, mirrored by slot from the differences that the scheduler sends.
//!
//! What the scheduler repeats in every row (how many tokens are computed) is not kept a second time here.

use quire_backend::SeqState;
use quire_core::{AdapterId, GrownTable, ModelRunnerOutput, NewSeq, SchedulerOutput, Slot, TokenId};

use crate::RunnerConfig;
use crate::block_tables::BlockTables;
use crate::error::PlanError;

/// Sequences and their block tables, indexed by slot.
#[derive(Debug)]
pub(crate) struct InputBatch {
    seqs: Vec<Option<SeqState>>,
    /// Counts who had the slot: tokens of a step in flight belong to its occupant of then.
    generations: Vec<u32>,
    /// Tokens sampled in steps in flight: known to the device, not here.
    pending: Vec<u32>,
    /// One per KV group.
    tables: Vec<BlockTables>,
    /// Token buffers of sequences that left, to be used again. At most one per slot.
    spare_tokens: Vec<Vec<TokenId>>,
    max_model_len: u32,
    /// By slot.
    adapters: Vec<Option<AdapterId>>,
    num_adapters: usize,
}

impl InputBatch {
    pub fn new(config: &RunnerConfig, num_groups: usize, num_adapters: usize) -> Self {
        let table = || BlockTables::new(config.max_num_seqs, config.max_blocks_per_seq(), config.num_blocks);
        Self {
            seqs: (0..config.max_num_seqs).map(|_| None).collect(),
            generations: vec![0; config.max_num_seqs as usize],
            pending: vec![0; config.max_num_seqs as usize],
            tables: (0..num_groups).map(|_| table()).collect(),
            spare_tokens: Vec::with_capacity(config.max_num_seqs as usize),
            max_model_len: config.max_model_len,
            adapters: vec![None; config.max_num_seqs as usize],
            num_adapters,
        }
    }

    /// Takes the differences of a step, in their documented order.
    pub fn apply(&mut self, plan: &SchedulerOutput) -> Result<(), PlanError> {
        plan.freed.iter().try_for_each(|&slot| self.free(slot))?;
        plan.new.iter().try_for_each(|new| self.insert(new))?;
        plan.grown.iter().try_for_each(|grown| self.grow(grown))
    }

    /// Notes the rows of a step that will be sampled: `(slot, generation)`, for [`InputBatch::append_sampled`].
    pub fn expect_sampled(&mut self, plan: &SchedulerOutput, sampled: &mut Vec<(Slot, u32)>) {
        for row in plan.scheduled.iter().filter(|row| row.sample) {
            let slot = row.slot.0 as usize;
            sampled.push((row.slot, self.generations[slot]));
            self.pending[slot] += 1;
        }
    }

    /// Appends what was sampled, so that the next step can feed it. Sequences that have left meanwhile get nothing.
    pub fn append_sampled(
        &mut self,
        out: &ModelRunnerOutput,
        sampled: &[(Slot, u32)],
    ) -> Result<(), PlanError> {
        for (row, &(slot, generation)) in out.rows.iter().zip(sampled) {
            let index = slot.0 as usize;
            if self.generations[index] == generation {
                self.pending[index] -= 1;
                self.seq_mut(row.slot)?.tokens.extend_from_slice(out.tokens_of(row));
            }
        }
        Ok(())
    }

    /// Tokens of the sequence in a slot, those included that only the device knows.
    pub fn num_tokens(&self, slot: Slot) -> Result<usize, PlanError> {
        Ok(self.seq(slot)?.tokens.len() + self.pending[slot.0 as usize] as usize)
    }

    /// All sequences, by slot.
    pub fn seqs(&self) -> &[Option<SeqState>] {
        &self.seqs
    }

    /// The sequence in a slot.
    pub fn seq(&self, slot: Slot) -> Result<&SeqState, PlanError> {
        let entry = self.seqs.get(slot.0 as usize).ok_or(PlanError::NoSuchSlot(slot, self.seqs.len()))?;
        entry.as_ref().ok_or(PlanError::SlotEmpty(slot))
    }

    /// The block table of a slot in KV group 0, the only one today.
    pub fn block_table(&self, slot: Slot) -> &[u32] {
        self.tables[0].row(slot)
    }

    /// The adapter of the sequence in a slot.
    pub fn adapter(&self, slot: Slot) -> Option<AdapterId> {
        self.adapters.get(slot.0 as usize).copied().flatten()
    }

    /// How many adapters there are.
    pub fn num_adapters(&self) -> usize {
        self.num_adapters
    }

    fn seq_mut(&mut self, slot: Slot) -> Result<&mut SeqState, PlanError> {
        self.entry(slot)?.as_mut().ok_or(PlanError::SlotEmpty(slot))
    }

    fn entry(&mut self, slot: Slot) -> Result<&mut Option<SeqState>, PlanError> {
        let slots = self.seqs.len();
        self.seqs.get_mut(slot.0 as usize).ok_or(PlanError::NoSuchSlot(slot, slots))
    }

    fn free(&mut self, slot: Slot) -> Result<(), PlanError> {
        let seq = self.entry(slot)?.take().ok_or(PlanError::SlotEmpty(slot))?;
        self.spare_tokens.push(seq.tokens);
        self.generations[slot.0 as usize] += 1;
        self.pending[slot.0 as usize] = 0;
        Ok(())
    }

    fn insert(&mut self, new: &NewSeq) -> Result<(), PlanError> {
        let slot = new.slot;
        if self.entry(slot)?.is_some() {
            return Err(PlanError::SlotTaken(slot));
        }
        let num_tokens = new.tokens.len();
        if new.prompt_len as usize > num_tokens || num_tokens > self.max_model_len as usize {
            let (prompt_len, max_model_len) = (new.prompt_len, self.max_model_len);
            return Err(PlanError::BadLength { slot, tokens: num_tokens, prompt_len, max_model_len });
        }
        if let Some(adapter) = new.adapter.filter(|adapter| adapter.0 as usize >= self.num_adapters) {
            return Err(PlanError::NoSuchAdapter { slot, adapter, adapters: self.num_adapters });
        }
        self.adapters[slot.0 as usize] = new.adapter;
        if new.block_tables.len() != self.tables.len() {
            let (given, expected) = (new.block_tables.len(), self.tables.len());
            return Err(PlanError::WrongGroups { slot, given, expected });
        }
        for (table, blocks) in self.tables.iter_mut().zip(&new.block_tables) {
            table.set(slot, blocks)?;
        }
        // Room for the whole answer at once: decoding then never moves the tokens.
        let answer = new.prompt_len.saturating_add(new.params.max_tokens).min(self.max_model_len);
        let mut tokens = self.spare_tokens.pop().unwrap_or_default();
        tokens.clear();
        tokens.reserve(num_tokens.max(answer as usize));
        tokens.extend_from_slice(&new.tokens);
        let (params, seed) = (new.params.clone(), new.seed);
        *self.entry(slot)? = Some(SeqState { tokens, prompt_len: new.prompt_len, params, seed });
        Ok(())
    }

    fn grow(&mut self, grown: &GrownTable) -> Result<(), PlanError> {
        self.seq(grown.slot)?;
        let groups = self.tables.len();
        let table = self.tables.get_mut(usize::from(grown.group));
        let table = table.ok_or(PlanError::NoSuchGroup { group: grown.group, groups })?;
        table.push(grown.slot, grown.block)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quire_core::{BlockId, DType, LogitRows, QuantFormat, RequestId, SamplingParams, Scheduled};

    use super::*;

    fn batch() -> InputBatch {
        let config = RunnerConfig {
            max_num_seqs: 2,
            max_num_batched_tokens: 8,
            max_model_len: 8,
            block_size: 2,
            num_blocks: 10,
            kv_dtype: DType::F32,
            quant: QuantFormat::None,
        };
        InputBatch::new(&config, 1, 1)
    }

    fn new_seq(slot: u32, tokens: &[TokenId], blocks: &[u32]) -> NewSeq {
        NewSeq {
            slot: Slot(slot),
            request: RequestId(0),
            index: 0,
            tokens: tokens.into(),
            prompt_len: tokens.len() as u32,
            params: Arc::new(SamplingParams::greedy(100)),
            adapter: None,
            seed: 5,
            block_tables: vec![blocks.iter().copied().map(BlockId).collect()],
            num_computed_tokens: 0,
        }
    }

    fn grown(slot: u32, block: u32) -> GrownTable {
        GrownTable { slot: Slot(slot), group: 0, block: BlockId(block) }
    }

    fn plan(freed: &[u32], new: &[NewSeq], grown: &[GrownTable]) -> SchedulerOutput {
        SchedulerOutput {
            freed: freed.iter().copied().map(Slot).collect(),
            new: new.to_vec(),
            grown: grown.to_vec(),
            ..SchedulerOutput::default()
        }
    }

    #[test]
    fn differences_apply_in_their_order() {
        let mut batch = batch();
        batch.apply(&plan(&[], &[new_seq(1, &[7, 8, 9], &[4])], &[grown(1, 9)])).unwrap();
        assert_eq!(batch.block_table(Slot(1)), [4, 9]);
        // The slot is freed, taken again, and grown within one plan.
        batch.apply(&plan(&[1], &[new_seq(1, &[3], &[])], &[grown(1, 0)])).unwrap();
        assert_eq!(batch.block_table(Slot(1)), [0]);
        assert_eq!(batch.seq(Slot(1)).unwrap().tokens, [3]);
        assert!(batch.seqs()[0].is_none());
    }

    #[test]
    fn sampled_tokens_are_appended_without_moving() {
        let mut batch = batch();
        batch.apply(&plan(&[], &[new_seq(0, &[7], &[1])], &[])).unwrap();
        let tokens = |batch: &InputBatch| batch.seq(Slot(0)).unwrap().tokens.as_ptr();
        let before = tokens(&batch);
        let mut out = ModelRunnerOutput::default();
        out.push_row(Slot(0), &[1, 2, 3, 4, 5, 6, 7], []);
        let row = Scheduled {
            slot: Slot(0),
            num_computed_tokens: 0,
            num_new_tokens: 1,
            logits: LogitRows::Last,
            sample: true,
        };
        let (mut sampled, mut step) = (Vec::new(), plan(&[], &[], &[]));
        step.scheduled.push(row);
        batch.expect_sampled(&step, &mut sampled);
        assert_eq!(batch.num_tokens(Slot(0)).unwrap(), 2, "one of them on the device");
        batch.append_sampled(&out, &sampled).unwrap();
        assert_eq!(batch.seq(Slot(0)).unwrap().tokens, [7, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(tokens(&batch), before);
        batch.apply(&plan(&[0], &[new_seq(1, &[4], &[1])], &[])).unwrap();
        assert_eq!(batch.seq(Slot(1)).unwrap().tokens.as_ptr(), before, "the buffer is used again");
        batch.append_sampled(&out, &sampled).unwrap();
        assert_eq!(batch.seq(Slot(1)).unwrap().tokens, [4], "whoever left gets nothing");
    }

    #[test]
    fn contradictions_are_errors() {
        let apply = |plans: &[SchedulerOutput]| {
            let mut batch = batch();
            plans.iter().try_for_each(|plan| batch.apply(plan)).unwrap_err()
        };
        let one = plan(&[], &[new_seq(1, &[7], &[4])], &[]);
        assert_eq!(apply(&[plan(&[1], &[], &[])]), PlanError::SlotEmpty(Slot(1)));
        assert_eq!(apply(&[plan(&[2], &[], &[])]), PlanError::NoSuchSlot(Slot(2), 2));
        assert_eq!(apply(&[one, plan(&[], &[new_seq(1, &[7], &[4])], &[])]), PlanError::SlotTaken(Slot(1)));
        assert_eq!(apply(&[plan(&[], &[], &[grown(0, 1)])]), PlanError::SlotEmpty(Slot(0)));
        let outside = PlanError::NoSuchBlock { slot: Slot(0), block: BlockId(10), num_blocks: 10 };
        assert_eq!(apply(&[plan(&[], &[new_seq(0, &[7], &[10])], &[])]), outside);
        let full = PlanError::TableFull { slot: Slot(0), max: 4 };
        assert_eq!(apply(&[plan(&[], &[new_seq(0, &[7], &[0, 1, 2, 3])], &[grown(0, 4)])]), full);
        let long = PlanError::BadLength { slot: Slot(0), tokens: 9, prompt_len: 9, max_model_len: 8 };
        assert_eq!(apply(&[plan(&[], &[new_seq(0, &[7; 9], &[])], &[])]), long);
        let two_groups = NewSeq { block_tables: vec![Vec::new(); 2], ..new_seq(0, &[7], &[]) };
        let groups = PlanError::WrongGroups { slot: Slot(0), given: 2, expected: 1 };
        assert_eq!(apply(&[plan(&[], &[two_groups], &[])]), groups);
        let group = GrownTable { group: 1, ..grown(0, 1) };
        let stranger = NewSeq { adapter: Some(AdapterId(1)), ..new_seq(0, &[7], &[]) };
        let no_adapter = PlanError::NoSuchAdapter { slot: Slot(0), adapter: AdapterId(1), adapters: 1 };
        assert_eq!(apply(&[plan(&[], &[stranger], &[])]), no_adapter);
        let no_group = PlanError::NoSuchGroup { group: 1, groups: 1 };
        assert_eq!(apply(&[plan(&[], &[new_seq(0, &[7], &[])], &[group])]), no_group);
    }
}
