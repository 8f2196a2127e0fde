//! Attention over contexts of several partial results: against plain f64, and to the bit whoever computes them.

use quire_backend::{
    Attention, AttnShape, Backend, BackendError, BufRole, KvLayerShape, KvLayout, LogitRow, RopeAndCache,
    StepInput,
};
use quire_core::{DType, Slot, StepId};
use quire_cpu::{CpuBackend, CpuConfig, Isa, Precision};

const SHAPE: AttnShape = AttnShape { num_heads: 4, num_kv_heads: 2, head_dim: 40 };
const BLOCK_SIZE: u32 = 16;
const CONTEXT: u32 = 2500;
const SCALE: f32 = 0.3;

/// Of each query head.
const SINKS: [f32; 4] = [3.0, -1.0, 9.5, 6.0];

/// What is asked: the last rows of the context, this many of them, a sliding window, and what bends the weights.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: u32,
    window: Option<u32>,
    soft_cap: Option<f32>,
    has_sinks: bool,
    dtype: DType,
}

fn noise(i: usize) -> f32 {
    let x = (i as u64).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((x >> 33) as f32 / (1u64 << 31) as f32 - 0.5) * 4.0
}

/// Fills the cache in one step, then attends with the last rows in another.
fn outputs(case: Case, threads: usize, max_isa: Isa) -> Result<Vec<f32>, BackendError> {
    let mut backend = CpuBackend::new(CpuConfig { threads, max_isa, precision: Precision::Bf16 })?;
    let layout = KvLayout {
        num_blocks: CONTEXT.div_ceil(BLOCK_SIZE),
        block_size: BLOCK_SIZE,
        layers: vec![KvLayerShape { num_kv_heads: SHAPE.num_kv_heads, head_dim: SHAPE.head_dim }],
        dtype: case.dtype,
    };
    let mut kv = backend.alloc_kv(&layout)?;
    let mut qkv = backend.alloc(BufRole::Hidden, CONTEXT as usize, SHAPE.qkv_size())?;
    let mut out = backend.alloc(BufRole::Hidden, CONTEXT as usize, SHAPE.q_size())?;
    let values: Vec<f32> = (0..CONTEXT as usize * SHAPE.qkv_size()).map(noise).collect();
    backend.write(&mut qkv, &values)?;
    prepare(&mut backend, CONTEXT)?;
    let (shape, kv_mut) = (SHAPE, &mut kv);
    backend.rope_and_cache(RopeAndCache {
        qkv: &mut qkv,
        shape,
        qk_norm: None,
        eps: 0.0,
        rope: None,
        kv: kv_mut,
        layer: 0,
    })?;
    prepare(&mut backend, case.rows)?;
    let first = (CONTEXT - case.rows) as usize * SHAPE.qkv_size();
    backend.write(&mut qkv, &values[first..])?;
    let sinks = SINKS.to_vec();
    backend.attention(Attention {
        qkv: &qkv,
        shape,
        scale: SCALE,
        soft_cap: case.soft_cap,
        window: case.window,
        sinks: case.has_sinks.then_some(&sinks),
        kv: &kv,
        layer: 0,
        out: &mut out,
    })?;
    backend.read(&out, case.rows as usize)
}

/// A step of the last `rows` rows of the context.
fn prepare(backend: &mut CpuBackend, rows: u32) -> Result<(), BackendError> {
    let positions: Vec<u32> = (CONTEXT - rows..CONTEXT).collect();
    let blocks: Vec<u32> = (0..CONTEXT.div_ceil(BLOCK_SIZE)).collect();
    let logit_rows: [LogitRow; 0] = [];
    backend.prepare(&StepInput {
        step: StepId(0),
        token_ids: &vec![0; rows as usize],
        positions: &positions,
        slot_mapping: &positions,
        cu_seqlens_q: &[0, rows],
        seq_lens: &[CONTEXT],
        seq_slots: &[Slot(0)],
        seq_adapters: &[],
        block_tables: &blocks,
        max_blocks_per_seq: blocks.len() as u32,
        logit_rows: &logit_rows,
        block_copies: &[],
        seqs: &[],
    })
}

/// One row of one head, in f64.
fn expected(position: usize, head: usize, case: Case) -> Vec<f64> {
    let (d, stride) = (SHAPE.head_dim as usize, SHAPE.qkv_size());
    let kv_head = head / (SHAPE.num_heads / SHAPE.num_kv_heads) as usize;
    let at = |position: usize, column: usize| f64::from(noise(position * stride + column));
    let first = case.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
    let sink = if case.has_sinks { f64::from(SINKS[head]).exp() } else { 0.0 };
    let (mut sum, mut out) = (sink, vec![0.0; d]);
    for key in first..=position {
        let k = SHAPE.q_size() + kv_head * d;
        let v = k + SHAPE.kv_size();
        let score: f64 = (0..d).map(|i| at(position, head * d + i) * at(key, k + i)).sum();
        let score = score * f64::from(SCALE);
        let weight =
            case.soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()).exp();
        sum += weight;
        (0..d).for_each(|i| out[i] += weight * at(key, v + i));
    }
    out.iter().map(|x| x / sum).collect()
}

#[test]
fn partial_results_make_a_whole() -> Result<(), BackendError> {
    for dtype in [DType::BF16, DType::I8] {
        for (rows, window, soft_cap, has_sinks) in [
            (1, None, None, false),
            (3, Some(1500), None, true),
            (40, None, Some(3.0), true),
            (1, Some(700), Some(3.0), false),
        ] {
            let case = Case { rows, window, soft_cap, has_sinks, dtype };
            let one = outputs(case, 1, Isa::detect())?;
            for threads in [2, 16] {
                assert!(one == outputs(case, threads, Isa::detect())?, "{case:?} with {threads} threads");
            }
            assert!(one == outputs(case, 3, Isa::detect().min(Isa::Avx2))?, "{case:?}, emulated");
            if rows > 1 {
                let last = outputs(Case { rows: 1, ..case }, 16, Isa::detect())?;
                assert!(one.ends_with(&last), "{case:?}: the last row alone");
            }
            let d = SHAPE.head_dim as usize;
            for head in 0..SHAPE.num_heads as usize {
                let want = expected(CONTEXT as usize - 1, head, case);
                let got = &one[one.len() - SHAPE.q_size() + head * d..][..d];
                let error = want.iter().zip(got).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
                assert!(error < 0.03, "{case:?}, head {head}: {error}");
            }
        }
    }
    Ok(())
}
