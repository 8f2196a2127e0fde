//! One step as flat arrays, ready for a device.
//!
//! `T` is the number of token rows in the step, `S` the number of sequences in it. Everything borrows from buffers that
//! the runner reuses; a backend copies in [`crate::Backend::prepare`] what it needs later.

use std::sync::Arc;

use quire_core::{BlockCopy, SamplingParams, Slot, StepId, TokenId};

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

/// One step.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// Which step.
    pub step: StepId,
    /// `[T]` input tokens.
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
