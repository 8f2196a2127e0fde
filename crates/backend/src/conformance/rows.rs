//! Rows that stand for themselves: steps of sequences of one token, for operations that know no positions.

use quire_core::{AdapterId, Slot, StepId};

use super::random::Rng;
use crate::{Backend, BackendError, StepInput};

/// Row `row` of a test's input: numbers of 7 bits, exact in every type.
pub(super) fn input(seed: u32, row: usize, hidden: usize) -> impl Iterator<Item = f32> {
    let mut rng = Rng::new(seed + row as u32);
    (0..hidden).map(move |_| (rng.signed() * 64.0).round() / 32.0)
}

/// A step of `rows` sequences of one token with these adapters, without logits.
pub(super) fn prepare<B: Backend>(
    backend: &mut B,
    rows: usize,
    adapters: &[Option<AdapterId>],
) -> Result<(), BackendError> {
    let numbers: Vec<u32> = (0..=rows as u32).collect();
    let slots: Vec<_> = numbers[..rows].iter().map(|&slot| Slot(slot)).collect();
    backend.prepare(&StepInput {
        step: StepId(0),
        token_ids: &vec![0; rows],
        positions: &vec![0; rows],
        slot_mapping: &numbers[..rows],
        cu_seqlens_q: &numbers,
        seq_lens: &vec![1; rows],
        seq_slots: &slots,
        seq_adapters: adapters,
        block_tables: &numbers[..rows],
        max_blocks_per_seq: 1,
        logit_rows: &[],
        block_copies: &[],
        seqs: &vec![None; rows],
    })
}
