//! What the kernels reach on this machine, at the shapes of a Qwen3-0.6B: `cargo run --release -p quire-cpu --example
//! throughput -- [threads [row]]`, where a row is `qkv`, `down`, `rows`, `attention` (or only its `decode` or `prefill`) or the like.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use quire_backend::{
    Activation, AddNorm, Attention, AttnShape, Backend, BackendError, BufRole, KvLayerShape, KvLayout,
    Linear, LinearPart, LinearSource, Mlp, MlpShape, RopeAndCache, RopeTable, StepInput,
};
use quire_core::{DType, QuantFormat, Slot, StepId, TensorView};
use quire_cpu::ops::rope::CpuRope;
use quire_cpu::{CpuBackend, CpuBuf, CpuConfig, CpuKv, CpuWeight, Precision};

/// Linear layers of one block: outputs, inputs; as `mlp`, the last two with the nonlinearity between them.
const SHAPES: [(&str, usize, usize); 4] =
    [("qkv", 4096, 1024), ("output", 1024, 2048), ("gate+up", 6144, 1024), ("down", 1024, 3072)];

/// Layers of a cache, in turn, so that keys come from memory.
const LAYERS: usize = 6;

/// Forms of the weights, in turn, so that all meet the same load.
const FORMS: [(&str, QuantFormat); 3] =
    [("bf16", QuantFormat::None), ("int8", QuantFormat::Int8), ("int4", QuantFormat::Int4)];

fn main() -> Result<(), BackendError> {
    let mut config = CpuConfig { precision: Precision::Bf16, ..CpuConfig::default() };
    if let Some(threads) = std::env::args().nth(1).and_then(|arg| arg.parse().ok()) {
        config.threads = threads;
    }
    let mut backend = CpuBackend::new(config)?;
    println!(
        "{} threads, {:?}; layers: fastest single call and median; attention: medians",
        config.threads,
        backend.isa()
    );
    println!(
        "{:>8} {:>4} {}",
        "layer",
        "rows",
        FORMS.map(|(form, _)| format!("{form:>9} GB/s med  Gop/s  med")).join("")
    );
    let only = std::env::args().nth(2);
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    for (name, n, k) in SHAPES.into_iter().filter(|(name, ..)| wanted(name)) {
        for rows in [1, 4, 8, 32, 512] {
            linear(&mut backend, name, (n, k), rows)?;
        }
    }
    for rows in [1, 4, 8, 32, 512] {
        if wanted("mlp") {
            feed_forward(&mut backend, rows)?;
        }
    }
    for rows in [32, 512] {
        if wanted("rows") {
            row_wise(&mut backend, rows)?;
        }
    }
    let attentions =
        [(1, 1, 16_384), (8, 1, 512), (32, 1, 512), (1, 512, 512), (4, 128, 1024), (1, 512, 2048)];
    for (seqs, rows, context) in attentions
        .into_iter()
        .filter(|(_, rows, _)| wanted("attention") || wanted(if *rows == 1 { "decode" } else { "prefill" }))
    {
        for dtype in [DType::BF16, DType::I8] {
            attention(&mut backend, seqs, rows, context, dtype)?;
        }
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
    let mut weights = Vec::new();
    for (_, quant) in FORMS {
        let layers = (0..(96 << 20) / (n * k)).map(|_| load(backend, quant, (n, k)));
        weights.push(layers.collect::<Result<Vec<_>, _>>()?);
    }
    let (x, mut out) = (activations(backend, rows, k)?, backend.alloc(BufRole::Hidden, rows as usize, n)?);
    prepare(backend, 1, rows, rows)?;
    report(name, n * k, rows, weights.iter().map(Vec::len).min().unwrap_or(0), |form, layer| {
        backend.linear(Linear { x: &x, weight: &weights[form][layer], out: &mut out })
    })
}

/// Gate, up and down in one.
fn feed_forward(backend: &mut CpuBackend, rows: u32) -> Result<(), BackendError> {
    const HIDDEN: usize = 1024;
    const INTERMEDIATE: usize = 3072;
    let mut weights = Vec::new();
    for (_, quant) in FORMS {
        let mut layer = || {
            let up = load(backend, quant, (2 * INTERMEDIATE, HIDDEN))?;
            Ok::<_, BackendError>((up, load(backend, quant, (HIDDEN, INTERMEDIATE))?))
        };
        weights.push((0..10).map(|_| layer()).collect::<Result<Vec<_>, _>>()?);
    }
    let x = activations(backend, rows, HIDDEN)?;
    let mut scratch = backend.alloc(BufRole::Hidden, rows as usize, 2 * INTERMEDIATE)?;
    let mut out = backend.alloc(BufRole::Hidden, rows as usize, HIDDEN)?;
    prepare(backend, 1, rows, rows)?;
    report("mlp", 3 * HIDDEN * INTERMEDIATE, rows, 10, |form, layer| {
        let (up, down) = &weights[form][layer];
        let (scratch, out, activation) = (&mut scratch, &mut out, Activation::Silu);
        backend.mlp(Mlp {
            x: &x,
            shape: MlpShape::Gated,
            up,
            down,
            activation,
            up_lora: None,
            down_lora: None,
            scratch,
            out,
        })
    })
}

/// A layer `[n, k]`. Whatever repeats after some rows is quantized in no time.
fn load(
    backend: &mut CpuBackend,
    quant: QuantFormat,
    (n, k): (usize, usize),
) -> Result<CpuWeight, BackendError> {
    let bytes: Vec<u8> = (0..n * k).flat_map(|i| [(i * 31 % 251) as u8, 0x3c | (i % 2) as u8]).collect();
    let weight = TensorView { dtype: DType::BF16, shape: &[n, k], data: &bytes };
    let parts = [LinearPart { weight, bias: None }];
    backend.load_linear(&LinearSource { name: "w", parts: &parts, quant })
}

/// Not zeros: a multiplier that has nothing to do takes less power, and the clock rises.
fn activations(backend: &mut CpuBackend, rows: u32, k: usize) -> Result<CpuBuf, BackendError> {
    let mut x = backend.alloc(BufRole::Hidden, rows as usize, k)?;
    let values: Vec<f32> = (0..rows as usize * k).map(|i| (i * 7919 % 1013) as f32 / 506.5 - 1.0).collect();
    backend.write(&mut x, &values)?;
    Ok(x)
}

/// Times `run(form, layer)`, the forms in turn, and prints rates for so many weights and rows.
fn report(
    name: &str,
    weights: usize,
    rows: u32,
    layers: usize,
    mut run: impl FnMut(usize, usize) -> Result<(), BackendError>,
) -> Result<(), BackendError> {
    let mut times = FORMS.map(|_| Vec::new());
    for _ in 0..if rows > 100 { 4 } else { 12 } {
        for (form, times) in times.iter_mut().enumerate() {
            for layer in 0..layers {
                let start = Instant::now();
                run(form, layer)?;
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let ops = 2.0 * weights as f64 * f64::from(rows);
    let rates = times.iter_mut().zip([2.0, 1.0, 0.53125]).map(|(times, size)| {
        times.sort_by(f64::total_cmp);
        let (fastest, median) = (times[0], times[times.len() / 2]);
        let (gb, gop) = (weights as f64 * size / 1e9, ops / 1e9);
        format!("{:9.1} {:4.1} {:6.0} {:4.0}", gb / fastest, gb / median, gop / fastest, gop / median)
    });
    println!("{name:>8} {rows:>4} {}", rates.collect::<String>());
    Ok(())
}

/// A layer's keys and values and what comes before them: of `seqs` sequences of `context` tokens.
struct Cached {
    layout: KvLayout,
    kv: CpuKv,
    qkv: CpuBuf,
    norm: Vec<f32>,
    rope: CpuRope,
    turn: usize,
}

impl Cached {
    const SHAPE: AttnShape = AttnShape { num_heads: 16, num_kv_heads: 8, head_dim: 128 };

    fn new(
        backend: &mut CpuBackend,
        (seqs, context): (u32, u32),
        num_layers: usize,
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let layout = KvLayout {
            num_blocks: seqs * context / 16,
            block_size: 16,
            layers: vec![KvLayerShape { num_kv_heads: 8, head_dim: 128 }; num_layers],
            dtype,
        };
        let angles = RopeTable { inv_freq: vec![0.1; 64], max_positions: context, attention_factor: 1.0 };
        let ones = TensorView { dtype: DType::F32, shape: &[128], data: &1f32.to_le_bytes().repeat(128) };
        let mut cached = Self {
            kv: backend.alloc_kv(&layout)?,
            layout,
            qkv: activations(backend, seqs * context, Self::SHAPE.qkv_size())?,
            norm: backend.load_norm("norm", ones)?,
            rope: backend.load_rope(&angles)?,
            turn: 0,
        };
        prepare(backend, seqs, context, context)?;
        (0..num_layers).try_for_each(|_| cached.rope_and_cache(backend))?;
        Ok(cached)
    }

    /// One layer, each in turn.
    fn rope_and_cache(&mut self, backend: &mut CpuBackend) -> Result<(), BackendError> {
        self.turn = (self.turn + 1) % self.layout.layers.len();
        backend.rope_and_cache(RopeAndCache {
            qkv: &mut self.qkv,
            shape: Self::SHAPE,
            qk_norm: Some((&self.norm, &self.norm)),
            eps: 1e-6,
            rope: Some(&self.rope),
            kv: &mut self.kv,
            layer: self.turn,
        })
    }
}

/// What works row by row: rotation and cache, norm, and activations to bytes (with the product of one panel of outputs).
fn row_wise(backend: &mut CpuBackend, rows: u32) -> Result<(), BackendError> {
    const HIDDEN: usize = 1024;
    for dtype in [DType::BF16, DType::I8] {
        // As many layers as a model has, as their pages come from memory.
        let (seqs, new, context) = if rows > 100 { (1, rows, rows) } else { (rows, 1, 16) };
        let mut cached = Cached::new(backend, (seqs, context), 28, dtype)?;
        prepare(backend, seqs, new, context)?;
        report_best(&format!("rope {dtype:?}"), rows, || cached.rope_and_cache(backend))?;
    }
    prepare(backend, 1, rows, rows)?;
    let (mut residual, delta) = (activations(backend, rows, HIDDEN)?, activations(backend, rows, HIDDEN)?);
    let mut out = backend.alloc(BufRole::Hidden, rows as usize, HIDDEN)?;
    let weight = vec![1.0; HIDDEN];
    report_best("norm", rows, || {
        let (residual, out, delta) = (&mut residual, &mut out, Some(&delta));
        backend.add_norm(AddNorm { residual, delta, delta_norm: None, weight: &weight, eps: 1e-6, out })
    })?;
    for k in [HIDDEN, 3 * HIDDEN] {
        let (x, mut out) =
            (activations(backend, rows, k)?, backend.alloc(BufRole::Hidden, rows as usize, 16)?);
        let weight = load(backend, QuantFormat::Int8, (16, k))?;
        report_best(&format!("bytes of {k}"), rows, || {
            backend.linear(Linear { x: &x, weight: &weight, out: &mut out })
        })?;
    }
    Ok(())
}

fn report_best(
    name: &str,
    rows: u32,
    run: impl FnMut() -> Result<(), BackendError>,
) -> Result<(), BackendError> {
    let (least, median) = best(run)?;
    println!("{name:>13} {rows:>4} rows: {:.1} us, median {:.1}", least * 1e6, median * 1e6);
    Ok(())
}

/// `rows` new rows at the end of each of `seqs` sequences of `context` tokens.
fn attention(
    backend: &mut CpuBackend,
    seqs: u32,
    rows: u32,
    context: u32,
    dtype: DType,
) -> Result<(), BackendError> {
    let shape = Cached::SHAPE;
    let mut cached = Cached::new(backend, (seqs, context), LAYERS, dtype)?;
    let mut out = backend.alloc(BufRole::Hidden, (seqs * context) as usize, shape.q_size())?;
    prepare(backend, seqs, rows, context)?;
    let (rope_seconds, _) = best(|| cached.rope_and_cache(backend))?;
    let mut reader = Reader::new(backend)?;
    let (mut times, mut read_times, begin) = (Vec::new(), Vec::new(), Instant::now());
    while begin.elapsed().as_secs_f64() < 1.0 {
        read_times.push(reader.read(backend)?);
        prepare(backend, seqs, rows, context)?;
        let start = Instant::now();
        for _ in 0..LAYERS {
            cached.turn = (cached.turn + 1) % LAYERS;
            let (layer, out) = (cached.turn, &mut out);
            backend.attention(Attention {
                qkv: &cached.qkv,
                shape,
                scale: 0.1,
                soft_cap: None,
                window: None,
                sinks: None,
                kv: &cached.kv,
                layer,
                out,
            })?;
        }
        times.push(start.elapsed().as_secs_f64() / LAYERS as f64);
    }
    let (seconds, read) = (middle(times), Reader::BYTES as f64 / middle(read_times));
    let keys: u64 = u64::from(seqs) * (context - rows..context).map(|p| u64::from(p) + 1).sum::<u64>();
    let flops = 4.0 * keys as f64 * shape.q_size() as f64;
    let bytes = cached.layout.block_bytes() * cached.layout.num_blocks as usize / LAYERS;
    println!(
        "attention {dtype:?} {seqs} x {rows} rows, context {context}: {:.1} us, {:.1} GFLOP/s, {:.1} GB/s = {:.0} % of a layer's; rope {:.1} us",
        seconds * 1e6,
        flops / seconds / 1e9,
        bytes as f64 / seconds / 1e9,
        100.0 * bytes as f64 / seconds / read,
        rope_seconds * 1e6
    );
    Ok(())
}

fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Layers of one token in bf16, which come at the rate of memory: what else comes from there is held against them, in
/// turn, as that rate changes with whoever shares the machine.
struct Reader {
    weights: Vec<CpuWeight>,
    x: CpuBuf,
    out: CpuBuf,
    turn: usize,
}

impl Reader {
    const SHAPE: (usize, usize) = (4096, 1024);
    const LAYERS: usize = 4;
    const BYTES: usize = Self::LAYERS * 2 * Self::SHAPE.0 * Self::SHAPE.1;

    fn new(backend: &mut CpuBackend) -> Result<Self, BackendError> {
        let weights = (0..4 * Self::LAYERS).map(|_| load(backend, QuantFormat::None, Self::SHAPE));
        Ok(Self {
            weights: weights.collect::<Result<_, _>>()?,
            x: activations(backend, 1, Self::SHAPE.1)?,
            out: backend.alloc(BufRole::Hidden, 1, Self::SHAPE.0)?,
            turn: 0,
        })
    }

    /// Seconds for [`Self::BYTES`].
    fn read(&mut self, backend: &mut CpuBackend) -> Result<f64, BackendError> {
        prepare(backend, 1, 1, 1)?;
        let start = Instant::now();
        for _ in 0..Self::LAYERS {
            self.turn = (self.turn + 1) % self.weights.len();
            let weight = &self.weights[self.turn];
            backend.linear(Linear { x: &self.x, weight, out: &mut self.out })?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// One hand-over to the team and back.
fn barrier(threads: usize) -> Result<(), BackendError> {
    let mut pool = quire_cpu::pool::Pool::new(threads)?;
    let (_, seconds) = best(|| {
        (0..1000).try_for_each(|_| pool.run(&|_| {}))?;
        Ok(())
    })?;
    println!("barrier: {:.2} us", seconds * 1e6 / 1000.0);
    Ok(())
}

/// `rows` rows at the end of each of `seqs` sequences of `context` tokens.
fn prepare(backend: &mut CpuBackend, seqs: u32, rows: u32, context: u32) -> Result<(), BackendError> {
    let positions: Vec<u32> = (0..seqs).flat_map(|_| context - rows..context).collect();
    let slots: Vec<u32> = (0..seqs).flat_map(|s| s * context + context - rows..(s + 1) * context).collect();
    let max_blocks_per_seq = context.div_ceil(16);
    backend.prepare(&StepInput {
        step: StepId(0),
        token_ids: &vec![0; positions.len()],
        positions: &positions,
        slot_mapping: &slots,
        cu_seqlens_q: &(0..=seqs).map(|s| s * rows).collect::<Vec<_>>(),
        seq_lens: &vec![context; seqs as usize],
        seq_slots: &(0..seqs).map(Slot).collect::<Vec<_>>(),
        seq_adapters: &[],
        block_tables: &(0..seqs * max_blocks_per_seq).collect::<Vec<_>>(),
        max_blocks_per_seq,
        logit_rows: &[],
        block_copies: &[],
        seqs: &[],
    })
}

/// Seconds of the best and the middle of a second's runs.
fn best(mut run: impl FnMut() -> Result<(), BackendError>) -> Result<(f64, f64), BackendError> {
    run()?;
    let (begin, mut all) = (Instant::now(), Vec::new());
    while begin.elapsed().as_secs_f64() < 1.0 {
        let start = Instant::now();
        run()?;
        all.push(start.elapsed().as_secs_f64());
    }
    all.sort_by(f64::total_cmp);
    Ok((all[0], all[all.len() / 2]))
}
