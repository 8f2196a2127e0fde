//! Every family's logits and greedy tokens.

use crate::checkpoints::{Family, Prompt, families, max_error};
use crate::driver::{Driver, TestBackend, config, greedy};

/// The bound on a logit, with f32 activations and an f32 cache.
const TOLERANCE: f32 = 1e-4;

test_on_each_backend!(agrees_with_transformers);

pub fn agrees_with_transformers<B: TestBackend>() {
    families().iter().filter(|family| B::takes(&family.checkpoint)).for_each(agrees::<B>);
}

fn agrees<B: TestBackend>(family: &Family) {
    let mut worst = 0.0f32;
    for case in &family.cases {
        let mut driver = Driver::<B>::new(&family.checkpoint, &config(case.max_model_len, 16));
        for prompt in &case.prompts {
            worst = worst.max(logit_error(&mut driver, prompt));
            let seq = driver.seqs.len() - 1;
            driver.run(&[seq], 1, |_| prompt.greedy.len());
            if !prompt.greedy.is_empty() {
                assert_eq!(driver.seqs[seq].output(), prompt.greedy, "{}", family.name);
            }
            driver = Driver::new(&family.checkpoint, &config(case.max_model_len, 16));
        }
    }
    println!("{:18} {:9} max |logit error| {worst:.2e}", family.name, B::NAME);
    assert!(worst <= TOLERANCE, "{}: {worst}", family.name);
}

/// Prefills the prompt, in parts that each fit the logits buffer, and compares the logits at every position.
fn logit_error<B: TestBackend>(driver: &mut Driver<B>, prompt: &Prompt) -> f32 {
    let seq = driver.add(&prompt.ids, &greedy());
    let mut logits = Vec::new();
    for part in prompt.ids.chunks(50) {
        driver.step(&[(seq, part.len())]);
        logits.extend(driver.logits());
    }
    max_error(&logits, &prompt.logits)
}
