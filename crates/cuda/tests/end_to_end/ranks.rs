//! A model split over two GPUs of the double, with the double of NCCL between them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quire_backend::Backend;
use quire_core::{DType, Executor, SamplingParams};
use quire_cuda::blaslt::Element;
use quire_cuda::{Cuda, CudaOptions};
use quire_model::Checkpoint;
use quire_runner::tensor_parallel::{load_ranks, load_ranks_measured};
use quire_runner::{MemoryPlan, RunnerConfig, TensorParallel};

use crate::common::build::repository;
use crate::common::{MockGpu, mock};
use crate::steps::Steps;
use crate::{GOLDEN_TOLERANCE, compare, config, element, golden_checkpoints, own_config, prompts};

/// Two GPUs of one test; `None` without the double: one real GPU is all that there is then.
pub fn pair() -> Option<[MockGpu; 2]> {
    let gpus = [MockGpu::new()?, MockGpu::new()?];
    gpus[0].is_mock().then_some(gpus)
}

fn load(
    gpus: &[MockGpu; 2],
    checkpoint: &Checkpoint,
    activations: Element,
    kv_dtype: DType,
) -> TensorParallel {
    let backends = backends(gpus, activations);
    let runners = load_ranks(backends, checkpoint, &config(kv_dtype), |_| {}).expect("the checkpoint loads");
    TensorParallel::new(runners).expect("threads can be had")
}

pub fn backends(gpus: &[MockGpu; 2], activations: Element) -> Vec<Cuda> {
    let options = CudaOptions { activations, arena_chunk: 0, ..CudaOptions::default() };
    let ordinals = gpus.each_ref().map(MockGpu::ordinal);
    Cuda::group(mock::images(), &options, &ordinals).expect("the doubles are GPUs")
}

pub fn golden(name: &str) -> Checkpoint {
    Checkpoint::open(&repository().join("tests/data/golden").join(name)).expect("it is sound")
}

/// All but the one with three heads, experts among them. The last of the four steps is replayed from a graph.
#[test]
fn golden_checkpoints_agree_on_two_gpus() {
    let Some(gpus) = pair() else { return };
    gpus.iter().for_each(|gpu| gpu.delay(true));
    let mut errors = Vec::new();
    for (name, checkpoint) in golden_checkpoints() {
        if MemoryPlan::of_rank(checkpoint.spec(), &config(DType::BF16), 2).is_err() {
            continue;
        }
        let config = own_config(&checkpoint);
        let runner = load(&gpus, &checkpoint, element(&checkpoint), config.kv_dtype);
        let worst = compare(&name, runner, &checkpoint, &config, 4);
        println!("{name:20} relative error {worst:.1e}");
        errors.push((name, worst));
    }
    assert!(errors.len() >= 12 && errors.iter().any(|(name, _)| name == "qwen3-moe"), "{errors:?}");
    assert!(errors.iter().all(|(_, worst)| *worst <= GOLDEN_TOLERANCE), "{errors:?}");
    for gpu in &gpus {
        assert!(gpu.counters().graph_launches > 0, "steps were recorded");
        gpu.assert_nothing_left();
    }
}

#[test]
fn two_steps_in_flight_and_company_change_no_token_on_two_gpus() {
    let Some(gpus) = pair() else { return };
    gpus.iter().for_each(|gpu| gpu.delay(true));
    let checkpoint = golden("qwen3");
    let vocab = checkpoint.spec().vocab_size;
    let params = SamplingParams { seed: 7, top_p: 0.9, ..SamplingParams::default() };
    let runner = || load(&gpus, &checkpoint, Element::Bf16, DType::BF16);
    let mut one = Steps::new(runner(), prompts(vocab), &params);
    (0..12).for_each(|_| one.step());
    let mut two = Steps::new(runner(), prompts(vocab), &params);
    two.pipelined(12);
    assert_eq!(one.outputs(), two.outputs());
    let mut alone = Steps::new(runner(), vec![prompts(vocab)[3].clone()], &params);
    alone.reseed(3);
    alone.pipelined(12);
    assert_eq!(one.outputs()[3], alone.outputs()[0]);
}

/// What one GPU launches; two sums a layer; and for the logits a copy to the place of the rank, a gather, and a copy out of
/// the place of each rank. Of experts a rank has some columns of each: no more launches than one GPU, and one sum.
#[test]
fn a_steady_step_of_two_gpus_is_one_graph_each() {
    for (name, [nodes, products]) in [("qwen3", [2 * 9, 2 * 4]), ("qwen3-moe", [9 + 2 * 12, 4 + 2 * 3])] {
        let Some(gpus) = pair() else { return };
        let checkpoint = golden(name);
        let runner = load(&gpus, &checkpoint, Element::Bf16, DType::BF16);
        let vocab = checkpoint.spec().vocab_size;
        let mut steps = Steps::new(runner, prompts(vocab), &SamplingParams::greedy(100));
        (0..4).for_each(|_| steps.step());
        let before = gpus.each_ref().map(MockGpu::counters);
        steps.step();
        let after = gpus.each_ref().map(MockGpu::counters);
        let layers = checkpoint.spec().layers.len() as u64;
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(after.graph_launches - before.graph_launches, 1, "{name}");
            assert_eq!(after.graph_nodes - before.graph_nodes, nodes + 6 + 2 * layers + 4, "{name}");
            assert_eq!(after.collectives - before.collectives, 2 * layers + 1, "{name}");
            assert_eq!(after.matmuls - before.matmuls, products + 1, "{name}");
            assert_eq!(after.launches - before.launches, nodes - products + 5 + 2, "{name}");
            assert_eq!(after.device_to_device - before.device_to_device, 3, "{name}");
            assert_eq!(after.synchronizations - before.synchronizations, 2, "{name}");
            assert_eq!(after.allocations, before.allocations, "{name}");
        }
    }
}

#[test]
fn the_cache_is_what_the_gpu_with_least_memory_holds() {
    let Some(gpus) = pair() else { return };
    let checkpoint = golden("qwen3");
    let config = RunnerConfig { num_blocks: u32::MAX / 16, ..config(DType::BF16) };
    let (smallest, largest) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));
    let measured = |backend: &Cuda| {
        let is_first = backend.name() == format!("cuda:{}", gpus[0].ordinal());
        let own = backend.memory_use()?.kv_budget(if is_first { 0.25 } else { 0.1 });
        smallest.fetch_min(own, Ordering::Relaxed);
        largest.fetch_max(own, Ordering::Relaxed);
        Ok(own)
    };
    let runners =
        load_ranks_measured(backends(&gpus, Element::Bf16), &checkpoint, &config, |_| {}, measured).unwrap();
    let (smallest, largest) = (smallest.into_inner(), largest.into_inner());
    assert!(smallest < largest, "{smallest} and {largest} bytes");
    for runner in &runners {
        let (block, blocks) = (runner.memory_plan().kv_block_bytes, u64::from(runner.limits().num_blocks));
        assert!(block * blocks <= smallest && smallest < block * (blocks + 1), "{blocks} in {smallest}");
    }
    let allocations = gpus.each_ref().map(|gpu| gpu.counters().allocations);
    let vocab = checkpoint.spec().vocab_size;
    let executor = TensorParallel::new(runners).unwrap();
    let mut steps = Steps::new(executor, prompts(vocab), &SamplingParams::greedy(100));
    (0..4).for_each(|_| steps.step());
    assert_eq!(gpus.each_ref().map(|gpu| gpu.counters().allocations), allocations);
    drop(steps);

    let nothing = |_: &Cuda| Ok(0);
    let refused = load_ranks_measured(backends(&gpus, Element::Bf16), &checkpoint, &config, |_| {}, nothing);
    assert!(refused.is_err_and(|error| error.to_string().contains("must be at least 2")));
    gpus.iter().for_each(MockGpu::assert_nothing_left);
}

/// The other GPU waits for the one that has failed, in a sum that never comes.
#[test]
fn a_gpu_that_fails_ends_the_step_of_both() {
    let checkpoint = golden("qwen3");
    for (failing, after) in [(1, 0), (0, 9), (1, 40)] {
        let Some(gpus) = pair() else { return };
        // As on a real GPU, what is enqueued waits on the stream, not in the call.
        gpus.iter().for_each(|gpu| gpu.delay(true));
        let runner = load(&gpus, &checkpoint, Element::Bf16, DType::BF16);
        let mut steps =
            Steps::new(runner, prompts(checkpoint.spec().vocab_size), &SamplingParams::greedy(100));
        // One step: the next ones launch by themselves, so that the fault strikes among them.
        steps.step();
        gpus[failing].fail_after(after, mock::ILLEGAL_ADDRESS);
        let begin = Instant::now();
        let error = steps.try_step().expect_err("a device has failed");
        assert!(error.message.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
        assert_eq!(error.device, format!("cuda:{}", gpus[failing].ordinal()));
        assert_eq!(steps.try_step(), Err(error), "and so for ever");
        drop(steps);
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    }
}
