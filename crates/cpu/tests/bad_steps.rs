//! A step that does not fit its buffers is an error, not undefined behaviour, and the backend stays usable.

use quire_backend::{
    Attention, AttnShape, Backend, BackendError, BufRole, Embed, KvLayerShape, KvLayout, LinearPart,
    LinearSource, RopeAndCache, StepInput,
};
use quire_core::{DType, QuantFormat, Slot, StepId, TensorView};
use quire_cpu::{CpuBackend, CpuBuf, CpuConfig, CpuKv, CpuWeight};

const SHAPE: AttnShape = AttnShape { num_heads: 2, num_kv_heads: 1, head_dim: 8 };

struct Fixture {
    backend: CpuBackend,
    table: CpuWeight,
    kv: CpuKv,
    hidden: CpuBuf,
    qkv: CpuBuf,
    out: CpuBuf,
}

/// A vocabulary of 10, hidden size 8, four blocks of two tokens, four rows.
fn fixture() -> Result<Fixture, BackendError> {
    let config = CpuConfig { threads: 2, ..CpuConfig::default() };
    let mut backend = CpuBackend::new(config)?;
    let weight = TensorView { dtype: DType::BF16, shape: &[10, 8], data: &[0; 160] };
    let parts = [LinearPart { weight, bias: None }];
    let source = LinearSource { name: "embed", parts: &parts, quant: QuantFormat::None };
    let layout = KvLayout {
        num_blocks: 4,
        block_size: 2,
        layers: vec![KvLayerShape { num_kv_heads: 1, head_dim: 8 }],
        dtype: DType::F32,
    };
    Ok(Fixture {
        table: backend.load_linear(&source)?,
        kv: backend.alloc_kv(&layout)?,
        hidden: backend.alloc(BufRole::Hidden, 4, 8)?,
        qkv: backend.alloc(BufRole::Hidden, 4, SHAPE.qkv_size())?,
        out: backend.alloc(BufRole::Hidden, 4, SHAPE.q_size())?,
        backend,
    })
}

impl Fixture {
    /// One sequence of two rows.
    fn run(&mut self, token: u32, slot: u32, block: u32) -> Result<(), BackendError> {
        let Self { backend, table, kv, hidden, qkv, out } = self;
        backend.prepare(&StepInput {
            step: StepId(1),
            token_ids: &[1, token],
            positions: &[0, 1],
            slot_mapping: &[0, slot],
            cu_seqlens_q: &[0, 2],
            seq_lens: &[2],
            seq_slots: &[Slot(0)],
            seq_adapters: &[],
            block_tables: &[block],
            max_blocks_per_seq: 1,
            logit_rows: &[],
            block_copies: &[],
            seqs: &[],
        })?;
        backend.embed(Embed { table, scale: 1.0, out: hidden })?;
        backend.rope_and_cache(RopeAndCache {
            qkv,
            shape: SHAPE,
            qk_norm: None,
            eps: 1e-6,
            rope: None,
            kv,
            layer: 0,
        })?;
        backend.attention(Attention {
            qkv,
            shape: SHAPE,
            scale: 1.0,
            soft_cap: None,
            window: None,
            sinks: None,
            kv,
            layer: 0,
            out,
        })
    }
}

#[test]
fn indices_out_of_range_are_errors() {
    let mut fixture = fixture().unwrap();
    fixture.run(9, 1, 0).unwrap();
    for (token, slot, block, named) in [
        (10, 1, 0, "token id 10"),
        (9, 8, 0, "64..72 of 64"),
        (9, 1, 4, "block 4"),
        (9, 1, u32::MAX, "block"),
    ] {
        let error = fixture.run(token, slot, block).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
        fixture.run(9, 1, 0).unwrap();
    }
}

#[test]
fn buffers_of_the_wrong_shape_are_errors() {
    let mut fixture = fixture().unwrap();
    fixture.hidden = fixture.backend.alloc(BufRole::Hidden, 1, 8).unwrap();
    let error = fixture.run(1, 1, 0).unwrap_err().to_string();
    assert!(error.contains("embed") && error.contains("[2, 8]"), "{error}");
}
