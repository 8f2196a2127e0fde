//! What the kernels reach on this machine, at the shapes of a Qwen3-0.6B: `cargo run --release -p quire-cpu --example
//! throughput -- [threads]`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use quire_backend::{
    Attention, AttnShape, Backend, BackendError, KvLayerShape, KvLayout, Linear, LinearPart, LinearSource,
    RopeAndCache, StepInput,
};
use quire_core::{DType, QuantFormat, Shard, Slot, StepId, TensorView};
use quire_cpu::{CpuBackend, CpuConfig, Precision};

/// Linear layers of one block: outputs, inputs.
const SHAPES: [(&str, usize, usize); 4] =
    [("qkv", 4096, 1024), ("output", 1024, 2048), ("gate+up", 6144, 1024), ("down", 1024, 3072)];

/// Forms of the weights, in turn, so that all meet the same load.
const FORMS: [(&str, QuantFormat); 3] =
    [("bf16", QuantFormat::None), ("int8", QuantFormat::Int8), ("int4", QuantFormat::Int4)];

fn main() -> Result<(), BackendError> {
    let mut config = CpuConfig { precision: Precision::Bf16, ..CpuConfig::default() };
    if let Some(threads) = std::env::args().nth(1).and_then(|arg| arg.parse().ok()) {
        config.threads = threads;
    }
    let mut backend = CpuBackend::new(config)?;
    println!("{} threads, {:?}; fastest single calls", config.threads, backend.isa());
    println!(
        "{:>8} {:>4} {}",
        "layer",
        "rows",
        FORMS.map(|(form, _)| format!("{form:>9} GB/s  Gop/s")).join("")
    );
    for (name, n, k) in SHAPES {
        for rows in [1, 4, 32, 512] {
            linear(&mut backend, name, (n, k), rows)?;
        }
    }
    for (rows, context) in [(1, 4096), (1, 65_536), (512, 512)] {
        attention(&mut backend, rows, context)?;
    }
    barrier(config.threads)
}

/// Many layers in turn, so that weights come from memory.
fn linear(
    backend: &mut CpuBackend,
    name: &str,
    (n, k): (usize, usize),
    rows: u32,
) -> Result<(), BackendError> {
    let layers = (96 << 20) / (n * k);
    // Whatever repeats after some rows is quantized in no time.
    let bytes: Vec<u8> = (0..n * k).flat_map(|i| [(i * 31 % 251) as u8, 0x3c | (i % 2) as u8]).collect();
    let weight = TensorView { dtype: DType::BF16, shape: &[n, k], data: &bytes };
    let parts = [LinearPart { weight, bias: None }];
    let mut weights = Vec::new();
    for (_, quant) in FORMS {
        let source = LinearSource { name: "w", parts: &parts, quant, shard: Shard::WHOLE };
        let layers = (0..layers).map(|_| backend.load_linear(&source)).collect::<Result<Vec<_>, _>>()?;
        weights.push(layers);
    }
    let (x, mut out) = (backend.alloc(rows as usize, k)?, backend.alloc(rows as usize, n)?);
    prepare(backend, rows, 0)?;
    let mut fastest = [f64::INFINITY; FORMS.len()];
    for _ in 0..if rows > 100 { 4 } else { 12 } {
        for (weights, fastest) in weights.iter().zip(&mut fastest) {
            for weight in weights {
                let start = Instant::now();
                backend.linear(Linear { x: &x, weight, out: &mut out })?;
                *fastest = fastest.min(start.elapsed().as_secs_f64());
            }
        }
    }
    let (weights, ops) = ((n * k) as f64, 2.0 * (n * k * rows as usize) as f64);
    let rates = fastest.iter().zip([2.0, 1.0, 0.53125]).map(|(seconds, size)| {
        format!("{:14.1} {:6.0}", weights * size / seconds / 1e9, ops / seconds / 1e9)
    });
    println!("{name:>8} {rows:>4} {}", rates.collect::<String>());
    Ok(())
}

/// `rows` new rows at the end of one sequence of `context` tokens.
fn attention(backend: &mut CpuBackend, rows: u32, context: u32) -> Result<(), BackendError> {
    let shape = AttnShape { num_heads: 16, num_kv_heads: 8, head_dim: 128 };
    let layout = KvLayout {
        num_blocks: context / 16,
        block_size: 16,
        layers: vec![KvLayerShape { num_kv_heads: 8, head_dim: 128 }],
        dtype: DType::BF16,
    };
    let mut kv = backend.alloc_kv(&layout)?;
    let mut qkv = backend.alloc(context as usize, shape.qkv_size())?;
    let mut out = backend.alloc(context as usize, shape.q_size())?;
    prepare(backend, context, 0)?;
    backend.rope_and_cache(RopeAndCache {
        qkv: &mut qkv,
        shape,
        qk_norm: None,
        eps: 1e-6,
        rope: None,
        kv: &mut kv,
        layer: 0,
    })?;
    prepare(backend, rows, context - rows)?;
    let seconds = best(|| {
        let out = &mut out;
        backend.attention(Attention { qkv: &qkv, shape, scale: 0.1, window: None, kv: &kv, layer: 0, out })
    })?;
    let keys: u64 = (context - rows..context).map(|p| u64::from(p) + 1).sum();
    let flops = 4.0 * keys as f64 * shape.q_size() as f64;
    println!(
        "attention bf16 {rows} rows, context {context}: {:.1} us, {:.1} GFLOP/s",
        seconds * 1e6,
        flops / seconds / 1e9
    );
    Ok(())
}

/// One hand-over to the team and back.
fn barrier(threads: usize) -> Result<(), BackendError> {
    let mut pool = quire_cpu::pool::Pool::new(threads)?;
    let seconds = best(|| {
        (0..1000).try_for_each(|_| pool.run(&|_| {}))?;
        Ok(())
    })?;
    println!("barrier: {:.2} us", seconds * 1e6 / 1000.0);
    Ok(())
}

/// One sequence with `rows` rows from position `first` on.
fn prepare(backend: &mut CpuBackend, rows: u32, first: u32) -> Result<(), BackendError> {
    let positions: Vec<u32> = (first..first + rows).collect();
    let blocks: Vec<u32> = (0..(first + rows).div_ceil(16)).collect();
    backend.prepare(&StepInput {
        step: StepId(0),
        token_ids: &vec![0; rows as usize],
        positions: &positions,
        slot_mapping: &positions,
        cu_seqlens_q: &[0, rows],
        seq_lens: &[first + rows],
        seq_slots: &[Slot(0)],
        block_tables: &blocks,
        max_blocks_per_seq: blocks.len() as u32,
        logit_rows: &[],
        block_copies: &[],
        seqs: &[],
    })
}

/// Seconds of the best of several runs, for at least a second in all.
fn best(mut run: impl FnMut() -> Result<(), BackendError>) -> Result<f64, BackendError> {
    run()?;
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed().as_secs_f64() < 1.0 {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}
