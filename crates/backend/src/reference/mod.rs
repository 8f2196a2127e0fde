//! The slow, readable definition of every operation: loops over rows and heads, f32 activations, f64 sums.
//!
//! It is not made to be fast, and it allocates freely. A new operation or a wider one is written here first.
//! Reading order: `linear`, `norm`, `rope`, `attention`, `mlp`, `sampler`.

mod attention;
mod linear;
mod lora;
mod mlp;
mod moe;
mod norm;
mod rope;
pub mod sampler;

use quire_core::{
    DType, ExecError, HostCopy, LateInputs, ModelRunnerOutput, Slot, StepId, TensorView, TokenId,
    TokenLogprobs,
};

pub use self::attention::RefKv;
pub use self::linear::RefWeight;
pub use self::lora::RefLora;
use crate::convert::{round_to, to_f32};
use crate::step_input::StepBuffer;
use crate::{
    AddLora, AddNorm, AllGather, AllReduce, Attention, Backend, BackendError, BufRole, Communicator, Embed,
    GraphKey, KvLayout, Linear, LinearSource, LogitKind, Logits, LoraSource, Mlp, Moe, RopeAndCache,
    RopeTable, SeqState, StepInput,
};

/// Activations `[rows, cols]`, row-major.
#[derive(Clone, Debug)]
pub struct RefBuf {
    values: Vec<f32>,
    cols: usize,
}

impl RefBuf {
    fn row(&self, t: usize) -> &[f32] {
        &self.values[t * self.cols..(t + 1) * self.cols]
    }

    fn row_mut(&mut self, t: usize) -> &mut [f32] {
        &mut self.values[t * self.cols..(t + 1) * self.cols]
    }
}

/// What `sample` found for one logit row.
#[derive(Clone, Debug)]
enum RowResult {
    Sampled(Slot, TokenId, Option<TokenLogprobs>),
    Prompt(Slot, u32, TokenLogprobs),
}

/// The reference backend. Holds nothing but the current step, and its place among the ranks.
#[derive(Debug, Default)]
pub struct RefBackend {
    step: StepBuffer,
    results: Vec<RowResult>,
    communicator: Communicator,
    rounding: Option<DType>,
}

impl RefBackend {
    /// Ready to load.
    pub fn new() -> Self {
        Self::default()
    }

    /// Rounds what experts pass on, as a backend does that keeps it in this type.
    pub fn with_rounding(self, rounding: Option<DType>) -> Self {
        Self { rounding, ..self }
    }

    /// As one rank of a group.
    pub fn with_communicator(self, communicator: Communicator) -> Self {
        Self { communicator, ..self }
    }
}

fn failed(message: String) -> BackendError {
    BackendError::Device(ExecError { device: "reference".into(), message })
}

impl Backend for RefBackend {
    type Buf = RefBuf;
    type Weight = RefWeight;
    type Lora = RefLora;
    type Norm = Vec<f32>;
    type Rope = RopeTable;
    type Kv = RefKv;

    const INLINE: bool = true;

    fn name(&self) -> String {
        "reference".into()
    }

    fn load_linear(&mut self, source: &LinearSource<'_>) -> Result<RefWeight, BackendError> {
        RefWeight::load(source)
    }

    fn load_lora(&mut self, source: &LoraSource<'_>) -> Result<RefLora, BackendError> {
        RefLora::load(source)
    }

    fn load_norm(&mut self, name: &str, weight: TensorView<'_>) -> Result<Vec<f32>, BackendError> {
        to_f32(name, &weight)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<RopeTable, BackendError> {
        Ok(table.clone())
    }

    fn alloc(&mut self, _role: BufRole, rows: usize, cols: usize) -> Result<RefBuf, BackendError> {
        Ok(RefBuf { values: vec![0.0; rows * cols], cols })
    }

    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<RefKv, BackendError> {
        RefKv::new(layout)
    }

    fn alloc_host_kv(&mut self, kv: &mut RefKv, layout: &KvLayout) -> Result<(), BackendError> {
        kv.alloc_host(layout);
        Ok(())
    }

    fn prepare(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        self.step.copy_from(input);
        self.results.clear();
        Ok(())
    }

    fn run(
        &mut self,
        _key: Option<GraphKey>,
        mut body: impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        body(self)
    }

    fn copy_blocks(&mut self, kv: &mut RefKv) -> Result<(), BackendError> {
        self.step.block_copies.iter().for_each(|&copy| kv.copy_block(copy));
        Ok(())
    }

    fn copy_host_blocks(
        &mut self,
        kv: &mut RefKv,
        to_host: &[HostCopy],
        to_device: &[HostCopy],
    ) -> Result<(), BackendError> {
        to_host.iter().for_each(|&copy| kv.copy_to_host(copy));
        to_device.iter().for_each(|&copy| kv.copy_to_device(copy));
        Ok(())
    }

    fn embed(&mut self, op: Embed<'_, Self>) -> Result<(), BackendError> {
        for (t, &id) in self.step.token_ids.iter().enumerate() {
            let vocab = op.table.out_features();
            if id as usize >= vocab {
                return Err(failed(format!("token id {id} is outside the embedding of {vocab} rows")));
            }
            let out = op.out.row_mut(t);
            op.table.read_row(id as usize, out);
            out.iter_mut().for_each(|x| *x *= op.scale);
        }
        Ok(())
    }

    fn add_norm(&mut self, op: AddNorm<'_, Self>) -> Result<(), BackendError> {
        for t in 0..self.step.num_tokens() {
            let residual = op.residual.row_mut(t);
            if let Some(delta) = op.delta {
                let mut delta = delta.row(t).to_vec();
                if let Some(weight) = op.delta_norm {
                    norm::rms_norm_in_place(&mut delta, weight, op.eps);
                }
                residual.iter_mut().zip(&delta).for_each(|(r, d)| *r += d);
            }
            norm::rms_norm(residual, op.weight, op.eps, op.out.row_mut(t));
        }
        Ok(())
    }

    fn linear(&mut self, op: Linear<'_, Self>) -> Result<(), BackendError> {
        for t in 0..self.step.num_tokens() {
            op.weight.apply(op.x.row(t), op.out.row_mut(t));
        }
        Ok(())
    }

    fn add_lora(&mut self, op: AddLora<'_, Self>) -> Result<(), BackendError> {
        for s in 0..self.step.num_seqs() {
            let Some(adapter) = self.step.adapter_of(s) else { continue };
            for t in self.step.rows_of(s) {
                op.lora.add(adapter, op.x.row(t), op.out.row_mut(t));
            }
        }
        Ok(())
    }

    fn rope_and_cache(&mut self, op: RopeAndCache<'_, Self>) -> Result<(), BackendError> {
        let (shape, head_dim) = (op.shape, op.shape.head_dim as usize);
        for t in 0..self.step.num_tokens() {
            let (q, kv) = op.qkv.row_mut(t).split_at_mut(shape.q_size());
            let (k, v) = kv.split_at_mut(shape.kv_size());
            let weights = op.qk_norm.unzip();
            for (heads, weight) in [(q, weights.0), (&mut *k, weights.1)] {
                for head in heads.chunks_exact_mut(head_dim) {
                    if let Some(weight) = weight {
                        norm::rms_norm_in_place(head, weight, op.eps);
                    }
                    if let Some(table) = op.rope {
                        rope::rotate(head, table, self.step.positions[t]);
                    }
                }
            }
            op.kv.store(op.layer, self.step.slot_mapping[t], k, v);
        }
        Ok(())
    }

    fn attention(&mut self, op: Attention<'_, Self>) -> Result<(), BackendError> {
        let head_dim = op.shape.head_dim as usize;
        let group = (op.shape.num_heads / op.shape.num_kv_heads) as usize;
        for s in 0..self.step.num_seqs() {
            for t in self.step.rows_of(s) {
                let last = self.step.positions[t];
                let context = attention::Context {
                    kv: op.kv,
                    layer: op.layer,
                    block_table: self.step.block_table(s),
                    first: op.window.map_or(0, |window| (last + 1).saturating_sub(window)),
                    last,
                };
                let q = op.qkv.row(t)[..op.shape.q_size()].chunks_exact(head_dim);
                for (head, (q, out)) in q.zip(op.out.row_mut(t).chunks_exact_mut(head_dim)).enumerate() {
                    let scoring = attention::Scoring {
                        scale: op.scale,
                        soft_cap: op.soft_cap,
                        sink: op.sinks.map(|sinks| sinks[head]),
                    };
                    attention::attend(&context, head / group, &scoring, q, out);
                }
            }
        }
        Ok(())
    }

    fn mlp(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError> {
        for s in 0..self.step.num_seqs() {
            let lora = self.step.adapter_of(s).map(|adapter| (adapter, op.up_lora, op.down_lora));
            for t in self.step.rows_of(s) {
                mlp::mlp(op.shape, op.activation, op.up, op.down, lora, op.x.row(t), op.out.row_mut(t));
            }
        }
        Ok(())
    }

    fn moe(&mut self, op: Moe<'_, Self>) -> Result<(), BackendError> {
        for t in 0..self.step.num_tokens() {
            let (x, logits, out) = (op.x.row(t), op.scratch.logits.row_mut(t), op.out.row_mut(t));
            op.router.apply(x, logits);
            let mut result = vec![0.0; out.len()];
            out.fill(0.0);
            for (expert, weight) in moe::route(logits, op.top_k, op.renormalise) {
                let round = |x| self.rounding.map_or(x, |dtype| round_to(dtype, x));
                moe::expert(expert, op.activation, (op.up, op.down), &round, x, &mut result);
                out.iter_mut().zip(&result).for_each(|(out, y)| *out += weight * y);
            }
        }
        Ok(())
    }

    fn logits(&mut self, op: Logits<'_, Self>) -> Result<(), BackendError> {
        for (i, row) in self.step.logit_rows.iter().enumerate() {
            let out = op.out.row_mut(i);
            op.head.apply(op.x.row(row.row as usize), out);
            if let Some(cap) = op.soft_cap {
                out.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
            }
        }
        Ok(())
    }

    fn all_reduce(&mut self, op: AllReduce<'_, Self>) -> Result<(), BackendError> {
        let len = self.step.num_tokens() * op.buf.cols;
        let summed = self.communicator.all_reduce(&mut op.buf.values[..len]);
        summed.map_err(|error| failed(error.to_string()))
    }

    fn all_gather(&mut self, op: AllGather<'_, Self>) -> Result<(), BackendError> {
        let rows = self.step.logit_rows.len();
        let (part, out) = (&op.part.values[..rows * op.part.cols], &mut op.out.values[..rows * op.out.cols]);
        self.communicator.all_gather(part, out, rows).map_err(|error| failed(error.to_string()))
    }

    fn sample(
        &mut self,
        logits: &mut RefBuf,
        seqs: &[Option<SeqState>],
        late: &LateInputs,
    ) -> Result<(), BackendError> {
        for (i, row) in self.step.logit_rows.iter().enumerate() {
            let seq = row.seq(seqs)?;
            let logits = logits.row(i);
            self.results.push(match row.kind {
                LogitKind::Sample => {
                    let mask = late.masks.iter().find(|(slot, _)| *slot == row.slot).map(|(_, m)| &m[..]);
                    let token = sampler::choose(logits, row, seq, mask);
                    let logprobs = seq.params.logprobs.map(|k| sampler::logprobs(logits, token, k));
                    RowResult::Sampled(row.slot, token, logprobs)
                }
                LogitKind::PromptLogprob { target } => {
                    let k = seq.params.prompt_logprobs.unwrap_or(0);
                    RowResult::Prompt(row.slot, row.position, sampler::logprobs(logits, target, k))
                }
            });
        }
        Ok(())
    }

    fn fetch(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), BackendError> {
        out.step = step;
        for result in self.results.drain(..) {
            match result {
                RowResult::Sampled(slot, token, logprobs) => out.push_row(slot, &[token], [logprobs]),
                RowResult::Prompt(slot, position, logprobs) => {
                    out.prompt_logprobs.push((slot, position, logprobs));
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, buf: &RefBuf, rows: usize) -> Result<Vec<f32>, BackendError> {
        Ok(buf.values[..rows * buf.cols].to_vec())
    }

    fn write(&mut self, buf: &mut RefBuf, values: &[f32]) -> Result<(), BackendError> {
        buf.values[..values.len()].copy_from_slice(values);
        Ok(())
    }
}
