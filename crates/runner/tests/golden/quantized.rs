//! Weights in 8 and 4 bits: what quantization may cost.
//!
//! Perplexity is what users ask for, but on a short text it goes up and down by chance. The divergence of the predicted
//! distributions (Kullback-Leibler, in nats a token) is steady, so its bounds are close to what was measured.

use quire_backend::reference::RefBackend;
use quire_core::{QuantFormat, TokenId};
use quire_model::Checkpoint;
use quire_runner::{ModelRunner, RunnerConfig};
use serde_json::Value;

use crate::checkpoints::{ids, list, read_json, trained_model};
use crate::driver::{Driver, TestBackend, config, greedy};

test_on_each_backend!(
    stories260k_keeps_its_quality,
    tinystories_656k_keeps_its_quality,
    demo_model_keeps_its_quality
);

/// What may be lost in a format.
struct Bound {
    quant: QuantFormat,
    /// Relative to the perplexity of the model as it is.
    perplexity: f64,
    divergence: f64,
}

const fn int8(perplexity: f64, divergence: f64) -> Bound {
    Bound { quant: QuantFormat::Int8, perplexity, divergence }
}

const fn int4(perplexity: f64, divergence: f64) -> Bound {
    Bound { quant: QuantFormat::Int4, perplexity, divergence }
}

/// One backend alone computes in fp8 without a GPU, and slowly.
#[test]
fn demo_model_keeps_its_quality_in_fp8() {
    let bound = Bound { quant: QuantFormat::Fp8, perplexity: 0.01, divergence: 0.0006 };
    demo_model::<ModelRunner<RefBackend>>(&[bound]);
}

/// The bounds of int4 are what llama.cpp's Q4_0 loses, whose activations stay in f32: in perplexity by its own files,
/// in divergence by the same blocks in every linear layer.
fn stories260k_keeps_its_quality<B: TestBackend>() {
    trained::<B>("stories260k", &[int8(0.005, 0.002), int4(0.125, 0.116)]);
}

fn tinystories_656k_keeps_its_quality<B: TestBackend>() {
    trained::<B>("tinystories-656k", &[int8(0.005, 0.002), int4(0.109, 0.087)]);
}

pub fn demo_model_keeps_its_quality<B: TestBackend>() {
    demo_model::<B>(&[int8(0.005, 0.0002), int4(0.05, 0.0027)]);
}

fn demo_model<B: TestBackend>(bounds: &[Bound]) {
    let reference: Value = serde_json::from_str(quire_demo_model::REFERENCE_JSON).unwrap();
    let checkpoint =
        Checkpoint::from_static(quire_demo_model::CONFIG_JSON, None, quire_demo_model::WEIGHTS).unwrap();
    let text = ids(&reference["eval_text"]["ids"]);
    check::<B>("demo model", &checkpoint, &reference, &[text[..200].to_vec()], bounds);
}

fn trained<B: TestBackend>(name: &str, bounds: &[Bound]) {
    let Some(path) = trained_model(name) else { return };
    let reference = read_json(&path.join("reference.json"));
    let stories = list(&reference["cases"]).iter();
    let texts: Vec<_> =
        stories.map(|case| [ids(&case["prompt_ids"]), ids(&case["output_ids"])].concat()).collect();
    check::<B>(name, &Checkpoint::open(&path).unwrap(), &reference, &texts, bounds);
}

/// Perplexity on the text of `reference`, divergence on `texts`.
fn check<B: TestBackend>(
    name: &str,
    checkpoint: &Checkpoint,
    reference: &Value,
    texts: &[Vec<TokenId>],
    bounds: &[Bound],
) {
    let text = ids(&reference["eval_text"]["ids"]);
    let want = reference["eval_text"]["perplexity"].as_f64().unwrap();
    let predict = |quant, text: &Vec<_>| predictions::<B>(checkpoint, quant, text);
    let whole: Vec<_> = texts.iter().map(|text| predict(QuantFormat::None, text)).collect();
    for Bound { quant, perplexity: max_loss, divergence: max_divergence } in bounds {
        let perplexity = perplexity(&predict(*quant, &text), &text);
        let (mut sum, mut tokens) = (0.0, 0);
        for (text, whole) in texts.iter().zip(&whole) {
            sum += whole.iter().zip(predict(*quant, text)).map(|(p, q)| divergence(p, &q)).sum::<f64>();
            tokens += text.len();
        }
        let (loss, divergence) = (perplexity / want - 1.0, sum / tokens as f64);
        let backend = B::NAME;
        println!(
            "{name:16} {backend:9} {quant:?}: perplexity {perplexity:.4} of {want:.4} ({:+.2} %); divergence \
             {divergence:.5} over {tokens} tokens",
            100.0 * loss
        );
        assert!(loss <= *max_loss, "{name} in {quant:?}: perplexity {perplexity} of {want}");
        assert!(divergence <= *max_divergence, "{name} in {quant:?}: divergence {divergence}");
    }
}

/// Log-probabilities of the whole vocabulary after each token.
fn predictions<B: TestBackend>(
    checkpoint: &Checkpoint,
    quant: QuantFormat,
    text: &[TokenId],
) -> Vec<Vec<f64>> {
    let config = RunnerConfig { quant, ..config(1024, 16) };
    let mut driver = Driver::<B>::new(checkpoint, &config);
    let seq = driver.add(text, &greedy());
    let mut all = Vec::new();
    for part in text.chunks(config.max_logit_rows() as usize) {
        driver.step(&[(seq, part.len())]);
        all.extend(driver.logits().chunks_exact(checkpoint.spec().vocab_size).map(log_softmax));
    }
    all
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - max - sum.ln()).collect()
}

fn perplexity(predictions: &[Vec<f64>], text: &[TokenId]) -> f64 {
    let next = predictions.iter().zip(&text[1..]);
    let sum: f64 = next.map(|(logprobs, &token)| logprobs[token as usize]).sum();
    (-sum / (text.len() - 1) as f64).exp()
}

/// Of `q` from `p`, both as log-probabilities.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}
