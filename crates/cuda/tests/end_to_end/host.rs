//! What a steady step costs the host: no allocation, no wait but for its own tokens, and little time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use quire_core::{AdapterId, DType, SamplingParams};
use quire_cuda::CudaOptions;
use quire_cuda::blaslt::Element;
use quire_model::{Checkpoint, ModelSpec};
use quire_runner::{ModelRunner, RunnerConfig};

use crate::common::MockGpu;
use crate::steps::Steps;
use crate::{Cuda, config, load_as, lora, mock};

struct Counting;

thread_local! {
    /// Per thread, because tests run side by side.
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

/// Of one thread.
#[derive(Clone, Copy, Default)]
pub struct Spent {
    /// CPU time.
    pub busy: Duration,
    pub allocations: u64,
}

impl Spent {
    /// Since the thread began.
    pub fn by_now() -> Self {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: a plain call with a valid pointer.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
        let busy = Duration::new(time.tv_sec as u64, time.tv_nsec as u32);
        Self { busy, allocations: NUM_ALLOCATIONS.get() }
    }

    /// Since `start`.
    pub fn add_since(&mut self, start: Self) {
        let now = Self::by_now();
        self.busy += now.busy - start.busy;
        self.allocations += now.allocations - start.allocations;
    }
}

/// As many layers as Qwen3-0.6B has; how wide they are is nothing to the host.
fn dense() -> Checkpoint {
    let spec = r#"{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 28, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "vocab_size": 512, "max_position_embeddings": 2048, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}"#;
    Checkpoint::dummy(ModelSpec::from_config_json(spec).expect("it is sound"), 1)
}

/// As many layers as Qwen3-30B-A3B has.
fn experts() -> Checkpoint {
    let spec = r#"{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "vocab_size": 512, "max_position_embeddings": 2048, "tie_word_embeddings": true, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": true,
        "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}"#;
    Checkpoint::dummy(ModelSpec::from_config_json(spec).expect("it is sound"), 1)
}

struct Model {
    name: &'static str,
    checkpoint: Checkpoint,
    /// Sequence `s` has that at `s` modulo their number.
    adapters: &'static [Option<AdapterId>],
}

/// Without files, none with adapters.
fn models() -> Vec<Model> {
    let plain = |name, checkpoint| Model { name, checkpoint, adapters: &[None] };
    let mut models = vec![plain("28 layers", dense()), plain("48 layers of experts", experts())];
    models.extend(lora::checkpoint().map(|checkpoint| Model {
        name: "5 layers with adapters",
        checkpoint,
        adapters: &[None, Some(AdapterId(0)), Some(AdapterId(1))],
    }));
    models
}

/// On a GPU that does nothing, `num_seqs` sequences that decode, with two steps in flight; behind what is made and
/// recorded at first.
fn steady(gpu: &MockGpu, model: &Model, num_seqs: u32) -> Steps<ModelRunner<Cuda>> {
    let config = RunnerConfig {
        max_num_seqs: num_seqs,
        max_num_batched_tokens: num_seqs * 2,
        max_model_len: 512,
        num_blocks: num_seqs * 32,
        ..config(DType::BF16)
    };
    let options =
        CudaOptions { ordinal: gpu.ordinal(), activations: Element::Bf16, ..CudaOptions::default() };
    let cuda = Cuda::new(mock::images(), options).expect("the double is a GPU");
    let runner = load_as(cuda, &model.checkpoint, &config);
    gpu.idle(true);
    let prompts = vec![vec![1, 2]; num_seqs as usize];
    let mut steps = Steps::new(runner, prompts, &SamplingParams::greedy(2000));
    steps.adapters = model.adapters.iter().copied().cycle().take(num_seqs as usize).collect();
    steps.pipelined(20);
    steps
}

/// Block tables grow meanwhile. A step waits for what its place in the ring held four steps ago, which is long done, and for
/// its tokens.
#[test]
fn a_steady_step_allocates_nothing_and_waits_for_nothing_but_its_tokens() {
    const NUM_STEPS: u64 = 64;
    for model in models() {
        let Some(gpu) = MockGpu::new().filter(MockGpu::is_mock) else { return };
        let mut steps = steady(&gpu, &model, 64);
        let (name, before, spent) = (model.name, gpu.counters(), steps.spent);
        assert!(spent.allocations > 0, "the first steps make what is kept");
        steps.pipelined(NUM_STEPS as usize);
        let after = gpu.counters();
        assert_eq!(steps.spent.allocations - spent.allocations, 0, "{name}");
        assert_eq!(after.allocations, before.allocations, "{name}");
        assert_eq!(
            (after.live_graphs, after.live_pinned),
            (before.live_graphs, before.live_pinned),
            "{name}"
        );
        assert_eq!(after.graph_launches - before.graph_launches, NUM_STEPS, "{name}");
        assert_eq!(after.synchronizations - before.synchronizations, 2 * NUM_STEPS, "{name}");
        assert_eq!(after.device_to_host - before.device_to_host, NUM_STEPS, "{name}");
    }
}

/// Time of the host alone.
#[test]
#[ignore = "a measurement: run it by name, on a quiet machine, in release mode"]
fn host_budget() {
    const NUM_STEPS: u32 = 400;
    let mut late = Vec::new();
    for model in models() {
        for (num_seqs, budget_us) in [(1, 50.0), (64, 50.0), (512, 200.0)] {
            let Some(gpu) = MockGpu::new().filter(MockGpu::is_mock) else { return };
            let mut steps = steady(&gpu, &model, num_seqs);
            let before = steps.spent.busy;
            steps.pipelined(NUM_STEPS as usize);
            let us = (steps.spent.busy - before).as_secs_f64() * 1e6 / f64::from(NUM_STEPS);
            let name = model.name;
            println!("{name:24} {num_seqs:4} sequences: {us:6.1} us a step, of {budget_us}");
            if us > budget_us {
                late.push((name, num_seqs, us));
            }
        }
    }
    assert!(late.is_empty(), "above the budget: {late:?}");
}
