//! What is timed, family by family.

use quire_backend::{
    AddNorm, Attention, AttnShape, Backend, BackendError, BufRole, KvLayerShape, KvLayout, Linear,
    LinearPart, LinearSource, RopeAndCache, RopeTable,
};
use quire_core::{DType, LateInputs, ModelRunnerOutput, QuantFormat, SamplingParams, StepId, TensorView};
use quire_cuda::driver::{Arena, Context, Event, LaunchShape, Modules, Stream};
use quire_cuda::params::ActParams;
use quire_cuda::{Cuda, CudaBuf, CudaKv, CudaWeight};

use crate::Timings;
use crate::common::mock;
use crate::step::{PAGE, Step};

/// Keys and values that are walked through, at least: several times the cache of an H200.
pub const COLD_BYTES: usize = 256 << 20;

/// Numbers between -1 and 1, bf16.
pub fn random_bf16(count: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Sign, an exponent from 2^-4 to 2^-1, seven bits of mantissa.
        let high = state >> 16;
        ((high & 0x807f) | ((0x7b + ((high >> 7) & 3)) << 7)) as u16
    };
    (0..count).flat_map(|_| draw().to_le_bytes()).collect()
}

pub fn buffer(cuda: &mut Cuda, role: BufRole, rows: usize, cols: usize) -> Result<CudaBuf, BackendError> {
    let mut buf = cuda.alloc(role, rows, cols)?;
    let mut state = 7u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..rows * cols).map(|_| draw()).collect();
    cuda.write(&mut buf, &values)?;
    Ok(buf)
}

/// Dense products of the feed-forward layer: as they are, and quantized.
pub fn products(timings: &mut Timings, rows: &[usize]) {
    let shape = timings.shape;
    let formats = [
        ("bf16", QuantFormat::None),
        ("fp8", QuantFormat::Fp8),
        ("int8", QuantFormat::Int8),
        ("int4", QuantFormat::Int4),
    ];
    let layers = [("up", 2 * shape.intermediate, shape.hidden), ("down", shape.hidden, shape.intermediate)];
    for (layer, n, k) in layers {
        let data = random_bf16(n * k);
        let view = TensorView { dtype: DType::BF16, shape: &[n, k], data: &data };
        for (format, quant) in formats {
            timings.case(&format!("gemm_us/{layer}/{format}"), |timings| {
                let parts = [LinearPart { weight: view, bias: None }];
                let source = LinearSource { name: "weight", parts: &parts, quant };
                let weight = timings.cuda.load_linear(&source)?;
                rows.iter().try_for_each(|&m| product(timings, &weight, (m, n, k), (layer, format)))
            });
        }
    }
}

fn product(
    timings: &mut Timings,
    weight: &CudaWeight,
    (m, n, k): (usize, usize, usize),
    (layer, format): (&str, &str),
) -> Result<(), BackendError> {
    let x = buffer(&mut timings.cuda, BufRole::Hidden, m, k)?;
    let mut out = timings.cuda.alloc(BufRole::Hidden, m, n)?;
    let step = Step::new(m, 1, 1, &SamplingParams::default());
    let us = timings.time(&step, |cuda, _| cuda.linear(Linear { x: &x, weight, out: &mut out }))?;
    let tflop_s = 2e-6 * (m * n * k) as f64 / us;
    timings.row(format!("gemm_us/{layer}/{m}/{format}"), us, "us");
    timings.row(format!("gemm_tflop_s/{layer}/{m}/{format}"), tflop_s, "TFLOP/s");
    if format == "bf16" {
        timings.row(format!("gemm_gb_s/{layer}/{m}/bf16"), 2e-3 * (n * k) as f64 / us, "GB/s");
    }
    Ok(())
}

struct Heads {
    shape: AttnShape,
    kv: CudaKv,
    num_layers: usize,
    qkv: CudaBuf,
    out: CudaBuf,
}

impl Heads {
    /// A cache for `step`, of as many layers as make it cold.
    fn new(timings: &mut Timings, step: &Step, rows: usize, dtype: DType) -> Result<Self, BackendError> {
        let Timings { shape: model, cuda, .. } = timings;
        let shape = AttnShape {
            num_heads: model.num_heads,
            num_kv_heads: model.num_kv_heads,
            head_dim: model.head_dim,
        };
        let layer = KvLayerShape { num_kv_heads: shape.num_kv_heads, head_dim: shape.head_dim };
        let layer_bytes = step.num_blocks() * PAGE * 2 * shape.kv_size() * dtype.size();
        let num_layers = if timings.repeats > 2 { COLD_BYTES.div_ceil(layer_bytes).min(64) } else { 1 };
        let layers = vec![layer; num_layers];
        let layout =
            KvLayout { num_blocks: step.num_blocks() as u32, block_size: PAGE as u32, layers, dtype };
        let kv = cuda.alloc_kv(&layout)?;
        let qkv = buffer(cuda, BufRole::Hidden, rows, shape.qkv_size())?;
        let out = cuda.alloc(BufRole::Hidden, rows, shape.q_size())?;
        Ok(Self { shape, kv, num_layers, qkv, out })
    }

    fn attend(&mut self, cuda: &mut Cuda, layer: usize) -> Result<(), BackendError> {
        cuda.attention(Attention {
            qkv: &self.qkv,
            shape: self.shape,
            scale: (self.shape.head_dim as f32).powf(-0.5),
            soft_cap: None,
            window: None,
            sinks: None,
            kv: &self.kv,
            layer: layer % self.num_layers,
            out: &mut self.out,
        })
    }

    /// Writes the keys and values of the step into every layer.
    fn fill(&mut self, cuda: &mut Cuda, step: &Step) -> Result<(), BackendError> {
        cuda.prepare(&step.input())?;
        let Self { shape, kv, num_layers, qkv, .. } = self;
        cuda.run(None, |cuda| {
            (0..*num_layers).try_for_each(|layer| {
                let shape = *shape;
                cuda.rope_and_cache(RopeAndCache {
                    qkv,
                    shape,
                    qk_norm: None,
                    eps: 1e-6,
                    rope: None,
                    kv,
                    layer,
                })
            })
        })
    }
}

/// One token a sequence, over whatever the cache holds.
pub fn decode_attention(timings: &mut Timings, num_seqs: usize, context: usize) {
    for (name, dtype) in [("bf16", DType::BF16), ("fp8", DType::F8E4M3)] {
        let row = format!("{num_seqs}x{context}/{name}");
        timings.case(&format!("decode_us/{row}"), |timings| {
            let step = Step::new(num_seqs, context, 1, &SamplingParams::default());
            let mut heads = Heads::new(timings, &step, num_seqs, dtype)?;
            let us = timings.time(&step, |cuda, i| heads.attend(cuda, i))?;
            let bytes = (num_seqs * context * 2 * heads.shape.kv_size() * dtype.size()) as f64;
            timings.row(format!("decode_us/{row}"), us, "us");
            timings.row(format!("decode_gb_s/{row}"), 1e-3 * bytes / us, "GB/s");
            Ok(())
        });
    }
}

/// One sequence of `len` tokens, causal. `kernels` is in front of the rows' names: empty for the generic ones.
pub fn prefill_attention(timings: &mut Timings, kernels: &str, len: usize) {
    timings.case(&format!("{kernels}prefill_us/{len}"), |timings| {
        let step = Step::new(1, len, len, &SamplingParams::default());
        let mut heads = Heads::new(timings, &step, len, DType::BF16)?;
        heads.fill(&mut timings.cuda, &step)?;
        let us = timings.time(&step, |cuda, i| heads.attend(cuda, i))?;
        let flops = 2.0 * heads.shape.q_size() as f64 * (len * (len + 1)) as f64;
        timings.row(format!("{kernels}prefill_us/{len}"), us, "us");
        timings.row(format!("{kernels}prefill_tflop_s/{len}"), 1e-6 * flops / us, "TFLOP/s");
        Ok(())
    });
}

/// What attention of `num_seqs` sequences gives of which `num_new` tokens are computed: the same numbers every time.
pub fn attention_output(
    timings: &mut Timings,
    num_seqs: usize,
    len: usize,
    num_new: usize,
) -> Result<Vec<f32>, BackendError> {
    let all = Step::new(num_seqs, len, len, &SamplingParams::default());
    let step = Step::new(num_seqs, len, num_new, &SamplingParams::default());
    let mut heads = Heads::new(timings, &all, num_seqs * len, DType::BF16)?;
    let cuda = &mut timings.cuda;
    heads.fill(cuda, &all)?;
    cuda.prepare(&step.input())?;
    cuda.run(None, |cuda| heads.attend(cuda, 0))?;
    cuda.read(&heads.out, num_seqs * num_new)
}

/// Norm, rotary embedding with the cache's writes, activation on `rows` rows.
pub fn elementwise(timings: &mut Timings, rows: usize) {
    let model = timings.shape;
    timings.case(&format!("norm_us/{rows}"), |timings| {
        let ones = vec![0x3f80u16; model.hidden].into_iter().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
        let view = TensorView { dtype: DType::BF16, shape: &[model.hidden], data: &ones };
        let cuda = &mut timings.cuda;
        let weight = cuda.load_norm("norm", view)?;
        let mut residual = buffer(cuda, BufRole::Residual, rows, model.hidden)?;
        let delta = buffer(cuda, BufRole::Hidden, rows, model.hidden)?;
        let mut out = cuda.alloc(BufRole::Hidden, rows, model.hidden)?;
        let step = Step::new(rows, 1, 1, &SamplingParams::default());
        let us = timings.time(&step, |cuda, _| {
            let (residual, out) = (&mut residual, &mut out);
            cuda.add_norm(AddNorm {
                residual,
                delta: Some(&delta),
                delta_norm: None,
                weight: &weight,
                eps: 1e-5,
                out,
            })
        })?;
        // The residual is read and written in f32, the rest is 16 bits.
        timings.row(format!("norm_us/{rows}"), us, "us");
        timings.row(format!("norm_gb_s/{rows}"), 12e-3 * (rows * model.hidden) as f64 / us, "GB/s");
        Ok(())
    });
    timings.case(&format!("rope_us/{rows}"), |timings| {
        let step = Step::new(1, rows, rows, &SamplingParams::default());
        let mut heads = Heads::new(timings, &step, rows, DType::BF16)?;
        let half = model.head_dim as usize / 2;
        let inv_freq = (0..half).map(|i| 500_000f32.powf(-(i as f32) / half as f32)).collect();
        let table = RopeTable { inv_freq, attention_factor: 1.0, max_positions: rows as u32 };
        let rope = timings.cuda.load_rope(&table)?;
        let us = timings.time(&step, |cuda, i| {
            let Heads { shape, kv, num_layers, qkv, .. } = &mut heads;
            let (shape, layer) = (*shape, i % *num_layers);
            cuda.rope_and_cache(RopeAndCache {
                qkv,
                shape,
                qk_norm: None,
                eps: 1e-5,
                rope: Some(&rope),
                kv,
                layer,
            })
        })?;
        let bytes = 4e-3 * (rows * heads.shape.qkv_size()) as f64;
        timings.row(format!("rope_us/{rows}"), us, "us");
        timings.row(format!("rope_gb_s/{rows}"), bytes / us, "GB/s");
        Ok(())
    });
    activation(timings, rows);
}

/// By its kernel: the backend's operation has products around it.
fn activation(timings: &mut Timings, rows: usize) {
    let (width, repeats) = (timings.shape.intermediate, timings.repeats);
    let context = Context::new(timings.cuda.context().ordinal()).unwrap();
    let stream = Stream::new(&context).unwrap();
    let modules = Modules::load(&context, mock::images()).unwrap();
    let kernel = modules.function::<ActParams>("quire_act_bf16", 0).unwrap();
    let mut arena = Arena::new(context.clone(), 0);
    let (input, out) = (arena.alloc(rows * width * 4).unwrap(), arena.alloc(rows * width * 2).unwrap());
    let count = arena.alloc(4).unwrap();
    let mut host = quire_cuda::driver::Pinned::new(&context, 4).unwrap();
    host.as_mut_slice()[..4].copy_from_slice(&(rows as i32).to_le_bytes());
    host.upload(4, count, &stream).unwrap();
    stream.fill(input, 0x3e).unwrap();
    let params = ActParams {
        r#in: input.address(),
        out: out.address(),
        num_rows: count.address(),
        width: width as i32,
        kind: 0,
        gated: 1,
        reserved: 0,
    };
    // As `Kernels::act` has it.
    let blocks = width.div_ceil(16 * 256) as u32;
    let shape = LaunchShape { grid: [rows as u32, blocks, 1], ..LaunchShape::linear(1, 256) };
    let capture = stream.begin_capture().unwrap();
    for _ in 0..repeats {
        // SAFETY: the struct is the kernel's, and its addresses are of the arena above, which outlives the stream's work.
        unsafe { kernel.launch(&stream, shape, &params) }.unwrap();
    }
    let graph = capture.end(&stream).unwrap();
    let (begin, end) = (Event::timed(&context).unwrap(), Event::timed(&context).unwrap());
    let mut best = f32::INFINITY;
    for _ in 0..4 {
        begin.record(&stream).unwrap();
        graph.launch(&stream).unwrap();
        end.record(&stream).unwrap();
        end.synchronize().unwrap();
        best = best.min(end.milliseconds_since(&begin).unwrap());
    }
    let us = f64::from(best) * 1e3 / repeats as f64;
    timings.row(format!("act_us/{rows}"), us, "us");
    timings.row(format!("act_gb_s/{rows}"), 6e-3 * (rows * width) as f64 / us, "GB/s");
}

/// Top-k and top-p over `rows` rows of logits; the host's work for it is part of the time.
pub fn sampling(timings: &mut Timings, rows: usize) {
    timings.case(&format!("sample_us/{rows}"), |timings| {
        let vocab = timings.shape.vocab;
        let params = SamplingParams { top_k: 50, top_p: 0.9, ..SamplingParams::default() };
        let step = Step::new(rows, 1, 1, &params);
        let mut logits = buffer(&mut timings.cuda, BufRole::Logits, rows, vocab)?;
        let cuda = &mut timings.cuda;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            cuda.prepare(&step.input())?;
            cuda.run(None, |_| Ok(()))?;
            let begin = cuda.timestamp()?;
            cuda.sample(&mut logits, step.seqs(), &LateInputs::default())?;
            let end = cuda.timestamp()?;
            cuda.fetch(StepId(0), &mut ModelRunnerOutput::default())?;
            end.synchronize().expect("the device lives");
            best = best.min(f64::from(end.milliseconds_since(&begin).expect("both were reached")) * 1e3);
        }
        timings.row(format!("sample_us/{rows}x{vocab}"), best, "us");
        Ok(())
    });
}
