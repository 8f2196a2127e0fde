//! A step of sequences of one kind, as the backend takes it.

use std::sync::Arc;

use quire_backend::{LogitKind, LogitRow, SeqState, StepInput};
use quire_core::{AdapterId, SamplingParams, Slot, StepId};

/// Tokens of a page.
pub const PAGE: usize = 16;

/// Owns the arrays of a [`StepInput`].
pub struct Step {
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    slot_mapping: Vec<u32>,
    cu_seqlens_q: Vec<u32>,
    seq_lens: Vec<u32>,
    seq_slots: Vec<Slot>,
    seq_adapters: Vec<Option<AdapterId>>,
    block_tables: Vec<u32>,
    blocks_per_seq: usize,
    logit_rows: Vec<LogitRow>,
    seqs: Vec<Option<SeqState>>,
}

impl Step {
    /// `num_seqs` sequences of `len` tokens, the last `num_new` of which are computed; each samples by `params`.
    pub fn new(num_seqs: usize, len: usize, num_new: usize, params: &SamplingParams) -> Self {
        let blocks_per_seq = len.div_ceil(PAGE);
        let params = Arc::new(params.clone());
        let rows = || (0..num_seqs).flat_map(|s| (len - num_new..len).map(move |position| (s, position)));
        let slot = |s: usize| Slot(s as u32);
        let seq = |s: usize| SeqState {
            tokens: vec![1; len],
            prompt_len: len as u32,
            params: Arc::clone(&params),
            seed: s as u64,
        };
        let logit_row = |s: usize| LogitRow {
            row: ((s + 1) * num_new - 1) as u32,
            slot: slot(s),
            position: len as u32,
            kind: LogitKind::Sample,
        };
        Self {
            token_ids: rows().map(|(s, position)| ((s * 31 + position) % 97) as u32).collect(),
            positions: rows().map(|(_, position)| position as u32).collect(),
            slot_mapping: rows().map(|(s, p)| (s * blocks_per_seq * PAGE + p) as u32).collect(),
            cu_seqlens_q: (0..=num_seqs).map(|s| (s * num_new) as u32).collect(),
            seq_lens: vec![len as u32; num_seqs],
            seq_slots: (0..num_seqs).map(slot).collect(),
            seq_adapters: Vec::new(),
            block_tables: (0..(num_seqs * blocks_per_seq) as u32).collect(),
            blocks_per_seq,
            logit_rows: (0..num_seqs).map(logit_row).collect(),
            seqs: (0..num_seqs).map(|s| Some(seq(s))).collect(),
        }
    }

    /// Every sequence with one of `count` adapters, in turn.
    pub fn with_adapters(mut self, count: usize) -> Self {
        let adapter = |s: usize| Some(AdapterId((s % count) as u32));
        self.seq_adapters = (0..self.seq_slots.len()).map(adapter).collect();
        self
    }

    pub fn num_blocks(&self) -> usize {
        self.block_tables.len()
    }

    pub fn seqs(&self) -> &[Option<SeqState>] {
        &self.seqs
    }

    pub fn input(&self) -> StepInput<'_> {
        StepInput {
            step: StepId(0),
            token_ids: &self.token_ids,
            positions: &self.positions,
            slot_mapping: &self.slot_mapping,
            cu_seqlens_q: &self.cu_seqlens_q,
            seq_lens: &self.seq_lens,
            seq_slots: &self.seq_slots,
            seq_adapters: &self.seq_adapters,
            block_tables: &self.block_tables,
            max_blocks_per_seq: self.blocks_per_seq as u32,
            logit_rows: &self.logit_rows,
            block_copies: &[],
            seqs: &self.seqs,
        }
    }
}
