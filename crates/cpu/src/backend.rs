//! The trait's implementation: checks, then hands each operation to [`crate::ops`].

use std::sync::Arc;

use quire_backend::convert::to_f32;
use quire_backend::{
    AddLora, AddNorm, AllGather, AllReduce, Attention, Backend, BackendError, BufRole, Communicator, Embed,
    GraphKey, KvLayout, Linear, LinearSource, LogitKind, LogitRow, Logits, LoraSource, Mlp, MlpShape, Moe,
    MoeScratch, RopeAndCache, RopeTable, SeqState, StepBuffer, StepInput,
};
use quire_core::{
    DType, ExecError, HostCopy, LateInputs, ModelRunnerOutput, Slot, StepId, TensorView, TokenId,
    TokenLogprobs,
};

use crate::Isa;
use crate::buffer::{Aligned, CpuBuf, Shared};
use crate::kv::{CpuKv, KvLayer};
use crate::ops::attention::attention;
use crate::ops::embed::embed_row;
use crate::ops::highest::sanitize;
use crate::ops::linear::{Input, Inputs, Rows, linear};
use crate::ops::lora::{CpuLora, LoraRows, add_lora};
use crate::ops::mlp::{MlpArgs, MlpLora, mlp};
use crate::ops::moe::{MoeArgs, Routing, moe};
use crate::ops::norm::AddNormRows;
use crate::ops::paged::{Workspace, paged_attention};
use crate::ops::rope::{CpuRope, RopeRows, SharedLayer};
use crate::ops::sample::{SampleRow, Scratch};
use crate::ops::soft_cap::CapRow;
use crate::ops::{MIN_WORK, grain};
use crate::pool::{Pool, default_threads};
use crate::populate::{Activity, KvMemory};
use crate::prepacked::Prepacked;
use crate::simd::dispatch;
use crate::simd::pairs::{PANEL, dispatch_pairs};
use crate::weights::{CpuWeight, Matrix};

/// How products of bf16 weights are computed. Weights of other types are not affected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// With activations in f32: exact up to the rounding of f32.
    #[default]
    F32,
    /// With activations rounded to bf16 as they enter a product, and f32 sums: what such models were trained with.
    /// Faster where the machine has [`Isa::Avx512`], slower elsewhere.
    Bf16,
}

impl Precision {
    /// The faster one on `isa` that loses nothing a checkpoint of `dtype` was trained with.
    pub fn for_checkpoint(dtype: DType, isa: Isa) -> Self {
        if dtype == DType::BF16 && isa >= Isa::Avx512 { Self::Bf16 } else { Self::F32 }
    }
}

/// How to use the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuConfig {
    /// Threads, the caller's included; at least 1.
    pub threads: usize,
    /// The instruction set to use at most; the machine's own limit holds anyway.
    pub max_isa: Isa,
    /// Of linear layers.
    pub precision: Precision,
}

impl Default for CpuConfig {
    /// Everything the process may use, in f32.
    fn default() -> Self {
        Self { threads: default_threads(), max_isa: Isa::detect(), precision: Precision::F32 }
    }
}

/// Computes on the calling thread and its pool, inside the calls.
pub struct CpuBackend {
    pool: Pool,
    isa: Isa,
    step: StepBuffer,
    /// `[T]` sequence of each row.
    row_seqs: Vec<u32>,
    results: Vec<Option<RowResult>>,
    /// One per thread.
    scratch: Vec<Scratch>,
    precision: Precision,
    kv_memory: KvMemory,
    activity: Arc<Activity>,
    prepacked: Option<Prepacked>,
    /// For the linear layer at work, and for the one after it.
    inputs: [Inputs; 2],
    attention: Workspace,
    communicator: Communicator,
    routing: Routing,
    lora_rows: LoraRows,
}

/// What `sample` found for one logit row.
enum RowResult {
    Sampled(Slot, TokenId, Option<TokenLogprobs>),
    Prompt(Slot, u32, TokenLogprobs),
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(config: CpuConfig) -> Result<Self, BackendError> {
        let threads = config.threads.max(1);
        Ok(Self {
            pool: Pool::new(threads)?,
            isa: config.max_isa.min(Isa::detect()),
            step: StepBuffer::default(),
            row_seqs: Vec::new(),
            results: Vec::new(),
            scratch: (0..threads).map(|_| Scratch::default()).collect(),
            precision: config.precision,
            kv_memory: KvMemory::OnUse,
            activity: Arc::default(),
            prepacked: None,
            inputs: [Inputs::new(threads)?, Inputs::new(threads)?],
            attention: Workspace::default(),
            communicator: Communicator::default(),
            routing: Routing::default(),
            lora_rows: LoraRows::default(),
        })
    }

    /// Takes packed weights from `prepacked` where it has them, and leaves with it what had to be packed.
    pub fn with_prepacked(self, prepacked: Prepacked) -> Self {
        Self { prepacked: Some(prepacked), ..self }
    }

    /// With keys and values whose memory is there when `kv_memory` says.
    pub fn with_kv_memory(self, kv_memory: KvMemory) -> Self {
        Self { kv_memory, ..self }
    }

    /// As one rank of a group whose ranks share this memory.
    pub fn with_communicator(self, communicator: Communicator) -> Self {
        Self { communicator, ..self }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How many rows make a piece, if a row costs `work` multiply-adds.
    fn row_grain(&self, work: usize) -> usize {
        grain(self.step.num_tokens(), work, self.pool.num_threads())
    }
}

fn failed(message: String) -> BackendError {
    BackendError::Device(ExecError { device: "cpu".into(), message })
}

/// A buffer has at least `rows` rows of exactly `cols` columns.
fn expect_shape(op: &str, buf: &CpuBuf, rows: usize, cols: usize) -> Result<(), BackendError> {
    if buf.rows >= rows && buf.cols == cols {
        return Ok(());
    }
    let (have_rows, have_cols) = (buf.rows, buf.cols);
    Err(failed(format!("{op}: needs a buffer of [{rows}, {cols}], got [{have_rows}, {have_cols}]")))
}

impl Backend for CpuBackend {
    type Buf = CpuBuf;
    type Weight = CpuWeight;
    type Lora = CpuLora;
    type Norm = Vec<f32>;
    type Rope = CpuRope;
    type Kv = CpuKv;

    const INLINE: bool = true;

    fn name(&self) -> String {
        match self.communicator.world() {
            1 => "cpu".into(),
            _ => format!("cpu, rank {}", self.communicator.rank()),
        }
    }

    fn load_linear(&mut self, source: &LinearSource<'_>) -> Result<CpuWeight, BackendError> {
        CpuWeight::load(&mut self.pool, self.precision, self.prepacked.as_ref(), source)
    }

    fn load_lora(&mut self, source: &LoraSource<'_>) -> Result<CpuLora, BackendError> {
        CpuLora::load(source)
    }

    fn load_norm(&mut self, name: &str, weight: TensorView<'_>) -> Result<Vec<f32>, BackendError> {
        to_f32(name, &weight)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<CpuRope, BackendError> {
        CpuRope::new(&mut self.pool, table)
    }

    fn alloc(&mut self, _role: BufRole, rows: usize, cols: usize) -> Result<CpuBuf, BackendError> {
        let len = rows.saturating_mul(cols);
        if self.precision == Precision::Bf16 {
            // Any buffer may become the input of a linear layer.
            self.inputs.iter_mut().try_for_each(|inputs| inputs.rounded.reserve(rows, cols))?;
        }
        Ok(CpuBuf { values: Aligned::zeroed(len, "activations")?, rows, cols })
    }

    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<CpuKv, BackendError> {
        let kv = CpuKv::new(layout, self.precision)?;
        Ok(match self.kv_memory {
            KvMemory::OnUse => kv,
            KvMemory::WhenIdle => kv.populated(Arc::clone(&self.activity)),
        })
    }

    fn alloc_host_kv(&mut self, kv: &mut CpuKv, layout: &KvLayout) -> Result<(), BackendError> {
        kv.host = CpuKv::new(layout, self.precision)?.layers;
        Ok(())
    }

    fn prepare(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        self.activity.begin();
        self.step.copy_from(input);
        self.results.clear();
        self.row_seqs.clear();
        for s in 0..self.step.num_seqs() {
            let rows = self.step.rows_of(s).len();
            self.row_seqs.extend(std::iter::repeat_n(s as u32, rows));
        }
        let (rows, tokens) = (self.row_seqs.len(), self.step.num_tokens());
        if rows != tokens || self.step.positions.len() != tokens || self.step.slot_mapping.len() != tokens {
            return Err(failed(format!("step {}: its arrays disagree about {tokens} tokens", input.step)));
        }
        self.lora_rows.prepare(&self.step);
        Ok(())
    }

    fn run(
        &mut self,
        _key: Option<GraphKey>,
        mut body: impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        body(self)
    }

    fn copy_blocks(&mut self, kv: &mut CpuKv) -> Result<(), BackendError> {
        let copies = &self.step.block_copies;
        let kv = Shared::new(std::slice::from_mut(kv));
        self.pool.split(copies.len(), copies.len(), |_, range| {
            // SAFETY: one piece, so one call.
            let kv = unsafe { kv.slice(0, 1) };
            copies[range].iter().for_each(|&copy| kv[0].copy_block(copy));
        })?;
        Ok(())
    }

    fn copy_host_blocks(
        &mut self,
        kv: &mut CpuKv,
        to_host: &[HostCopy],
        to_device: &[HostCopy],
    ) -> Result<(), BackendError> {
        if kv.host.len() != kv.layers.len() {
            return Err(failed("blocks of the host tier are copied, but there is none".into()));
        }
        let num_layers = kv.layers.len();
        let (layers, host) = (Shared::new(&mut kv.layers), Shared::new(&mut kv.host));
        self.pool.split(num_layers, 1, |_, range| {
            // SAFETY: the ranges of one split do not overlap.
            let (layers, host) =
                unsafe { (layers.slice(range.start, range.len()), host.slice(range.start, range.len())) };
            for (layer, host) in layers.iter_mut().zip(host) {
                for copy in to_host {
                    host.copy_block_of(layer, copy.device.0 as usize, copy.host.0 as usize);
                }
                for copy in to_device {
                    layer.copy_block_of(host, copy.host.0 as usize, copy.device.0 as usize);
                }
            }
        })?;
        Ok(())
    }

    fn embed(&mut self, op: Embed<'_, Self>) -> Result<(), BackendError> {
        let tokens = self.step.num_tokens();
        expect_shape("embed", op.out, tokens, op.table.in_features)?;
        let (grain, out) = (self.row_grain(op.table.in_features), op.out.shared());
        let ids = &self.step.token_ids;
        self.pool.split(tokens, grain, |_, rows| {
            rows.for_each(|t| embed_row(op.table, op.scale, ids[t], t, out));
        })?;
        Ok(())
    }

    fn add_norm(&mut self, op: AddNorm<'_, Self>) -> Result<(), BackendError> {
        let (tokens, cols, isa) = (self.step.num_tokens(), op.weight.len(), self.isa);
        for buf in [&*op.residual, &*op.out].into_iter().chain(op.delta) {
            expect_shape("add_norm", buf, tokens, cols)?;
        }
        let delta_norm = op.delta_norm.map(|weight| &weight[..]);
        if let Some(weight) = delta_norm.filter(|weight| weight.len() != cols) {
            return Err(failed(format!("add_norm: {} weights of delta for {cols}", weight.len())));
        }
        let (residual, out) = (op.residual.shared(), op.out.shared());
        let (delta, weight, eps) = (op.delta, &op.weight[..], op.eps);
        let grain = self.row_grain(2 * cols);
        self.pool.split(tokens, grain, |_, rows| {
            let rows = AddNormRows { rows, residual, delta, delta_norm, weight, eps, out };
            // SAFETY: `isa` was detected; these rows belong to this piece alone.
            unsafe { dispatch_pairs(isa, rows) };
        })?;
        Ok(())
    }

    fn linear(&mut self, op: Linear<'_, Self>) -> Result<(), BackendError> {
        let tokens = self.step.num_tokens();
        expect_shape("linear input", op.x, tokens, op.weight.in_features)?;
        expect_shape("linear output", op.out, tokens, op.weight.out_features)?;
        let x = Input::new(op.x, Rows::First(tokens));
        linear(&mut self.pool, self.isa, op.weight, x, &mut self.inputs[0], op.out.shared())
    }

    fn add_lora(&mut self, op: AddLora<'_, Self>) -> Result<(), BackendError> {
        let tokens = self.step.num_tokens();
        expect_shape("add_lora input", op.x, tokens, op.lora.in_features)?;
        expect_shape("add_lora output", op.out, tokens, op.lora.out_features)?;
        add_lora(&mut self.pool, self.isa, op.lora, op.x, &mut self.lora_rows, op.out.shared())
    }

    fn rope_and_cache(&mut self, op: RopeAndCache<'_, Self>) -> Result<(), BackendError> {
        let RopeAndCache { qkv, shape, qk_norm, eps, rope, kv, layer } = op;
        let (step, isa) = (&self.step, self.isa);
        expect_shape("rope_and_cache", qkv, step.num_tokens(), shape.qkv_size())?;
        let qk_norm = qk_norm.map(|(q, k)| (&q[..], &k[..]));
        let cache = SharedLayer::new(&mut kv.layers[layer]);
        let qkv = qkv.shared();
        // Of a long prompt, whole panels of keys stay together.
        let grain = match self.row_grain(4 * shape.qkv_size()) {
            few if few < PANEL => few,
            many => many.next_multiple_of(PANEL),
        };
        let (positions, slots) = (&step.positions[..], &step.slot_mapping[..]);
        self.pool.split(step.num_tokens(), grain, |_, rows| {
            let rows = RopeRows { rows, qkv, shape, qk_norm, eps, rope, positions, slots, cache };
            // SAFETY: `isa` was detected; these rows and their cache slots belong to this piece alone.
            unsafe { dispatch_pairs(isa, rows) };
        })?;
        Ok(())
    }

    fn attention(&mut self, op: Attention<'_, Self>) -> Result<(), BackendError> {
        let tokens = self.step.num_tokens();
        expect_shape("attention input", op.qkv, tokens, op.shape.qkv_size())?;
        expect_shape("attention output", op.out, tokens, op.shape.q_size())?;
        if let Some(sinks) = op.sinks.filter(|sinks| sinks.len() != op.shape.num_heads as usize) {
            let (have, heads) = (sinks.len(), op.shape.num_heads);
            return Err(failed(format!("attention: {have} sinks for {heads} query heads")));
        }
        let (pool, isa, step) = (&mut self.pool, self.isa, &self.step);
        match &op.kv.layers[op.layer] {
            KvLayer::Packed(pages) => paged_attention(pool, isa, step, &mut self.attention, pages, op)?,
            _ => attention(pool, isa, step, &self.row_seqs, op)?,
        }
        Ok(())
    }

    fn mlp(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError> {
        let Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out } = op;
        let tokens = self.step.num_tokens();
        expect_shape("mlp input", x, tokens, up.in_features)?;
        expect_shape("mlp scratch", scratch, tokens, up.out_features)?;
        let parts = if shape == MlpShape::Gated { 2 } else { 1 };
        if up.out_features != parts * down.in_features {
            let (up, down) = (up.out_features, down.in_features);
            return Err(failed(format!("mlp: up has {up} rows for {parts} times {down} columns of down")));
        }
        expect_shape("mlp output", out, tokens, down.out_features)?;
        let out = out.shared();
        let lora = MlpLora { up: up_lora, down: down_lora, rows: &mut self.lora_rows };
        let args = MlpArgs { x, tokens, shape, up, down, activation, lora, scratch, out };
        mlp(&mut self.pool, self.isa, args, &mut self.inputs)
    }

    fn moe(&mut self, op: Moe<'_, Self>) -> Result<(), BackendError> {
        let Moe { x, router, up, down, top_k, renormalise, activation, scratch, out } = op;
        let MoeScratch { logits, hidden, expert_out } = scratch;
        let (tokens, num_experts) = (self.step.num_tokens(), router.out_features);
        let (width, cols) = (down.in_features, router.in_features);
        let is_packed = !matches!(up.matrix, Matrix::F32(_) | Matrix::F16(_) | Matrix::Bf16(_));
        if is_packed && !(width.is_multiple_of(PANEL) && cols.is_multiple_of(PANEL)) {
            return Err(failed(format!("moe: {cols} and {width} columns are not multiples of {PANEL}")));
        }
        let wanted = (num_experts * 2 * width, cols, num_experts * cols);
        if (up.out_features, up.in_features, down.out_features) != wanted || top_k > num_experts {
            let (up, down) = (up.out_features, down.out_features);
            return Err(failed(format!("moe: {up} and {down} rows for {top_k} of {num_experts} experts")));
        }
        expect_shape("moe input", x, tokens, cols)?;
        expect_shape("moe logits", logits, tokens, num_experts)?;
        expect_shape("moe hidden", hidden, tokens, top_k * 2 * width)?;
        expect_shape("moe results", expert_out, tokens, top_k * cols)?;
        expect_shape("moe output", out, tokens, cols)?;
        let out = out.shared();
        let args = MoeArgs {
            x,
            tokens,
            router,
            up,
            down,
            top_k,
            renormalise,
            activation,
            logits,
            hidden,
            expert_out,
            out,
        };
        moe(&mut self.pool, self.isa, args, &mut self.inputs[0], &mut self.routing)
    }

    fn logits(&mut self, op: Logits<'_, Self>) -> Result<(), BackendError> {
        let rows = Rows::Gather(&self.step.logit_rows);
        expect_shape("logits input", op.x, self.step.num_tokens(), op.head.in_features)?;
        expect_shape("logits output", op.out, rows.len(), op.head.out_features)?;
        let num_rows = rows.len();
        let x = Input::new(op.x, rows);
        linear(&mut self.pool, self.isa, op.head, x, &mut self.inputs[0], op.out.shared())?;
        let Some(cap) = op.soft_cap else { return Ok(()) };
        let (isa, cols, out) = (self.isa, op.out.cols, op.out.shared());
        let grain = grain(num_rows, 8 * cols, self.pool.num_threads());
        self.pool.split(num_rows, grain, |_, rows| {
            for row in rows {
                // SAFETY: `isa` was detected; row `row` belongs to this piece alone.
                unsafe { dispatch(isa, CapRow { row: out.row(row), cap }) };
            }
        })?;
        Ok(())
    }

    fn all_reduce(&mut self, op: AllReduce<'_, Self>) -> Result<(), BackendError> {
        if self.communicator.world() == 1 {
            return Ok(());
        }
        let tokens = self.step.num_tokens();
        expect_shape("all_reduce", op.buf, tokens, op.buf.cols)?;
        let values = &mut op.buf.values[..tokens * op.buf.cols];
        self.communicator.all_reduce(values).map_err(|error| failed(error.to_string()))
    }

    fn all_gather(&mut self, op: AllGather<'_, Self>) -> Result<(), BackendError> {
        let rows = self.step.logit_rows.len();
        expect_shape("all_gather input", op.part, rows, op.part.cols)?;
        expect_shape("all_gather output", op.out, rows, op.out.cols)?;
        let (part, out) = (&op.part.values[..rows * op.part.cols], &mut op.out.values[..rows * op.out.cols]);
        self.communicator.all_gather(part, out, rows).map_err(|error| failed(error.to_string()))
    }

    fn sample(
        &mut self,
        logits: &mut CpuBuf,
        seqs: &[Option<SeqState>],
        late: &LateInputs,
    ) -> Result<(), BackendError> {
        let (rows, isa) = (&self.step.logit_rows, self.isa);
        rows.iter().try_for_each(|row| row.seq(seqs).map(|_| ()))?;
        expect_shape("sample", logits, rows.len(), logits.cols)?;
        self.results.clear();
        self.results.resize_with(rows.len(), || None);
        let (results, scratch) = (Shared::new(&mut self.results), Shared::new(&mut self.scratch));
        let grain = (MIN_WORK / logits.cols.max(1)).max(1);
        let logits = logits.shared();
        self.pool.split(rows.len(), grain, |worker, range| {
            for i in range {
                // SAFETY: row `i` belongs to this piece, and scratch `worker` to this thread.
                let (logits, result, scratch) =
                    unsafe { (logits.row(i), results.slice(i, 1), scratch.slice(worker, 1)) };
                result[0] = sample_row(isa, logits, &rows[i], seqs, late, &mut scratch[0]);
            }
        })?;
        Ok(())
    }

    fn fetch(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), BackendError> {
        self.activity.end();
        out.step = step;
        for result in self.results.drain(..).flatten() {
            match result {
                RowResult::Sampled(slot, token, logprobs) => out.push_row(slot, &[token], [logprobs]),
                RowResult::Prompt(slot, position, logprobs) => {
                    out.prompt_logprobs.push((slot, position, logprobs));
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, buf: &CpuBuf, rows: usize) -> Result<Vec<f32>, BackendError> {
        expect_shape("read", buf, rows, buf.cols)?;
        Ok(buf.values[..rows * buf.cols].to_vec())
    }

    fn write(&mut self, buf: &mut CpuBuf, values: &[f32]) -> Result<(), BackendError> {
        expect_shape("write", buf, values.len().div_ceil(buf.cols.max(1)), buf.cols)?;
        buf.values[..values.len()].copy_from_slice(values);
        Ok(())
    }
}

fn sample_row(
    isa: Isa,
    logits: &mut [f32],
    row: &LogitRow,
    seqs: &[Option<SeqState>],
    late: &LateInputs,
    scratch: &mut Scratch,
) -> Option<RowResult> {
    let seq = row.seq(seqs).ok()?;
    let mask = late.masks.iter().find(|(slot, _)| *slot == row.slot).map(|(_, mask)| &mask[..]);
    let highest = sanitize(isa, logits);
    let sampler = SampleRow { isa, logits, highest, row, seq, mask };
    Some(match row.kind {
        LogitKind::Sample => {
            let token = sampler.choose(scratch);
            let logprobs = seq.params.logprobs.map(|k| sampler.logprobs(token, k, scratch));
            RowResult::Sampled(row.slot, token, logprobs)
        }
        LogitKind::PromptLogprob { target } => {
            let k = seq.params.prompt_logprobs.unwrap_or(0);
            RowResult::Prompt(row.slot, row.position, sampler.logprobs(target, k, scratch))
        }
    })
}
