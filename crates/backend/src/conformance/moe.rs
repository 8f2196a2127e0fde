//! Mixtures of experts: the values of the reference, and rows that do not show whom they share their experts with.
//!
//! Inputs are exact in 16 bits, so that every backend's router sees the same numbers; ties between experts are there on
//! purpose, as routers of equal rows.

use quire_core::{DType, QuantFormat};

use super::compare::{assert_close, same_bits, scale};
use super::random::{HostTensor, Rng};
use super::rows::{input, prepare};
use super::{Support, Tolerance};
use crate::convert::round_to;
use crate::reference::RefBackend;
use crate::{
    Activation, Backend, BackendError, BufRole, GraphKey, LinearPart, LinearSource, Moe, MoeScratch,
};

#[derive(Clone, Copy, Debug)]
struct Case {
    /// Of the second half of them, the routers are those of the first.
    num_experts: usize,
    top_k: usize,
    renormalise: bool,
    hidden: usize,
    width: usize,
    activation: Activation,
    dtype: DType,
}

const CASE: Case = Case {
    num_experts: 8,
    top_k: 2,
    renormalise: true,
    hidden: 64,
    width: 32,
    activation: Activation::Silu,
    dtype: DType::F32,
};

const CASES: &[Case] = &[
    CASE,
    Case { top_k: 3, renormalise: false, width: 48, dtype: DType::BF16, ..CASE },
    Case { num_experts: 1, top_k: 1, activation: Activation::GeluTanh, dtype: DType::F16, ..CASE },
    Case { num_experts: 60, top_k: 5, hidden: 144, width: 80, dtype: DType::BF16, ..CASE },
    Case { num_experts: 4, top_k: 4, hidden: 320, width: 16, activation: Activation::Relu, ..CASE },
    Case { num_experts: 512, top_k: 8, hidden: 32, width: 16, dtype: DType::BF16, ..CASE },
    // A single expert weighs exactly 1. Several groups of inputs, and many rows an expert.
    Case { num_experts: 2, top_k: 1, hidden: 560, width: 272, ..CASE },
];

/// Rows of the largest step.
const MAX_ROWS: usize = 48;
const INPUT_SEED: u32 = 1000;

pub(super) fn run<B: Backend>(
    quant: QuantFormat,
    tolerance: Tolerance,
    support: Support,
    make: &mut impl FnMut() -> B,
) {
    for case in CASES {
        // Exact, so that no activation of the next layer is rounded to another code.
        let exact = Case { activation: Activation::Relu, ..*case };
        let case = if quant == QuantFormat::None { case } else { &exact };
        let dtype = support.dtype.unwrap_or(case.dtype);
        let all: Vec<usize> = (0..MAX_ROWS).collect();
        // Integers are exact, so both must round in the same places.
        let rounding = support.dtype.filter(|_| quant != QuantFormat::None);
        let reference = RefBackend::new().with_rounding(rounding);
        let mut expected = Layer::load(reference, case, quant, dtype).rows(&all);
        let got = Layer::load(make(), case, quant, dtype).rows(&all);
        let tolerance = match rounding {
            None => tolerance.f32,
            // Sums of numbers of fp8 are rounded: the same neighbours.
            Some(_) if quant == QuantFormat::Fp8 => 1.0 / 256.0,
            Some(_) if case.top_k == 1 && case.renormalise => 0.0,
            // Neighbours of bf16: the sum's weights come from an exponential.
            Some(_) => 1.0 / 256.0,
        };
        let round = |x: &mut f32| *x = rounding.map_or(*x, |dtype| round_to(dtype, *x));
        expected.iter_mut().flatten().for_each(round);
        let bound = tolerance * scale(expected.iter().flatten());
        for (row, (want, have)) in expected.iter().zip(&got).enumerate() {
            assert_close(format_args!("{case:?}: row {row}"), want, have, bound);
        }

        // Alone, in other company, in another order, and in another backend.
        let mut rng = Rng::new(23);
        let mut shuffled = all.clone();
        rng.shuffle(&mut shuffled);
        let mut other = Layer::load(make(), case, quant, dtype);
        for rows in all[..5].chunks(1).chain(shuffled.chunks(19)).chain([&shuffled[..]]) {
            for (row, have) in rows.iter().zip(other.rows(rows)) {
                let company = rows.len();
                assert!(same_bits(&got[*row], &have), "{case:?}: row {row} has other bits among {company}");
            }
        }
    }
}

/// A layer with its buffers.
struct Layer<'a, B: Backend> {
    case: &'a Case,
    backend: B,
    router: B::Weight,
    up: B::Weight,
    down: B::Weight,
    x: B::Buf,
    logits: B::Buf,
    hidden: B::Buf,
    expert_out: B::Buf,
    out: B::Buf,
}

impl<'a, B: Backend> Layer<'a, B> {
    fn load(backend: B, case: &'a Case, quant: QuantFormat, dtype: DType) -> Self {
        Self::try_load(backend, case, quant, dtype).unwrap_or_else(|error| panic!("{case:?}: {error}"))
    }

    fn try_load(
        mut backend: B,
        case: &'a Case,
        quant: QuantFormat,
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let Case { num_experts, top_k, hidden, width, .. } = *case;
        let mut rng = Rng::new(29);
        let mut tensors = |count: usize, rows, cols| -> Vec<HostTensor> {
            let scale = 1.5 / (cols as f32).sqrt();
            let tensor = |_| HostTensor::random(&mut rng, dtype, &[rows, cols], 0.0, scale);
            (0..count).map(tensor).collect()
        };
        let half = tensors(1, num_experts.div_ceil(2), hidden);
        let router: Vec<_> = half.iter().chain(&half).take(num_experts.min(2)).collect();
        let (up, down) = (tensors(2 * num_experts, width, hidden), tensors(num_experts, hidden, width));
        let mut load = |tensors: &[&HostTensor], quant| {
            let views = tensors.iter().map(|tensor| tensor.view());
            let parts: Vec<_> = views.map(|weight| LinearPart { weight, bias: None }).collect();
            backend.load_linear(&LinearSource { name: "test", parts: &parts, quant })
        };
        let router = load(&router, QuantFormat::None)?;
        let up = load(&up.iter().collect::<Vec<_>>(), quant)?;
        let down = load(&down.iter().collect::<Vec<_>>(), quant)?;
        let mut alloc = |role, cols| backend.alloc(role, MAX_ROWS, cols);
        Ok(Self {
            router,
            up,
            down,
            x: alloc(BufRole::Hidden, hidden)?,
            logits: alloc(BufRole::Logits, num_experts)?,
            hidden: alloc(BufRole::Hidden, top_k * 2 * width)?,
            expert_out: alloc(BufRole::Hidden, top_k * hidden)?,
            out: alloc(BufRole::Hidden, hidden)?,
            case,
            backend,
        })
    }

    /// The layer's results for rows of the test's input, in a step of their own.
    fn rows(&mut self, rows: &[usize]) -> Vec<Vec<f32>> {
        self.try_rows(rows).unwrap_or_else(|error| panic!("{:?}, {} rows: {error}", self.case, rows.len()))
    }

    fn try_rows(&mut self, rows: &[usize]) -> Result<Vec<Vec<f32>>, BackendError> {
        let Self { case, backend, .. } = self;
        let values: Vec<f32> = rows.iter().flat_map(|&row| input(INPUT_SEED, row, case.hidden)).collect();
        // Twice: what a backend records is replayed.
        let mut results = Vec::new();
        for _ in 0..2 {
            backend.write(&mut self.x, &values)?;
            prepare(backend, rows.len(), &[])?;
            backend.run(Some(GraphKey(0)), |backend| {
                backend.moe(Moe {
                    x: &self.x,
                    router: &self.router,
                    up: &self.up,
                    down: &self.down,
                    top_k: case.top_k,
                    renormalise: case.renormalise,
                    activation: case.activation,
                    scratch: MoeScratch {
                        logits: &mut self.logits,
                        hidden: &mut self.hidden,
                        expert_out: &mut self.expert_out,
                    },
                    out: &mut self.out,
                })
            })?;
            results = backend.read(&self.out, rows.len())?;
        }
        Ok(results.chunks(case.hidden).map(<[f32]>::to_vec).collect())
    }
}
