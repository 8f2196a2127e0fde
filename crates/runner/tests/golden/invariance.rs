//! The same bits whatever the chunks, the blocks, the company in the batch, and the history.

use std::sync::Arc;

use quire_core::{SamplingParams, TokenLogprobs};

use crate::checkpoints::{Case, Family, families, family_named};
use crate::driver::{Driver, Seq, TestBackend, config, greedy};

test_on_each_backend!(
    ignores_chunks_blocks_and_company,
    resumes_preempted_sequences,
    continues_cached_prefixes,
    forks_with_block_copies,
    cuts_steps_with_many_logit_rows,
    obeys_late_masks,
);

fn for_each_case<B: TestBackend>(test: impl Fn(&Family, &Case)) {
    let families = families().into_iter().filter(|family| B::takes(&family.checkpoint));
    families.for_each(|family| family.cases.iter().for_each(|case| test(&family, case)));
}

/// How the prompt at `index` is sampled: with all log-probabilities, with those of the output only, and by chance with
/// penalties, so that every kind of row shares the batches.
fn params(index: usize) -> Arc<SamplingParams> {
    let output_only = SamplingParams { prompt_logprobs: None, ..(*greedy()).clone() };
    match index % 4 {
        1 => Arc::new(output_only),
        2 => Arc::new(SamplingParams {
            temperature: 0.8,
            top_p: 0.9,
            repetition_penalty: 1.1,
            frequency_penalty: 0.2,
            seed: 7,
            ..output_only
        }),
        _ => greedy(),
    }
}

/// Each prompt by itself, prefilled at once: what all other ways are compared with.
fn alone<B: TestBackend>(family: &Family, case: &Case) -> Vec<Seq> {
    let run = |(index, prompt): (usize, &crate::checkpoints::Prompt)| {
        let mut driver = Driver::<B>::new(&family.checkpoint, &config(case.max_model_len, 16));
        let seq = driver.add(&prompt.ids, &params(index));
        driver.run(&[seq], usize::MAX, |_| prompt.greedy.len().max(1));
        driver.seqs.pop().unwrap()
    };
    case.prompts.iter().enumerate().map(run).collect()
}

/// All prompts of a case in one driver.
fn together<B: TestBackend>(family: &Family, case: &Case, block_size: u32) -> (Driver<B>, Vec<usize>) {
    let mut driver = Driver::new(&family.checkpoint, &config(case.max_model_len, block_size));
    let prompts = case.prompts.iter().enumerate();
    let seqs = prompts.map(|(index, prompt)| driver.add(&prompt.ids, &params(index))).collect();
    (driver, seqs)
}

/// The same tokens, and the same bits of every log-probability that was asked for.
fn assert_same(got: &Seq, want: &Seq, context: &str) {
    assert_eq!(got.tokens, want.tokens, "{context}");
    let bits = |logprobs: &Option<TokenLogprobs>| {
        let l = logprobs.as_ref().unwrap_or_else(|| panic!("{context}: a log-probability is missing"));
        (l.logprob.to_bits(), l.rank, l.top[0].0, l.top[0].1.to_bits())
    };
    for position in got.logprobs_from.max(want.logprobs_from)..got.tokens.len() {
        assert_eq!(
            bits(&got.logprobs[position]),
            bits(&want.logprobs[position]),
            "{context}, position {position}"
        );
    }
}

pub fn ignores_chunks_blocks_and_company<B: TestBackend>() {
    for_each_case::<B>(|family, case| {
        let want = alone::<B>(family, case);
        for (chunk, block_size) in [(1, 16), (7, 1), (16, 32), (7, 16)] {
            let (mut driver, seqs) = together::<B>(family, case, block_size);
            // One after the other joins, so that prefill and decode share steps.
            for joined in 1..seqs.len() {
                let ends = |seq: usize| want[seq].output().len().min(3 * joined);
                driver.run(&seqs[..joined], chunk, ends);
            }
            driver.run(&seqs, chunk, |seq| want[seq].output().len());
            for (got, want) in driver.seqs.iter().zip(&want) {
                let context = format!("{}, chunk {chunk}, block size {block_size}", family.name);
                assert_same(got, want, &context);
            }
        }
    });
}

pub fn resumes_preempted_sequences<B: TestBackend>() {
    for_each_case::<B>(|family, case| {
        let want = alone::<B>(family, case);
        let (mut driver, seqs) = together::<B>(family, case, 16);
        driver.run(&seqs, 16, |seq| want[seq].output().len().min(9));
        seqs.iter().for_each(|&seq| driver.preempt(seq));
        driver.run(&seqs, 7, |seq| want[seq].output().len());
        for (got, want) in driver.seqs.iter().zip(&want) {
            assert_same(got, want, &format!("{}, resumed", family.name));
        }
    });
}

pub fn continues_cached_prefixes<B: TestBackend>() {
    for_each_case::<B>(|family, case| {
        let want = alone::<B>(family, case);
        let longest = (0..want.len()).max_by_key(|&i| want[i].prompt_len).unwrap();
        let (prompt, want) = (&case.prompts[longest].ids, &want[longest]);
        let mut driver = Driver::<B>::new(&family.checkpoint, &config(case.max_model_len, 16));
        let first = driver.add(prompt, &params(longest));
        driver.run(&[first], usize::MAX, |_| 1);
        let mut seqs = vec![first];
        for num_blocks in [1, (prompt.len() - 1) / 16] {
            seqs.push(driver.add_with_prefix(prompt, first, num_blocks));
        }
        driver.run(&seqs, 7, |_| want.output().len());
        for &seq in &seqs {
            assert_same(&driver.seqs[seq], want, &format!("{}, cached prefix {seq}", family.name));
        }
    });
}

pub fn forks_with_block_copies<B: TestBackend>() {
    for_each_case::<B>(|family, case| {
        let want = alone::<B>(family, case);
        let (mut driver, seqs) = together::<B>(family, case, 16);
        driver.run(&seqs, 16, |_| 1);
        let forks: Vec<_> = seqs.iter().map(|&seq| driver.fork(seq)).collect();
        let all: Vec<_> = seqs.iter().chain(&forks).copied().collect();
        driver.run(&all, 16, |seq| want[seq % want.len()].output().len());
        for &seq in &all {
            assert_same(&driver.seqs[seq], &want[seq % want.len()], &format!("{}, fork {seq}", family.name));
        }
    });
}

/// Two prompts of 70 tokens want a row of logits for each; the buffer has 64. Rows that decode, and rows
/// that want one row of logits or none, stand before, between and behind them.
pub fn cuts_steps_with_many_logit_rows<B: TestBackend>() {
    let family = &family_named("llama3");
    let case = &family.cases[0];
    let want = alone::<B>(family, case);
    let which = |seq: usize| [1, 3, 1, 3, 0, 2][seq];
    let limits = config(case.max_model_len, 16);
    assert_eq!(limits.max_logit_rows(), 64);
    let mut driver = Driver::<B>::new(&family.checkpoint, &limits);
    let seqs: Vec<_> = (0..6).map(|i| driver.add(&case.prompts[which(i)].ids, &params(which(i)))).collect();
    driver.run(&seqs[..1], usize::MAX, |_| 3);
    driver.run(&seqs[4..5], usize::MAX, |_| 5);

    let rows: Vec<_> = [0, 1, 2, 3, 4].map(|seq| (seq, driver.seqs[seq].left())).into();
    let wants_all = rows.iter().filter(|row| which(row.0) == 3).map(|row| row.1).sum::<usize>();
    assert!(wants_all > 2 * 64, "{wants_all} rows of logits must take three passes");
    driver.step(&[&rows[..], &[(5, 10)]].concat());

    driver.run(&seqs, usize::MAX, |seq| want[which(seq)].output().len());
    for &seq in &seqs {
        assert_same(&driver.seqs[seq], &want[which(seq)], &format!("cut step, sequence {seq}"));
    }
}

pub fn obeys_late_masks<B: TestBackend>() {
    let family = &family_named("llama3");
    let case = &family.cases[0];
    let want = alone::<B>(family, case);
    let (mut driver, seqs) = together::<B>(family, case, 16);
    // Tokens 40 to 42 only, for one sequence of the batch.
    let mut mask = vec![0u32; 256 / 32];
    mask[1] = 0b111 << 8;
    driver.late.masks.push((driver.seqs[1].slot, mask));
    driver.run(&seqs, 16, |seq| want[seq].output().len());
    let masked = driver.seqs[1].output();
    assert!(masked.iter().all(|id| (40..43).contains(id)), "{masked:?}");
    for seq in [0, 2, 3] {
        assert_same(&driver.seqs[seq], &want[seq], "beside a masked sequence");
    }
}
