//! Adapters: the values of the reference, and rows that do not show who else has which adapter. Rows without one have the
//! bits of a step in which nobody has any.

use quire_core::{AdapterId, DType, QuantFormat};

use super::compare::{assert_close, same_bits, scale};
use super::random::{HostTensor, Rng};
use super::rows::{input, prepare};
use super::{Support, Tolerance};
use crate::reference::RefBackend;
use crate::{
    Activation, AddLora, Backend, BackendError, BufRole, GraphKey, Linear, LinearPart, LinearSource,
    LoraPart, LoraSource, Mlp, MlpShape,
};

#[derive(Clone, Copy, Debug)]
struct Case {
    hidden: usize,
    /// Of the three merged parts of the linear layer.
    outs: [usize; 3],
    ffn: usize,
    mlp: MlpShape,
    activation: Activation,
    /// Of the base weights.
    dtype: DType,
    lora_dtype: DType,
    ranks: [usize; NUM_ADAPTERS],
}

/// The last one adapts only the second part of each layer that is several merged.
const NUM_ADAPTERS: usize = 3;

const CASE: Case = Case {
    hidden: 64,
    outs: [48, 16, 16],
    ffn: 32,
    mlp: MlpShape::Gated,
    activation: Activation::Silu,
    dtype: DType::F32,
    lora_dtype: DType::F32,
    ranks: [8, 16, 1],
};

const CASES: &[Case] = &[
    CASE,
    Case { ffn: 48, dtype: DType::BF16, lora_dtype: DType::BF16, ranks: [4, 4, 4], ..CASE },
    Case {
        mlp: MlpShape::Plain,
        activation: Activation::GeluTanh,
        dtype: DType::F16,
        ranks: [1, 2, 3],
        ..CASE
    },
    Case { hidden: 288, outs: [160, 32, 32], ffn: 352, dtype: DType::BF16, ranks: [17, 64, 33], ..CASE },
    Case { hidden: 32, outs: [64, 32, 32], ffn: 96, lora_dtype: DType::F16, ranks: [130, 32, 8], ..CASE },
];

/// Rows of the largest step.
const MAX_ROWS: usize = 40;
const INPUT_SEED: u32 = 3000;
/// What of a hidden layer that is quantized may round to the other neighbour, and more where activations are rounded
/// between operations.
const QUANTIZED: f32 = 2e-2;
const QUANTIZED_AND_ROUNDED: f32 = 6e-2;

pub(super) fn run<B: Backend>(
    quant: QuantFormat,
    tolerance: Tolerance,
    support: Support,
    make: &mut impl FnMut() -> B,
) {
    let tolerance = match (quant, support.dtype) {
        (QuantFormat::None, _) => tolerance.f32,
        (_, None) => QUANTIZED,
        (_, Some(_)) => QUANTIZED_AND_ROUNDED,
    };
    for case in CASES {
        let dtype = support.dtype.unwrap_or(case.dtype);
        let case = &Case { dtype, ..*case };
        let adapters: Vec<_> = (0..MAX_ROWS).map(adapter_of).collect();
        let all: Vec<usize> = (0..MAX_ROWS).collect();
        let expected = Layers::load(RefBackend::new(), case, quant).rows(&all, &adapters);
        let mut layers = Layers::load(make(), case, quant);
        let got = layers.rows(&all, &adapters);
        assert_rows_close(case, &expected, &got, tolerance);

        let nobody = layers.rows(&all, &[None; MAX_ROWS]);
        for (row, adapter) in adapters.iter().enumerate() {
            let same = got[row].iter().zip(&nobody[row]).all(|(a, b)| same_bits(a, b));
            assert_eq!(same, adapter.is_none(), "{case:?}: row {row} of adapter {adapter:?} and without");
        }
        // Alone, in other company, in another order, and in another backend.
        let mut rng = Rng::new(31);
        let mut shuffled = all.clone();
        rng.shuffle(&mut shuffled);
        // Tests of quantized layers change the instruction set, which f32 does not hide.
        let mut other = if quant == QuantFormat::None { Layers::load(make(), case, quant) } else { layers };
        for rows in all[..9].chunks(1).chain(shuffled.chunks(13)).chain([&shuffled[..]]) {
            let own: Vec<_> = rows.iter().map(|&row| adapters[row]).collect();
            for (row, have) in rows.iter().zip(other.rows(rows, &own)) {
                let same = got[*row].iter().zip(&have).all(|(a, b)| same_bits(a, b));
                assert!(same, "{case:?}: row {row} has other bits among {}", rows.len());
            }
        }
    }
}

/// Runs of rows of one adapter, changes from row to row, and rows without.
fn adapter_of(row: usize) -> Option<AdapterId> {
    let id = match row {
        0..20 => row * 7 % 4,
        _ => row / 9 % 4,
    };
    (id < NUM_ADAPTERS).then_some(AdapterId(id as u32))
}

/// Results of the linear layer and of the feed-forward layer.
type RowOutputs = [Vec<f32>; 2];

fn assert_rows_close(case: &Case, expected: &[RowOutputs], got: &[RowOutputs], tolerance: f32) {
    for (layer, name) in ["linear", "feed-forward"].iter().enumerate() {
        let bound = tolerance * scale(expected.iter().flat_map(|row| &row[layer]));
        for (row, (want, have)) in expected.iter().zip(got).enumerate() {
            assert_close(format_args!("{case:?}: {name}, row {row}"), &want[layer], &have[layer], bound);
        }
    }
}

/// Two layers with their adapters and buffers.
struct Layers<'a, B: Backend> {
    case: &'a Case,
    backend: B,
    linear: B::Weight,
    linear_lora: B::Lora,
    up: B::Weight,
    up_lora: B::Lora,
    down: B::Weight,
    down_lora: B::Lora,
    x: B::Buf,
    wide: B::Buf,
    scratch: B::Buf,
    out: B::Buf,
}

impl<'a, B: Backend> Layers<'a, B> {
    fn load(backend: B, case: &'a Case, quant: QuantFormat) -> Self {
        Self::try_load(backend, case, quant).unwrap_or_else(|error| panic!("{case:?}: {error}"))
    }

    fn try_load(mut backend: B, case: &'a Case, quant: QuantFormat) -> Result<Self, BackendError> {
        let (backend_ref, rng) = (&mut backend, &mut Rng::new(37));
        let ups: &[usize] = if case.mlp == MlpShape::Gated { &[case.ffn; 2] } else { &[case.ffn] };
        let linear = load_linear(backend_ref, rng, case, quant, &case.outs, case.hidden)?;
        let linear_lora = load_lora(backend_ref, rng, case, &case.outs, case.hidden)?;
        let up = load_linear(backend_ref, rng, case, quant, ups, case.hidden)?;
        let up_lora = load_lora(backend_ref, rng, case, ups, case.hidden)?;
        let down = load_linear(backend_ref, rng, case, quant, &[case.hidden], case.ffn)?;
        let down_lora = load_lora(backend_ref, rng, case, &[case.hidden], case.ffn)?;
        let mut alloc = |cols| backend.alloc(BufRole::Hidden, MAX_ROWS, cols);
        Ok(Self {
            linear,
            linear_lora,
            up,
            up_lora,
            down,
            down_lora,
            x: alloc(case.hidden)?,
            wide: alloc(case.outs.iter().sum())?,
            scratch: alloc(ups.iter().sum())?,
            out: alloc(case.hidden)?,
            case,
            backend,
        })
    }

    /// The layers' results for rows of the test's input, in a step of their own.
    fn rows(&mut self, rows: &[usize], adapters: &[Option<AdapterId>]) -> Vec<RowOutputs> {
        let outputs = self.try_rows(rows, adapters);
        outputs.unwrap_or_else(|error| panic!("{:?}, {} rows: {error}", self.case, rows.len()))
    }

    fn try_rows(
        &mut self,
        rows: &[usize],
        adapters: &[Option<AdapterId>],
    ) -> Result<Vec<RowOutputs>, BackendError> {
        let has_adapters = adapters.iter().any(Option::is_some);
        let Self { case, backend, .. } = self;
        let values: Vec<f32> = rows.iter().flat_map(|&row| input(INPUT_SEED, row, case.hidden)).collect();
        let mut results = Vec::new();
        // Twice: what a backend records is replayed.
        for _ in 0..2 {
            backend.write(&mut self.x, &values)?;
            prepare(backend, rows.len(), adapters)?;
            backend.run(Some(GraphKey(u32::from(has_adapters))), |backend| {
                backend.linear(Linear { x: &self.x, weight: &self.linear, out: &mut self.wide })?;
                if has_adapters {
                    backend.add_lora(AddLora { x: &self.x, lora: &self.linear_lora, out: &mut self.wide })?;
                }
                backend.mlp(Mlp {
                    x: &self.x,
                    shape: case.mlp,
                    up: &self.up,
                    down: &self.down,
                    activation: case.activation,
                    up_lora: has_adapters.then_some(&self.up_lora),
                    down_lora: has_adapters.then_some(&self.down_lora),
                    scratch: &mut self.scratch,
                    out: &mut self.out,
                })
            })?;
            let (wide, out) = (backend.read(&self.wide, rows.len())?, backend.read(&self.out, rows.len())?);
            let wide = wide.chunks(wide.len() / rows.len());
            let pairs = wide.zip(out.chunks(case.hidden)).map(|(wide, out)| [wide.to_vec(), out.to_vec()]);
            results = pairs.collect();
        }
        Ok(results)
    }
}

fn load_linear<B: Backend>(
    backend: &mut B,
    rng: &mut Rng,
    case: &Case,
    quant: QuantFormat,
    outs: &[usize],
    cols: usize,
) -> Result<B::Weight, BackendError> {
    let scale = 1.5 / (cols as f32).sqrt();
    let tensors: Vec<_> =
        outs.iter().map(|&rows| HostTensor::random(rng, case.dtype, &[rows, cols], 0.0, scale)).collect();
    let parts: Vec<_> =
        tensors.iter().map(|weight| LinearPart { weight: weight.view(), bias: None }).collect();
    backend.load_linear(&LinearSource { name: "test", parts: &parts, quant })
}

fn load_lora<B: Backend>(
    backend: &mut B,
    rng: &mut Rng,
    case: &Case,
    outs: &[usize],
    cols: usize,
) -> Result<B::Lora, BackendError> {
    let mut adapters: Vec<Vec<(usize, HostTensor, HostTensor)>> = Vec::new();
    for (adapter, &rank) in case.ranks.iter().enumerate() {
        let (mut first, mut parts) = (0, Vec::new());
        for (index, &rows) in outs.iter().enumerate() {
            let of_last = index == outs.len() / 2 && outs.len() > 1;
            if adapter + 1 < NUM_ADAPTERS || of_last || outs.len() == 1 {
                let tensor = |rng: &mut Rng, shape: [usize; 2], scale: f32| {
                    HostTensor::random(rng, case.lora_dtype, &shape, 0.0, scale)
                };
                let a = tensor(rng, [rank, cols], 1.0 / (cols as f32).sqrt());
                let b = tensor(rng, [rows, rank], 1.0 / (rank as f32).sqrt());
                parts.push((first, a, b));
            }
            first += rows;
        }
        adapters.push(parts);
    }
    let views: Vec<Vec<_>> = adapters.iter().map(|parts| parts.iter().map(part_of).collect()).collect();
    let out_features = outs.iter().sum();
    backend.load_lora(&LoraSource { name: "test", in_features: cols, out_features, adapters: &views })
}

fn part_of((first, a, b): &(usize, HostTensor, HostTensor)) -> LoraPart<'_> {
    LoraPart { first: *first, a: a.view(), b: b.view(), scaling: 1.25 }
}
