//! The embedded model gives the tokens that transformers computes from the same weights.

use quire_core::{DType, Micros, SamplingParams, TokenId};
use quire_model::Checkpoint;
use quire_scheduler::SeqEventKind;
use serde_json::Value;

use crate::support::{Setup, engine, request};

/// Below this the two best tokens are closer than float32 arithmetic in another order decides reliably.
const MIN_MARGIN: f64 = 1e-3;

#[test]
fn greedy_answers_equal_transformers() {
    let reference: Value = serde_json::from_str(quire_demo_model::REFERENCE_JSON).unwrap();
    let checkpoint = Checkpoint::from_static(
        quire_demo_model::CONFIG_JSON,
        Some(quire_demo_model::GENERATION_CONFIG_JSON),
        quire_demo_model::WEIGHTS,
    )
    .unwrap();
    let setup = Setup { kv_dtype: DType::F32, max_model_len: 512, prefix_caching: true, ..Setup::default() };
    let mut core = engine(&checkpoint, setup);
    let ids = |value: &Value| -> Vec<TokenId> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
    };
    let prompts = reference["prompts"].as_array().unwrap();
    assert!(prompts.len() >= 5);
    for (i, prompt) in prompts.iter().enumerate() {
        let expected = ids(&prompt["greedy_ids"]);
        let margins = prompt["margins"].as_array().unwrap().iter().map(|m| m.as_f64().unwrap());
        let reliable = margins.take_while(|&margin| margin > MIN_MARGIN).count().min(expected.len());
        assert!(reliable > 0, "prompt {i} checks nothing");
        let params = SamplingParams::greedy(reliable as u32);
        core.add(request(i as u64, &ids(&prompt["prompt_ids"]), params, setup.block_size)).unwrap();
        let mut tokens = Vec::new();
        while core.has_work() {
            core.step(Micros(0)).unwrap();
            for event in core.events() {
                if let SeqEventKind::Tokens { row, num_tokens } = event.kind {
                    let row = core.output().tokens_of(&core.output().rows[row as usize]);
                    tokens.extend_from_slice(&row[..num_tokens as usize]);
                }
            }
        }
        assert_eq!(tokens, expected[..reliable], "prompt {i}");
    }
}
