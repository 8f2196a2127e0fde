//! The same bytes, whoever else is in the batch: 200 mixed requests alone, and all at once through a tiny pool with
//! random chunk sizes, block sizes and thread counts, must agree in every token and every bit of every log-probability.

use std::collections::BTreeMap;

use quire_core::{DType, FinishReason, Micros, QuantFormat, Request, RequestId, SamplingParams, TokenId};
use quire_cpu::Precision;
use quire_engine::EngineCore;
use quire_model::Checkpoint;
use quire_scheduler::SeqEventKind;

use crate::support::{Random, Setup, engine, golden, request};

const NUM_REQUESTS: u64 = 200;

/// Log-probability and rank of a token, and the most likely tokens; floats as bits.
type LogprobBits = (u32, u32, Vec<(TokenId, u32)>);

/// Everything a caller can see of one continuation.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<LogprobBits>,
    prompt_logprobs: BTreeMap<u32, (u32, u32)>,
    finished: Option<FinishReason>,
}

type Answers = BTreeMap<(RequestId, u32), Answer>;

fn random_params(random: &mut Random) -> SamplingParams {
    let mut params = SamplingParams::greedy(1 + random.below(20) as u32);
    params.seed = random.next();
    params.logprobs = random.pick(&[None, Some(0), Some(3)]);
    if random.below(3) > 0 {
        params.temperature = random.pick(&[0.3, 0.8, 1.0, 1.7]);
        params.top_k = random.pick(&[0, 0, 5, 40]);
        params.top_p = random.pick(&[1.0, 1.0, 0.9, 0.5]);
        params.min_p = random.pick(&[0.0, 0.0, 0.05]);
    }
    if random.below(4) == 0 {
        params.presence_penalty = 0.7;
        params.frequency_penalty = 0.3;
        params.repetition_penalty = 1.2;
    }
    if random.below(5) == 0 {
        params.logit_bias = vec![(3, 4.0), (100, -50.0)];
    }
    if random.below(4) == 0 {
        params.stop_token_ids = (0..24).map(|_| random.below(256) as u32).collect();
        params.min_tokens = random.below(u64::from(params.max_tokens)) as u32;
    }
    params.n = random.pick(&[1, 1, 1, 2, 3]);
    if random.below(10) == 0 {
        params.prompt_logprobs = Some(0);
    }
    params
}

/// Half the prompts begin with one of a few shared prefixes.
fn random_requests(seed: u64, block_size: u32) -> Vec<Request> {
    let mut random = Random(seed);
    let shared: Vec<Vec<u32>> =
        (0..4).map(|i| (0..20 + 8 * i).map(|_| random.below(256) as u32).collect()).collect();
    let make = |id| {
        let mut prompt =
            if random.below(2) == 0 { shared[random.below(4) as usize].clone() } else { Vec::new() };
        let len = 1 + random.below(40);
        prompt.extend((0..len).map(|_| random.below(256) as u32));
        let mut request = request(id, &prompt, random_params(&mut random), block_size);
        if request.params.prompt_logprobs.is_some() {
            request.block_hashes = Vec::new().into();
        }
        request
    };
    (1..=NUM_REQUESTS).map(make).collect()
}

fn collect_events(core: &EngineCore, answers: &mut Answers) {
    let output = core.output();
    for event in core.events() {
        let answer = answers.entry((event.request, event.index)).or_default();
        match event.kind {
            SeqEventKind::Started { .. } => {}
            SeqEventKind::PromptLogprobs { entry } => {
                let (_, position, logprobs) = &output.prompt_logprobs[entry as usize];
                let before =
                    answer.prompt_logprobs.insert(*position, (logprobs.logprob.to_bits(), logprobs.rank));
                assert!(before.is_none(), "position {position} was reported twice");
            }
            SeqEventKind::Tokens { row, num_tokens } => {
                let row = &output.rows[row as usize];
                answer.tokens.extend(&output.tokens_of(row)[..num_tokens as usize]);
                for logprobs in output.logprobs_of(row)[..num_tokens as usize].iter().flatten() {
                    let top = logprobs.top.iter().map(|&(id, logprob)| (id, logprob.to_bits())).collect();
                    answer.logprobs.push((logprobs.logprob.to_bits(), logprobs.rank, top));
                }
            }
            SeqEventKind::Finished { reason, .. } => {
                assert_eq!(answer.finished.replace(reason), None, "ended twice");
            }
        }
    }
}

fn run_until_idle(core: &mut EngineCore, answers: &mut Answers) -> u64 {
    let mut steps = 0;
    while core.has_work() {
        steps += 1;
        assert!(steps < 200_000, "the engine does not come to an end");
        core.step(Micros(1_000_000 + steps)).unwrap();
        core.check_invariants().unwrap();
        collect_events(core, answers);
    }
    steps
}

fn alone(checkpoint: &Checkpoint, setup: Setup, requests: &[Request]) -> Answers {
    let mut answers = Answers::new();
    let mut core = engine(checkpoint, setup);
    for request in requests {
        core.add(request.clone()).unwrap();
        run_until_idle(&mut core, &mut answers);
    }
    answers
}

/// What happened on the way.
#[derive(Debug, Default)]
struct Seen {
    num_preemptions: u64,
    num_swaps: u64,
    num_copied_in: u64,
}

/// The answers, and how often a sequence lost its blocks.
fn together(checkpoint: &Checkpoint, setup: Setup, requests: &[Request]) -> (Answers, Seen) {
    let mut answers = Answers::new();
    let mut core = engine(checkpoint, setup);
    requests.iter().for_each(|request| core.add(request.clone()).unwrap());
    let steps = run_until_idle(&mut core, &mut answers);
    let stats = core.stats();
    println!(
        "    {setup:?}: {steps} steps, {} preemptions, {} of {} prompt tokens from the cache, {:?}",
        stats.num_preemptions, stats.prefix_cache_hits, stats.prefix_cache_queries, stats.host
    );
    if setup.prefix_caching {
        assert!(stats.prefix_cache_hits > 0, "prefixes were meant to be found");
    }
    let seen = Seen {
        num_preemptions: stats.num_preemptions,
        num_swaps: stats.host.num_swaps,
        num_copied_in: stats.host.num_copied_in,
    };
    (answers, seen)
}

/// `pool_tokens`: what the KV pool holds, about three of the longest sequences (fewer blocks suffice under a window).
fn assert_same_bytes(family: &str, base: Setup, pool_tokens: u32, seed: u64) {
    println!("{family}, {base:?}");
    let checkpoint = Checkpoint::open(&golden(family)).unwrap();
    let mut random = Random(seed);
    let expected = alone(&checkpoint, base, &random_requests(seed, base.block_size));
    assert_eq!(
        expected.len() as u64,
        random_requests(seed, 16).iter().map(|r| u64::from(r.params.n)).sum::<u64>()
    );
    let mut total = Seen::default();
    for round in 0..4_usize {
        let block_size = random.pick(&[1, 4, 8, 16]);
        let setup = Setup {
            threads: 1 + round % 3,
            max_num_seqs: random.pick(&[7, 24, 64]),
            max_num_batched_tokens: random.pick(&[16, 61, 256]),
            max_prefill_chunk: random.pick(&[1, 5, 23, u32::MAX]),
            block_size,
            num_blocks: pool_tokens / block_size,
            prefix_caching: round % 2 == 0,
            // In half of the rounds, with and without a prefix cache; from too little to more than enough.
            num_host_blocks: [0, pool_tokens / block_size, 3 * pool_tokens / block_size, 0][round],
            ..base
        };
        let (answers, seen) = together(&checkpoint, setup, &random_requests(seed, block_size));
        total.num_preemptions += seen.num_preemptions;
        total.num_swaps += seen.num_swaps;
        total.num_copied_in += seen.num_copied_in;
        for (key, answer) in &expected {
            assert_eq!(answers.get(key), Some(answer), "{family}: request {key:?} under {setup:?}");
        }
        assert_eq!(answers.len(), expected.len());
    }
    assert!(total.num_preemptions > 0, "the pool was meant to be too small");
    assert!(total.num_swaps > 0 && total.num_copied_in > 0, "the host tier was meant to be used: {total:?}");
}

#[test]
fn same_bytes_llama3_f32_cache() {
    assert_same_bytes("llama3", Setup::default(), 320, 1);
}

#[test]
fn same_bytes_qwen3_bf16_cache() {
    assert_same_bytes("qwen3", Setup { kv_dtype: DType::BF16, ..Setup::default() }, 320, 2);
}

#[test]
fn same_bytes_mistral_sliding_window() {
    assert_same_bytes("mistral", Setup::default(), 128, 3);
}

/// As bf16 checkpoints run.
const BF16: Setup = Setup { kv_dtype: DType::BF16, precision: Precision::Bf16, ..Setup::ROOMY };

#[test]
fn same_bytes_llama3_bf16_products() {
    assert_same_bytes("llama3", BF16, 320, 4);
}

#[test]
fn same_bytes_llama3_int8() {
    assert_same_bytes("llama3", Setup { quant: QuantFormat::Int8, ..BF16 }, 320, 5);
}

#[test]
fn same_bytes_qwen3_int4() {
    assert_same_bytes("qwen3", Setup { quant: QuantFormat::Int4, ..BF16 }, 320, 6);
}

#[test]
fn same_bytes_qwen3_int8_cache() {
    assert_same_bytes("qwen3", Setup { kv_dtype: DType::I8, ..BF16 }, 320, 7);
}
