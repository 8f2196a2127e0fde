//! A step on its way to the device: one packed upload, laid out so that a recorded graph finds everything where it was.
//!
//! Where a section begins depends on the number of rows only through their bucket, and a graph serves one bucket.

use quire_backend::{LogitKind, ON_DEVICE, StepInput};
use quire_core::{BlockCopy, Slot, TokenId};

use crate::params::LogitRowEntry;

/// Page copies of a step that go with the upload. A step with more, or with copies that depend on each other, is not
/// replayed from a graph.
pub const MAX_COPIES: usize = 64;
/// Changed entries of block tables in one upload.
pub const MAX_ENTRIES: usize = 4096;

const HEADER_WORDS: usize = 8;
const LOGIT_ROW_WORDS: usize = size_of::<LogitRowEntry>() / 4;

/// Rows that share a graph: the smallest bucket that holds `rows`. Above 1024 every number is its own.
pub fn bucket(rows: usize) -> usize {
    match rows {
        0..=2 => rows.max(1),
        3..=16 => rows.next_multiple_of(4),
        17..=32 => rows.next_multiple_of(8),
        33..=64 => rows.next_multiple_of(16),
        65..=128 => rows.next_multiple_of(32),
        129..=512 => rows.next_multiple_of(64),
        513..=1024 => rows.next_multiple_of(128),
        _ => rows,
    }
}

/// Offsets of the sections, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub token_ids: usize,
    pub cu_seqlens_q: usize,
    pub seq_lens: usize,
    pub seq_slots: usize,
    pub logit_rows: usize,
    pub pairs: usize,
    /// Changed entries of block tables; what is used of it ends the upload.
    pub entries: usize,
}

impl Layout {
    pub const NUM_TOKENS: usize = 0;
    pub const NUM_SEQS: usize = 1;
    pub const NUM_LOGIT_ROWS: usize = 2;
    pub const NUM_PAIRS: usize = 3;
    pub const NUM_ENTRIES: usize = 4;

    /// For up to `rows` token rows (and so at most as many sequences) and `logit_rows` rows of logits.
    pub fn new(rows: usize, logit_rows: usize) -> Self {
        let token_ids = HEADER_WORDS;
        let cu_seqlens_q = token_ids + rows;
        let seq_lens = cu_seqlens_q + rows + 1;
        let seq_slots = seq_lens + rows;
        let logit_rows_at = seq_slots + rows;
        let pairs = logit_rows_at + logit_rows * LOGIT_ROW_WORDS;
        Self {
            token_ids,
            cu_seqlens_q,
            seq_lens,
            seq_slots,
            logit_rows: logit_rows_at,
            pairs,
            entries: pairs + 2 * MAX_COPIES,
        }
    }

    /// Words of the largest upload.
    pub fn words(&self) -> usize {
        self.entries + 3 * MAX_ENTRIES
    }
}

/// What the backend remembers of a row of logits until its token is fetched.
#[derive(Clone, Copy, Debug)]
pub struct RowMeta {
    pub slot: Slot,
    pub position: u32,
    pub kind: LogitKind,
    /// As in [`LogitRowEntry`]: -1 for none.
    pub num_logprobs: i32,
}

/// Fills `words` (as long as the layout without entries) and `rows` from a step.
pub fn pack(input: &StepInput<'_>, layout: &Layout, words: &mut Vec<i32>, rows: &mut Vec<RowMeta>) {
    words.clear();
    words.resize(layout.entries, 0);
    words[Layout::NUM_TOKENS] = input.num_tokens() as i32;
    words[Layout::NUM_SEQS] = input.num_seqs() as i32;
    words[Layout::NUM_LOGIT_ROWS] = input.logit_rows.len() as i32;
    for s in 0..input.num_seqs() {
        let slot = input.seq_slots[s].0 as i32;
        words[layout.cu_seqlens_q + s + 1] = input.cu_seqlens_q[s + 1] as i32;
        words[layout.seq_lens + s] = input.seq_lens[s] as i32;
        words[layout.seq_slots + s] = slot;
        for row in input.cu_seqlens_q[s] as usize..input.cu_seqlens_q[s + 1] as usize {
            words[layout.token_ids + row] = token_word(input.token_ids[row], slot);
        }
    }
    rows.clear();
    for (i, row) in input.logit_rows.iter().enumerate() {
        let params = input.seqs.get(row.slot.0 as usize).and_then(Option::as_ref).map(|seq| &seq.params);
        let (target, num_logprobs) = match row.kind {
            LogitKind::Sample => (-1, params.and_then(|p| p.logprobs).map_or(-1, |k| k as i32)),
            LogitKind::PromptLogprob { target } => {
                (target as i32, params.and_then(|p| p.prompt_logprobs).unwrap_or(0) as i32)
            }
        };
        let at = layout.logit_rows + i * LOGIT_ROW_WORDS;
        let entry = [row.row as i32, row.slot.0 as i32, row.position as i32, target, num_logprobs, 0];
        words[at..at + LOGIT_ROW_WORDS].copy_from_slice(&entry);
        rows.push(RowMeta { slot: row.slot, position: row.position, kind: row.kind, num_logprobs });
    }
}

/// The kernels read `-1 - slot` as: what that slot sampled last.
fn token_word(id: TokenId, slot: i32) -> i32 {
    if id == ON_DEVICE { -1 - slot } else { id as i32 }
}

/// Copies done in order, as `(source, destination)` pairs in rounds whose pairs may be done at once.
///
/// Chains are resolved to the page where their content lies at the start, so that there is nearly always one round.
pub fn copy_rounds(copies: &[BlockCopy]) -> Vec<Vec<[i32; 2]>> {
    let mut rounds: Vec<Vec<[i32; 2]>> = Vec::new();
    let mut rest: Vec<[i32; 2]> = copies.iter().map(|c| [c.src.0 as i32, c.dst.0 as i32]).collect();
    while !rest.is_empty() {
        let (round, taken) = one_round(&rest);
        rounds.push(round);
        rest.drain(..taken);
    }
    rounds
}

/// The longest prefix of `copies` that can be done at once, and how many copies that is.
fn one_round(copies: &[[i32; 2]]) -> (Vec<[i32; 2]>, usize) {
    let mut round: Vec<[i32; 2]> = Vec::new();
    for (i, &[src, dst]) in copies.iter().enumerate() {
        let origin = round.iter().find(|pair| pair[1] == src).map_or(src, |pair| pair[0]);
        let overwrites = round.iter().any(|pair| pair[0] == dst || pair[1] == dst);
        let reads_written = round.iter().any(|pair| pair[1] == origin);
        if overwrites || reads_written || origin == dst {
            // Alone, a copy of a page onto itself is nothing to do.
            return if i == 0 { (Vec::new(), 1) } else { (round, i) };
        }
        round.push([origin, dst]);
    }
    let taken = copies.len();
    (round, taken)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use quire_core::BlockId;

    use super::*;

    #[test]
    fn buckets_hold_their_rows_and_are_few() {
        let mut seen = Vec::new();
        for rows in 1..=1024 {
            let bucket = bucket(rows);
            assert!(bucket >= rows && super::bucket(bucket) == bucket, "{rows} {bucket}");
            assert!(bucket <= rows + rows / 2 + 3, "{rows} {bucket}");
            seen.push(bucket);
        }
        seen.dedup();
        assert!(seen.len() < 40, "{seen:?}");
        assert_eq!(bucket(5000), 5000);
    }

    #[test]
    fn rounds_do_what_copies_in_order_do() {
        let mut random = 1u32;
        let mut below = |n: u32| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 16) % n
        };
        for case in 0..2000 {
            let copies: Vec<_> = (0..below(8))
                .map(|_| BlockCopy { group: 0, src: BlockId(below(6)), dst: BlockId(below(6)) })
                .collect();
            let mut expected: BTreeMap<u32, u32> = (0..6).map(|page| (page, page)).collect();
            for copy in &copies {
                expected.insert(copy.dst.0, expected[&copy.src.0]);
            }
            let mut got: BTreeMap<u32, u32> = (0..6).map(|page| (page, page)).collect();
            for round in copy_rounds(&copies) {
                let before = got.clone();
                for (i, [src, dst]) in round.iter().enumerate() {
                    let others = round.iter().enumerate().filter(|(j, _)| *j != i);
                    assert!(
                        others.clone().all(|(_, p)| p[1] != *dst && p[1] != *src),
                        "case {case}: {round:?}"
                    );
                    got.insert(*dst as u32, before[&(*src as u32)]);
                }
            }
            assert_eq!(got, expected, "case {case}: {copies:?}");
        }
        let copy = |src, dst| BlockCopy { group: 0, src: BlockId(src), dst: BlockId(dst) };
        assert_eq!(copy_rounds(&[copy(0, 2), copy(2, 1)]), [[[0, 2], [0, 1]]], "a chain is one round");
    }
}
