//! The time of every kernel by events of the device, at the shapes of Llama-3.1-8B: on a GPU (`tests/gpu/run`), rows of
//! JSON for its table. Under the double the same program runs at tiny shapes, so that it is known to work.
//!
//! An operation is recorded several times into one graph and replayed: what is measured is the device, not the host.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may fail, and this one says what it measured"
)]

#[path = "timing/adapters.rs"]
mod adapters;
#[path = "timing/cases.rs"]
mod cases;
mod common;
#[path = "timing/experts.rs"]
mod experts;
#[path = "timing/step.rs"]
mod step;

use std::fmt::Write;

use common::{MockGpu, mock};
use quire_backend::{Backend, BackendError, GraphKey};
use quire_cuda::{Cuda, CudaOptions, KernelSet};
use step::Step;

/// What is measured, from a whole model's shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) num_heads: u32,
    pub(crate) num_kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) vocab: usize,
}

const LLAMA_8B: Shape = Shape {
    hidden: 4096,
    intermediate: 14336,
    num_heads: 32,
    num_kv_heads: 8,
    head_dim: 128,
    vocab: 128_256,
};
const TINY: Shape =
    Shape { hidden: 64, intermediate: 96, num_heads: 4, num_kv_heads: 2, head_dim: 64, vocab: 512 };

/// Collects rows, and owns the device.
pub(crate) struct Timings {
    pub(crate) cuda: Cuda,
    pub(crate) shape: Shape,
    /// Operations in a graph.
    pub(crate) repeats: usize,
    rows: Vec<(String, f64, &'static str)>,
    next_key: u32,
}

impl Timings {
    pub(crate) fn row(&mut self, name: String, value: f64, unit: &'static str) {
        println!("{name:44} {value:12.2} {unit}");
        self.rows.push((name, value, unit));
    }

    /// Microseconds of `body`, which is done `repeats` times in a graph: the best of three replays.
    ///
    /// # Errors
    /// The device does not support it.
    pub(crate) fn time(
        &mut self,
        step: &Step,
        mut body: impl FnMut(&mut Cuda, usize) -> Result<(), BackendError>,
    ) -> Result<f64, BackendError> {
        let (key, repeats) = (GraphKey(self.next_key), self.repeats);
        self.next_key += 1;
        let mut best = f64::INFINITY;
        // The first makes what is missing, the second records.
        for replay in 0..5 {
            self.cuda.prepare(&step.input())?;
            let begin = self.cuda.timestamp()?;
            self.cuda.run(Some(key), |cuda| (0..repeats).try_for_each(|i| body(cuda, i)))?;
            let end = self.cuda.timestamp()?;
            end.synchronize().expect("the device lives");
            let milliseconds = end.milliseconds_since(&begin).expect("both were reached");
            if replay >= 2 {
                best = best.min(f64::from(milliseconds) * 1e3 / repeats as f64);
            }
        }
        Ok(best)
    }

    /// A case that this build cannot run is said and left out.
    pub(crate) fn case(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Result<(), BackendError>) {
        if let Err(error) = run(self) {
            println!("{name:44} left out: {error}");
        }
    }

    /// To the file that this variable names, if it is set.
    fn write(&self, variable: &str) {
        if let Some(path) = std::env::var_os(variable) {
            std::fs::write(path, self.json()).unwrap();
        }
    }

    fn json(&self) -> String {
        let mut text = String::from("{\"rows\": [");
        for (i, (name, value, unit)) in self.rows.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(text, "{comma}{{\"name\": \"{name}\", \"value\": {value}, \"unit\": \"{unit}\"}}")
                .unwrap();
        }
        text + "]}\n"
    }
}

fn timings(gpu: &MockGpu, kernels: KernelSet) -> Timings {
    let is_mock = gpu.is_mock();
    let options = CudaOptions { ordinal: gpu.ordinal(), kernels, ..CudaOptions::default() };
    Timings {
        cuda: Cuda::new(mock::images(), options).unwrap(),
        shape: if is_mock { TINY } else { LLAMA_8B },
        repeats: if is_mock { 2 } else { 20 },
        rows: Vec::new(),
        next_key: 0,
    }
}

#[test]
fn every_kernel_is_timed() {
    let Some(gpu) = MockGpu::new() else { return };
    let is_mock = gpu.is_mock();
    let mut timings = timings(&gpu, KernelSet::Generic);
    let peaks = timings.cuda.peaks().unwrap();
    timings.row("copy_gb_s".into(), peaks.copy_bytes_s / 1e9, "GB/s");
    timings.row("gemm_peak_tflop_s".into(), peaks.gemm_flop_s / 1e12, "TFLOP/s");
    let rows: Vec<usize> = (0..14).map(|i| 1 << i).collect();
    cases::products(&mut timings, if is_mock { &[1, 16] } else { &rows });
    let contexts = if is_mock { vec![32] } else { vec![1024, 2048, 4096, 8192] };
    for num_seqs in if is_mock { vec![2] } else { vec![1, 64] } {
        contexts.iter().for_each(|&context| cases::decode_attention(&mut timings, num_seqs, context));
    }
    for len in if is_mock { vec![48] } else { vec![512, 1024, 2048, 4096, 8192] } {
        cases::prefill_attention(&mut timings, "", len);
    }
    for rows in if is_mock { vec![4, 64] } else { vec![64, 8192] } {
        cases::elementwise(&mut timings, rows);
    }
    experts::experts(&mut timings, if is_mock { experts::TINY } else { experts::QWEN3_30B_A3B });
    adapters::adapters(&mut timings);
    cases::sampling(&mut timings, if is_mock { 4 } else { 256 });
    let names: Vec<_> = timings.rows.iter().map(|(name, ..)| name.as_str()).collect();
    for wanted in [
        "copy",
        "gemm_us/up",
        "gemm_us/down/1/fp8",
        "moe_us/64/fp8",
        "moe_us/64/int4",
        "lora_us/64x8",
        "lora_of_products",
        "decode_us",
        "prefill_us",
        "norm_us",
        "rope_us",
        "act_us",
        "sample_us",
    ] {
        assert!(names.iter().any(|name| name.starts_with(wanted)), "no {wanted} in {names:?}");
    }
    assert!(timings.rows.iter().all(|(_, value, _)| *value > 0.0), "{:?}", timings.rows);
    timings.write("QUIRE_TIMINGS");
}

/// Prefill attention with Hopper's own instructions, which no double has: against the generic kernel, then its time.
#[test]
fn hopper_attention_agrees_with_the_generic_one() {
    let Some(gpu) = MockGpu::new() else { return };
    if gpu.is_mock() {
        println!("skipped: needs a GPU of compute capability 9.0");
        return;
    }
    let mut generic = timings(&gpu, KernelSet::Generic);
    if generic.cuda.context().compute_capability() != (9, 0) {
        println!("skipped: compute capability {:?}", generic.cuda.context().compute_capability());
        return;
    }
    let mut hopper = timings(&gpu, KernelSet::Sm90a);
    // Whole prompts, chunks in the middle of a page, few rows over many splits.
    for (num_seqs, len, num_new) in [(1, 16, 16), (3, 77, 77), (2, 1030, 1030), (2, 1500, 33), (1, 9000, 9)] {
        let want = cases::attention_output(&mut generic, num_seqs, len, num_new).unwrap();
        let got = cases::attention_output(&mut hopper, num_seqs, len, num_new).unwrap();
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let error = norm(&mut got.iter().zip(&want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied());
        let equal = got.iter().zip(&want).filter(|(g, w)| g.to_bits() == w.to_bits()).count();
        let share = equal as f64 / want.len() as f64;
        hopper.row(format!("sm90a_equal/{num_seqs}x{len}/{num_new}"), share, "of 1");
        assert!(
            error < 1e-2,
            "{num_seqs} sequences of {len}, {num_new} computed: relative error {error:.1e}"
        );
    }
    for len in [512, 1024, 2048, 4096, 8192] {
        cases::prefill_attention(&mut hopper, "sm90a_", len);
    }
    hopper.write("QUIRE_TIMINGS_SM90A");
}
