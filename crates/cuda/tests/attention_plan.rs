//! The planner's lists: every row meets every split that it sees exactly once, within the limits.

mod attention_problem;
mod common;

use std::collections::BTreeMap;

use attention_problem::{Item, Limits, PREFILL_ROWS, Rng, Sequences, Spread};
use common::HostKernels;

const SPLIT: i32 = 512;

/// What is known of one sequence.
#[derive(Clone, Copy, Debug)]
struct Seq {
    q_start: i32,
    q_len: i32,
    kv_len: i32,
}

/// `[seq]` the sequence of each slot.
fn check(list: &[Item], is_decode: bool, seqs: &BTreeMap<i32, Seq>, group: i32, window: i32, limits: Limits) {
    assert!(list.len() <= limits.items);
    let (mut covered, mut partials, mut arrivals) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for item in list {
        let seq = seqs[&item.seq];
        assert_eq!((item.q_start, item.first_position), (seq.q_start, seq.kv_len - seq.q_len), "{item:?}");
        assert_eq!(is_decode, seq.q_len * group <= 16, "{item:?}");
        assert!(item.num_rows > 0 && item.num_rows <= if is_decode { 16 } else { PREFILL_ROWS }, "{item:?}");
        // What the rows see together, and the item's part of it.
        let position = |row: i32| item.first_position + (item.row_begin + row) / group;
        let begin = if window > 0 { (position(0) + 1 - window).max(0) } else { 0 };
        let end = position(item.num_rows - 1) + 1;
        assert!(begin <= item.kv_begin && item.kv_begin < item.kv_end && item.kv_end <= end, "{item:?}");
        assert!(item.kv_begin == begin || item.kv_begin % SPLIT == 0, "{item:?}");
        assert!(item.kv_end == end || item.kv_end % SPLIT == 0, "{item:?}");
        assert_eq!(item.num_splits, (end - 1) / SPLIT - begin / SPLIT + 1, "{item:?}");
        assert_eq!(item.split_offset, item.kv_begin / SPLIT - begin / SPLIT, "{item:?}");
        for row in item.row_begin..item.row_begin + item.num_rows {
            for split in item.kv_begin / SPLIT..=(item.kv_end - 1) / SPLIT {
                assert!(covered.insert((item.seq, row, split), ()).is_none(), "{item:?}: row {row} twice");
            }
        }
        assert_eq!(item.partial < 0, item.kv_begin == begin && item.kv_end == end, "{item:?}");
        if item.partial >= 0 {
            let tile = (item.seq, item.row_begin);
            let range = (item.partial, item.partial + item.num_splits * item.num_rows);
            assert!(range.1 as usize <= limits.partials, "{item:?}");
            assert_eq!(*partials.entry(tile).or_insert(range), range, "{item:?}");
            assert!((item.counter as usize) < limits.counters, "{item:?}");
            let (counter, expected, have) = arrivals.entry(tile).or_insert((item.counter, item.num_items, 0));
            assert_eq!((*counter, *expected), (item.counter, item.num_items), "{item:?}");
            *have += 1;
        }
    }
    for (slot, seq) in seqs {
        if (seq.q_len * group <= 16) != is_decode {
            continue;
        }
        for row in 0..seq.q_len * group {
            let position = seq.kv_len - seq.q_len + row / group;
            let begin = if window > 0 { (position + 1 - window).max(0) } else { 0 };
            for split in begin / SPLIT..=position / SPLIT {
                assert!(
                    covered.contains_key(&(*slot, row, split)),
                    "slot {slot}: row {row}, split {split} is nobody's"
                );
            }
        }
    }
    assert!(arrivals.values().all(|(_, expected, have)| expected == have), "{arrivals:?}");
    let mut counters: Vec<_> = arrivals.values().map(|(counter, ..)| *counter).collect();
    counters.sort_unstable();
    counters.dedup();
    assert_eq!(counters.len(), arrivals.len(), "a counter of two tiles");
    let mut ranges: Vec<_> = partials.values().copied().collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "partial results overlap");
}

#[test]
fn every_row_meets_every_split_once() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng(77);
    for (case, num_seqs) in [1, 2, 9, 255, 300, 600].into_iter().enumerate() {
        for (group, window) in [(1, 0), (4, 1000), (8, 0), (5, 100)] {
            let (mut cu_seqlens_q, mut seq_lens, mut seqs) = (vec![0], Vec::new(), BTreeMap::new());
            let seq_slots: Vec<i32> = (0..num_seqs).map(|i| num_seqs - 1 - i).collect();
            for slot in &seq_slots {
                // One in nine is padding; most decode, some have a prompt.
                let q_len = match rng.next() % 9 {
                    0 => 0,
                    1 => 2 + rng.next() as i32 % 3,
                    2 => 1 + (rng.next() % 700) as i32,
                    _ => 1,
                };
                let kv_len = if q_len == 0 { 0 } else { q_len + (rng.next() % 3000) as i32 };
                let q_start = *cu_seqlens_q.last().unwrap();
                if q_len > 0 {
                    seqs.insert(*slot, Seq { q_start, q_len, kv_len });
                }
                cu_seqlens_q.push(q_start + q_len);
                seq_lens.push(kv_len);
            }
            let sequences = Sequences {
                cu_seqlens_q: &cu_seqlens_q,
                seq_lens: &seq_lens,
                seq_slots: &seq_slots,
                group,
                window,
            };
            for spread in [1, 100, 10_000] {
                for limits in [
                    Limits { items: 20_000, partials: 1 << 20, counters: 20_000 },
                    Limits { items: 9000, partials: 3000, counters: 50 },
                ] {
                    let (decode, prefill) = sequences.plan(kernels, 2, Spread(spread), limits, case as u64);
                    check(&decode, true, &seqs, group as i32, window as i32, limits);
                    check(&prefill, false, &seqs, group as i32, window as i32, limits);
                }
            }
        }
    }
}

#[test]
fn few_long_sequences_are_cut_and_many_are_not() {
    let Some(kernels) = HostKernels::load() else { return };
    let limits = Limits { items: 5000, partials: 1 << 20, counters: 5000 };
    let items = |num_seqs: i32, len: i32| {
        let cu_seqlens_q: Vec<i32> = (0..=num_seqs).collect();
        let (lens, slots) = (vec![len; num_seqs as usize], (0..num_seqs).collect::<Vec<_>>());
        let sequences = Sequences {
            cu_seqlens_q: &cu_seqlens_q,
            seq_lens: &lens,
            seq_slots: &slots,
            group: 4,
            window: 0,
        };
        sequences.plan(kernels, 8, Spread(396), limits, 0).0.len()
    };
    assert_eq!(items(1, 4096), 8, "one sequence: all its splits apart");
    assert_eq!(items(512, 4096), 512, "more than enough: each in one piece");
    assert_eq!(items(0, 4096), 0);
}
