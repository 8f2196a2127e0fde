//! The grid of shapes, and the three questions asked at each point: right values, batch invariance, block copies.

use quire_core::{BlockCopy, BlockId, DType, HostBlockId, HostCopy};

use super::compare::{assert_close, same_bits, scale};
use super::model::{Shape, TinyModel};
use super::random::Rng;
use super::schedule::{Piece, Sequence, Step, Trace, alone, execute, mixed, sequences};
use super::{Support, Tolerance};
use crate::reference::RefBackend;
use crate::{Activation, AttnShape, Backend, MlpShape};

const fn heads(num_heads: u32, num_kv_heads: u32, head_dim: u32) -> AttnShape {
    AttnShape { num_heads, num_kv_heads, head_dim }
}

const BASE: Shape = Shape {
    name: "base: f32, head_dim 16, two query heads per kv head",
    hidden: 64,
    ffn: 172,
    attn: heads(4, 2, 16),
    vocab: 512,
    window: None,
    soft_cap: None,
    sinks: false,
    qk_norm: false,
    post_norms: false,
    embed_scale: 1.0,
    logit_cap: None,
    bias: false,
    rotary_dim: 16,
    mlp: MlpShape::Gated,
    activation: Activation::Silu,
    weight_dtype: DType::F32,
    kv_dtype: DType::F32,
    block_size: 16,
    num_blocks: 40,
    max_rows: 256,
};

const SHORT: &[u32] = &[1, 17, 5, 33, 40];
const LONG: &[u32] = &[150, 64, 65, 3];
/// Across one end of a tile.
const ACROSS: &[u32] = &[70, 3, 20];

/// Shapes with the lengths of the sequences to run.
const GRID: &[(Shape, &[u32])] = &[
    (BASE, SHORT),
    (
        Shape {
            name: "bf16 weights, head_dim 8, no grouping, block size 1",
            attn: heads(8, 8, 8),
            rotary_dim: 8,
            vocab: 1000,
            weight_dtype: DType::BF16,
            block_size: 1,
            num_blocks: 120,
            ..BASE
        },
        SHORT,
    ),
    (
        Shape {
            name: "bf16 weights and cache, head_dim 64, one kv head, qk norm",
            attn: heads(4, 1, 64),
            rotary_dim: 64,
            qk_norm: true,
            weight_dtype: DType::BF16,
            kv_dtype: DType::BF16,
            ..BASE
        },
        SHORT,
    ),
    (
        Shape {
            name: "f16 weights and cache, head_dim 128, window 5, block size 32",
            attn: heads(2, 1, 128),
            rotary_dim: 128,
            window: Some(5),
            weight_dtype: DType::F16,
            kv_dtype: DType::F16,
            block_size: 32,
            num_blocks: 10,
            ..BASE
        },
        SHORT,
    ),
    (
        Shape {
            name: "bias, three query heads per kv head, window 17, long",
            attn: heads(6, 2, 16),
            bias: true,
            window: Some(17),
            ..BASE
        },
        LONG,
    ),
    (Shape { name: "long, across attention tiles", weight_dtype: DType::BF16, ..BASE }, LONG),
    (
        Shape {
            name: "long, window 70 across tiles, bf16 cache",
            window: Some(70),
            kv_dtype: DType::BF16,
            block_size: 32,
            num_blocks: 12,
            ..BASE
        },
        LONG,
    ),
    (
        Shape {
            name: "soft cap that bends most scores, three query heads per kv head",
            attn: heads(6, 2, 16),
            soft_cap: Some(0.8),
            ..BASE
        },
        ACROSS,
    ),
    (
        Shape {
            name: "norms after layers, scaled embeddings, capped logits, odd widths",
            hidden: 50,
            attn: heads(3, 1, 10),
            rotary_dim: 10,
            vocab: 77,
            post_norms: true,
            embed_scale: 7.3,
            logit_cap: Some(1.2),
            ..BASE
        },
        &[9, 2],
    ),
    (
        Shape {
            name: "norms after layers, scaled embeddings, capped logits, bf16 weights",
            post_norms: true,
            embed_scale: 8.0,
            logit_cap: Some(2.0),
            weight_dtype: DType::BF16,
            ..BASE
        },
        &[17, 1],
    ),
    (
        Shape {
            name: "sinks, window 17, bf16 weights and cache",
            attn: heads(4, 2, 64),
            rotary_dim: 64,
            window: Some(17),
            sinks: true,
            weight_dtype: DType::BF16,
            kv_dtype: DType::BF16,
            ..BASE
        },
        ACROSS,
    ),
    (
        Shape {
            name: "soft cap and sinks, one kv head, bf16 cache",
            attn: heads(4, 1, 32),
            rotary_dim: 32,
            soft_cap: Some(1.5),
            sinks: true,
            kv_dtype: DType::BF16,
            ..BASE
        },
        ACROSS,
    ),
    (
        Shape {
            name: "plain feed-forward with gelu, partial rotation, odd widths",
            hidden: 50,
            ffn: 101,
            attn: heads(3, 1, 10),
            rotary_dim: 4,
            bias: true,
            vocab: 77,
            mlp: MlpShape::Plain,
            activation: Activation::GeluTanh,
            ..BASE
        },
        SHORT,
    ),
    (
        Shape {
            name: "no positions, exact gelu",
            rotary_dim: 0,
            activation: Activation::Gelu,
            weight_dtype: DType::F16,
            ..BASE
        },
        SHORT,
    ),
    (Shape { name: "relu", activation: Activation::Relu, mlp: MlpShape::Plain, ..BASE }, &[9, 2]),
    (
        Shape {
            name: "hidden 256, ffn 704, head_dim 64",
            hidden: 256,
            ffn: 704,
            attn: heads(4, 2, 64),
            rotary_dim: 64,
            qk_norm: true,
            weight_dtype: DType::BF16,
            kv_dtype: DType::BF16,
            ..BASE
        },
        &[40, 1, 18],
    ),
];

pub(super) fn run<B: Backend>(tolerance: Tolerance, support: Support, make: &mut impl FnMut() -> B) {
    for (shape, lens) in GRID {
        let shape = adapted(shape, support);
        values_and_invariance(&shape, lens, tolerance, make);
        block_copies(&shape, make);
    }
}

/// The cases whose cache is not plain f32, with this type in its place.
pub(super) fn run_kv_dtype<B: Backend>(
    kv_dtype: DType,
    tolerance: Tolerance,
    support: Support,
    make: &mut impl FnMut() -> B,
) {
    for (shape, lens) in GRID.iter().filter(|(shape, _)| shape.kv_dtype != DType::F32) {
        let shape = Shape { kv_dtype, ..adapted(shape, support) };
        values_and_invariance(&shape, lens, tolerance, make);
        block_copies(&shape, make);
    }
}

/// The case as the backend can take it.
fn adapted(shape: &Shape, support: Support) -> Shape {
    let mut shape = shape.clone();
    if let Some(dtype) = support.dtype {
        (shape.weight_dtype, shape.kv_dtype) = (dtype, dtype);
    }
    shape.block_size = shape.block_size.max(support.min_block_size);
    shape.attn.head_dim = shape.attn.head_dim.next_multiple_of(support.head_dim_multiple);
    shape
}

fn values_and_invariance<B: Backend>(
    shape: &Shape,
    lens: &[u32],
    tolerance: Tolerance,
    make: &mut impl FnMut() -> B,
) {
    let name = shape.name;
    let mut rng = Rng::new(3);
    let place = |rng: &mut Rng| sequences(rng, lens, shape.vocab, shape.block_size, shape.num_blocks);
    let seqs = place(&mut rng);
    let whole = alone(&seqs, shape.max_rows as u32);

    let mut reference = RefBackend::new();
    let expected = trace(&mut reference, shape, &seqs, &whole);
    let mut backend = make();
    let got = trace(&mut backend, shape, &seqs, &whole);
    assert_traces_close(name, &expected, &got, shape, tolerance);

    let chunk = if lens.iter().max() > Some(&64) { 37 } else { 1 };
    assert_same(name, "in small chunks", &got, &trace(&mut backend, shape, &seqs, &alone(&seqs, chunk)));
    for max_chunk in [2, 19, 60] {
        let seqs = place(&mut rng);
        let steps = mixed(&mut rng, &seqs, max_chunk);
        let mut backend = make();
        let what = format!("in mixed batches of chunks up to {max_chunk}, in other blocks");
        assert_same(name, &what, &got, &trace(&mut backend, shape, &seqs, &steps));
    }
}

/// A second sequence takes over the first one's blocks by copies (through a third place) and goes on from there.
fn block_copies<B: Backend>(shape: &Shape, make: &mut impl FnMut() -> B) {
    let (prefix, total) = (shape.block_size + 1, shape.block_size + 4);
    let mut rng = Rng::new(9);
    let mut seqs = sequences(&mut rng, &[total; 3], shape.vocab, shape.block_size, shape.num_blocks);
    seqs[1].tokens = seqs[0].tokens.clone();
    let copies = |from: &Sequence, to: &Sequence| -> Vec<BlockCopy> {
        let pairs = from.block_table.iter().zip(&to.block_table);
        pairs.map(|(&src, &dst)| BlockCopy { group: 0, src: BlockId(src), dst: BlockId(dst) }).collect()
    };
    let mut block_copies = copies(&seqs[0], &seqs[2]);
    block_copies.extend(copies(&seqs[2], &seqs[1]));
    let steps = [
        vec![Piece { seq: 0, start: 0, len: prefix }].into(),
        Step {
            pieces: vec![Piece { seq: 1, start: prefix, len: total - prefix }],
            block_copies,
            ..Step::default()
        },
        vec![Piece { seq: 0, start: prefix, len: total - prefix }].into(),
    ];
    let got = trace(&mut make(), shape, &seqs, &steps);
    for position in prefix..total {
        let (own, copied) = (&got[&(0, position)], &got[&(1, position)]);
        for ((op, own), (_, copied)) in own.values.iter().zip(&copied.values) {
            assert!(
                same_bits(own, copied),
                "{}: position {position}, {op}: differs on copied blocks",
                shape.name
            );
        }
    }
}

/// A sequence goes to the host tier while others, in steps that copy, use its blocks on the device, and goes on in other
/// blocks: it never notices.
pub(super) fn host_copies<B: Backend>(make: &mut impl FnMut() -> B) {
    for (shape, _) in GRID {
        let (prefix, total) = (shape.block_size + 1, shape.block_size + 4);
        let mut rng = Rng::new(11);
        let mut seqs = sequences(&mut rng, &[total; 3], shape.vocab, shape.block_size, shape.num_blocks);
        // Sequence 1 goes on with what 0 began; 2 overwrites the blocks of 0.
        seqs[1].tokens = seqs[0].tokens.clone();
        seqs[2].block_table = seqs[0].block_table.clone();
        let copies = |seq: &Sequence, first: u32| -> Vec<HostCopy> {
            let copy =
                |(&device, host)| HostCopy { group: 0, device: BlockId(device), host: HostBlockId(host) };
            seq.block_table.iter().zip(first..).map(copy).collect()
        };
        let whole = |seq, start| vec![Piece { seq, start, len: total - start }];
        let copied = [
            vec![Piece { seq: 0, start: 0, len: prefix }].into(),
            Step { pieces: whole(2, 0), copies_to_host: copies(&seqs[0], 1), ..Step::default() },
            Step {
                pieces: whole(1, prefix),
                copies_to_host: copies(&seqs[2], 1 + seqs[0].block_table.len() as u32),
                copies_to_device: copies(&seqs[1], 1),
                ..Step::default()
            },
        ];
        let mut backend = make();
        let num_host_blocks = 1 + 2 * seqs[0].block_table.len() as u32;
        let got = TinyModel::load(&mut backend, shape).and_then(|mut model| {
            model.add_host_blocks(&mut backend, num_host_blocks)?;
            execute(&mut backend, &mut model, &seqs, &copied)
        });
        let got = got.unwrap_or_else(|error| panic!("{} on {}: {error}", shape.name, backend.name()));
        let expected = trace(&mut make(), shape, &seqs, &[whole(0, 0).into()]);
        for position in prefix..total {
            let (alone, moved) = (&expected[&(0, position)], &got[&(1, position)]);
            for ((op, alone), (_, moved)) in alone.values.iter().zip(&moved.values) {
                let name = shape.name;
                assert!(
                    same_bits(alone, moved),
                    "{name}: position {position}, {op}: differs after the host tier"
                );
            }
        }
    }
}

fn trace<B: Backend>(backend: &mut B, shape: &Shape, seqs: &[Sequence], steps: &[Step]) -> Trace {
    let run = TinyModel::load(backend, shape).and_then(|mut model| execute(backend, &mut model, seqs, steps));
    run.unwrap_or_else(|error| panic!("{} on {}: {error}", shape.name, backend.name()))
}

fn assert_traces_close(name: &str, expected: &Trace, got: &Trace, shape: &Shape, tolerance: Tolerance) {
    let tolerance = tolerance.f32
        + match shape.kv_dtype {
            DType::F16 => tolerance.f16_kv,
            DType::BF16 => tolerance.bf16_kv,
            DType::F8E4M3 => tolerance.fp8_kv,
            _ => 0.0,
        };
    for (at, want) in expected {
        let have = &got[at];
        let logits = ("logits".to_owned(), want.logits.clone().unwrap_or_default());
        let got_logits = ("logits".to_owned(), have.logits.clone().unwrap_or_default());
        let wanted = want.values.iter().chain([&logits]);
        for ((op, want), (_, have)) in wanted.zip(have.values.iter().chain([&got_logits])) {
            let what = format_args!("{name}: sequence and position {at:?}, {op}");
            assert_close(what, want, have, tolerance * scale(want));
        }
    }
}

fn assert_same(name: &str, what: &str, expected: &Trace, got: &Trace) {
    assert_eq!(expected.len(), got.len(), "{name}: {what}: rows");
    for (at, want) in expected {
        let have = &got[at];
        for ((op, want), (_, have)) in want.values.iter().zip(&have.values) {
            assert!(
                same_bits(want, have),
                "{name}: sequence and position {at:?}, {op}: other bits {what} than alone"
            );
        }
        if let (Some(want), Some(have)) = (&want.logits, &have.logits) {
            assert!(
                same_bits(want, have),
                "{name}: sequence and position {at:?}, logits: other bits {what} than alone"
            );
        }
    }
}
