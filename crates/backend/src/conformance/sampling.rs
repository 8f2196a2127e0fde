//! Sampling on given logits: ids as the reference chooses them, alone and in a batch.

use std::sync::Arc;

use quire_core::{LateInputs, ModelRunnerOutput, SamplingParams, Slot, StepId, TokenLogprobs};

use super::random::Rng;
use crate::reference::RefBackend;
use crate::{Backend, BackendError, BufRole, LogitKind, LogitRow, SeqState, StepInput};

/// One row with everything that decides its token.
#[derive(Clone)]
struct Case {
    name: String,
    logits: Vec<f32>,
    seq: SeqState,
    mask: Option<Vec<u32>>,
    kind: LogitKind,
}

pub(super) fn run<B: Backend>(make: &mut impl FnMut() -> B) {
    for vocab in [77, 512, 1000, 8195] {
        let cases = cases(vocab);
        let expected = sample(&mut RefBackend::new(), &cases).expect("the reference samples");
        let mut backend = make();
        let together = sample(&mut backend, &cases).expect("the backend samples");
        for (case, (want, have)) in cases.iter().zip(expected.iter().zip(&together)) {
            compare(&format!("vocabulary {vocab}: {}", case.name), want, have);
        }
        for (case, have) in cases.iter().zip(&together) {
            let alone = sample(&mut backend, std::slice::from_ref(case)).expect("the backend samples");
            assert_eq!(&alone[0], have, "vocabulary {vocab}: {}: differs when alone", case.name);
        }
        let mut reversed = cases.clone();
        reversed.reverse();
        let reversed = sample(&mut backend, &reversed).expect("the backend samples");
        assert!(reversed.iter().rev().eq(&together), "vocabulary {vocab}: depends on the order of rows");
    }
}

/// The parameter sets, each on several rows of logits.
fn cases(vocab: usize) -> Vec<Case> {
    let d = SamplingParams::default;
    let penalties =
        SamplingParams { presence_penalty: 0.7, frequency_penalty: -0.4, repetition_penalty: 1.3, ..d() };
    let last = vocab as u32 - 1;
    let sets: Vec<(&str, SamplingParams)> = vec![
        ("greedy", SamplingParams { temperature: 0.0, ..d() }),
        ("greedy with penalties", SamplingParams { temperature: 0.0, ..penalties.clone() }),
        ("temperature 1", d()),
        ("temperature 0.3", SamplingParams { temperature: 0.3, ..d() }),
        ("temperature 100", SamplingParams { temperature: 100.0, ..d() }),
        ("temperature 1e-6", SamplingParams { temperature: 1e-6, ..d() }),
        ("top_k 1", SamplingParams { top_k: 1, ..d() }),
        ("top_k 40", SamplingParams { top_k: 40, ..d() }),
        ("top_k of everything", SamplingParams { top_k: vocab as u32, ..d() }),
        ("top_p 0.9", SamplingParams { top_p: 0.9, ..d() }),
        ("top_p 1e-3", SamplingParams { top_p: 1e-3, ..d() }),
        ("min_p 0.1", SamplingParams { min_p: 0.1, ..d() }),
        ("min_p 1", SamplingParams { min_p: 1.0, ..d() }),
        (
            "top_k, top_p and min_p",
            SamplingParams { top_k: 50, top_p: 0.8, min_p: 0.02, temperature: 1.7, ..d() },
        ),
        ("penalties and top_p", SamplingParams { top_p: 0.95, ..penalties }),
        ("bias", SamplingParams { logit_bias: vec![(0, 5.0), (7, -100.0), (last, 100.0)], ..d() }),
        (
            "min_tokens not reached",
            SamplingParams { temperature: 0.0, min_tokens: 9, stop_token_ids: vec![0, 5, last], ..d() },
        ),
        ("min_tokens reached", SamplingParams { min_tokens: 3, stop_token_ids: vec![0, 5, last], ..d() }),
    ];
    let mut rng = Rng::new(vocab as u32);
    let mut cases = Vec::new();
    for (name, params) in sets {
        for (kind, logits) in rows_of_logits(&mut rng, vocab) {
            for masked in [false, true] {
                let mask = masked.then(|| mask(&mut rng, vocab));
                let params =
                    SamplingParams { logprobs: [None, Some(0), Some(5)][cases.len() % 3], ..params.clone() };
                cases.push(Case {
                    name: format!("{name}, {kind} logits{}", if masked { ", masked" } else { "" }),
                    logits: logits.clone(),
                    seq: sequence(&mut rng, vocab, params),
                    mask,
                    kind: LogitKind::Sample,
                });
            }
        }
    }
    for (kind, logits) in rows_of_logits(&mut rng, vocab) {
        let params = SamplingParams { prompt_logprobs: Some(3), ..d() };
        cases.push(Case {
            name: format!("prompt log-probabilities, {kind} logits"),
            logits,
            seq: sequence(&mut rng, vocab, params),
            mask: None,
            kind: LogitKind::PromptLogprob { target: rng.below(vocab as u32) },
        });
    }
    cases
}

fn rows_of_logits(rng: &mut Rng, vocab: usize) -> Vec<(&'static str, Vec<f32>)> {
    let spread: Vec<f32> = (0..vocab).map(|_| rng.signed() * 8.0).collect();
    let tied: Vec<f32> = (0..vocab).map(|_| rng.below(4) as f32).collect();
    let mut broken = spread.clone();
    broken[vocab / 2] = f32::NAN;
    broken[vocab / 3] = f32::NEG_INFINITY;
    let mut infinite = spread.clone();
    infinite[vocab / 4] = f32::INFINITY;
    vec![
        ("spread", spread),
        ("tied", tied),
        ("flat", vec![0.25; vocab]),
        ("NaN", broken),
        ("infinite", infinite),
        ("only NaN", vec![f32::NAN; vocab]),
    ]
}

/// Allows about a quarter. Sometimes a word short: what it does not cover is not allowed.
fn mask(rng: &mut Rng, vocab: usize) -> Vec<u32> {
    let words = vocab.div_ceil(32) - rng.below(2) as usize;
    (0..words).map(|_| rng.next_u32() & rng.next_u32()).collect()
}

fn sequence(rng: &mut Rng, vocab: usize, params: SamplingParams) -> SeqState {
    let len = 5 + rng.below(20);
    let tokens = (0..len).map(|_| rng.below(vocab as u32)).collect();
    SeqState { tokens, prompt_len: len - 4, params: Arc::new(params), seed: u64::from(rng.next_u32()) << 7 }
}

/// Token (of sampled rows) and log-probabilities of a row.
type Outcome = (Option<u32>, Option<TokenLogprobs>);

fn sample<B: Backend>(backend: &mut B, cases: &[Case]) -> Result<Vec<Outcome>, BackendError> {
    let n = cases.len();
    let rows: Vec<u32> = (0..n as u32).collect();
    let slots: Vec<Slot> = rows.iter().map(|&r| Slot(r)).collect();
    let seqs: Vec<_> = cases.iter().map(|c| Some(c.seq.clone())).collect();
    let logit_rows: Vec<_> = cases
        .iter()
        .zip(&rows)
        .map(|(c, &row)| LogitRow { row, slot: Slot(row), position: c.seq.tokens.len() as u32, kind: c.kind })
        .collect();
    let positions: Vec<u32> = logit_rows.iter().map(|r| r.position - 1).collect();
    let seq_lens: Vec<u32> = logit_rows.iter().map(|r| r.position).collect();
    let late = LateInputs {
        masks: cases.iter().zip(&slots).filter_map(|(c, &slot)| Some((slot, c.mask.clone()?))).collect(),
    };

    let mut logits = backend.alloc(BufRole::Logits, n, cases[0].logits.len())?;
    let values: Vec<f32> = cases.iter().flat_map(|c| c.logits.iter().copied()).collect();
    backend.write(&mut logits, &values)?;
    backend.prepare(&StepInput {
        step: StepId(1),
        token_ids: &vec![0; n],
        positions: &positions,
        slot_mapping: &rows,
        cu_seqlens_q: &(0..=n as u32).collect::<Vec<_>>(),
        seq_lens: &seq_lens,
        seq_slots: &slots,
        seq_adapters: &[],
        block_tables: &rows,
        max_blocks_per_seq: 1,
        logit_rows: &logit_rows,
        block_copies: &[],
        seqs: &seqs,
    })?;
    backend.sample(&mut logits, &seqs, &late)?;
    let mut out = ModelRunnerOutput::default();
    backend.fetch(StepId(1), &mut out)?;
    Ok(collect(cases, &out))
}

/// Puts sampled rows and prompt rows back into the order of the cases.
fn collect(cases: &[Case], out: &ModelRunnerOutput) -> Vec<Outcome> {
    let (mut sampled, mut prompts) = (out.rows.iter(), out.prompt_logprobs.iter());
    let outcomes = cases.iter().enumerate().map(|(i, case)| match case.kind {
        LogitKind::Sample => {
            let row = sampled.next().expect("one row for each sampled row");
            assert_eq!(row.slot, Slot(i as u32), "{}: rows come in the order of logit_rows", case.name);
            (Some(out.tokens_of(row)[0]), out.logprobs_of(row)[0].clone())
        }
        LogitKind::PromptLogprob { .. } => {
            let (slot, position, logprobs) = prompts.next().expect("one entry for each prompt row");
            assert_eq!((*slot, *position), (Slot(i as u32), case.seq.tokens.len() as u32), "{}", case.name);
            (None, Some(logprobs.clone()))
        }
    });
    let outcomes = outcomes.collect();
    assert!(sampled.next().is_none() && prompts.next().is_none(), "more rows than asked for");
    outcomes
}

fn compare(name: &str, want: &Outcome, have: &Outcome) {
    assert_eq!(want.0, have.0, "{name}: token");
    let (Some(want), Some(have)) = (&want.1, &have.1) else {
        assert_eq!(want.1, have.1, "{name}: log-probabilities");
        return;
    };
    assert_eq!(want.rank, have.rank, "{name}: rank");
    let close = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-5 * a.abs().max(1.0);
    assert!(close(want.logprob, have.logprob), "{name}: logprob {} and {}", want.logprob, have.logprob);
    assert_eq!(want.top.len(), have.top.len(), "{name}: alternatives");
    for (want, have) in want.top.iter().zip(&have.top) {
        assert!(want.0 == have.0 && close(want.1, have.1), "{name}: alternative {want:?} and {have:?}");
    }
}
