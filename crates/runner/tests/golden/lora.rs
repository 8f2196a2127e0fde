//! Two trained LoRA adapters and their base model in one batch: each tells the story that PEFT on transformers tells with
//! it, and the same bits as alone. Skipped, with a message, where the files are not there.

use std::path::Path;

use quire_core::AdapterId;
use quire_model::{Checkpoint, LoraAdapter};
use quire_runner::MemoryPlan;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::checkpoints::{
    Prompt, adapted_prompts, family_named, ids, list, max_error, read_json, trained_model, workspace,
};
use crate::driver::{Driver, Seq, TestBackend, config, greedy};

/// On log-probabilities; `reference.json` has six decimals.
const TOLERANCE: f32 = 1e-4;
/// Below this lead of the best token over the next, implementations may differ.
const MIN_MARGIN: f64 = 1e-3;
const ADAPTERS: [&str; 2] = ["stories260k-robot", "stories260k-rhyme"];

test_on_each_backend!(agrees_with_peft_in_one_batch, agrees_with_peft_on_experts);

/// What one sequence must say.
struct Case {
    adapter: Option<AdapterId>,
    prompt: Vec<u32>,
    /// Of each generated token: id, log-probability, margin.
    steps: Vec<(u32, f32, f64)>,
}

pub fn agrees_with_peft_in_one_batch<B: TestBackend>() {
    let Some(path) = trained_model("stories260k") else { return };
    let base = Checkpoint::open(&path).unwrap();
    let folder = path.join("../../lora");
    let adapters = ADAPTERS.map(|name| LoraAdapter::open(&folder.join(name), &base).unwrap());
    let adapted = Checkpoint::open(&path).unwrap().with_adapters(adapters.into());
    let cases = cases(&path, &folder);
    assert!(cases.len() >= 5 && cases.iter().any(|case| case.adapter.is_none()));

    let mut together = Driver::<B>::new(&adapted, &config(512, 16));
    let seqs: Vec<_> = cases.iter().map(|case| add(&mut together, case)).collect();
    // Cut into chunks, so that prompts and decodes share steps.
    together.run(&seqs, 3, |seq| cases[seq].steps.len());
    for (case, seq) in cases.iter().zip(&together.seqs) {
        check(case, seq);
        // Without an adapter: on a model that has none.
        let checkpoint = if case.adapter.is_some() { &adapted } else { &base };
        let mut alone = Driver::<B>::new(checkpoint, &config(512, 32));
        let only = add(&mut alone, case);
        alone.run(&[only], usize::MAX, |_| case.steps.len());
        assert_eq!(alone.seqs[only].tokens, seq.tokens, "{:?}", case.adapter);
        assert!(bits(&alone.seqs[only]) == bits(seq), "{:?}: other bits in company", case.adapter);
    }
}

/// An adapter of attention on a model with experts, in one batch with the model as it is: the logits of PEFT and those of
/// transformers, and greedy tokens in chunks of any size.
pub fn agrees_with_peft_on_experts<B: TestBackend>() {
    let family = family_named("qwen3-moe");
    let folder = workspace().join("tests/data/adapters/qwen3-moe");
    let adapter = LoraAdapter::open(&folder, &family.checkpoint).unwrap();
    let adapted = family.checkpoint.with_adapters(vec![adapter]);
    let with_adapter = adapted_prompts(&folder).into_iter().map(|prompt| (Some(AdapterId(0)), prompt));
    let cases = family.cases.into_iter().flat_map(|case| case.prompts);
    let without = cases.filter(|prompt| prompt.ids.len() < 20).map(|prompt| (None, prompt));
    let cases: Vec<_> = with_adapter.chain(without).collect();
    assert_eq!(cases.len(), 5);

    let mut driver = Driver::<B>::new(&adapted, &config(128, 16));
    let all = |driver: &mut Driver<B>| -> Vec<usize> {
        let add = |(adapter, prompt): &(Option<AdapterId>, Prompt)| {
            let seq = driver.add(&prompt.ids, &greedy());
            driver.seqs[seq].adapter = *adapter;
            seq
        };
        cases.iter().map(add).collect()
    };
    let seqs = all(&mut driver);
    let rows: Vec<_> = seqs.iter().map(|&seq| (seq, driver.seqs[seq].left())).collect();
    driver.step(&rows);
    let want: Vec<f32> = cases.iter().flat_map(|(_, prompt)| prompt.logits.clone()).collect();
    let worst = max_error(&driver.logits(), &want);
    assert!(worst <= TOLERANCE, "{}: {worst}", B::NAME);

    let mut driver = Driver::<B>::new(&adapted, &config(128, 16));
    let seqs = all(&mut driver);
    driver.run(&seqs, 3, |seq| cases[seq].1.greedy.len());
    for ((adapter, prompt), seq) in cases.iter().zip(&driver.seqs) {
        assert_eq!(seq.output(), prompt.greedy, "{adapter:?}, prompt of {}", prompt.ids.len());
    }
}

/// Their files are in f32, as the plan counts them. Of two ranks each has the halves of one factor and the other as a whole.
#[test]
fn the_memory_plan_counts_adapters() {
    let Some(path) = trained_model("stories260k") else { return };
    let base = Checkpoint::open(&path).unwrap();
    let (mut adapters, mut bytes_in_files) = (Vec::new(), 0);
    for name in ADAPTERS {
        let folder = path.join("../../lora").join(name);
        adapters.push(LoraAdapter::open(&folder, &base).unwrap());
        let file = std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        bytes_in_files += tensors.iter().map(|(_, tensor)| tensor.data().len() as u64).sum::<u64>();
    }
    let config = config(512, 16);
    let plan =
        |checkpoint: &Checkpoint, world| MemoryPlan::of_checkpoint(checkpoint, &config, world).unwrap();
    let without = plan(&base, 1);
    assert_eq!(without.adapter_bytes, 0);
    let adapted = base.with_adapters(adapters);
    let (whole, rank) = (plan(&adapted, 1), plan(&adapted, 2).adapter_bytes);
    assert_eq!(whole.adapter_bytes, bytes_in_files);
    assert_eq!(whole.total_bytes(), without.total_bytes() + bytes_in_files);
    assert!(bytes_in_files / 2 < rank && rank < bytes_in_files, "{rank} of {bytes_in_files}");
}

fn add<B: TestBackend>(driver: &mut Driver<B>, case: &Case) -> usize {
    let seq = driver.add(&case.prompt, &greedy());
    driver.seqs[seq].adapter = case.adapter;
    seq
}

fn bits(seq: &Seq) -> Vec<Option<u32>> {
    seq.logprobs.iter().map(|entry| entry.as_ref().map(|entry| entry.logprob.to_bits())).collect()
}

fn check(case: &Case, seq: &Seq) {
    for (index, &(id, want, margin)) in case.steps.iter().enumerate() {
        if margin <= MIN_MARGIN {
            // From here on the two may tell different stories.
            return;
        }
        let position = seq.prompt_len + index;
        assert_eq!(seq.tokens[position], id, "{:?}, token {index}", case.adapter);
        let have = seq.logprobs[position].as_ref().unwrap().logprob;
        assert!(
            (have - want).abs() <= TOLERANCE,
            "{:?}, token {index}: {have}, expected {want}",
            case.adapter
        );
    }
}

fn cases(base: &Path, folder: &Path) -> Vec<Case> {
    let step = |id: &Value, logprob: &Value, margin: &Value| {
        (id.as_u64().unwrap() as u32, logprob.as_f64().unwrap() as f32, margin.as_f64().unwrap())
    };
    let mut cases = Vec::new();
    let reference = read_json(&base.join("reference.json"));
    for case in list(&reference["cases"]).iter().take(2) {
        let steps = list(&case["steps"]).iter().take(48);
        let steps = steps.map(|s| step(&s["id"], &s["logprob"], &s["margin"])).collect();
        cases.push(Case { adapter: None, prompt: ids(&case["prompt_ids"]), steps });
    }
    for (index, name) in ADAPTERS.iter().enumerate() {
        let reference = read_json(&folder.join(name).join("reference.json"));
        // Alternating with those without.
        for (place, case) in list(&reference["cases"]).iter().enumerate() {
            let steps = list(&case["steps_id_logprob_margin"]).iter();
            let steps = steps.map(|s| step(&s[0], &s[1], &s[2])).collect();
            let adapter = Some(AdapterId(index as u32));
            cases.insert(place, Case { adapter, prompt: ids(&case["prompt_ids"]), steps });
        }
    }
    cases
}
