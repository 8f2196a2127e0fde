//! Weights in 8 and 4 bits: what quantization may cost in perplexity.

use quire_core::QuantFormat;
use quire_model::Checkpoint;
use quire_runner::RunnerConfig;
use serde_json::Value;

use crate::checkpoints::{ids, read_json, trained_model};
use crate::driver::{Driver, TestBackend, config, greedy};

test_on_each_backend!(measure);

fn measure<B: TestBackend>() {
    for name in ["stories260k", "tinystories-656k"] {
        let Some(path) = trained_model(name) else { continue };
        let checkpoint = Checkpoint::open(&path).unwrap();
        let reference = read_json(&path.join("reference.json"));
        figures::<B>(name, &checkpoint, &reference);
    }
    let reference: Value = serde_json::from_str(quire_demo_model::REFERENCE_JSON).unwrap();
    let checkpoint =
        Checkpoint::from_static(quire_demo_model::CONFIG_JSON, None, quire_demo_model::WEIGHTS).unwrap();
    figures::<B>("demo", &checkpoint, &reference);
}

fn figures<B: TestBackend>(name: &str, checkpoint: &Checkpoint, reference: &Value) {
    let text = ids(&reference["eval_text"]["ids"]);
    let base = perplexity::<B>(checkpoint, QuantFormat::None, &text);
    for quant in [QuantFormat::Int8, QuantFormat::Int4] {
        let got = perplexity::<B>(checkpoint, quant, &text);
        println!("{name:18} {quant:?}: {got:.4} of {base:.4}, {:+.2} %", 100.0 * (got / base - 1.0));
    }
}

fn perplexity<B: TestBackend>(checkpoint: &Checkpoint, quant: QuantFormat, ids: &[u32]) -> f64 {
    let len = ids.len() as u32;
    let config = RunnerConfig { max_num_batched_tokens: len, quant, ..config(len, 16) };
    let mut driver = Driver::<B>::new(checkpoint, &config);
    let seq = driver.add(ids, &greedy());
    driver.step(&[(seq, ids.len())]);
    let logprobs = &driver.seqs[seq].logprobs[1..ids.len()];
    let sum: f64 = logprobs.iter().map(|logprob| f64::from(logprob.as_ref().unwrap().logprob)).sum();
    (-sum / (ids.len() - 1) as f64).exp()
}
