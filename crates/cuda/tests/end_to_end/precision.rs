//! The golden checkpoints in bf16 against the CPU backend in bf16, which rounds less: docs/cuda.md says where.

use quire_backend::Backend;
use quire_core::{DType, SamplingParams};
use quire_cpu::{CpuBackend, CpuConfig, Precision};
use quire_model::Checkpoint;
use quire_runner::ModelRunner;

use crate::common::MockGpu;
use crate::steps::Steps;
use crate::{GOLDEN_TOLERANCE, config, cuda, golden_checkpoints, load_as, margin, prompts, relative_error};

/// Of all rows of a checkpoint together: the worst has 0.0153, most are below 0.01.
const OVERALL_TOLERANCE: f32 = 1.8e-2;
const NUM_STEPS: usize = 4;

/// How far logits are off, norm over norm.
#[derive(Clone, Copy, Debug)]
struct Errors {
    /// Of all rows together.
    overall: f32,
    /// Of the row that is off most.
    worst_row: f32,
}

fn greedy<B: Backend>(backend: B, checkpoint: &Checkpoint) -> Steps<ModelRunner<B>> {
    let prompts = prompts(checkpoint.spec().vocab_size);
    Steps::new(load_as(backend, checkpoint, &config(DType::BF16)), prompts, &SamplingParams::greedy(100))
}

/// Greedy tokens must be the same where the margin is clear.
fn compare(gpu: &MockGpu, name: &str, checkpoint: &Checkpoint) -> Errors {
    let cpu = CpuConfig { threads: 1, precision: Precision::Bf16, ..CpuConfig::default() };
    let mut expected = greedy(CpuBackend::new(cpu).expect("threads can be started"), checkpoint);
    let mut got = greedy(cuda(gpu), checkpoint);
    let (mut all_wanted, mut all_had, mut worst_row) = (Vec::new(), Vec::new(), 0.0f32);
    for step in 0..NUM_STEPS {
        expected.step();
        got.step();
        let (want, have) = (expected.logits(), got.logits());
        let vocab = checkpoint.spec().vocab_size;
        for (seq, (want, have)) in want.chunks(vocab).zip(have.chunks(vocab)).enumerate() {
            let error = relative_error(have, want);
            assert!(!error.is_nan(), "{name}, step {step}, sequence {seq}");
            worst_row = worst_row.max(error);
            let difference = have.iter().zip(want).map(|(h, w)| (h - w).abs()).fold(0.0, f32::max);
            let (wanted, chosen) = (expected.last_token(seq), got.last_token(seq));
            let is_clear = margin(want) > 2.0 * difference;
            assert!(
                wanted == chosen || !is_clear,
                "{name}, step {step}, sequence {seq}: {chosen} for {wanted}"
            );
            got.force(seq, wanted);
        }
        all_wanted.extend(want);
        all_had.extend(have);
    }
    assert_eq!(all_had.len(), all_wanted.len());
    Errors { overall: relative_error(&all_had, &all_wanted), worst_row }
}

/// The two differ from each other as much as each does from exact arithmetic.
#[test]
fn golden_checkpoints_agree_with_the_cpu_in_bf16() {
    let Some(gpu) = MockGpu::new() else { return };
    let mut errors = Vec::new();
    for (name, checkpoint) in golden_checkpoints() {
        if checkpoint.spec().dtype == DType::BF16 {
            errors.push((compare(&gpu, &name, &checkpoint), name));
        }
    }
    assert!(errors.len() >= 9);
    errors.iter().for_each(|(errors, name)| println!("{name:20} from the CPU {errors:?}"));
    let is_close =
        |errors: Errors| errors.overall <= OVERALL_TOLERANCE && errors.worst_row <= GOLDEN_TOLERANCE;
    assert!(errors.iter().all(|&(errors, _)| is_close(errors)), "{errors:?}");
    gpu.assert_nothing_left();
}
