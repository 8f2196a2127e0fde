//! A mixture of experts, as its layer: router, routing, products and sum.

use quire_backend::{Activation, Backend, BackendError, BufRole, LinearPart, LinearSource, Moe, MoeScratch};
use quire_core::{DType, QuantFormat, SamplingParams, TensorView};
use quire_cuda::{Cuda, CudaWeight};

use crate::Timings;
use crate::cases::{buffer, random_bf16};
use crate::step::Step;

/// Widths of a layer.
#[derive(Clone, Copy)]
pub struct Experts {
    num_experts: usize,
    top_k: usize,
    hidden: usize,
    width: usize,
}

pub const QWEN3_30B_A3B: Experts = Experts { num_experts: 128, top_k: 8, hidden: 2048, width: 768 };
pub const TINY: Experts = Experts { num_experts: 8, top_k: 2, hidden: 64, width: 32 };
/// So many rows that nearly every expert has some.
const ROWS: usize = 64;

pub fn experts(timings: &mut Timings, shape: Experts) {
    let formats = [
        ("bf16", QuantFormat::None),
        ("fp8", QuantFormat::Fp8),
        ("int8", QuantFormat::Int8),
        ("int4", QuantFormat::Int4),
    ];
    for (format, quant) in formats {
        timings.case(&format!("moe_us/{ROWS}/{format}"), |timings| {
            let us = layer(timings, shape, quant)?;
            timings.row(format!("moe_us/{ROWS}/{format}"), us, "us");
            if quant == QuantFormat::None {
                let bytes = 6 * shape.num_experts * shape.hidden * shape.width;
                timings.row(format!("moe_gb_s/{ROWS}/{format}"), 1e-3 * bytes as f64 / us, "GB/s");
            }
            Ok(())
        });
    }
}

/// Random weights of bf16, rounded to `quant`.
fn load(cuda: &mut Cuda, rows: usize, cols: usize, quant: QuantFormat) -> Result<CudaWeight, BackendError> {
    let data = random_bf16(rows * cols);
    let weight = TensorView { dtype: DType::BF16, shape: &[rows, cols], data: &data };
    let parts = [LinearPart { weight, bias: None }];
    cuda.load_linear(&LinearSource { name: "experts", parts: &parts, quant })
}

/// Microseconds of the layer.
fn layer(timings: &mut Timings, shape: Experts, quant: QuantFormat) -> Result<f64, BackendError> {
    let Experts { num_experts, top_k, hidden, width } = shape;
    let cuda = &mut timings.cuda;
    let router = load(cuda, num_experts, hidden, QuantFormat::None)?;
    let up = load(cuda, num_experts * 2 * width, hidden, quant)?;
    let down = load(cuda, num_experts * hidden, width, quant)?;
    let x = buffer(cuda, BufRole::Hidden, ROWS, hidden)?;
    let mut logits = cuda.alloc(BufRole::Logits, ROWS, num_experts)?;
    let mut inner = cuda.alloc(BufRole::Hidden, ROWS, top_k * 2 * width)?;
    let mut expert_out = cuda.alloc(BufRole::Hidden, ROWS, top_k * hidden)?;
    let mut out = cuda.alloc(BufRole::Hidden, ROWS, hidden)?;
    let step = Step::new(ROWS, 1, 1, &SamplingParams::default());
    timings.time(&step, |cuda, _| {
        cuda.moe(Moe {
            x: &x,
            router: &router,
            up: &up,
            down: &down,
            top_k,
            renormalise: true,
            activation: Activation::Silu,
            scratch: MoeScratch { logits: &mut logits, hidden: &mut inner, expert_out: &mut expert_out },
            out: &mut out,
        })
    })
}
