//! Greedy tokens of Hugging Face transformers, through the whole engine on the CPU backend: chunked prompts, prefix-cache
//! hits, preemption and recomputation must not change one of them.

use std::collections::BTreeMap;

use quire_core::{Micros, RequestId, SamplingParams, TokenId};
use quire_engine::EngineCore;
use quire_model::Checkpoint;
use quire_scheduler::SeqEventKind;
use serde_json::Value;

use crate::support::{Setup, engine, golden, request};

const FAMILIES: [&str; 12] = [
    "llama2",
    "llama3",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "smollm",
    "llama-bias",
    "rope-linear",
    "rope-dynamic",
    "rope-yarn",
    "rope-yarn-factor",
];

struct Prompt {
    ids: Vec<TokenId>,
    greedy: Vec<TokenId>,
}

/// `(max_model_len, prompts)` of each case.
fn cases(family: &str) -> Vec<(u32, Vec<Prompt>)> {
    let text = std::fs::read_to_string(golden(family).join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let ids =
        |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let prompts = |case: &Value| {
        let all = case["prompts"].as_array().unwrap().iter();
        let all = all.map(|prompt| Prompt { ids: ids(&prompt["ids"]), greedy: ids(&prompt["greedy"]) });
        all.filter(|prompt| !prompt.greedy.is_empty()).collect::<Vec<_>>()
    };
    let cases = golden["cases"].as_array().unwrap().iter();
    cases.map(|case| (case["max_model_len"].as_u64().unwrap() as u32, prompts(case))).collect()
}

fn run(
    core: &mut EngineCore,
    prompts: &[Prompt],
    first_id: u64,
    block_size: u32,
) -> BTreeMap<u64, Vec<TokenId>> {
    for (i, prompt) in prompts.iter().enumerate() {
        let params = SamplingParams::greedy(prompt.greedy.len() as u32);
        core.add(request(first_id + i as u64, &prompt.ids, params, block_size)).unwrap();
    }
    let mut tokens: BTreeMap<u64, Vec<TokenId>> = BTreeMap::new();
    while core.has_work() {
        core.step(Micros(0)).unwrap();
        core.check_invariants().unwrap();
        for event in core.events() {
            if let SeqEventKind::Tokens { row, num_tokens } = event.kind {
                let row = core.output().tokens_of(&core.output().rows[row as usize]);
                let RequestId(id) = event.request;
                tokens.entry(id - first_id).or_default().extend(&row[..num_tokens as usize]);
            }
        }
    }
    tokens
}

#[test]
fn greedy_tokens_equal_transformers() {
    let mut num_preemptions = 0;
    for family in FAMILIES {
        let checkpoint = Checkpoint::open(&golden(family)).unwrap();
        for (max_model_len, prompts) in cases(family) {
            let Some(longest) = prompts.iter().map(|p| (p.ids.len() + p.greedy.len()) as u32).max() else {
                continue;
            };
            for (block_size, max_prefill_chunk, threads, roomy) in
                [(16, u32::MAX, 1, true), (4, 7, 2, false), (1, 1, 3, false), (4, 13, 2, true)]
            {
                let setup = Setup {
                    threads,
                    block_size,
                    max_prefill_chunk,
                    max_model_len,
                    max_num_batched_tokens: 40,
                    // Everything fits and stays in the cache, or only one long sequence fits.
                    num_blocks: if roomy { 1024 / block_size } else { longest.div_ceil(block_size) + 1 },
                    prefix_caching: true,
                    ..Setup::default()
                };
                let mut core = engine(&checkpoint, setup);
                // The second round finds what the first left in the cache.
                for first_id in [1, 1001] {
                    let tokens = run(&mut core, &prompts, first_id, block_size);
                    for (i, prompt) in prompts.iter().enumerate() {
                        assert_eq!(
                            tokens[&(i as u64)],
                            prompt.greedy,
                            "{family}, prompt {i}, round {first_id}, {setup:?}"
                        );
                    }
                }
                let stats = core.stats();
                assert!(
                    !roomy || stats.prefix_cache_hits > 0,
                    "{family}: the second round must hit the cache"
                );
                num_preemptions += stats.num_preemptions;
            }
        }
    }
    assert!(num_preemptions > 0, "some pools were meant to be too small");
}
