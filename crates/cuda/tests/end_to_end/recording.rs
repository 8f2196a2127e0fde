//! A backend that hands every call to another one and notes what the routers of experts said. It records no graphs, so
//! that the numbers can be read between operations; and, if asked to, rounded, as a backend does that keeps activations
//! in fewer bits.

use std::sync::{Arc, Mutex};

use quire_backend::convert::round_to;
use quire_backend::{
    AddLora, AddNorm, AllGather, AllReduce, Attention, Backend, BackendError, BufRole, Embed, GraphKey,
    KvLayout, Linear, LinearSource, Logits, LoraSource, Mlp, MlpShape, Moe, MoeScratch, RopeAndCache,
    RopeTable, SeqState, StepInput,
};
use quire_core::{DType, LateInputs, ModelRunnerOutput, StepId, TensorView};

/// Logits of each router since the start, in the order of the layers: `[rows, experts]`.
pub type RouterLogits = Arc<Mutex<Vec<Vec<f32>>>>;

pub struct Recording<B> {
    inner: B,
    num_rows: usize,
    router_logits: RouterLogits,
    /// What activations are rounded to wherever they leave an operation.
    rounding: Option<DType>,
}

impl<B: Backend> Recording<B> {
    pub fn new(inner: B, rounding: Option<DType>) -> (Self, RouterLogits) {
        let router_logits = RouterLogits::default();
        (Self { inner, num_rows: 0, router_logits: Arc::clone(&router_logits), rounding }, router_logits)
    }

    fn round(&mut self, buf: &mut B::Buf) -> Result<(), BackendError> {
        let Some(dtype) = self.rounding else { return Ok(()) };
        let mut values = self.inner.read(buf, self.num_rows)?;
        values.iter_mut().for_each(|x| *x = round_to(dtype, *x));
        self.inner.write(buf, &values)
    }

    /// A gated network without adapters as three operations, rounded after each.
    fn mlp_in_parts(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError> {
        let Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out } = op;
        assert!(shape == MlpShape::Gated && up_lora.is_none() && down_lora.is_none());
        self.linear(Linear { x, weight: up, out: &mut *scratch })?;
        let both = self.inner.read(scratch, self.num_rows)?;
        let columns = both.len() / self.num_rows;
        let gated = both.chunks(columns).flat_map(|row| {
            let (gate, up) = row.split_at(columns / 2);
            gate.iter().zip(up).map(|(&gate, &up)| activation.apply(gate) * up).collect::<Vec<_>>()
        });
        let mut hidden = self.inner.alloc(BufRole::Hidden, self.num_rows, columns / 2)?;
        self.inner.write(&mut hidden, &gated.collect::<Vec<_>>())?;
        self.round(&mut hidden)?;
        self.linear(Linear { x: &hidden, weight: down, out })
    }
}

impl<B: Backend> Backend for Recording<B> {
    type Buf = B::Buf;
    type Weight = B::Weight;
    type Lora = B::Lora;
    type Norm = B::Norm;
    type Rope = B::Rope;
    type Kv = B::Kv;

    const INLINE: bool = B::INLINE;

    fn name(&self) -> String {
        self.inner.name()
    }

    fn load_linear(&mut self, source: &LinearSource<'_>) -> Result<B::Weight, BackendError> {
        self.inner.load_linear(source)
    }

    fn load_lora(&mut self, source: &LoraSource<'_>) -> Result<B::Lora, BackendError> {
        self.inner.load_lora(source)
    }

    fn load_norm(&mut self, name: &str, weight: TensorView<'_>) -> Result<B::Norm, BackendError> {
        self.inner.load_norm(name, weight)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<B::Rope, BackendError> {
        self.inner.load_rope(table)
    }

    fn alloc(&mut self, role: BufRole, rows: usize, cols: usize) -> Result<B::Buf, BackendError> {
        self.inner.alloc(role, rows, cols)
    }

    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<B::Kv, BackendError> {
        self.inner.alloc_kv(layout)
    }

    fn prepare(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        self.num_rows = input.num_tokens();
        self.inner.prepare(input)
    }

    fn run(
        &mut self,
        _key: Option<GraphKey>,
        mut body: impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        // What it does before any body.
        self.inner.run(None, |_| Ok(()))?;
        body(self)
    }

    fn copy_blocks(&mut self, kv: &mut B::Kv) -> Result<(), BackendError> {
        self.inner.copy_blocks(kv)
    }

    fn embed(&mut self, op: Embed<'_, Self>) -> Result<(), BackendError> {
        let Embed { table, scale, out } = op;
        self.inner.embed(Embed { table, scale, out })
    }

    fn add_norm(&mut self, op: AddNorm<'_, Self>) -> Result<(), BackendError> {
        let AddNorm { residual, delta, delta_norm, weight, eps, out } = op;
        self.inner.add_norm(AddNorm { residual, delta, delta_norm, weight, eps, out: &mut *out })?;
        self.round(out)
    }

    fn linear(&mut self, op: Linear<'_, Self>) -> Result<(), BackendError> {
        let Linear { x, weight, out } = op;
        self.inner.linear(Linear { x, weight, out: &mut *out })?;
        self.round(out)
    }

    fn add_lora(&mut self, op: AddLora<'_, Self>) -> Result<(), BackendError> {
        let AddLora { x, lora, out } = op;
        self.inner.add_lora(AddLora { x, lora, out: &mut *out })?;
        self.round(out)
    }

    fn rope_and_cache(&mut self, op: RopeAndCache<'_, Self>) -> Result<(), BackendError> {
        let RopeAndCache { qkv, shape, qk_norm, eps, rope, kv, layer } = op;
        self.inner.rope_and_cache(RopeAndCache { qkv: &mut *qkv, shape, qk_norm, eps, rope, kv, layer })?;
        self.round(qkv)
    }

    fn attention(&mut self, op: Attention<'_, Self>) -> Result<(), BackendError> {
        let Attention { qkv, shape, scale, soft_cap, window, sinks, kv, layer, out } = op;
        let op = Attention { qkv, shape, scale, soft_cap, window, sinks, kv, layer, out: &mut *out };
        self.inner.attention(op)?;
        self.round(out)
    }

    fn mlp(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError> {
        if self.rounding.is_some() {
            return self.mlp_in_parts(op);
        }
        let Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out } = op;
        self.inner.mlp(Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out })
    }

    fn moe(&mut self, op: Moe<'_, Self>) -> Result<(), BackendError> {
        let Moe { x, router, up, down, top_k, renormalise, activation, scratch, out } = op;
        let MoeScratch { logits, hidden, expert_out } = scratch;
        let scratch = MoeScratch { logits: &mut *logits, hidden, expert_out };
        self.inner.moe(Moe {
            x,
            router,
            up,
            down,
            top_k,
            renormalise,
            activation,
            scratch,
            out: &mut *out,
        })?;
        self.round(out)?;
        let logits = self.inner.read(logits, self.num_rows)?;
        self.router_logits.lock().expect("nobody panics with it").push(logits);
        Ok(())
    }

    fn logits(&mut self, op: Logits<'_, Self>) -> Result<(), BackendError> {
        let Logits { x, head, soft_cap, out } = op;
        self.inner.logits(Logits { x, head, soft_cap, out })
    }

    fn all_reduce(&mut self, op: AllReduce<'_, Self>) -> Result<(), BackendError> {
        self.inner.all_reduce(AllReduce { buf: &mut *op.buf })?;
        self.round(op.buf)
    }

    fn all_gather(&mut self, op: AllGather<'_, Self>) -> Result<(), BackendError> {
        self.inner.all_gather(AllGather { part: op.part, out: op.out })
    }

    fn sample(
        &mut self,
        logits: &mut B::Buf,
        seqs: &[Option<SeqState>],
        late: &LateInputs,
    ) -> Result<(), BackendError> {
        self.inner.sample(logits, seqs, late)
    }

    fn fetch(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), BackendError> {
        self.inner.fetch(step, out)
    }

    fn read(&mut self, buf: &B::Buf, rows: usize) -> Result<Vec<f32>, BackendError> {
        self.inner.read(buf, rows)
    }

    fn write(&mut self, buf: &mut B::Buf, values: &[f32]) -> Result<(), BackendError> {
        self.inner.write(buf, values)
    }
}
