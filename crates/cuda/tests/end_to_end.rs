//! Whole models through the runner on the CUDA backend under the double of a driver: the golden checkpoints and the
//! embedded model against the reference backend, two steps in flight, what a step launches, and how failure ends.

mod common;
#[path = "end_to_end/host.rs"]
mod host;
#[path = "end_to_end/lora.rs"]
mod lora;
#[path = "end_to_end/memory.rs"]
mod memory;
#[path = "end_to_end/precision.rs"]
mod precision;
#[path = "end_to_end/ranks.rs"]
mod ranks;
#[path = "end_to_end/recording.rs"]
mod recording;
#[path = "end_to_end/routes.rs"]
mod routes;
#[path = "end_to_end/steps.rs"]
mod steps;

use common::build::repository;
use common::{MockGpu, mock};
use quire_backend::Backend;
use quire_backend::reference::RefBackend;
use quire_core::{DType, Executor, LateInputs, ModelRunnerOutput, QuantFormat, SamplingParams, TokenId};
use quire_cuda::blaslt::Element;
use quire_cuda::{Cuda, CudaOptions};
use quire_model::{Checkpoint, Ffn};
use quire_runner::{ModelRunner, RunnerConfig};
use steps::{Runner, Steps};

/// Of a row of logits, norm over norm: activations are rounded to bf16, the reference keeps f32.
const TOLERANCE: f32 = 1e-2;
/// The same for the golden checkpoints, whose random weights on 64 columns amplify rounding: the worst row has 0.025.
const GOLDEN_TOLERANCE: f32 = 3e-2;
/// The same where activations are quantized too: a difference in the last bit of bf16 may move a code by one of 127.
const QUANTIZED_TOLERANCE: f32 = 4e-2;
/// Of a model in fp8 against the model as it is: four roundings of a product, in quadrature.
const FP8_TOLERANCE: f32 = 0.1;
/// Of the golden checkpoints the worst row has 0.083. That the layers themselves are right to the bit is for the
/// conformance suite to say.
const GOLDEN_QUANTIZED_TOLERANCE: f32 = 0.1;
const MAX_NUM_SEQS: u32 = 8;
const MAX_MODEL_LEN: u32 = 128;

fn config(kv_dtype: DType) -> RunnerConfig {
    RunnerConfig {
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: 256,
        max_model_len: MAX_MODEL_LEN,
        block_size: 16,
        num_blocks: MAX_NUM_SEQS * MAX_MODEL_LEN / 16,
        kv_dtype,
        quant: QuantFormat::None,
    }
}

fn cuda(gpu: &MockGpu) -> Cuda {
    cuda_with(gpu, Element::Bf16)
}

fn cuda_with(gpu: &MockGpu, activations: Element) -> Cuda {
    let options =
        CudaOptions { ordinal: gpu.ordinal(), activations, arena_chunk: 0, ..CudaOptions::default() };
    Cuda::new(mock::images(), options).expect("the double is a GPU")
}

fn load<B: Backend>(backend: B, checkpoint: &Checkpoint, kv_dtype: DType) -> ModelRunner<B> {
    load_as(backend, checkpoint, &config(kv_dtype))
}

fn load_as<B: Backend>(backend: B, checkpoint: &Checkpoint, config: &RunnerConfig) -> ModelRunner<B> {
    ModelRunner::load(backend, checkpoint, config, |_| {}).expect("the checkpoint loads")
}

fn load_on(gpu: &MockGpu, checkpoint: &Checkpoint, config: &RunnerConfig) -> ModelRunner<Cuda> {
    load_as(cuda_with(gpu, element(checkpoint)), checkpoint, config)
}

/// Of activations: as the checkpoint is.
fn element(checkpoint: &Checkpoint) -> Element {
    if checkpoint.spec().dtype == DType::F16 { Element::F16 } else { Element::Bf16 }
}

/// As the checkpoint is.
fn own_config(checkpoint: &Checkpoint) -> RunnerConfig {
    config(if checkpoint.spec().dtype == DType::F16 { DType::F16 } else { DType::BF16 })
}

fn demo() -> Checkpoint {
    Checkpoint::from_static(quire_demo_model::CONFIG_JSON, None, quire_demo_model::WEIGHTS)
        .expect("it is ours")
}

/// Prompts of different lengths, one of them across pages.
fn prompts(vocab: usize) -> Vec<Vec<TokenId>> {
    let id = |seq: usize, i: usize| ((seq * 131 + i * i * 7 + i * 29 + 5) % vocab) as TokenId;
    [3, 18, 1, 40].iter().enumerate().map(|(seq, &len)| (0..len).map(|i| id(seq, i)).collect()).collect()
}

/// Norm of the difference over the norm.
fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    let norm =
        |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    (difference / norm(&mut want.iter().copied())) as f32
}

/// The lead of the largest over the next.
fn margin(logits: &[f32]) -> f32 {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted[0] - sorted[1]
}

/// Prefills and decodes on `runner` and on the reference, which has a cache in f32 and, where layers are in fp8, layers as
/// they come; returns the worst error of a row of logits.
fn compare<R: Runner>(
    name: &str,
    runner: R,
    checkpoint: &Checkpoint,
    config: &RunnerConfig,
    num_steps: usize,
) -> f32 {
    let vocab = checkpoint.spec().vocab_size;
    let greedy = SamplingParams::greedy(100);
    let quant = if config.quant == QuantFormat::Fp8 { QuantFormat::None } else { config.quant };
    let exact = RunnerConfig { kv_dtype: DType::F32, quant, ..*config };
    let reference = load_as(RefBackend::new(), checkpoint, &exact);
    let mut expected = Steps::new(reference, prompts(vocab), &greedy);
    let mut got = Steps::new(runner, prompts(vocab), &greedy);
    let mut worst = 0.0f32;
    for step in 0..num_steps {
        expected.step();
        got.step();
        let (want, have) = (expected.logits(), got.logits());
        assert_eq!(want.len(), have.len());
        for (seq, (want, have)) in want.chunks(vocab).zip(have.chunks(vocab)).enumerate() {
            let error = relative_error(have, want);
            // A NaN is a failure too.
            worst = if error <= worst { worst } else { error };
            let difference = have.iter().zip(want).map(|(h, w)| (h - w).abs()).fold(0.0, f32::max);
            let (wanted, chosen) = (expected.last_token(seq), got.last_token(seq));
            let is_clear = margin(want) > 2.0 * difference;
            assert!(
                wanted == chosen || !is_clear,
                "{name}, step {step}, sequence {seq}: {chosen} for {wanted}"
            );
            // Where the two may differ, both go on from the same token.
            got.force(seq, wanted);
        }
    }
    worst
}

/// `(name, checkpoint)` in the order of the names.
fn golden_checkpoints() -> Vec<(String, Checkpoint)> {
    let folder = repository().join("tests/data/golden");
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .expect("they are in the repository")
        .map(|entry| entry.expect("a folder can be read").path())
        .collect();
    names.retain(|path| path.is_dir());
    names.sort();
    assert!(names.len() >= 10);
    let open = |path: std::path::PathBuf| {
        let name = path.file_name().expect("it was listed").to_string_lossy().into_owned();
        (name, Checkpoint::open(&path).expect("it is whole"))
    };
    names.into_iter().map(open).collect()
}

#[test]
fn golden_checkpoints_agree_with_the_reference() {
    let Some(gpu) = MockGpu::new() else { return };
    let mut errors = Vec::new();
    for (name, checkpoint) in golden_checkpoints() {
        let config = own_config(&checkpoint);
        let worst = compare(&name, load_on(&gpu, &checkpoint, &config), &checkpoint, &config, 4);
        println!("{name:20} relative error {worst:.1e}");
        errors.push((name, worst));
    }
    assert!(errors.iter().all(|(_, worst)| *worst <= GOLDEN_TOLERANCE), "{errors:?}");
    gpu.assert_nothing_left();
}

#[test]
fn quantized_checkpoints_agree_with_the_reference() {
    let Some(gpu) = MockGpu::new() else { return };
    let mut errors = Vec::new();
    // Those with experts are compared in `routes`.
    let has_experts = |checkpoint: &Checkpoint| {
        checkpoint.spec().layers.iter().any(|layer| matches!(layer.ffn, Ffn::Moe(_)))
    };
    let dense = golden_checkpoints().into_iter().filter(|(_, checkpoint)| !has_experts(checkpoint));
    for ((name, checkpoint), quant) in dense.zip([QuantFormat::Int8, QuantFormat::Int4].into_iter().cycle()) {
        let config = RunnerConfig { quant, ..own_config(&checkpoint) };
        let worst = compare(&name, load_on(&gpu, &checkpoint, &config), &checkpoint, &config, 2);
        println!("{name:20} {:4} relative error {worst:.1e}", quant.name());
        errors.push((name, quant, worst));
    }
    assert!(errors.iter().all(|(_, _, worst)| *worst <= GOLDEN_QUANTIZED_TOLERANCE), "{errors:?}");
    gpu.assert_nothing_left();
}

#[test]
fn the_embedded_model_agrees_with_the_reference() {
    let Some(gpu) = MockGpu::new() else { return };
    gpu.delay(true);
    let (checkpoint, config) = (demo(), config(DType::BF16));
    let worst = compare("quire-demo", load_on(&gpu, &checkpoint, &config), &checkpoint, &config, 2);
    println!("quire-demo relative error {worst:.1e}");
    assert!(worst <= TOLERANCE, "{worst}");
}

/// Against the layers as they are: their rounding is what a user notices. Numbers of e4m3 move by a twenty-eighth in the
/// root mean square, those of weights and of activations, so each product by a twentieth.
#[test]
fn the_embedded_model_agrees_in_fp8() {
    let Some(gpu) = MockGpu::new() else { return };
    let config = RunnerConfig { quant: QuantFormat::Fp8, ..config(DType::BF16) };
    let checkpoint = demo();
    let worst = compare("quire-demo", load_on(&gpu, &checkpoint, &config), &checkpoint, &config, 2);
    println!("quire-demo fp8 relative error {worst:.1e}");
    assert!(worst <= FP8_TOLERANCE, "{worst}");
}

/// With layers so wide that prefill takes the kernel for many rows.
#[test]
fn the_embedded_model_agrees_in_8_bits() {
    let Some(gpu) = MockGpu::new() else { return };
    let config = RunnerConfig { quant: QuantFormat::Int8, ..config(DType::BF16) };
    let checkpoint = demo();
    let worst = compare("quire-demo", load_on(&gpu, &checkpoint, &config), &checkpoint, &config, 2);
    println!("quire-demo int8 relative error {worst:.1e}");
    assert!(worst <= QUANTIZED_TOLERANCE, "{worst}");
    if gpu.is_mock() {
        assert!(gpu.launches_of("quire_int8_gemm_wide_bf16") > 0);
        assert!(gpu.launches_of("quire_int8_gemm_m8_bf16") > 0);
    }
}

/// Rounding to e4m3 moves a number by at most a sixteenth, and by a twenty-eighth in the root mean square of numbers that
/// are spread evenly: so much, then, an average over keys and values may move, and with it what attention adds to the
/// residual stream.
#[test]
fn fp8_keys_and_values_move_logits_by_less_than_their_rounding() {
    let Some(gpu) = MockGpu::new() else { return };
    let (checkpoint, config) = (demo(), config(DType::F8E4M3));
    let worst = compare("quire-demo", load_on(&gpu, &checkpoint, &config), &checkpoint, &config, 2);
    println!("quire-demo fp8 cache relative error {worst:.1e}");
    assert!(TOLERANCE < worst && worst <= 1.0 / 16.0, "{worst}");
    if gpu.is_mock() {
        assert!(gpu.launches_of("quire_attention_decode_bf16_fp8_64") > 0);
        assert!(gpu.launches_of("quire_attention_prefill_bf16_fp8_64") > 0);
    }
}

#[test]
fn company_changes_no_bit_of_quantized_layers_and_caches() {
    let Some(gpu) = MockGpu::new() else { return };
    let formats = [
        ("qwen3", QuantFormat::Int8, DType::BF16),
        ("qwen3", QuantFormat::Int4, DType::F8E4M3),
        ("qwen3", QuantFormat::Fp8, DType::F8E4M3),
        ("qwen3-moe", QuantFormat::Int8, DType::BF16),
        ("qwen3-moe", QuantFormat::Int4, DType::BF16),
        ("qwen3-moe", QuantFormat::Fp8, DType::BF16),
    ];
    for (name, quant, kv_dtype) in formats {
        let checkpoint = Checkpoint::open(&repository().join("tests/data/golden").join(name)).unwrap();
        let vocab = checkpoint.spec().vocab_size;
        let config = RunnerConfig { quant, ..config(kv_dtype) };
        let runner = || load_as(cuda(&gpu), &checkpoint, &config);
        let greedy = SamplingParams::greedy(100);
        let mut together = Steps::new(runner(), prompts(vocab), &greedy);
        let mut alone = Steps::new(runner(), vec![prompts(vocab)[3].clone()], &greedy);
        for step in 0..4 {
            together.step();
            alone.step();
            let (all, own) = (together.logits(), alone.logits());
            let bits = |logits: &[f32]| -> Vec<u32> { logits.iter().map(|x| x.to_bits()).collect() };
            assert_eq!(bits(&all[3 * vocab..]), bits(&own), "{name} {quant:?}, step {step}");
        }
    }
    if gpu.is_mock() {
        assert!(gpu.launches_of("quire_moe_down_int8_bf16") > 0);
        assert!(gpu.launches_of("quire_moe_gate_up_int4_bf16") > 0);
        assert!(gpu.launches_of("quire_moe_gate_up_fp8_bf16") > 0);
    }
    gpu.assert_nothing_left();
}

/// The sampler's own choices, with two steps in flight and with one, whoever shares the batch.
#[test]
fn two_steps_in_flight_and_company_change_no_token() {
    let Some(gpu) = MockGpu::new() else { return };
    gpu.delay(true);
    let path = repository().join("tests/data/golden/qwen3");
    let checkpoint = Checkpoint::open(&path).unwrap();
    let vocab = checkpoint.spec().vocab_size;
    for params in [
        SamplingParams::greedy(100),
        SamplingParams { seed: 7, top_p: 0.9, ..SamplingParams::default() },
        SamplingParams {
            seed: 9,
            presence_penalty: 0.5,
            frequency_penalty: 0.3,
            repetition_penalty: 1.2,
            ..SamplingParams::default()
        },
    ] {
        let runner = || load(cuda(&gpu), &checkpoint, DType::BF16);
        assert_eq!(runner().limits().max_steps_in_flight, 2);
        let mut one = Steps::new(runner(), prompts(vocab), &params);
        (0..12).for_each(|_| one.step());
        let mut two = Steps::new(runner(), prompts(vocab), &params);
        two.pipelined(12);
        assert_eq!(one.outputs(), two.outputs(), "{params:?}");
        let mut alone = Steps::new(runner(), vec![prompts(vocab)[3].clone()], &params);
        alone.reseed(3);
        alone.pipelined(12);
        assert_eq!(one.outputs()[3], alone.outputs()[0], "{params:?}");
    }
    gpu.assert_nothing_left();
}

/// Nine launches a layer (norm, qkv, rope, attention, o, norm, up, activation, down), twelve where it has experts (router,
/// route, sort, gate and up, down, sum in place of the last three); the step's plan, that of attention, embedding, last
/// norm, gather and head; two to sample. Quantized: one more before each product, but that of a router, and once before
/// those of gate and up of all experts; in fp8 none before those of experts, whose activations stay as they are.
#[test]
fn a_steady_step_is_one_graph_and_its_launches_are_counted() {
    for (name, quant, [nodes, products]) in [
        ("qwen3", QuantFormat::None, [2 * 9 + 6, 2 * 4 + 1]),
        ("qwen3-moe", QuantFormat::None, [9 + 2 * 12 + 6, 4 + 2 * 3 + 1]),
        ("qwen3", QuantFormat::Int8, [2 * 13 + 7, 0]),
        ("qwen3-moe", QuantFormat::Int4, [13 + 2 * 16 + 7, 2]),
        ("qwen3-moe", QuantFormat::Fp8, [13 + 2 * 14 + 7, 4 + 2 * 3 + 1]),
    ] {
        let Some(gpu) = MockGpu::new() else { return };
        let checkpoint = Checkpoint::open(&repository().join("tests/data/golden").join(name)).unwrap();
        let runner = load_as(cuda(&gpu), &checkpoint, &RunnerConfig { quant, ..config(DType::BF16) });
        let vocab = checkpoint.spec().vocab_size;
        let mut steps = Steps::new(runner, prompts(vocab), &SamplingParams::greedy(100));
        (0..4).for_each(|_| steps.step());
        let before = gpu.counters();
        steps.step();
        let after = gpu.counters();
        assert_eq!(after.graph_launches - before.graph_launches, 1, "{name}");
        assert_eq!(after.graph_nodes - before.graph_nodes, nodes, "{name} {quant:?}");
        assert_eq!(after.matmuls - before.matmuls, products, "{name} {quant:?}");
        let launches = after.launches - before.launches;
        assert_eq!(launches, nodes - products + 2, "{name} {quant:?}: products are not among them");
        assert_eq!(after.direct_launches - before.direct_launches, 2, "{name}");
        assert_eq!(after.host_to_device - before.host_to_device, 1, "{name}");
        assert_eq!(after.device_to_host - before.device_to_host, 1, "{name}");
        assert_eq!(after.synchronizations - before.synchronizations, 2, "for the ring and for the tokens");
        assert_eq!(after.allocations, before.allocations, "{name}");
        assert_eq!(after.pdl_launches - before.pdl_launches, 2, "{name}");
    }
}

#[test]
fn a_device_error_poisons_everything_after_it() {
    let Some(gpu) = MockGpu::new() else { return };
    let checkpoint = Checkpoint::open(&repository().join("tests/data/golden/llama3")).unwrap();
    for after in [0, 1, 5, 12] {
        let gpu = MockGpu::new().unwrap_or_else(|| panic!("there was one before {}", gpu.ordinal()));
        let runner = load(cuda(&gpu), &checkpoint, DType::BF16);
        let mut steps =
            Steps::new(runner, prompts(checkpoint.spec().vocab_size), &SamplingParams::greedy(100));
        (0..4).for_each(|_| steps.step());
        gpu.fail_after(after, mock::ILLEGAL_ADDRESS);
        let first = steps.try_step().expect_err("the device has failed");
        assert!(first.message.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{first}");
        assert_eq!(first.device, format!("cuda:{}", gpu.ordinal()));
        let mut runner = steps.into_runner();
        for _ in 0..3 {
            let mut out = ModelRunnerOutput::default();
            let plan = std::sync::Arc::new(quire_core::SchedulerOutput::default());
            let submitted = runner.submit(plan);
            let later = submitted.and_then(|step| {
                runner.sample(step, &LateInputs::default())?;
                runner.collect(step, &mut out)
            });
            assert!(later.is_err() && out.tokens.is_empty(), "no token after it");
        }
        drop(runner);
    }
}

/// The device fails in the middle of its work, of which the host learns when it waits for it, with another step enqueued by
/// then. Of each step one copy brings the tokens back: they come of the steps whose copy was made, and of no other.
#[test]
fn no_token_comes_of_the_step_in_which_the_device_fails_or_of_a_later_one() {
    const NUM_STEPS: usize = 8;
    let checkpoint = Checkpoint::open(&repository().join("tests/data/golden/llama3")).unwrap();
    let params = SamplingParams { seed: 3, ..SamplingParams::default() };
    let start = || {
        let gpu = MockGpu::new().filter(MockGpu::is_mock)?;
        gpu.delay(true);
        let runner = load(cuda(&gpu), &checkpoint, DType::BF16);
        let mut steps = Steps::new(runner, prompts(checkpoint.spec().vocab_size), &params);
        // Products are tried out at their first use, which makes copies of its own.
        steps.step();
        Some((steps, gpu))
    };
    let Some((mut unharmed, gpu)) = start() else { return };
    let before = gpu.counters();
    unharmed.pipelined(NUM_STEPS);
    let expected = unharmed.outputs();
    // Steps launched one by one, recorded, and replayed.
    let work = gpu.counters().work - before.work;
    let mut seen = std::collections::BTreeSet::new();
    for after in (0..12).map(|i| i * work / 12) {
        let (mut steps, gpu) = start().expect("there was one before");
        let before = gpu.counters();
        gpu.fail_in_work(after, mock::ILLEGAL_ADDRESS);
        let error = steps.try_pipelined(NUM_STEPS).expect_err("the device has failed");
        assert!(error.message.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
        let num_done = 1 + (gpu.counters().device_to_host - before.device_to_host) as usize;
        let of_done: Vec<_> = expected.iter().map(|tokens| tokens[..num_done].to_vec()).collect();
        assert_eq!(steps.outputs(), of_done, "failed after {after} of {work} pieces of work");
        assert!(steps.try_step().is_err(), "and so for ever");
        assert_eq!(steps.outputs(), of_done);
        seen.insert(num_done);
    }
    assert!(seen.len() >= 5, "the device failed in different steps: {seen:?}");
}

/// Timed GEMM algorithms instead of invariant ones: the same within rounding, and kept on disk.
#[test]
fn timed_algorithms_agree_and_are_remembered() {
    let Some(gpu) = MockGpu::new() else { return };
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("algorithms");
    let _ = std::fs::remove_dir_all(&folder);
    let checkpoint = Checkpoint::open(&repository().join("tests/data/golden/llama3")).unwrap();
    let run = || {
        let options = CudaOptions {
            ordinal: gpu.ordinal(),
            batch_invariant: false,
            algorithm_cache: Some(folder.clone()),
            activations: Element::Bf16,
            ..CudaOptions::default()
        };
        let cuda = Cuda::new(mock::images(), options).expect("the double is a GPU");
        let runner = load(cuda, &checkpoint, DType::BF16);
        let prompts = prompts(checkpoint.spec().vocab_size);
        let mut steps = Steps::new(runner, prompts, &SamplingParams::greedy(100));
        (0..3).for_each(|_| steps.step());
        (steps.outputs(), gpu.counters().matmuls)
    };
    let (first, after_first) = run();
    let files: Vec<_> = std::fs::read_dir(&folder).unwrap().collect();
    assert_eq!(files.len(), 1);
    let (second, after_second) = run();
    assert_eq!(first, second);
    assert!(!gpu.is_mock() || after_second - after_first < after_first / 2, "nothing is timed again");
}

fn in_mode(gpu: &MockGpu, batch_invariant: bool) -> Cuda {
    let options = CudaOptions {
        ordinal: gpu.ordinal(),
        arena_chunk: 0,
        batch_invariant,
        activations: Element::Bf16,
        ..CudaOptions::default()
    };
    Cuda::new(mock::images(), options).expect("the double is a GPU")
}

/// Experts in fp8, whose routers' products of few rows are in another order where company may show. What that moves is
/// rounded to other neighbours in fp8 by the layers of attention.
#[test]
fn experts_in_fp8_agree_in_both_modes() {
    let Some(gpu) = MockGpu::new() else { return };
    let checkpoint = Checkpoint::open(&repository().join("tests/data/golden/qwen3-moe")).unwrap();
    let config = RunnerConfig { quant: QuantFormat::Fp8, ..config(DType::BF16) };
    let vocab = checkpoint.spec().vocab_size;
    let [mut on, mut off] = [true, false].map(|batch_invariant| {
        let runner = load_as(in_mode(&gpu, batch_invariant), &checkpoint, &config);
        Steps::new(runner, prompts(vocab), &SamplingParams::greedy(100))
    });
    for step in 0..6 {
        on.step();
        off.step();
        let (want, have) = (on.logits(), off.logits());
        for (seq, (want, have)) in want.chunks(vocab).zip(have.chunks(vocab)).enumerate() {
            let error = relative_error(have, want);
            assert!(error <= GOLDEN_TOLERANCE, "step {step}, sequence {seq}: {error}");
            off.force(seq, on.last_token(seq));
        }
    }
    assert!(!gpu.is_mock() || gpu.launches_of("quire_gemv_bf16_f32") > 0, "of the routers");
}

/// Four sequences decode by our own kernel for few rows if rows may show their company, and never if not.
#[test]
fn few_rows_take_their_own_kernel_only_where_company_may_show() {
    let Some(gpu) = MockGpu::new().filter(MockGpu::is_mock) else { return };
    let checkpoint = Checkpoint::open(&repository().join("tests/data/golden/llama3")).unwrap();
    let config = own_config(&checkpoint);
    for batch_invariant in [true, false] {
        let before = gpu.launches_of("quire_gemv_bf16") + gpu.launches_of("quire_gemv_bf16_f32");
        let cuda = in_mode(&gpu, batch_invariant);
        let worst = compare("few rows", load_as(cuda, &checkpoint, &config), &checkpoint, &config, 4);
        assert!(worst <= GOLDEN_TOLERANCE, "batch invariant {batch_invariant}: {worst}");
        let launches = gpu.launches_of("quire_gemv_bf16") + gpu.launches_of("quire_gemv_bf16_f32") - before;
        assert_eq!(launches > 0, !batch_invariant, "{launches} launches");
    }
}
