//! Sequences cut into steps, and what came out for each of their positions.

use std::collections::BTreeMap;
use std::sync::Arc;

use quire_core::{BlockCopy, HostCopy, SamplingParams, Slot, StepId, TokenId};

use super::compare::same_bits;
use super::model::TinyModel;
use super::random::Rng;
use crate::{Backend, BackendError, LogitKind, LogitRow, SeqState, StepInput};

/// A token sequence and where its cache lives.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub tokens: Vec<TokenId>,
    pub block_table: Vec<u32>,
}

/// Rows of one sequence in a step: `len` tokens from position `start`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub seq: usize,
    pub start: u32,
    pub len: u32,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Step {
    pub pieces: Vec<Piece>,
    pub block_copies: Vec<BlockCopy>,
    pub copies_to_host: Vec<HostCopy>,
    pub copies_to_device: Vec<HostCopy>,
}

impl From<Vec<Piece>> for Step {
    fn from(pieces: Vec<Piece>) -> Self {
        Self { pieces, ..Self::default() }
    }
}

/// Random tokens; blocks scattered over the pool without overlap.
pub(super) fn sequences(
    rng: &mut Rng,
    lens: &[u32],
    vocab: usize,
    block_size: u32,
    num_blocks: u32,
) -> Vec<Sequence> {
    let mut token_rng = Rng::new(5);
    let mut pool: Vec<u32> = (0..num_blocks).collect();
    rng.shuffle(&mut pool);
    lens.iter()
        .map(|&len| Sequence {
            tokens: (0..len).map(|_| token_rng.below(vocab as u32)).collect(),
            block_table: pool.split_off(pool.len() - len.div_ceil(block_size) as usize),
        })
        .collect()
}

/// Every sequence by itself, in chunks of `chunk`.
pub(super) fn alone(seqs: &[Sequence], chunk: u32) -> Vec<Step> {
    let mut steps = Vec::new();
    for (seq, s) in seqs.iter().enumerate() {
        let len = s.tokens.len() as u32;
        for start in (0..len).step_by(chunk as usize) {
            steps.push(vec![Piece { seq, start, len: chunk.min(len - start) }].into());
        }
    }
    steps
}

/// Prefills and decodes of all sequences mixed: random order, random chunks, some sequences pausing.
pub(super) fn mixed(rng: &mut Rng, seqs: &[Sequence], max_chunk: u32) -> Vec<Step> {
    let mut done = vec![0u32; seqs.len()];
    let mut steps = Vec::new();
    loop {
        let mut order: Vec<usize> =
            (0..seqs.len()).filter(|&seq| (done[seq] as usize) < seqs[seq].tokens.len()).collect();
        if order.is_empty() {
            return steps;
        }
        rng.shuffle(&mut order);
        order.truncate(1 + rng.below(order.len() as u32) as usize);
        let pieces = order.into_iter().map(|seq| {
            let left = seqs[seq].tokens.len() as u32 - done[seq];
            let wanted = if rng.below(2) == 0 { 1 } else { 1 + rng.below(max_chunk) };
            let piece = Piece { seq, start: done[seq], len: wanted.min(left) };
            done[seq] += piece.len;
            piece
        });
        steps.push(pieces.collect::<Vec<_>>().into());
    }
}

/// Values by operation, for one (sequence, position). `logits` only where the step asked for them.
pub(super) struct RowTrace {
    pub values: Vec<(String, Vec<f32>)>,
    pub logits: Option<Vec<f32>>,
}

pub(super) type Trace = BTreeMap<(usize, u32), RowTrace>;

/// The arrays behind a [`StepInput`].
#[derive(Default)]
struct Arrays {
    token_ids: Vec<TokenId>,
    positions: Vec<u32>,
    slot_mapping: Vec<u32>,
    cu_seqlens_q: Vec<u32>,
    seq_lens: Vec<u32>,
    seq_slots: Vec<Slot>,
    block_tables: Vec<u32>,
    max_blocks_per_seq: u32,
    logit_rows: Vec<LogitRow>,
}

/// Never to be read: past the end of a sequence, or below its window.
const STALE: u32 = u32::MAX;

impl Arrays {
    fn new(seqs: &[Sequence], pieces: &[Piece], block_size: u32, window: Option<u32>) -> Self {
        let mut a = Self { cu_seqlens_q: vec![0], ..Self::default() };
        a.max_blocks_per_seq = seqs.iter().map(|s| s.block_table.len() as u32).max().unwrap_or(0) + 1;
        for piece in pieces {
            let (seq, end) = (&seqs[piece.seq], piece.start + piece.len);
            let slot = Slot((seqs.len() - 1 - piece.seq) as u32);
            for position in piece.start..end {
                if position % 3 == 0 || position + 1 == end {
                    let row = a.token_ids.len() as u32;
                    a.logit_rows.push(LogitRow {
                        row,
                        slot,
                        position: position + 1,
                        kind: LogitKind::Sample,
                    });
                }
                a.token_ids.push(seq.tokens[position as usize]);
                a.positions.push(position);
                let block = seq.block_table[(position / block_size) as usize];
                a.slot_mapping.push(block * block_size + position % block_size);
            }
            a.cu_seqlens_q.push(a.token_ids.len() as u32);
            a.seq_lens.push(end);
            a.seq_slots.push(slot);
            let first_visible = window.map_or(0, |w| (piece.start + 1).saturating_sub(w));
            let live = first_visible / block_size..end.div_ceil(block_size);
            a.block_tables.extend((0..a.max_blocks_per_seq).map(|i| match live.contains(&i) {
                true => seq.block_table[i as usize],
                false => STALE,
            }));
        }
        a
    }
}

/// Runs `steps` and collects every row. Each step runs twice and must give the same bits.
pub(super) fn execute<B: Backend>(
    backend: &mut B,
    model: &mut TinyModel<B>,
    seqs: &[Sequence],
    steps: &[Step],
) -> Result<Trace, BackendError> {
    let states: Vec<_> = seqs.iter().rev().map(|s| Some(state(s))).collect();
    let mut trace = Trace::new();
    for (index, step) in steps.iter().enumerate() {
        let a = Arrays::new(seqs, &step.pieces, model.shape.block_size, model.shape.window);
        let input = StepInput {
            step: StepId(index as u64),
            token_ids: &a.token_ids,
            positions: &a.positions,
            slot_mapping: &a.slot_mapping,
            cu_seqlens_q: &a.cu_seqlens_q,
            seq_lens: &a.seq_lens,
            seq_slots: &a.seq_slots,
            seq_adapters: &[],
            block_tables: &a.block_tables,
            max_blocks_per_seq: a.max_blocks_per_seq,
            logit_rows: &a.logit_rows,
            block_copies: &step.block_copies,
            seqs: &states,
        };
        if !(step.copies_to_host.is_empty() && step.copies_to_device.is_empty()) {
            backend.prepare(&input)?;
            backend.copy_host_blocks(&mut model.kv, &step.copies_to_host, &step.copies_to_device)?;
        }
        let mut pass = || {
            backend.prepare(&input)?;
            model.forward(backend, a.token_ids.len(), a.logit_rows.len())
        };
        let (first, second) = (pass()?, pass()?);
        assert!(
            same_bits(&first.logits, &second.logits),
            "{}: step {index} gave other logits when run again",
            model.shape.name
        );
        let vocab = model.shape.vocab;
        let mut row = 0;
        for piece in &step.pieces {
            for position in piece.start..piece.start + piece.len {
                let cut = |(name, cols, values): &(String, usize, Vec<f32>)| {
                    (name.clone(), values[row * cols..(row + 1) * cols].to_vec())
                };
                let values = second.by_token.iter().map(cut).collect();
                let at = a.logit_rows.iter().position(|l| l.row as usize == row);
                let logits = at.map(|i| second.logits[i * vocab..(i + 1) * vocab].to_vec());
                trace.insert((piece.seq, position), RowTrace { values, logits });
                row += 1;
            }
        }
    }
    Ok(trace)
}

fn state(seq: &Sequence) -> SeqState {
    SeqState {
        tokens: seq.tokens.clone(),
        prompt_len: seq.tokens.len() as u32,
        params: Arc::new(SamplingParams::greedy(1)),
        seed: 0,
    }
}
