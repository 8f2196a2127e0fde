//! Quantized layers. The arithmetic of integers is defined to the bit, so every backend gives the numbers of the reference. Where a
//! backend rounds activations between operations, the reference's are rounded in the same places.

use quire_core::{DType, QuantFormat, Slot, StepId};

use super::Support;
use super::compare::{assert_close, largest};
use super::random::{HostTensor, Rng};
use crate::convert::round_to;
use crate::quant::TINY;
use crate::reference::RefBackend;
use crate::{
    Activation, Backend, BackendError, BufRole, Embed, Linear, LinearPart, LinearSource, LogitKind, LogitRow,
    Logits, Mlp, MlpShape, StepInput,
};

/// Inputs of a layer: below, at, and beyond the groups of 32 and 256, and not multiples of anything.
const IN_FEATURES: &[usize] = &[1, 31, 32, 50, 64, 172, 256, 257, 300, 512, 544, 1000];
/// Outputs, of the two parts of a fused layer.
const OUT_FEATURES: &[[usize; 2]] = &[[1, 0], [15, 2], [64, 32], [77, 50]];
/// The same for fp8, whose layers have outputs in multiples of 16.
const FP8_IN_FEATURES: &[usize] = &[16, 64, 176, 272, 512];
const FP8_OUT_FEATURES: &[[usize; 2]] = &[[16, 0], [64, 32], [77, 51]];
/// Rows of a step.
const ROWS: &[usize] = &[1, 2, 3, 7, 13, 33];

pub(super) fn run<B: Backend>(quant: QuantFormat, support: Support, make: &mut impl FnMut() -> B) {
    let (ins, outs) = match quant {
        QuantFormat::Fp8 => (FP8_IN_FEATURES, FP8_OUT_FEATURES),
        _ => (IN_FEATURES, OUT_FEATURES),
    };
    for (i, &in_features) in ins.iter().enumerate() {
        for (j, outs) in outs.iter().enumerate() {
            let dtype = [DType::BF16, DType::F32, DType::F16][(i + j) % 3];
            let case = Case { quant, in_features, outs, dtype, bias: j % 2 == 1, rounded: support.dtype };
            let expected =
                case.outputs(&mut RefBackend::new(), mlp_in_parts).expect("the reference can do this");
            let mut backend = make();
            let got = case.outputs(&mut backend, mlp);
            let got = got.unwrap_or_else(|error| panic!("{case:?} on {}: {error}", backend.name()));
            case.assert_agrees(&expected, &got);
        }
    }
}

#[derive(Debug)]
struct Case {
    quant: QuantFormat,
    in_features: usize,
    outs: &'static [usize; 2],
    dtype: DType,
    bias: bool,
    /// What the backend rounds activations to between operations.
    rounded: Option<DType>,
}

/// What an operation gave: its name, the rows of the step, and the values.
type Output = (&'static str, usize, Vec<f32>);

/// Runs a feed-forward layer on `x`, `[rows, in_features]`.
type RunMlp<B> = fn(&Case, &mut B, &Layers<B>, MlpShape, usize) -> Result<Vec<f32>, BackendError>;

/// The weights of a case.
struct Layers<B: Backend> {
    linear: B::Weight,
    table: B::Weight,
    gated: B::Weight,
    down: B::Weight,
}

impl Case {
    fn load<B: Backend>(
        &self,
        backend: &mut B,
        outs: &[usize],
        cols: usize,
        bias: bool,
    ) -> Result<B::Weight, BackendError> {
        let mut rng = Rng::new((outs[0] + 100 * cols) as u32);
        let mut random = |shape: &[usize], scale| HostTensor::random(&mut rng, self.dtype, shape, 0.0, scale);
        let outs = outs.iter().filter(|&&rows| rows > 0);
        let tensors: Vec<_> =
            outs.map(|&rows| (random(&[rows, cols], 0.2), bias.then(|| random(&[rows], 0.5)))).collect();
        let parts: Vec<_> = tensors
            .iter()
            .map(|(weight, bias)| LinearPart {
                weight: weight.view(),
                bias: bias.as_ref().map(HostTensor::view),
            })
            .collect();
        let source = LinearSource { name: "test", parts: &parts, quant: self.quant };
        backend.load_linear(&source)
    }

    /// Everything that a quantized weight serves for, for each number of rows.
    fn outputs<B: Backend>(&self, backend: &mut B, mlp: RunMlp<B>) -> Result<Vec<Output>, BackendError> {
        let (out_features, in_features) = (self.out_features(), self.in_features);
        let layers = Layers::<B> {
            linear: self.load(backend, self.outs, in_features, self.bias)?,
            table: self.load(backend, &[out_features], in_features, false)?,
            gated: self.load(backend, &[out_features, out_features], in_features, false)?,
            down: self.load(backend, &[in_features], out_features, self.bias)?,
        };
        let mut outputs = Vec::new();
        for &rows in ROWS {
            self.step(backend, &layers, rows, mlp, &mut outputs)?;
        }
        Ok(outputs)
    }

    fn step<B: Backend>(
        &self,
        backend: &mut B,
        layers: &Layers<B>,
        rows: usize,
        mlp: RunMlp<B>,
        outputs: &mut Vec<Output>,
    ) -> Result<(), BackendError> {
        let (out_features, in_features) = (self.out_features(), self.in_features);
        let x = self.input(backend, rows)?;
        let mut wide = backend.alloc(BufRole::Hidden, rows, out_features)?;
        let mut logits = backend.alloc(BufRole::Logits, rows, out_features)?;
        let mut residual = backend.alloc(BufRole::Residual, rows, in_features)?;
        prepare(backend, rows, out_features)?;

        let Layers { linear, table, .. } = layers;
        backend.run(None, |backend| backend.linear(Linear { x: &x, weight: linear, out: &mut wide }))?;
        outputs.push(("linear", rows, self.rounded(backend.read(&wide, rows)?)));
        backend.run(None, |backend| {
            backend.logits(Logits { x: &x, head: table, soft_cap: None, out: &mut logits })
        })?;
        outputs.push(("logits", rows, backend.read(&logits, rows.div_ceil(2))?));
        backend.run(None, |backend| backend.embed(Embed { table, scale: 0.7, out: &mut residual }))?;
        outputs.push(("embed", rows, backend.read(&residual, rows)?));
        for (name, shape) in [("plain mlp", MlpShape::Plain), ("gated mlp", MlpShape::Gated)] {
            let out = mlp(self, backend, layers, shape, rows)?;
            outputs.push((name, rows, self.rounded(out)));
        }
        Ok(())
    }

    fn out_features(&self) -> usize {
        self.outs.iter().sum()
    }

    fn input<B: Backend>(&self, backend: &mut B, rows: usize) -> Result<B::Buf, BackendError> {
        let mut x = backend.alloc(BufRole::Hidden, rows, self.in_features)?;
        backend.write(&mut x, &self.rounded(activations(rows, self.in_features)))?;
        Ok(x)
    }

    /// As the backend rounds between operations.
    fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
        let dtype = self.rounded.unwrap_or(DType::F32);
        values.iter_mut().for_each(|value| *value = round_to(dtype, *value));
        values
    }

    /// How far values may lie from the reference, of the largest. Integers: not at all. Sums of fp8 numbers are rounded: once
    /// to the buffer's type, where two neighbours of bf16 are a 128th apart, and what goes into a second layer may move
    /// to a neighbour in fp8, an eighth away.
    fn tolerance(&self, op: &str) -> f32 {
        match (self.quant, op) {
            (QuantFormat::Fp8, "linear" | "logits") => 1.0 / 128.0,
            (QuantFormat::Fp8, "plain mlp" | "gated mlp") => 1.0 / 8.0,
            _ => 0.0,
        }
    }

    fn assert_agrees(&self, expected: &[Output], got: &[Output]) {
        for ((name, rows, want), (_, _, have)) in expected.iter().zip(got) {
            assert_eq!(want.len(), have.len(), "{self:?}, {rows} rows, {name}");
            let columns = want.len() / if *name == "logits" { rows.div_ceil(2) } else { *rows };
            for (row, (want, have)) in want.chunks(columns).zip(have.chunks(columns)).enumerate() {
                let what = format_args!("{self:?}, {rows} rows, {name}, row {row}");
                assert_close(what, want, have, self.tolerance(name) * largest(want));
            }
        }
    }
}

/// The layer's first weight, and its rows.
fn up_of<'a, B: Backend>(case: &Case, layers: &'a Layers<B>, shape: MlpShape) -> (&'a B::Weight, usize) {
    match shape {
        MlpShape::Plain => (&layers.linear, case.out_features()),
        MlpShape::Gated => (&layers.gated, 2 * case.out_features()),
    }
}

/// In one operation, with `relu`, which is exact.
fn mlp<B: Backend>(
    case: &Case,
    backend: &mut B,
    layers: &Layers<B>,
    shape: MlpShape,
    rows: usize,
) -> Result<Vec<f32>, BackendError> {
    let (up, up_features) = up_of(case, layers, shape);
    let x = case.input(backend, rows)?;
    let mut scratch = backend.alloc(BufRole::Hidden, rows, up_features)?;
    let mut out = backend.alloc(BufRole::Hidden, rows, case.in_features)?;
    backend.run(None, |backend| {
        let (down, activation) = (&layers.down, Activation::Relu);
        backend.mlp(Mlp {
            x: &x,
            shape,
            up,
            down,
            activation,
            up_lora: None,
            down_lora: None,
            scratch: &mut scratch,
            out: &mut out,
        })
    })?;
    backend.read(&out, rows)
}

/// By its definition, with rounding after each part.
fn mlp_in_parts<B: Backend>(
    case: &Case,
    backend: &mut B,
    layers: &Layers<B>,
    shape: MlpShape,
    rows: usize,
) -> Result<Vec<f32>, BackendError> {
    let ((up, up_features), width) = (up_of(case, layers, shape), case.out_features());
    let x = case.input(backend, rows)?;
    let mut scratch = backend.alloc(BufRole::Hidden, rows, up_features)?;
    backend.run(None, |backend| backend.linear(Linear { x: &x, weight: up, out: &mut scratch }))?;
    let projected = case.rounded(backend.read(&scratch, rows)?);
    let activated = projected.chunks(up_features).flat_map(|row| {
        let gated = |i: usize| if shape == MlpShape::Gated { row[width + i] } else { 1.0 };
        (0..width).map(move |i| Activation::Relu.apply(row[i]) * gated(i))
    });
    let activated = case.rounded(activated.collect());
    let mut hidden = backend.alloc(BufRole::Hidden, rows, width)?;
    let mut out = backend.alloc(BufRole::Hidden, rows, case.in_features)?;
    backend.write(&mut hidden, &activated)?;
    backend
        .run(None, |backend| backend.linear(Linear { x: &hidden, weight: &layers.down, out: &mut out }))?;
    backend.read(&out, rows)
}

/// Random rows of all magnitudes, among them rows of zeros and of numbers that count as zero.
fn activations(rows: usize, cols: usize) -> Vec<f32> {
    let mut rng = Rng::new(rows as u32);
    let magnitude = |row: usize| [1.0, 1e-3, 0.0, 300.0, 0.9 * TINY, 1e-6, 1e10][row % 7];
    (0..rows * cols).map(|i| magnitude(i / cols) * rng.signed()).collect()
}

/// A step of `rows` sequences of one token. Every second row has logits.
fn prepare<B: Backend>(backend: &mut B, rows: usize, vocab: usize) -> Result<(), BackendError> {
    let numbers: Vec<u32> = (0..=rows as u32).collect();
    let slots: Vec<_> = numbers[..rows].iter().map(|&slot| Slot(slot)).collect();
    let token_ids: Vec<_> = numbers[..rows].iter().map(|n| n * 31 % vocab as u32).collect();
    let kind = LogitKind::PromptLogprob { target: 0 };
    let logit_rows: Vec<_> =
        (0..rows as u32).step_by(2).map(|row| LogitRow { row, slot: Slot(row), position: 1, kind }).collect();
    backend.prepare(&StepInput {
        step: StepId(0),
        token_ids: &token_ids,
        positions: &vec![0; rows],
        slot_mapping: &numbers[..rows],
        cu_seqlens_q: &numbers,
        seq_lens: &vec![1; rows],
        seq_slots: &slots,
        seq_adapters: &[],
        block_tables: &numbers[..rows],
        max_blocks_per_seq: 1,
        logit_rows: &logit_rows,
        block_copies: &[],
        seqs: &vec![None; rows],
    })
}
