//! The sampling kernels, compiled for the host, against the reference backend: the same ids, ranks and log-probabilities
//! for the same logits, ties and broken rows included, alone and in a batch, whatever the order of threads.

mod common;
mod data;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{HostKernels, under_sanitizers};
use data::{Rng, address, address_mut, assert_close, count};
use quire_backend::reference::RefBackend;
use quire_backend::{Backend, BufRole, LogitKind, LogitRow, SeqState, StepInput};
use quire_core::{LateInputs, ModelRunnerOutput, SamplingParams, Slot, StepId, TokenLogprobs};
use quire_cuda::params::{
    CountTokensParams, LogitRowEntry, LogitsParams, LogprobsParams, SampleParams, SlotSampling,
};

/// Ids of a row that one block of quire_logits_process takes.
const PART: usize = 8192;
const THREADS: [u32; 3] = [1024, 1, 1];
const MAX_TOP: usize = 7;

/// One row with everything that decides its token.
#[derive(Clone)]
struct Case {
    name: String,
    logits: Vec<f32>,
    seq: SeqState,
    mask: Option<Vec<u32>>,
    target: Option<u32>,
}

impl Case {
    fn position(&self) -> u32 {
        self.seq.tokens.len() as u32
    }

    fn num_logprobs(&self) -> Option<u32> {
        let params = &self.seq.params;
        if self.target.is_some() { Some(params.prompt_logprobs.unwrap_or(0)) } else { params.logprobs }
    }
}

/// What is known of one row afterwards.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    token: u32,
    logprobs: Option<TokenLogprobs>,
}

fn reference(cases: &[Case]) -> Vec<Answer> {
    let mut backend = RefBackend::new();
    let mut logits = backend
        .alloc(BufRole::Logits, cases.len(), cases[0].logits.len())
        .expect("the reference computes it");
    let values: Vec<f32> = cases.iter().flat_map(|c| c.logits.iter().copied()).collect();
    backend.write(&mut logits, &values).expect("the reference computes it");
    let seqs: Vec<_> = cases.iter().map(|c| Some(c.seq.clone())).collect();
    let rows: Vec<_> = cases
        .iter()
        .enumerate()
        .map(|(i, case)| LogitRow {
            row: i as u32,
            slot: Slot(i as u32),
            position: case.position(),
            kind: case.target.map_or(LogitKind::Sample, |target| LogitKind::PromptLogprob { target }),
        })
        .collect();
    let zeros = vec![0; cases.len()];
    let input = StepInput {
        step: StepId(1),
        token_ids: &zeros,
        positions: &zeros,
        slot_mapping: &zeros,
        cu_seqlens_q: &[0],
        seq_lens: &[],
        seq_slots: &[],
        seq_adapters: &[],
        block_tables: &[],
        max_blocks_per_seq: 0,
        logit_rows: &rows,
        block_copies: &[],
        seqs: &seqs,
    };
    backend.prepare(&input).expect("the reference computes it");
    let masks = cases.iter().enumerate();
    let masks = masks.filter_map(|(i, c)| Some((Slot(i as u32), c.mask.clone()?))).collect();
    backend.sample(&mut logits, &seqs, &LateInputs { masks }).expect("the reference computes it");
    let mut out = ModelRunnerOutput::default();
    backend.fetch(StepId(1), &mut out).expect("the reference computes it");
    let (mut sampled, mut scored) = (out.tokens.iter().zip(&out.logprobs), out.prompt_logprobs.iter());
    cases
        .iter()
        .map(|case| match case.target {
            Some(token) => {
                Answer { token, logprobs: Some(scored.next().expect("the reference computes it").2.clone()) }
            }
            None => {
                let (&token, logprobs) = sampled.next().expect("the reference computes it");
                Answer { token, logprobs: logprobs.clone() }
            }
        })
        .collect()
}

/// The resident state and the step's rows, as the host sends them.
struct Batch {
    rows: Vec<LogitRowEntry>,
    slots: Vec<SlotSampling>,
    counts: Vec<u32>,
    masks: Vec<u32>,
    mask_rows: Vec<i32>,
    bias_ids: Vec<i32>,
    bias_values: Vec<f32>,
    stop_ids: Vec<i32>,
    logits: Vec<f32>,
    vocab: usize,
    stride: usize,
    mask_words: usize,
}

impl Batch {
    fn new(cases: &[Case]) -> Self {
        let vocab = cases[0].logits.len();
        let (stride, mask_words) = (vocab.next_multiple_of(4), vocab.div_ceil(32));
        let mut batch = Self {
            rows: Vec::new(),
            slots: vec![SlotSampling::default(); cases.len()],
            counts: Vec::new(),
            masks: Vec::new(),
            mask_rows: Vec::new(),
            // Ranges do not begin at the lists' start.
            bias_ids: vec![0; 3],
            bias_values: vec![1e9; 3],
            stop_ids: vec![0; 2],
            // What lies between the end of a row and the next one is not read as a logit.
            logits: vec![f32::NAN; cases.len() * stride],
            vocab,
            stride,
            mask_words,
        };
        let mut num_counts = 0;
        for (i, case) in cases.iter().enumerate() {
            batch.logits[i * stride..][..vocab].copy_from_slice(&case.logits);
            batch.logits[i * stride + vocab..(i + 1) * stride].fill(1e30);
            let slot = cases.len() - 1 - i;
            batch.rows.push(LogitRowEntry {
                row: i as i32,
                slot: slot as i32,
                position: case.position(),
                target: case.target.map_or(-1, |t| t as i32),
                num_logprobs: case.num_logprobs().map_or(-1, |n| n as i32),
                reserved: 0,
            });
            batch.mask_rows.push(case.mask.as_ref().map_or(-1, |_| (batch.masks.len() / mask_words) as i32));
            batch.masks.extend(case.mask.iter().flatten());
            batch.slots[slot] = batch.slot(case, &mut num_counts);
        }
        batch.counts = vec![!0; num_counts as usize * vocab];
        batch
    }

    fn slot(&mut self, case: &Case, num_counts: &mut i32) -> SlotSampling {
        let params = &case.seq.params;
        let slot = SlotSampling {
            seed: case.seq.seed,
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            repetition_penalty: params.repetition_penalty,
            top_k: params.top_k,
            prompt_len: case.seq.prompt_len,
            min_tokens: params.min_tokens,
            counts: if params.needs_history() { *num_counts } else { -1 },
            bias_begin: self.bias_ids.len() as i32,
            bias_count: params.logit_bias.len() as i32,
            stop_begin: self.stop_ids.len() as i32,
            stop_count: params.stop_token_ids.len() as i32,
        };
        *num_counts += i32::from(params.needs_history());
        self.bias_ids.extend(params.logit_bias.iter().map(|b| b.0 as i32));
        self.bias_values.extend(params.logit_bias.iter().map(|b| b.1));
        self.stop_ids.extend(params.stop_token_ids.iter().map(|&id| id as i32));
        slot
    }

    /// What admission does for slots with penalties.
    fn count_tokens(&mut self, kernels: &HostKernels, cases: &[Case], seed: u64) {
        for (i, case) in cases.iter().enumerate() {
            let row = self.slots[cases.len() - 1 - i].counts;
            if row < 0 {
                continue;
            }
            let params = CountTokensParams {
                counts: address_mut(&mut self.counts[row as usize * self.vocab..][..self.vocab]),
                tokens: address(&case.seq.tokens),
                num_tokens: case.seq.tokens.len() as i32,
                num_prompt: case.seq.prompt_len as i32,
                vocab: self.vocab as i32,
                reserved: 0,
            };
            kernels.launch("quire_count_tokens", [1, 1, 1], THREADS, 0, &params, seed);
        }
    }
}

/// The three launches of a step's sampling, in a grid with a row to spare.
fn sample(kernels: &HostKernels, cases: &[Case], seed: u64) -> Vec<Answer> {
    let mut batch = Batch::new(cases);
    batch.count_tokens(kernels, cases, seed);
    let counts_before = batch.counts.clone();
    let (n, vocab) = (cases.len(), batch.vocab);
    let splits = vocab.div_ceil(PART);
    let num_rows = count(n);
    let mut adjusted = vec![f32::NAN; n * batch.stride];
    let mut best = vec![!0u64; n * splits * 2];
    let process = LogitsParams {
        logits: address(&batch.logits),
        adjusted: address_mut(&mut adjusted),
        rows: address(&batch.rows),
        num_rows: address(&num_rows),
        slots: address(&batch.slots),
        counts: address(&batch.counts),
        masks: address(&batch.masks),
        mask_rows: address(&batch.mask_rows),
        bias_ids: address(&batch.bias_ids),
        bias_values: address(&batch.bias_values),
        stop_ids: address(&batch.stop_ids),
        best: address_mut(&mut best),
        vocab: vocab as i32,
        stride: batch.stride as i32,
        mask_words: batch.mask_words as i32,
        reserved: 0,
    };
    let grid = n as u32 + 1;
    kernels.launch("quire_logits_process", [grid, splits as u32, 1], [256, 1, 1], 0, &process, seed);

    let (mut sampled, mut last_tokens) = (vec![-9i32; n + 1], vec![-9i32; n]);
    let params = SampleParams {
        logits: process.logits,
        adjusted: process.adjusted,
        rows: process.rows,
        num_rows: process.num_rows,
        slots: process.slots,
        masks: process.masks,
        mask_rows: process.mask_rows,
        best: process.best,
        sampled: address_mut(&mut sampled),
        last_tokens: address_mut(&mut last_tokens),
        counts: address_mut(&mut batch.counts),
        vocab: vocab as i32,
        stride: batch.stride as i32,
        mask_words: batch.mask_words as i32,
        splits: splits as i32,
    };
    kernels.launch("quire_sample", [grid, 1, 1], THREADS, vocab.div_ceil(128) as u32 * 8, &params, seed);

    let (mut logprob, mut rank) = (vec![f32::NAN; n], vec![-9i32; n]);
    let (mut top_ids, mut top_logprobs) = (vec![-9i32; n * MAX_TOP], vec![f32::NAN; n * MAX_TOP]);
    let params = LogprobsParams {
        logits: process.logits,
        rows: process.rows,
        num_rows: process.num_rows,
        best: process.best,
        sampled: address(&sampled),
        logprob: address_mut(&mut logprob),
        rank: address_mut(&mut rank),
        top_ids: address_mut(&mut top_ids),
        top_logprobs: address_mut(&mut top_logprobs),
        max_top: MAX_TOP as i32,
        vocab: vocab as i32,
        stride: batch.stride as i32,
        splits: splits as i32,
    };
    kernels.launch("quire_logprobs", [grid, 1, 1], THREADS, 0, &params, seed);

    assert_eq!(sampled[n], -9, "the surplus row stays");
    check_state(cases, &batch, &counts_before, &sampled, &last_tokens);
    let answer = |i: usize| Answer {
        token: sampled[i] as u32,
        logprobs: cases[i].num_logprobs().map(|k| TokenLogprobs {
            logprob: logprob[i],
            rank: rank[i] as u32,
            top: (i * MAX_TOP..i * MAX_TOP + (k as usize).min(vocab))
                .map(|at| (top_ids[at] as u32, top_logprobs[at]))
                .collect(),
        }),
    };
    (0..n).map(answer).collect()
}

/// The sampled token is where the next step looks for it, and counted.
fn check_state(cases: &[Case], batch: &Batch, before: &[u32], sampled: &[i32], last_tokens: &[i32]) {
    let mut wanted = before.to_vec();
    for (i, case) in cases.iter().enumerate() {
        let slot = cases.len() - 1 - i;
        let expected = if case.target.is_some() { -9 } else { sampled[i] };
        assert_eq!(last_tokens[slot], expected, "{}", case.name);
        // An id that only the mask has is chosen where nothing else is left, and not counted.
        let is_counted = batch.slots[slot].counts >= 0 && (sampled[i] as usize) < batch.vocab;
        if is_counted && case.target.is_none() {
            wanted[batch.slots[slot].counts as usize * batch.vocab + sampled[i] as usize] += 1;
        }
    }
    assert!(batch.counts == wanted, "counts");
}

fn compare(case: &Case, have: &Answer, want: &Answer) {
    let name = &case.name;
    assert_eq!(have.token, want.token, "{name}: token");
    let (Some(have), Some(want)) = (&have.logprobs, &want.logprobs) else {
        assert!(have.logprobs.is_none() && want.logprobs.is_none(), "{name}");
        return;
    };
    assert_eq!(have.rank, want.rank, "{name}: rank");
    let ids = |l: &TokenLogprobs| l.top.iter().map(|t| t.0).collect::<Vec<_>>();
    assert_eq!(ids(have), ids(want), "{name}: most likely");
    let values =
        |l: &TokenLogprobs| [l.logprob].into_iter().chain(l.top.iter().map(|t| t.1)).collect::<Vec<_>>();
    let finite = |values: Vec<f32>| -> Vec<f32> {
        values.into_iter().map(|x| if x == f32::NEG_INFINITY { -1e30 } else { x }).collect()
    };
    assert_close(&format!("{name}: logprobs"), &finite(values(have)), &finite(values(want)), 1e-6, 1.0);
}

/// Rows that try the selection in its several ways.
fn logits(rng: &mut Rng, vocab: usize, kind: usize) -> Vec<f32> {
    let bell = |rng: &mut Rng| (0..6).map(|_| rng.signed(1.0)).sum::<f32>();
    match kind {
        // As a model's: a few stand out.
        0 => (0..vocab).map(|_| bell(rng) * 2.0 + if rng.below(50) == 0 { 8.0 } else { 0.0 }).collect(),
        // Flat, so that truncation ends among thousands; with many ties.
        1 => (0..vocab).map(|_| rng.below(16) as f32 * 0.001).collect(),
        // All alike.
        2 => vec![-3.25; vocab],
        // One far above all others, which are too unlikely to have a mass.
        3 => {
            let mut l = rng.vector(vocab, 5.0);
            l[vocab / 3] = 90.0;
            l
        }
        // Broken.
        4 => (0..vocab)
            .map(|i| match rng.below(4) {
                0 => f32::NAN,
                1 => f32::NEG_INFINITY,
                2 if i % 5 == 0 => f32::INFINITY,
                _ => bell(rng),
            })
            .collect(),
        // Around zero, where floats are finer than any fixed point; both zeros.
        5 => (0..vocab)
            .map(|i| match i % 7 {
                0 => -0.0,
                1 => 0.0,
                _ => rng.signed(1e-12),
            })
            .collect(),
        // Nothing left.
        _ => vec![if kind == 6 { f32::NAN } else { f32::NEG_INFINITY }; vocab],
    }
}

const KINDS: usize = 8;

fn parameter_sets(vocab: usize) -> Vec<(&'static str, SamplingParams)> {
    let d = SamplingParams::default;
    let last = vocab as u32 - 1;
    let penalties =
        SamplingParams { presence_penalty: 0.7, frequency_penalty: -0.4, repetition_penalty: 1.3, ..d() };
    let bias = [(0, 5.0), (5, -3.0), (7, -100.0), (vocab as u32 / 2, 2.0), (last, 3.0), (last + 9, 1.0)];
    let bias: Vec<_> = BTreeMap::from(bias).into_iter().collect();
    let stop_token_ids = vec![0, 5, last];
    vec![
        ("greedy", SamplingParams { temperature: 0.0, ..d() }),
        ("greedy, penalties", SamplingParams { temperature: 0.0, ..penalties.clone() }),
        ("greedy, bias", SamplingParams { temperature: 0.0, logit_bias: bias.clone(), ..d() }),
        ("temperature 1", d()),
        ("temperature 0.3", SamplingParams { temperature: 0.3, ..d() }),
        ("temperature 100", SamplingParams { temperature: 100.0, ..d() }),
        ("temperature 1e-6", SamplingParams { temperature: 1e-6, ..d() }),
        ("top_k 1", SamplingParams { top_k: 1, ..d() }),
        ("top_k 40", SamplingParams { top_k: 40, temperature: 0.7, ..d() }),
        ("top_k of nearly all", SamplingParams { top_k: last, ..d() }),
        ("top_k of half, top_p", SamplingParams { top_k: last / 2 + 1, top_p: 0.9, ..d() }),
        ("top_p 0.9", SamplingParams { top_p: 0.9, ..d() }),
        ("top_p 0.999", SamplingParams { top_p: 0.999, temperature: 1.3, ..d() }),
        ("top_p 1e-3", SamplingParams { top_p: 1e-3, ..d() }),
        ("min_p 0.1", SamplingParams { min_p: 0.1, ..d() }),
        ("min_p 1", SamplingParams { min_p: 1.0, ..d() }),
        (
            "top_k, top_p, min_p",
            SamplingParams { top_k: 50, top_p: 0.8, min_p: 0.02, temperature: 1.7, ..d() },
        ),
        ("penalties, top_p", SamplingParams { top_p: 0.95, ..penalties.clone() }),
        (
            "all of it",
            SamplingParams {
                logit_bias: bias,
                min_tokens: 20,
                stop_token_ids: stop_token_ids.clone(),
                top_k: 30,
                top_p: 0.9,
                ..penalties
            },
        ),
        ("stops held", SamplingParams { temperature: 0.0, min_tokens: 20, stop_token_ids, ..d() }),
    ]
}

fn cases(vocab: usize) -> Vec<Case> {
    let mut rng = Rng::new(vocab as u32);
    let mut cases = Vec::new();
    for (name, params) in parameter_sets(vocab) {
        for kind in 0..KINDS {
            let index = cases.len();
            let mask = (index % 3 == 0).then(|| {
                let words = vocab.div_ceil(32);
                (0..words).map(|_| rng.next_u32() & if kind == 7 { 0x10 } else { !0 }).collect()
            });
            let params = SamplingParams {
                logprobs: [None, Some(0), Some(5)][index % 3],
                prompt_logprobs: Some(MAX_TOP as u32),
                max_tokens: 100,
                ..params.clone()
            };
            let prompt_len = 3 + rng.below(8);
            let len = prompt_len + rng.below(10);
            // Tokens come again, and one lies outside the row.
            let mut tokens: Vec<_> = (0..len).map(|_| rng.below(vocab.min(9)) as u32).collect();
            tokens[1] = vocab as u32 + 3;
            let seed = u64::from(rng.next_u32()) << 32 | u64::from(rng.next_u32());
            let logits = logits(&mut rng, vocab, kind);
            cases.push(Case {
                name: format!("vocabulary {vocab}, {name}, logits {kind}, mask {}", mask.is_some()),
                logits,
                seq: SeqState { tokens, prompt_len: prompt_len as u32, params: Arc::new(params), seed },
                mask,
                target: (index % 11 == 10).then(|| rng.below(vocab) as u32),
            });
        }
    }
    cases
}

#[test]
fn tokens_and_logprobs_are_the_references() {
    let Some(kernels) = HostKernels::load() else { return };
    for vocab in [1, 31, 513, 4099] {
        let cases = cases(vocab);
        let want = reference(&cases);
        let have = sample(kernels, &cases, 1);
        for (case, (have, want)) in cases.iter().zip(have.iter().zip(&want)) {
            compare(case, have, want);
        }
    }
}

/// A row of several parts, with more candidates than shared memory holds.
#[test]
fn long_rows_are_sampled_as_the_reference_does() {
    let Some(kernels) = HostKernels::load() else { return };
    let cases: Vec<Case> =
        cases(2 * PART + 77).into_iter().filter(|c| !c.name.contains("logits 6")).collect();
    let want = reference(&cases);
    let have = sample(kernels, &cases, 2);
    for (case, (have, want)) in cases.iter().zip(have.iter().zip(&want)) {
        compare(case, have, want);
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_or_on_the_order_of_threads() {
    let Some(kernels) = HostKernels::load() else { return };
    let cases: Vec<Case> = cases(2500).into_iter().step_by(3).collect();
    let together = sample(kernels, &cases, 1);
    let mut reversed = cases.clone();
    reversed.reverse();
    let mut reversed = sample(kernels, &reversed, 77);
    reversed.reverse();
    assert!(reversed == together, "depends on the order");
    for (case, together) in cases.iter().zip(&together).step_by(5) {
        assert_eq!(&sample(kernels, std::slice::from_ref(case), 5)[0], together, "{}", case.name);
    }
}

/// One distribution, many draws: each as the reference's.
#[test]
fn draws_are_the_references_over_many_positions() {
    let Some(kernels) = HostKernels::load() else { return };
    let mut rng = Rng::new(3);
    let row = logits(&mut rng, 300, 0);
    for params in [
        SamplingParams::default(),
        SamplingParams { top_p: 0.7, ..SamplingParams::default() },
        SamplingParams { top_k: 12, temperature: 1.4, ..SamplingParams::default() },
    ] {
        let params = Arc::new(params);
        let cases: Vec<Case> = (1..400)
            .map(|position| Case {
                name: format!("{params:?} at {position}"),
                logits: row.clone(),
                seq: SeqState {
                    tokens: vec![0; position],
                    prompt_len: 1,
                    params: params.clone(),
                    seed: 0xABCD_EF01_2345_6789,
                },
                mask: None,
                target: None,
            })
            .collect();
        assert!(sample(kernels, &cases, 4) == reference(&cases), "{params:?}");
    }
}

#[test]
fn no_kernel_reads_or_writes_out_of_bounds() {
    under_sanitizers("tokens_and_logprobs");
}
