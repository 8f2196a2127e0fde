//! Quantized layers: their arithmetic is defined to the bit, so every backend gives the numbers of the reference.

use quire_core::{DType, QuantFormat, Slot, StepId};

use super::random::{HostTensor, Rng};
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
/// Rows of a step.
const ROWS: &[usize] = &[1, 2, 3, 7, 13, 33];

pub(super) fn run<B: Backend>(quant: QuantFormat, make: &mut impl FnMut() -> B) {
    for (i, &in_features) in IN_FEATURES.iter().enumerate() {
        for (j, outs) in OUT_FEATURES.iter().enumerate() {
            let dtype = [DType::BF16, DType::F32, DType::F16][(i + j) % 3];
            let case = Case { quant, in_features, outs, dtype, bias: j % 2 == 1 };
            let expected = case.outputs(&mut RefBackend::new()).expect("the reference can do this");
            let mut backend = make();
            let got = case.outputs(&mut backend);
            let got = got.unwrap_or_else(|error| panic!("{case:?} on {}: {error}", backend.name()));
            case.assert_equal(&expected, &got);
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
}

/// What an operation gave: its name, the rows of the step, and the values.
type Output = (&'static str, usize, Vec<f32>);

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
    fn outputs<B: Backend>(&self, backend: &mut B) -> Result<Vec<Output>, BackendError> {
        let (out_features, in_features) = (self.outs.iter().sum::<usize>(), self.in_features);
        let layers = Layers::<B> {
            linear: self.load(backend, self.outs, in_features, self.bias)?,
            table: self.load(backend, &[out_features], in_features, false)?,
            gated: self.load(backend, &[out_features, out_features], in_features, false)?,
            down: self.load(backend, &[in_features], out_features, self.bias)?,
        };
        let mut outputs = Vec::new();
        for &rows in ROWS {
            self.step(backend, &layers, rows, &mut outputs)?;
        }
        Ok(outputs)
    }

    /// The feed-forward layer is with `relu`, which is exact.
    fn step<B: Backend>(
        &self,
        backend: &mut B,
        layers: &Layers<B>,
        rows: usize,
        outputs: &mut Vec<Output>,
    ) -> Result<(), BackendError> {
        let (out_features, in_features) = (self.outs.iter().sum::<usize>(), self.in_features);
        let mut x = backend.alloc(BufRole::Hidden, rows, in_features)?;
        backend.write(&mut x, &activations(rows, in_features))?;
        let mut wide = backend.alloc(BufRole::Hidden, rows, out_features)?;
        let mut narrow = backend.alloc(BufRole::Hidden, rows, in_features)?;
        prepare(backend, rows, out_features)?;

        let Layers { linear, table, gated, down } = layers;
        backend.run(None, |backend| backend.linear(Linear { x: &x, weight: linear, out: &mut wide }))?;
        outputs.push(("linear", rows, backend.read(&wide, rows)?));
        backend.run(None, |backend| backend.logits(Logits { x: &x, head: table, out: &mut wide }))?;
        outputs.push(("logits", rows, backend.read(&wide, rows.div_ceil(2))?));
        backend.run(None, |backend| backend.embed(Embed { table, out: &mut narrow }))?;
        outputs.push(("embed", rows, backend.read(&narrow, rows)?));
        let shapes = [
            ("plain mlp", MlpShape::Plain, linear, out_features),
            ("gated mlp", MlpShape::Gated, gated, 2 * out_features),
        ];
        for (name, shape, up, scratch_cols) in shapes {
            let mut scratch = backend.alloc(BufRole::Hidden, rows, scratch_cols)?;
            let activation = Activation::Relu;
            backend.run(None, |backend| {
                let (scratch, out) = (&mut scratch, &mut narrow);
                backend.mlp(Mlp { x: &x, shape, up, down, activation, scratch, out })
            })?;
            outputs.push((name, rows, backend.read(&narrow, rows)?));
        }
        Ok(())
    }

    fn assert_equal(&self, expected: &[Output], got: &[Output]) {
        for ((name, rows, want), (_, _, have)) in expected.iter().zip(got) {
            assert_eq!(want.len(), have.len(), "{self:?}, {rows} rows, {name}");
            for (i, (want, have)) in want.iter().zip(have).enumerate() {
                assert!(
                    want == have,
                    "{self:?}, {rows} rows, {name}, element {i}: expected {want:e}, got {have:e}"
                );
            }
        }
    }
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
        block_tables: &numbers[..rows],
        max_blocks_per_seq: 1,
        logit_rows: &logit_rows,
        block_copies: &[],
        seqs: &vec![None; rows],
    })
}
