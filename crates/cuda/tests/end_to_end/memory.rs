//! The cache takes what the largest step leaves of the memory, and afterwards nothing is allocated or recorded any more.

use quire_core::{AdapterId, DType, Executor, SamplingParams};
use quire_cuda::{Cuda, MemoryUse};
use quire_model::Checkpoint;
use quire_runner::{ModelRunner, RunnerConfig, RunnerError};

use crate::common::MockGpu;
use crate::common::build::repository;
use crate::steps::Steps;
use crate::{MAX_NUM_SEQS, config, cuda, lora};

fn load(
    gpu: &MockGpu,
    checkpoint: &Checkpoint,
    utilization: f64,
    measured: &mut Option<MemoryUse>,
) -> Result<ModelRunner<Cuda>, RunnerError> {
    let config = RunnerConfig { num_blocks: u32::MAX / 16, ..config(DType::BF16) };
    ModelRunner::load_measured(
        cuda(gpu),
        checkpoint,
        &config,
        |_| {},
        |backend| {
            let now = backend.memory_use()?;
            let budget = now.kv_budget(utilization);
            *measured = Some(now);
            Ok(budget)
        },
    )
}

fn taken(memory: &MemoryUse, purpose: &str) -> u64 {
    memory.taken.iter().find(|(name, _)| *name == purpose).map_or(0, |(_, bytes)| *bytes)
}

#[test]
fn the_cache_takes_what_the_largest_step_leaves() {
    let Some(gpu) = MockGpu::new() else { return };
    let checkpoint = Checkpoint::open(&repository().join("tests/data/golden/qwen3")).unwrap();
    let mut measured = None;
    let runner = load(&gpu, &checkpoint, 0.25, &mut measured).unwrap();
    let (measured, after) = (measured.unwrap(), runner.backend().memory_use().unwrap());
    let block = runner.memory_plan().kv_block_bytes;
    let cache = block * u64::from(runner.limits().num_blocks);
    let budget = measured.kv_budget(0.25);
    assert!(cache <= budget && budget < cache + block, "{cache} of {budget} in blocks of {block}");
    assert_eq!(taken(&after, "kv cache"), cache + block, "the block of the first steps is kept");
    for purpose in ["weights", "activations", "attention", "sampler", "step", "rotary table", "token counts"]
    {
        assert!(taken(&measured, purpose) > 0, "{purpose}");
        assert_eq!(taken(&measured, purpose), taken(&after, purpose), "{purpose}");
    }
    let used = after.total - after.free;
    assert!(used * 4 <= after.total, "{used} of {}", after.total);
    if gpu.is_mock() {
        assert_eq!(measured.free - after.free, cache, "free memory shrinks by the cache and by nothing else");
        assert_eq!(after.outside(), 0, "the double takes nothing for itself");
    }
    assert_nothing_is_made_any_more(&gpu, runner, checkpoint.spec().vocab_size);
    gpu.assert_nothing_left();
}

/// The largest step, then steps of decoding with fewer and fewer sequences, with everything that takes memory.
fn assert_nothing_is_made_any_more(gpu: &MockGpu, runner: ModelRunner<Cuda>, vocab: usize) {
    let start = gpu.counters();
    let params =
        SamplingParams { presence_penalty: 0.5, logprobs: Some(20), seed: 3, ..SamplingParams::default() };
    let longest = runner.limits().max_num_batched_tokens / MAX_NUM_SEQS;
    let prompt = |seq: usize, len: usize| (0..len).map(|i| ((seq * 31 + i * 7) % vocab) as u32).collect();
    let prompts = (0..MAX_NUM_SEQS as usize).map(|seq| prompt(seq, longest as usize)).collect();
    let mut steps = Steps::new(runner, prompts, &params);
    steps.step();
    let prefilled = gpu.counters();
    for num_seqs in (1..=MAX_NUM_SEQS as usize).rev() {
        steps.keep(num_seqs);
        steps.step();
    }
    let end = gpu.counters();
    assert_eq!(end.allocations, start.allocations);
    assert_eq!(end.live_graphs, start.live_graphs);
    if gpu.is_mock() {
        assert_eq!(end.graph_launches - prefilled.graph_launches, u64::from(MAX_NUM_SEQS));
    }
}

/// What a model with adapters has for its cache is less by what they take, and by what steps with them do.
#[test]
fn adapters_are_counted_before_the_cache() {
    let (Some(gpu), Some(adapted)) = (MockGpu::new().filter(MockGpu::is_mock), lora::checkpoint()) else {
        return;
    };
    let plain = lora::base().expect("it is there with its adapters");
    let budget = |checkpoint: &Checkpoint, measured: &mut Option<MemoryUse>| {
        let runner = load(&gpu, checkpoint, 0.25, measured).unwrap();
        (runner, measured.take().unwrap())
    };
    let (runner, without) = budget(&plain, &mut None);
    drop(runner);
    let (runner, with) = budget(&adapted, &mut None);
    let plan = *runner.memory_plan();
    assert_eq!(taken(&without, "adapters"), 0);
    // The plan's are in f32; here each table has entries beside them, and ranks are filled up to eight.
    assert!(taken(&with, "adapters") >= plan.adapter_bytes / 2, "{with:?}");
    let (of_steps, allocated) = (taken(&with, "step") - taken(&without, "step"), without.free - with.free);
    assert!(allocated >= taken(&with, "adapters") + of_steps, "{allocated} bytes for {with:?}");
    assert_eq!(without.kv_budget(0.25) - with.kv_budget(0.25), allocated);
    let start = gpu.counters();
    let prompts = (0..MAX_NUM_SEQS).map(|seq| vec![1, seq + 300, seq + 301]).collect();
    let mut steps = Steps::new(runner, prompts, &SamplingParams::greedy(100));
    steps.adapters = (0..MAX_NUM_SEQS)
        .map(|seq| [None, Some(AdapterId(0)), Some(AdapterId(1))][seq as usize % 3])
        .collect();
    (0..4).for_each(|_| steps.step());
    let end = gpu.counters();
    assert_eq!((end.allocations, end.live_graphs), (start.allocations, start.live_graphs));
    assert_eq!(end.graph_launches - start.graph_launches, 3, "all but the prompts");
    drop(steps);
    gpu.assert_nothing_left();
}

#[test]
fn too_little_memory_is_said() {
    let Some(gpu) = MockGpu::new() else { return };
    let checkpoint = Checkpoint::open(&repository().join("tests/data/golden/qwen3")).unwrap();
    let error = load(&gpu, &checkpoint, 1e-9, &mut None).err().expect("there is no room").to_string();
    assert!(error.contains("must be at least 2"), "{error}");
    gpu.assert_nothing_left();
}
