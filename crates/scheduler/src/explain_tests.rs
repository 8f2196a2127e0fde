//! What is noted of sequences that wait, and that nothing is noted while nothing changes.

use quire_core::{SamplingParams, TenantId, TenantShare};

use crate::note::{NoteKind, WaitCause};
use crate::tests::{Rig, limits};

/// Adds an uncached request and returns nothing; every prompt is of its own.
fn add(rig: &mut Rig, id: u64, tenant: u32, priority: i8, prompt_len: u32, max_tokens: u32) {
    let start = 100 * id as u32;
    let mut request = rig.request(id, start..start + prompt_len, SamplingParams::greedy(max_tokens));
    (request.tenant, request.priority) = (TenantId(tenant), priority);
    request.block_hashes = [].into();
    rig.scheduler.add(request).unwrap();
}

/// A step, and what it notes as `(request, kind)`.
fn step(rig: &mut Rig) -> Vec<(u64, NoteKind)> {
    rig.step();
    rig.scheduler.notes().iter().map(|note| (note.request.0, note.kind)).collect()
}

fn waits(notes: &[(u64, NoteKind)]) -> Vec<(u64, WaitCause)> {
    let cause = |&(id, kind): &(u64, NoteKind)| match kind {
        NoteKind::Waits(cause) => Some((id, cause)),
        _ => None,
    };
    notes.iter().filter_map(cause).collect()
}

#[test]
fn a_request_that_has_a_place_at_once_never_waits() {
    let mut rig = Rig::with(limits(), |_| {});
    add(&mut rig, 1, 0, 0, 5, 40);
    let expected = [
        (1, NoteKind::Entered { cached_tokens: 0 }),
        (1, NoteKind::Chunk { num_tokens: 5 }),
        (1, NoteKind::FirstToken),
    ];
    assert_eq!(step(&mut rig), expected);
    for _ in 0..20 {
        assert_eq!(step(&mut rig), [], "a decode is not worth a note");
    }
}

#[test]
fn each_that_waits_is_told_why_once() {
    let mut rig = Rig::with(limits(), |config| {
        config.limits.max_num_seqs = 1;
        // The tenant in turn stays so.
        config.fairness.quantum = 100.0;
    });
    add(&mut rig, 1, 0, 0, 8, 10);
    step(&mut rig);
    // Two of the tenant that is in turn, one of another, one behind them all.
    add(&mut rig, 2, 0, 0, 8, 10);
    add(&mut rig, 3, 0, 0, 8, 2);
    add(&mut rig, 4, 1, 0, 8, 2);
    add(&mut rig, 5, 1, -1, 8, 1);
    let mut noted = waits(&step(&mut rig));
    noted.sort_by_key(|&(id, _)| id);
    let expected = [
        (2, WaitCause::BatchFull),
        (3, WaitCause::Queue),
        (4, WaitCause::Fairness),
        (5, WaitCause::Priority),
    ];
    assert_eq!(noted, expected);
    for _ in 0..5 {
        assert_eq!(step(&mut rig), [], "nothing has changed");
    }
    // Whoever comes to the front waits for the place, no longer for somebody.
    let mut noted = Vec::new();
    while rig.scheduler.has_work() {
        noted.extend(waits(&step(&mut rig)));
    }
    assert_eq!(noted, [(3, WaitCause::BatchFull), (4, WaitCause::BatchFull), (5, WaitCause::BatchFull)]);
}

#[test]
fn a_short_budget_is_told_from_a_small_pool() {
    let mut rig = Rig::with(limits(), |_| {});
    add(&mut rig, 1, 0, 0, 60, 4);
    add(&mut rig, 2, 0, 0, 60, 4);
    let notes = step(&mut rig);
    assert_eq!(waits(&notes), [(2, WaitCause::TokenBudget)]);
    assert!(notes.contains(&(1, NoteKind::Chunk { num_tokens: 32 })), "{notes:?}");

    let mut rig = Rig::with(limits(), |config| config.limits.num_blocks = 24);
    add(&mut rig, 1, 0, 0, 30, 4);
    add(&mut rig, 2, 0, 0, 80, 4);
    assert_eq!(waits(&step(&mut rig)), [(2, WaitCause::KvPressure)]);
}

#[test]
fn a_tenant_at_its_share_is_told_so() {
    let mut rig = Rig::with(limits(), |_| {});
    let share = TenantShare { kv_blocks_share: 0.1, ..TenantShare::default() };
    rig.scheduler.set_tenants(&[share, TenantShare::default()]);
    for id in 1..=3 {
        add(&mut rig, id, 0, 0, 16, 4);
    }
    let mut noted = waits(&step(&mut rig));
    noted.extend(waits(&step(&mut rig)));
    assert_eq!(noted, [(2, WaitCause::KvShare), (3, WaitCause::Queue)]);
}

#[test]
fn who_loses_its_blocks_is_told_and_its_tokens_are_computed_again() {
    let mut rig = Rig::with(limits(), |config| config.limits.num_blocks = 16);
    add(&mut rig, 1, 0, 0, 20, 40);
    add(&mut rig, 2, 0, 0, 12, 40);
    let mut notes = Vec::new();
    while rig.scheduler.has_work() {
        notes.extend(step(&mut rig).into_iter().filter(|&(id, _)| id == 2));
    }
    let lost = notes.iter().position(|&(_, kind)| kind == NoteKind::Preempted(WaitCause::KvPressure));
    let lost = lost.unwrap_or_else(|| panic!("nobody was preempted: {notes:?}"));
    let back = &notes[lost + 1..];
    assert!(matches!(back[0].1, NoteKind::Entered { .. }), "no second reason for the same wait: {back:?}");
    let computed: u32 = back
        .iter()
        .map(|&(_, kind)| if let NoteKind::Chunk { num_tokens } = kind { num_tokens } else { 0 })
        .sum();
    assert!(computed > 12, "the prompt and what was generated: {notes:?}");
    let firsts = notes.iter().filter(|&&(_, kind)| kind == NoteKind::FirstToken).count();
    assert_eq!(firsts, 1);
}
