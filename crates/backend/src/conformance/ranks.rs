//! Sums and gathers over the ranks of a group, each on a thread of its own.

use std::sync::Arc;

use quire_core::{SamplingParams, Shard, Slot, StepId};

use crate::{AllGather, AllReduce, Backend, BackendError, BufRole, LogitKind, LogitRow, SeqState, StepInput};

/// Rows of tokens, and of logits.
const TOKENS: usize = 5;
const LOGIT_ROWS: usize = 3;
const COLS: usize = 24;
/// Over three ranks: 4, 4 and 2.
const VOCAB: usize = 10;
/// The same buffers again, with other numbers.
const ROUNDS: usize = 3;

pub(super) fn run<B: Backend>(group: Vec<B>) {
    let world = group.len() as u32;
    // Nobody leaves before all are done: that would end the group.
    let done = std::thread::scope(|scope| {
        let ranks = group.into_iter().enumerate().map(|(rank, mut backend)| {
            let shard = Shard { rank: rank as u32, world };
            scope.spawn(move || (check(&mut backend, shard), backend))
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    for rank in done {
        let (outcome, backend) = rank.expect("an assertion has failed; its message is above");
        outcome.unwrap_or_else(|error| panic!("{}: {error}", backend.name()));
    }
}

/// Quarters, whose sums are exact in every type of activations.
fn value(shard: Shard, round: usize, i: usize) -> f32 {
    let mixed = (i * 7 + shard.rank as usize * 5 + round * 3) % 61;
    mixed as f32 / 4.0 - 8.0
}

/// The whole row of logits that the ranks have parts of.
fn logit(round: usize, row: usize, column: usize) -> f32 {
    (100 * round + 10 * row + column) as f32 / 3.0
}

fn check<B: Backend>(backend: &mut B, shard: Shard) -> Result<(), BackendError> {
    let columns = shard.range(VOCAB);
    let mut buf = backend.alloc(BufRole::Hidden, TOKENS + 1, COLS)?;
    let mut part = backend.alloc(BufRole::Logits, LOGIT_ROWS, columns.len())?;
    let mut out = backend.alloc(BufRole::Logits, LOGIT_ROWS, VOCAB)?;
    for round in 0..ROUNDS {
        let own = |shard, i| value(shard, round, i);
        backend.write(&mut buf, &(0..(TOKENS + 1) * COLS).map(|i| own(shard, i)).collect::<Vec<_>>())?;
        let rows =
            (0..LOGIT_ROWS).flat_map(|row| columns.clone().map(move |column| logit(round, row, column)));
        backend.write(&mut part, &rows.collect::<Vec<_>>())?;
        prepare(backend, round)?;
        backend.run(None, |backend| {
            backend.all_reduce(AllReduce { buf: &mut buf })?;
            // A single rank has no parts to gather.
            if shard == Shard::WHOLE {
                return Ok(());
            }
            backend.all_gather(AllGather { part: &part, out: &mut out })
        })?;
        let sum = |i| (0..shard.world).map(|rank| own(Shard { rank, ..shard }, i)).sum::<f32>();
        let mut want: Vec<_> = (0..TOKENS * COLS).map(sum).collect();
        // Rows that are not of the step are left alone.
        want.extend((TOKENS * COLS..(TOKENS + 1) * COLS).map(|i| own(shard, i)));
        assert_eq!(backend.read(&buf, TOKENS + 1)?, want, "{}: all_reduce, round {round}", backend.name());
        if shard != Shard::WHOLE {
            let want =
                (0..LOGIT_ROWS).flat_map(|row| (0..VOCAB).map(move |column| logit(round, row, column)));
            let got = backend.read(&out, LOGIT_ROWS)?;
            assert_eq!(got, want.collect::<Vec<_>>(), "{}: all_gather, round {round}", backend.name());
        }
    }
    Ok(())
}

/// One sequence; its last rows want logits.
fn prepare<B: Backend>(backend: &mut B, round: usize) -> Result<(), BackendError> {
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    let logit_row = |row: u32| LogitRow { row, slot: Slot(0), position: row + 1, kind: LogitKind::Sample };
    let state = SeqState {
        tokens: vec![1; TOKENS],
        prompt_len: TOKENS as u32,
        params: Arc::new(SamplingParams::greedy(1)),
        seed: 0,
    };
    backend.prepare(&StepInput {
        step: StepId(round as u64),
        token_ids: &[1; TOKENS],
        positions: &positions,
        slot_mapping: &positions,
        cu_seqlens_q: &[0, TOKENS as u32],
        seq_lens: &[TOKENS as u32],
        seq_slots: &[Slot(0)],
        seq_adapters: &[],
        block_tables: &[0],
        max_blocks_per_seq: 1,
        logit_rows: &positions[TOKENS - LOGIT_ROWS..].iter().map(|&row| logit_row(row)).collect::<Vec<_>>(),
        block_copies: &[],
        seqs: &[Some(state)],
    })
}
