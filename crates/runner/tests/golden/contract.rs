//! What the runner promises to whoever drives it, beyond numbers.

use std::sync::Arc;

use quire_backend::reference::RefBackend;
use quire_core::{
    Executor, LateInputs, LogitRows, ModelRunnerOutput, Scheduled, SchedulerOutput, Slot, StepId,
};
use quire_runner::{LoadProgress, ModelRunner, RunnerConfig};

use crate::checkpoints::{families, family_named};
use crate::driver::config;

fn runner() -> ModelRunner<RefBackend> {
    let family = family_named("qwen3");
    ModelRunner::load(RefBackend::new(), &family.checkpoint, &config(64, 16), |_| {}).unwrap()
}

fn empty_step(step: u64) -> Arc<SchedulerOutput> {
    Arc::new(SchedulerOutput { step: StepId(step), ..SchedulerOutput::default() })
}

#[test]
fn calls_out_of_order_are_refused() {
    let (mut runner, mut out) = (runner(), ModelRunnerOutput::default());
    let late = LateInputs::default();
    assert!(runner.sample(StepId(1), &late).unwrap_err().message.contains("was not submitted"));
    runner.submit(empty_step(1)).unwrap();
    assert!(runner.submit(empty_step(2)).unwrap_err().message.contains("was not collected"));
    assert!(runner.collect(StepId(1), &mut out).unwrap_err().message.contains("`sample` was not called"));
    runner.sample(StepId(1), &late).unwrap();
    assert!(runner.collect(StepId(2), &mut out).unwrap_err().message.contains("was not submitted"));
    runner.collect(StepId(1), &mut out).unwrap();
    assert_eq!((out.step, out.rows.len()), (StepId(1), 0));
}

#[test]
fn plans_are_given_back_before_collect_returns() {
    let (mut runner, mut out) = (runner(), ModelRunnerOutput::default());
    let plan = empty_step(7);
    runner.submit(plan.clone()).unwrap();
    runner.sample(StepId(7), &LateInputs::default()).unwrap();
    runner.collect(StepId(7), &mut out).unwrap();
    assert_eq!(Arc::strong_count(&plan), 1);
}

#[test]
fn plans_that_contradict_the_batch_are_refused() {
    let row = Scheduled {
        slot: Slot(0),
        num_computed_tokens: 0,
        num_new_tokens: 1,
        logits: LogitRows::Last,
        sample: true,
    };
    let plan = SchedulerOutput { scheduled: vec![row], ..SchedulerOutput::default() };
    let error = runner().submit(Arc::new(plan)).unwrap_err();
    assert_eq!(error.to_string(), "reference: inconsistent plan: slot 0 holds no sequence");
}

#[test]
fn limits_are_those_of_the_config_and_the_model() {
    let family = family_named("mistral");
    let limits = |config: &RunnerConfig| {
        ModelRunner::load(RefBackend::new(), &family.checkpoint, config, |_| {}).map(|runner| runner.limits())
    };
    let config = config(64, 16);
    let got = limits(&config).unwrap();
    assert_eq!((got.vocab_size, got.block_size, got.num_blocks), (256, 16, 32));
    assert_eq!(got.kv_groups, [Some(16)]);
    let error = limits(&RunnerConfig { block_size: 0, ..config.clone() }).unwrap_err();
    assert_eq!(error.to_string(), "block_size = 0: must be at least 1");
    let error = limits(&RunnerConfig { num_blocks: u32::MAX, ..config }).unwrap_err();
    assert!(error.to_string().contains("must be below 2^32"), "{error}");
}

#[test]
fn progress_rises_to_the_end() {
    for family in families() {
        let mut calls: Vec<LoadProgress> = Vec::new();
        ModelRunner::load(RefBackend::new(), &family.checkpoint, &config(64, 16), |p| calls.push(p)).unwrap();
        assert!(calls.len() > family.checkpoint.spec().layers.len());
        assert!(calls.windows(2).all(|w| w[0].done_bytes <= w[1].done_bytes), "{calls:?}");
        let bytes: u64 = family.checkpoint.tensors().iter().map(|tensor| tensor.bytes).sum();
        assert_eq!(*calls.last().unwrap(), LoadProgress { done_bytes: bytes, total_bytes: bytes });
        assert_eq!(calls[calls.len() - 2].done_bytes, bytes, "{}: every tensor is counted", family.name);
    }
}
