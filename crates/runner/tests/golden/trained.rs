//! Two small trained models against their `reference.json`; skipped, with a message, where they are not there.

use quire_model::Checkpoint;
use serde_json::Value;

use crate::checkpoints::{floats, ids, list, max_error, read_json, trained_model};
use crate::driver::{Driver, Seq, TestBackend, config, greedy};

/// On log-probabilities and logits; `reference.json` has six decimals.
const TOLERANCE: f32 = 1e-4;

/// Below this lead of the best token over the next, implementations may differ.
const MIN_MARGIN: f64 = 1e-3;

test_on_each_backend!(agrees_on_stories260k, agrees_on_tinystories_656k);

fn agrees_on_stories260k<B: TestBackend>() {
    agrees::<B>("stories260k");
}

fn agrees_on_tinystories_656k<B: TestBackend>() {
    agrees::<B>("tinystories-656k");
}

fn agrees<B: TestBackend>(name: &str) {
    let Some(path) = trained_model(name) else { return };
    let checkpoint = Checkpoint::open(&path).unwrap();
    let reference = read_json(&path.join("reference.json"));
    let mut worst = 0.0f32;
    for case in list(&reference["cases"]) {
        worst = worst.max(case_error::<B>(&checkpoint, case));
    }
    let perplexity = perplexity::<B>(&checkpoint, &ids(&reference["eval_text"]["ids"]));
    let want = reference["eval_text"]["perplexity"].as_f64().unwrap();
    let backend = B::NAME;
    println!("{name:18} {backend:9} max |error| {worst:.2e}; perplexity {perplexity:.5}, expected {want}");
    assert!(worst <= TOLERANCE, "{name}: {worst}");
    assert!((perplexity - want).abs() <= 1e-4 * want, "{name}: perplexity {perplexity}, expected {want}");
}

/// The largest error over the log-probabilities of prompt and output, and over the first step's logits if given.
fn case_error<B: TestBackend>(checkpoint: &Checkpoint, case: &Value) -> f32 {
    let mut driver = Driver::<B>::new(checkpoint, &config(512, 16));
    let seq = driver.add(&ids(&case["prompt_ids"]), &greedy());
    driver.run(&[seq], usize::MAX, |_| 1);
    let mut worst = 0.0f32;
    if case["first_step_logits"].is_array() {
        let want = floats(&case["first_step_logits"]);
        let logits = driver.logits();
        worst = max_error(&logits[logits.len() - want.len()..], &want);
    }
    let steps = list(&case["steps"]);
    driver.run(&[seq], usize::MAX, |_| steps.len());
    let seq = &driver.seqs[seq];

    for (position, want) in list(&case["prompt_logprobs"]).iter().enumerate().skip(1) {
        worst = worst.max((logprob(seq, position) - want.as_f64().unwrap() as f32).abs());
    }
    for (index, step) in steps.iter().enumerate() {
        if step["margin"].as_f64().unwrap() <= MIN_MARGIN {
            // From here on the two may tell different stories.
            break;
        }
        assert_eq!(
            u64::from(seq.output()[index]),
            step["id"].as_u64().unwrap(),
            "{} step {index}",
            case["prompt"]
        );
        let want = step["logprob"].as_f64().unwrap() as f32;
        worst = worst.max((logprob(seq, seq.prompt_len + index) - want).abs());
    }
    worst
}

fn logprob(seq: &Seq, position: usize) -> f32 {
    seq.logprobs[position].as_ref().unwrap().logprob
}

fn perplexity<B: TestBackend>(checkpoint: &Checkpoint, ids: &[u32]) -> f64 {
    let mut driver = Driver::<B>::new(checkpoint, &config(512, 32));
    let seq = driver.add(ids, &greedy());
    driver.step(&[(seq, ids.len())]);
    let sum: f64 = (1..ids.len()).map(|position| f64::from(logprob(&driver.seqs[seq], position))).sum();
    (-sum / (ids.len() - 1) as f64).exp()
}
