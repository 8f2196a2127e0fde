//! Products in bf16: what a rounded activation may change, and what it may not.

use quire_core::{DType, TokenId};
use quire_cpu::{CpuBackend, CpuConfig, Isa, Precision};
use quire_model::Checkpoint;
use quire_runner::{ModelRunner, RunnerConfig};
use serde_json::Value;

use crate::checkpoints::{families, floats, ids, list, max_error};
use crate::driver::{Driver, config, greedy};

/// Below this lead of the best token over the next, rounding may decide between them. The golden checkpoints have random
/// weights and logits of about 1; trained models are sharper.
const MIN_MARGIN: f32 = 0.05;
/// On the logits of the golden checkpoints, relative to the largest of a prompt. Their random weights amplify what
/// rounding activations, queries, keys and attention weights to 8 bits leaves: 0.042 in one prompt of 300 tokens, at
/// most 0.027 in all others.
const LOGIT_TOLERANCE: f32 = 0.06;
/// Relative, on perplexity.
const PERPLEXITY_TOLERANCE: f64 = 0.005;

fn driver(checkpoint: &Checkpoint, config: &RunnerConfig) -> Driver<ModelRunner<CpuBackend>> {
    let cpu = CpuConfig { threads: 2, max_isa: Isa::detect(), precision: Precision::Bf16 };
    let backend = CpuBackend::new(cpu).unwrap();
    Driver::on(ModelRunner::load(backend, checkpoint, config, |_| {}).unwrap(), config)
}

fn bf16_kv(max_model_len: u32) -> RunnerConfig {
    RunnerConfig { kv_dtype: DType::BF16, ..config(max_model_len, 16) }
}

/// Greedy tokens up to the first that is not `MIN_MARGIN` ahead.
fn assert_greedy(
    checkpoint: &Checkpoint,
    prompt: &[TokenId],
    want: &[TokenId],
    margins: &[f32],
    what: &str,
) -> usize {
    let reliable = margins.iter().take_while(|&&margin| margin > MIN_MARGIN).count().min(want.len());
    let mut driver = driver(checkpoint, &bf16_kv(512));
    let seq = driver.add(prompt, &greedy());
    driver.run(&[seq], usize::MAX, |_| reliable);
    assert_eq!(driver.seqs[seq].output(), &want[..reliable], "{what}");
    reliable
}

#[test]
fn golden_checkpoints_keep_their_tokens() {
    let (mut checked, mut worst) = (0, 0.0f32);
    for family in families().iter().filter(|family| family.checkpoint.spec().dtype == DType::BF16) {
        for case in &family.cases {
            for prompt in &case.prompts {
                let config = bf16_kv(case.max_model_len);
                let mut driver = driver(&family.checkpoint, &config);
                let seq = driver.add(&prompt.ids, &greedy());
                let mut logits = Vec::new();
                for part in prompt.ids.chunks(50) {
                    driver.step(&[(seq, part.len())]);
                    logits.extend(driver.logits());
                }
                let largest = prompt.logits.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
                let error = max_error(&logits, &prompt.logits) / largest;
                println!("{:18} max |logit error| {error:.2e} of {largest:.1}", family.name);
                worst = if error <= worst { worst } else { error };

                let reliable = prompt.margins.iter().take_while(|&&margin| margin > MIN_MARGIN).count();
                let reliable = reliable.min(prompt.greedy.len());
                driver.run(&[seq], 1, |_| reliable);
                let output = driver.seqs[seq].output();
                assert_eq!(output[..reliable], prompt.greedy[..reliable], "{}", family.name);
                checked += reliable;
            }
        }
    }
    assert!(checked >= 50, "only {checked} tokens were checked");
    assert!(worst <= LOGIT_TOLERANCE, "{worst}");
}

/// The embedded model as `quire serve` runs it, and what it thinks of text it has not seen.
#[test]
fn demo_model_keeps_its_answers_and_its_perplexity() {
    let reference: Value = serde_json::from_str(quire_demo_model::REFERENCE_JSON).unwrap();
    let checkpoint =
        Checkpoint::from_static(quire_demo_model::CONFIG_JSON, None, quire_demo_model::WEIGHTS).unwrap();
    let mut checked = 0;
    for (i, prompt) in list(&reference["prompts"]).iter().enumerate() {
        let (prompt_ids, want) = (ids(&prompt["prompt_ids"]), ids(&prompt["greedy_ids"]));
        checked += assert_greedy(
            &checkpoint,
            &prompt_ids,
            &want,
            &floats(&prompt["margins"]),
            &format!("prompt {i}"),
        );
    }
    assert!(checked >= 20, "only {checked} tokens were checked");

    let text = ids(&reference["eval_text"]["ids"]);
    let want = reference["eval_text"]["perplexity"].as_f64().unwrap();
    for kv_dtype in [DType::BF16, DType::I8] {
        let got = perplexity(&checkpoint, kv_dtype, &text);
        println!("{kv_dtype} cache: perplexity {got:.5}, expected {want}");
        assert!((got - want).abs() <= PERPLEXITY_TOLERANCE * want, "{kv_dtype}: {got}, expected {want}");
    }
}

fn perplexity(checkpoint: &Checkpoint, kv_dtype: DType, ids: &[TokenId]) -> f64 {
    let tokens = ids.len() as u32;
    let config = RunnerConfig { max_num_batched_tokens: tokens, kv_dtype, ..config(tokens, 16) };
    let mut driver = driver(checkpoint, &config);
    let seq = driver.add(ids, &greedy());
    driver.step(&[(seq, ids.len())]);
    let logprobs = &driver.seqs[seq].logprobs[1..ids.len()];
    let sum: f64 = logprobs.iter().map(|logprob| f64::from(logprob.as_ref().unwrap().logprob)).sum();
    (-sum / (ids.len() - 1) as f64).exp()
}
