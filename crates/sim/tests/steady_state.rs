//! A steady decode step allocates nothing: neither the scheduler nor the engine core around it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use quire_core::{
    BlockHasher, CacheSalt, ExecutorLimits, Micros, Request, RequestId, SamplingParams, TenantId,
};
use quire_engine::EngineCore;
use quire_scheduler::SchedulerConfig;
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

#[test]
fn a_steady_step_allocates_nothing() {
    for (depth, num_seqs) in [(1, 32), (2, 32), (1, 256), (1, 4096)] {
        let (allocations, us) = measure(depth, num_seqs);
        println!("{num_seqs} sequences, depth {depth}: {us:.1} us per step, mock executor included");
        assert_eq!(allocations, 0, "{num_seqs} sequences, depth {depth}");
    }
}
