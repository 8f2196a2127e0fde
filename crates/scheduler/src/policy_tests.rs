//! Shares, priorities and latency targets, driven step by step.

use quire_core::{FinishReason, Micros, RequestError, SamplingParams, TenantId, TenantShare};

use crate::cost::CostModel;
use crate::event::SeqEventKind;
use crate::pacing::LatencyTargets;
use crate::policy::Policy;
use crate::tests::{Rig, limits};
use crate::{SchedulerConfig, SchedulerStats};

fn started(rig: &Rig) -> Vec<u64> {
    let events = rig.events.iter().filter(|event| matches!(event.kind, SeqEventKind::Started { .. }));
    events.map(|event| event.request.0).collect()
}

fn add_for(rig: &mut Rig, id: u64, tenant: u32, priority: i8, prompt: std::ops::Range<u32>, max_tokens: u32) {
    let mut request = rig.request(id, prompt, SamplingParams::greedy(max_tokens));
    (request.tenant, request.priority) = (TenantId(tenant), priority);
    request.block_hashes = [].into();
    rig.scheduler.add(request).unwrap();
}

/// One place in the batch, and no patience with a tenant's locality.
fn one_place(config: &mut SchedulerConfig) {
    config.limits.max_num_seqs = 1;
    config.fairness.quantum = 0.0;
}

#[test]
fn the_tenant_that_was_served_least_is_next_by_weight() {
    let mut rig = Rig::with(limits(), one_place);
    let share = |weight| TenantShare { weight, ..TenantShare::default() };
    rig.scheduler.set_tenants(&[share(1.0), share(2.0)]);
    for id in 1..=8 {
        add_for(&mut rig, id, u32::from(id > 4), 0, 0..8, 1);
    }
    rig.run();
    // 10 units each; tenant 1 pays half. When both are equal, the one served last stays in turn.
    assert_eq!(started(&rig), [1, 5, 6, 7, 2, 8, 3, 4]);
}

#[test]
fn a_tenant_that_was_idle_does_not_bring_unused_service() {
    let mut rig = Rig::with(limits(), one_place);
    for id in 1..=6 {
        add_for(&mut rig, id, 0, 0, 0..8, 1);
    }
    for _ in 0..3 {
        rig.step();
    }
    for id in 11..=14 {
        add_for(&mut rig, id, 1, 0, 0..8, 1);
    }
    rig.run();
    let order = started(&rig);
    let place = |id| order.iter().position(|&other| other == id).unwrap();
    assert!(place(13) > place(5), "it takes turns from when it came: {order:?}");
}

#[test]
fn a_share_of_the_blocks_holds_back_only_its_tenant() {
    let mut rig = Rig::with(limits(), |_| {});
    let share = TenantShare { kv_blocks_share: 0.1, ..TenantShare::default() };
    rig.scheduler.set_tenants(&[share, TenantShare::default()]);
    // Four blocks each; tenant 0 may hold seven of 64.
    for id in 1..=3 {
        add_for(&mut rig, id, 0, 0, 0..16, 4);
    }
    add_for(&mut rig, 4, 1, 0, 0..16, 4);
    rig.step();
    rig.step();
    assert_eq!(started(&rig), [1, 4]);
    rig.run();
    assert_eq!(rig.finished().len(), 4);
}

#[test]
fn priority_delays_but_does_not_starve() {
    let mut rig = Rig::with(limits(), |config| {
        one_place(config);
        config.fairness.max_queue_age = 5;
    });
    add_for(&mut rig, 1, 0, -1, 0..4, 1);
    for id in 2..=20 {
        add_for(&mut rig, id, 0, 0, 0..4, 1);
    }
    rig.run();
    let order = started(&rig);
    let place = order.iter().position(|&id| id == 1).unwrap();
    assert!((3..10).contains(&place), "{order:?}");
}

#[test]
fn a_higher_priority_displaces_the_newest_of_the_lowest_that_never_ran() {
    let mut rig = Rig::with(limits(), one_place);
    add_for(&mut rig, 1, 0, -2, 0..4, 4);
    rig.step();
    for (id, tenant, priority) in [(2, 0, -1), (3, 1, -2), (4, 0, -2), (5, 1, -2), (6, 0, 0)] {
        add_for(&mut rig, id, tenant, priority, 0..4, 2);
    }
    assert_eq!(rig.scheduler.stats().lowest_waiting, Some(-2));
    let displaced = [0, 0, 0, 0, 0, -1].map(|priority| rig.scheduler.displace(priority));
    assert_eq!(displaced, [1, 1, 1, 1, 0, 0], "not one of the same priority");
    rig.run();
    let rejected = rig.finished().into_iter().filter(|finished| finished.2 == FinishReason::Rejected);
    assert_eq!(rejected.map(|finished| finished.0).collect::<Vec<_>>(), [5, 4, 3, 2]);
}

/// A token takes a millisecond, a step one more.
fn targets() -> LatencyTargets {
    let cost = CostModel {
        fixed: 1000.0,
        per_row: 0.0,
        weights: 0.0,
        per_token: 1000.0,
        per_context_token: 0.0,
        per_attention: 0.0,
        per_copied_block: 0.0,
    };
    let (ttft, itl) = (Micros(100_000), Micros(10_000));
    LatencyTargets { ttft, itl, ..LatencyTargets::new(cost) }
}

fn paced() -> Rig {
    Rig::with(limits(), |config| config.policy = Policy::DeadlineSlack(targets()))
}

#[test]
fn chunks_keep_the_step_within_the_target_while_somebody_decodes() {
    let mut rig = paced();
    add_for(&mut rig, 1, 0, 0, 0..4, 40);
    rig.step();
    add_for(&mut rig, 2, 0, 0, 0..20, 4);
    // A step may take 9.5 ms: itself, the decode, and seven tokens; but a chunk is not cut below 64.
    assert_eq!(rig.step(), [(4, 1, true), (0, 20, true)]);
}

/// Two requests of 31 ms each when alone, due in 124 ms.
fn two_in_time() -> Rig {
    let mut rig = paced();
    for id in 1..=2 {
        add_for(&mut rig, id, 0, 0, 0..30, 1);
    }
    rig
}

#[test]
fn what_cannot_be_in_time_is_refused_at_once() {
    let mut rig = two_in_time();
    // A third would have its token after 93 ms if all goes as predicted, which is too good to be promised.
    let late = rig.request(3, 0..30, SamplingParams::greedy(1));
    let error = rig.scheduler.add(late).unwrap_err();
    assert!(matches!(error, RequestError::Late { retry_after } if retry_after.as_secs() >= 1), "{error:?}");
    let mut hopeless = rig.request(20, 0..30, SamplingParams::greedy(1));
    hopeless.deadline = Some(Micros(20_000));
    assert_eq!(rig.scheduler.add(hopeless), Err(RequestError::DeadlineExceeded));
    rig.run();
    assert!(rig.finished().iter().all(|f| f.2 == FinishReason::Length && f.3 == 1), "{:?}", rig.finished());
}

#[test]
fn who_was_let_in_is_served_late_rather_than_not_at_all() {
    let mut rig = two_in_time();
    // Nothing is computed for a second. Then both are put off: one that comes goes first, and they have their turn.
    rig.now = 1_000_000;
    assert_eq!(rig.step(), [(0, 30, true), (0, 2, false)]);
    let mut punctual = rig.request(3, 40..70, SamplingParams::greedy(1));
    punctual.arrival = Micros(1_000_000);
    rig.scheduler.add(punctual).unwrap();
    rig.run();
    assert_eq!(
        rig.finished().iter().map(|f| (f.0, f.2)).collect::<Vec<_>>(),
        [1, 3, 2].map(|id| (id, FinishReason::Length))
    );
    assert_eq!(rig.scheduler.stats().num_rejected, 0);
}

#[test]
fn nobody_waits_longer_than_the_longest_wait() {
    let mut rig = two_in_time();
    rig.now = 31_000_000;
    rig.run();
    assert!(rig.finished().iter().all(|f| f.2 == FinishReason::Rejected && f.3 == 0), "{:?}", rig.finished());
    let SchedulerStats { num_rejected, running, waiting, .. } = rig.scheduler.stats();
    assert_eq!((num_rejected, running, waiting), (2, 0, 0));
}

#[test]
fn a_short_prompt_that_is_due_sooner_goes_before_a_long_one_in_the_batch() {
    let mut rig = paced();
    add_for(&mut rig, 1, 0, 0, 0..100, 1);
    assert_eq!(rig.step(), [(0, 32, false)]);
    add_for(&mut rig, 2, 0, 0, 0..8, 1);
    assert_eq!(rig.step(), [(0, 8, true), (32, 24, false)]);
}
