//! A steady decode step allocates nothing: neither the scheduler nor the engine core around it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use quire_core::{
    BlockHasher, CacheSalt, ExecutorLimits, Micros, Request, RequestId, SamplingParams, TenantId,
};
use quire_engine::EngineCore;
use quire_scheduler::{Calibration, CostModel, HostTierConfig, SchedulerConfig};
use quire_sim::{MockExecutor, MockTiming};

struct Counting;

thread_local! {
    /// Per thread, because the test harness allocates beside us.
    static NUM_ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call is passed on unchanged to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NUM_ALLOCATIONS.set(NUM_ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations in `NUM_STEPS` steps of a full batch, and microseconds per step.
fn measure(depth: u32, num_seqs: u32) -> (u64, f64) {
    const NUM_STEPS: u32 = 200;
    let limits = ExecutorLimits {
        block_size: 16,
        num_blocks: num_seqs * 32,
        max_num_seqs: num_seqs,
        max_num_batched_tokens: num_seqs * 16,
        max_model_len: 512,
        vocab_size: 50_000,
        max_steps_in_flight: depth,
        kv_groups: vec![None],
    };
    let hasher = BlockHasher::new((1, 2), 16);
    let mut config = SchedulerConfig::new(limits.clone(), hasher);
    config.max_queued_requests = num_seqs;
    let mut core = EngineCore::new(config, Box::new(MockExecutor::new(limits, MockTiming::default())));
    let params = Arc::new(SamplingParams {
        stop_token_ids: vec![1, 2],
        min_tokens: 450,
        ..SamplingParams::greedy(450)
    });
    for id in 1..=u64::from(num_seqs) {
        let prompt: Arc<[u32]> = (0..16 + id as u32 % 16).map(|at| at + id as u32).collect();
        core.add(Request {
            id: RequestId(id),
            block_hashes: hasher.chain(CacheSalt(0), &prompt).into(),
            prompt,
            salt: CacheSalt(0),
            adapter: None,
            params: params.clone(),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(0),
            deadline: None,
        })
        .expect("it fits");
    }
    for now in 0..40 {
        core.step(Micros(now)).expect("the mock does not fail");
    }
    assert_eq!(core.stats().running, num_seqs);
    let before = NUM_ALLOCATIONS.get();
    let started = std::time::Instant::now();
    for now in 0..NUM_STEPS {
        core.step(Micros(u64::from(now) + 100)).expect("the mock does not fail");
        assert_eq!(core.step_stats().num_sampled, num_seqs);
    }
    let us = started.elapsed().as_secs_f64() * 1e6 / f64::from(NUM_STEPS);
    (NUM_ALLOCATIONS.get() - before, us)
}

/// As [`measure`], where every block that a sequence takes displaces a cached one, which goes to the host tier.
fn measure_evicting(num_seqs: u32) -> u64 {
    const NUM_STEPS: u32 = 128;
    let limits = ExecutorLimits {
        block_size: 16,
        num_blocks: num_seqs * 32,
        max_num_seqs: num_seqs,
        max_num_batched_tokens: num_seqs * 64,
        max_model_len: 512,
        vocab_size: 50_000,
        max_steps_in_flight: 2,
        kv_groups: vec![None],
    };
    let hasher = BlockHasher::new((1, 2), 16);
    let mut config = SchedulerConfig::new(limits.clone(), hasher);
    config.max_queued_requests = 4 * num_seqs;
    let cost = CostModel { per_copied_block: 1.0, ..Calibration::H200_LLAMA_3_1_8B.cost() };
    config.host_tier = Some(HostTierConfig { num_blocks: num_seqs * 128, block_bytes: 1, cost });
    let mut core = EngineCore::new(config, Box::new(MockExecutor::new(limits, MockTiming::default())));
    let send = |core: &mut EngineCore, id: u32, len: u32, max_tokens: u32| {
        let prompt: Arc<[u32]> = (0..len).map(|at| (at + 31 * id) % 50_000).collect();
        core.add(Request {
            id: RequestId(id.into()),
            block_hashes: hasher.chain(CacheSalt(0), &prompt).into(),
            prompt,
            salt: CacheSalt(0),
            adapter: None,
            params: Arc::new(SamplingParams::greedy(max_tokens)),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(0),
            deadline: None,
        })
        .expect("it fits");
    };
    // What these leave fills the pool and most of the host tier.
    (0..3 * num_seqs).for_each(|id| send(&mut core, 1 + id, 500, 1));
    let mut now = 0;
    while core.has_work() {
        now += 10_000;
        core.step(Micros(now)).expect("the mock does not fail");
    }
    (0..num_seqs).for_each(|id| send(&mut core, 10_000 + id, 8 + id % 16, 400));
    for _ in 0..160 {
        now += 10_000;
        core.step(Micros(now)).expect("the mock does not fail");
    }
    let (allocations, copied) = (NUM_ALLOCATIONS.get(), core.stats().host.num_copied_out);
    for _ in 0..NUM_STEPS {
        now += 10_000;
        core.step(Micros(now)).expect("the mock does not fail");
        assert_eq!(core.step_stats().num_sampled, num_seqs);
    }
    let copied = core.stats().host.num_copied_out - copied;
    assert!(copied >= u64::from(num_seqs * NUM_STEPS / 16), "only {copied} blocks were copied out");
    NUM_ALLOCATIONS.get() - allocations
}

#[test]
fn a_steady_step_that_evicts_to_the_host_tier_allocates_nothing() {
    assert_eq!(measure_evicting(32), 0);
    assert_eq!(measure_evicting(256), 0);
}

#[test]
fn a_steady_step_allocates_nothing() {
    for (depth, num_seqs) in [(1, 32), (2, 32), (1, 256), (1, 4096)] {
        let (allocations, us) = measure(depth, num_seqs);
        println!("{num_seqs} sequences, depth {depth}: {us:.1} us per step, mock executor included");
        assert_eq!(allocations, 0, "{num_seqs} sequences, depth {depth}");
    }
}
