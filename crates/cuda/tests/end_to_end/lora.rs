//! A trained model with two trained adapters and without, in one batch: the reference's logits, the same bits alone, and
//! what a step launches. Skipped, with a message, where the files are not there.

use std::path::PathBuf;

use quire_backend::reference::RefBackend;
use quire_core::{AdapterId, DType, SamplingParams, TokenId};
use quire_cpu::{CpuBackend, CpuConfig, Precision};
use quire_model::{Checkpoint, LoraAdapter};

use super::steps::{Runner, Steps};
use super::{Element, GOLDEN_TOLERANCE, MockGpu, config, cuda, cuda_with, load, load_as, relative_error};

fn data() -> Option<PathBuf> {
    let beside = || super::repository().join("../shared");
    let data = std::env::var_os("QUIRE_SHARED").map_or_else(beside, PathBuf::from).join("data");
    let has_adapters = data.join("lora").is_dir();
    if !has_adapters {
        eprintln!("skipped: {} has no adapters; QUIRE_SHARED names the folder", data.display());
    }
    has_adapters.then_some(data)
}

/// The model alone.
pub fn base() -> Option<Checkpoint> {
    Some(Checkpoint::open(&data()?.join("models/stories260k")).expect("it is whole"))
}

/// The model with `robot` (q, v) and `rhyme` (all linear layers).
pub fn checkpoint() -> Option<Checkpoint> {
    let (data, base) = (data()?, base()?);
    let open = |name: &str| LoraAdapter::open(&data.join("lora").join(name), &base).expect("it fits");
    let adapters = ["stories260k-robot", "stories260k-rhyme"].map(open);
    Some(base.with_adapters(adapters.into()))
}

const ADAPTERS: [Option<AdapterId>; 4] = [Some(AdapterId(1)), None, Some(AdapterId(0)), Some(AdapterId(1))];

fn prompts() -> Vec<Vec<TokenId>> {
    [&[1, 403, 407, 261, 378][..], &[1, 403, 407, 261, 378], &[1, 385, 328, 432], &[1, 385, 328, 432]]
        .map(<[_]>::to_vec)
        .into()
}

fn steps<R: Runner>(runner: R, sequences: &[usize]) -> Steps<R> {
    let own = sequences.iter().map(|&s| prompts()[s].clone()).collect();
    let mut steps = Steps::new(runner, own, &SamplingParams::greedy(100));
    steps.adapters = sequences.iter().map(|&s| ADAPTERS[s]).collect();
    steps
}

#[test]
fn adapters_agree_with_the_reference_and_do_not_show_their_company() {
    let (Some(gpu), Some(checkpoint)) = (MockGpu::new(), checkpoint()) else { return };
    let vocab = checkpoint.spec().vocab_size;
    // The model is in f32, so the more precise type.
    let runner = || load(cuda_with(&gpu, Element::F16), &checkpoint, DType::F16);
    let mut got = steps(runner(), &[0, 1, 2, 3]);
    let mut alone: Vec<_> = (0..4).map(|s| steps(runner(), &[s])).collect();
    let mut expected = steps(load_as(RefBackend::new(), &checkpoint, &config(DType::F32)), &[0, 1, 2, 3]);
    for step in 0..8 {
        got.step();
        expected.step();
        let (have, want) = (got.logits(), expected.logits());
        for (s, (have, want)) in have.chunks(vocab).zip(want.chunks(vocab)).enumerate() {
            let error = relative_error(have, want);
            assert!(error <= GOLDEN_TOLERANCE, "step {step}, sequence {s}: relative error {error}");
            alone[s].step();
            let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(
                bits(&alone[s].logits()) == bits(have),
                "step {step}, sequence {s}: other bits in company"
            );
        }
        // The stories are sure of themselves.
        assert_eq!(got.outputs(), expected.outputs(), "step {step}");
    }
    drop((got, alone));
    gpu.assert_nothing_left();
}

/// A model with experts, whose attention has an adapter made by PEFT in some sequences: against the CPU backend, in one
/// graph with those that have none, whose bits are those of the model without.
#[test]
fn an_adapter_of_a_model_with_experts_agrees_with_the_cpu() {
    let Some(gpu) = MockGpu::new() else { return };
    let open =
        || Checkpoint::open(&super::repository().join("tests/data/golden/qwen3-moe")).expect("it is whole");
    let folder = super::repository().join("tests/data/adapters/qwen3-moe");
    let adapter = LoraAdapter::open(&folder, &open()).expect("it fits");
    let (plain, adapted) = (open(), open().with_adapters(vec![adapter]));
    let vocab = adapted.spec().vocab_size;
    let start = |prompts: Vec<Vec<TokenId>>, checkpoint: &Checkpoint, adapters: &[Option<AdapterId>]| {
        let runner = load(cuda(&gpu), checkpoint, DType::BF16);
        let mut steps = Steps::new(runner, prompts, &SamplingParams::greedy(100));
        steps.adapters = adapters.to_vec();
        steps
    };
    let adapters = [Some(AdapterId(0)), None, Some(AdapterId(0)), None];
    let prompts = super::prompts(vocab);
    let mut got = start(prompts.clone(), &adapted, &adapters);
    let mut without = start(vec![prompts[1].clone(), prompts[3].clone()], &plain, &[None, None]);
    let cpu = CpuConfig { threads: 1, precision: Precision::Bf16, ..CpuConfig::default() };
    let cpu = load_as(CpuBackend::new(cpu).expect("threads can be started"), &adapted, &config(DType::BF16));
    let mut expected = Steps::new(cpu, prompts, &SamplingParams::greedy(100));
    expected.adapters = adapters.to_vec();
    for step in 0..5 {
        let before = gpu.counters().graph_launches;
        got.step();
        assert!(
            !gpu.is_mock() || step < 3 || gpu.counters().graph_launches == before + 1,
            "one graph for all"
        );
        without.step();
        expected.step();
        let (have, want, plain) = (got.logits(), expected.logits(), without.logits());
        let row = |logits: &[f32], seq: usize| logits[seq * vocab..(seq + 1) * vocab].to_vec();
        for seq in 0..4 {
            let error = relative_error(&row(&have, seq), &row(&want, seq));
            assert!(error <= GOLDEN_TOLERANCE, "step {step}, sequence {seq}: relative error {error}");
            got.force(seq, expected.last_token(seq));
        }
        for (seq, alone) in [(1, 0), (3, 1)] {
            assert_eq!(row(&have, seq), row(&plain, alone), "step {step}, sequence {seq} has no adapter");
            without.force(alone, expected.last_token(seq));
        }
    }
    drop((got, without));
    gpu.assert_nothing_left();
}

/// Two launches for each adapted layer (qkv, o, up and down of five) where a sequence has an adapter, none where none has.
#[test]
fn adapters_cost_two_launches_a_layer_and_nothing_where_nobody_has_one() {
    let (Some(gpu), Some(checkpoint)) = (MockGpu::new(), checkpoint()) else { return };
    let count = |sequences: &[usize]| {
        let mut steps = steps(load(cuda(&gpu), &checkpoint, DType::BF16), sequences);
        (0..4).for_each(|_| steps.step());
        let before = gpu.counters();
        steps.step();
        let after = gpu.counters();
        assert_eq!(after.graph_launches - before.graph_launches, 1);
        assert_eq!(after.allocations, before.allocations);
        (after.graph_nodes - before.graph_nodes, after.host_to_device - before.host_to_device)
    };
    let (nodes, uploads) = count(&[1]);
    assert_eq!(uploads, 1);
    assert_eq!(
        count(&[0, 1, 2]),
        (nodes + 5 * 4 * 2, 2),
        "the ids of the rows' adapters go up by themselves"
    );
    assert_eq!(count(&[1, 1]).0, nodes);
}
