//! Two trained LoRA adapters and their base model in one batch: each tells the story that PEFT on transformers tells with
//! it, and the same bits as alone. Skipped, with a message, where the files are not there.

use std::path::Path;

use quire_core::AdapterId;
use quire_model::{Checkpoint, LoraAdapter};
use quire_runner::MemoryPlan;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::checkpoints::{ids, list, read_json, trained_model};
use crate::driver::{Driver, Seq, TestBackend, config, greedy};

/// On log-probabilities; `reference.json` has six decimals.
const TOLERANCE: f32 = 1e-4;
/// Below this lead of the best token over the next, implementations may differ.
const MIN_MARGIN: f64 = 1e-3;
const ADAPTERS: [&str; 2] = ["stories260k-robot", "stories260k-rhyme"];

test_on_each_backend!(agrees_with_peft_in_one_batch);

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
