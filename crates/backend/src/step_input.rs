//! One step as flat arrays, ready for a device.
//!
//! `T` is the number of token rows in the step, `S` the number of sequences in it. Everything borrows from buffers that
//! the runner reuses; a backend copies in [`crate::Backend::prepare`] what it needs later.

use std::sync::Arc;

use quire_core::{AdapterId, BlockCopy, ExecError, SamplingParams, Slot, StepId, TokenId};

use crate::BackendError;

/// What the runner knows of the sequence in a slot.
#[derive(Clone, Debug)]
pub struct SeqState {
    /// All tokens known on the host: prompt, then output. Complete when one step is in flight.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are prompt (fixed, also after a preemption).
    pub prompt_len: u32,
    /// How to sample.
    pub params: Arc<SamplingParams>,
    /// Key of the random stream of this sequence.
    pub seed: u64,
}

/// Stands for a token that was sampled in a step still in flight. Only backends that are not
/// [`crate::Backend::INLINE`] are given it.
pub const ON_DEVICE: TokenId = TokenId::MAX;

/// One step.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// Which step.
    pub step: StepId,
    /// `[T]` input tokens. [`ON_DEVICE`]: what the row's sequence sampled last, which the host does not know yet.
    pub token_ids: &'a [TokenId],
    /// `[T]` absolute positions.
    pub positions: &'a [u32],
    /// `[T]` where each row's K and V go: `block_id * block_size + offset` (KV group 0).
    pub slot_mapping: &'a [u32],
    /// `[S + 1]` first row of each sequence, then `T`. Sequence `s` owns rows `cu_seqlens_q[s]..cu_seqlens_q[s + 1]`.
    pub cu_seqlens_q: &'a [u32],
    /// `[S]` tokens in the cache once this step has run: last position + 1.
    pub seq_lens: &'a [u32],
    /// `[S]` slot of each sequence: index into `seqs`.
    pub seq_slots: &'a [Slot],
    /// `[S]` the adapter of each sequence's rows; empty if none has one.
    pub seq_adapters: &'a [Option<AdapterId>],
    /// `[S, max_blocks_per_seq]` row-major block ids (KV group 0). Entries past `seq_lens` or below a sliding window
    /// are stale and never read.
    pub block_tables: &'a [u32],
    /// Row length of `block_tables`.
    pub max_blocks_per_seq: u32,
    /// The rows that need logits, ascending by `row`.
    pub logit_rows: &'a [LogitRow],
    /// Blocks to copy before anything else.
    pub block_copies: &'a [BlockCopy],
    /// Per-slot state, indexed by slot; `None` where the slot is free.
    pub seqs: &'a [Option<SeqState>],
}

impl StepInput<'_> {
    /// Token rows `T`.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences `S`.
    pub fn num_seqs(&self) -> usize {
        self.seq_slots.len()
    }
}

/// A row whose logits are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogitRow {
    /// Row of the step, `0..T`.
    pub row: u32,
    /// The sequence.
    pub slot: Slot,
    /// Absolute position of the token that these logits predict: the row's position + 1.
    pub position: u32,
    /// What for.
    pub kind: LogitKind,
}

impl LogitRow {
    /// The sequence's state.
    ///
    /// # Errors
    /// Its slot is free: the runner's plan and its state disagree.
    pub fn seq<'a>(&self, seqs: &'a [Option<SeqState>]) -> Result<&'a SeqState, BackendError> {
        seqs.get(self.slot.0 as usize).and_then(Option::as_ref).ok_or_else(|| {
            let message = format!("logit row {} names slot {}, which is free", self.row, self.slot);
            BackendError::Device(ExecError { device: "host".into(), message })
        })
    }
}

/// What logits are used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitKind {
    /// Choose the next token.
    Sample,
    /// Report the log-probability of a prompt token that is already known.
    PromptLogprob {
        /// That token.
        target: TokenId,
    },
}

/// The arrays of a [`StepInput`], owned: what a backend that reads them on the host keeps from `prepare` to `fetch`. The
/// per-slot state is not kept, since `sample` receives it anew.
#[derive(Clone, Debug, Default)]
pub struct StepBuffer {
    /// As in [`StepInput`]; so are all the others.
    pub token_ids: Vec<TokenId>,
    /// `[T]`.
    pub positions: Vec<u32>,
    /// `[T]`.
    pub slot_mapping: Vec<u32>,
    /// `[S + 1]`.
    pub cu_seqlens_q: Vec<u32>,
    /// `[S]`.
    pub seq_lens: Vec<u32>,
    /// `[S]`, or empty.
    pub seq_adapters: Vec<Option<AdapterId>>,
    /// `[S, max_blocks_per_seq]`.
    pub block_tables: Vec<u32>,
    /// Row length of `block_tables`.
    pub max_blocks_per_seq: u32,
    /// Rows that need logits.
    pub logit_rows: Vec<LogitRow>,
    /// Blocks to copy.
    pub block_copies: Vec<BlockCopy>,
}

impl StepBuffer {
    /// Replaces the content, keeps the memory.
    pub fn copy_from(&mut self, input: &StepInput<'_>) {
        fn replace<T: Copy>(to: &mut Vec<T>, from: &[T]) {
            to.clear();
            to.extend_from_slice(from);
        }
        replace(&mut self.token_ids, input.token_ids);
        replace(&mut self.positions, input.positions);
        replace(&mut self.slot_mapping, input.slot_mapping);
        replace(&mut self.cu_seqlens_q, input.cu_seqlens_q);
        replace(&mut self.seq_lens, input.seq_lens);
        replace(&mut self.seq_adapters, input.seq_adapters);
        replace(&mut self.block_tables, input.block_tables);
        self.max_blocks_per_seq = input.max_blocks_per_seq;
        replace(&mut self.logit_rows, input.logit_rows);
        replace(&mut self.block_copies, input.block_copies);
    }

    /// Token rows `T`.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences `S`.
    pub fn num_seqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// The rows of sequence `s`.
    pub fn rows_of(&self, s: usize) -> std::ops::Range<usize> {
        self.cu_seqlens_q[s] as usize..self.cu_seqlens_q[s + 1] as usize
    }

    /// The adapter of sequence `s`.
    pub fn adapter_of(&self, s: usize) -> Option<AdapterId> {
        self.seq_adapters.get(s).copied().flatten()
    }

    /// The block table of sequence `s`.
    pub fn block_table(&self, s: usize) -> &[u32] {
        let width = self.max_blocks_per_seq as usize;
        &self.block_tables[s * width..(s + 1) * width]
    }
}
