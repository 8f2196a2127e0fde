//! A backend that hands every call to another one and notes what the routers of experts said. It records no graphs, so
//! that the numbers can be read between operations.

use std::sync::{Arc, Mutex};

use quire_backend::{
    AddLora, AddNorm, AllGather, AllReduce, Attention, Backend, BackendError, BufRole, Embed, GraphKey,
    KvLayout, Linear, LinearSource, Logits, LoraSource, Mlp, Moe, MoeScratch, RopeAndCache, RopeTable,
    SeqState, StepInput,
};
use quire_core::{LateInputs, ModelRunnerOutput, StepId, TensorView};

/// Logits of each router since the start, in the order of the layers: `[rows, experts]`.
pub type RouterLogits = Arc<Mutex<Vec<Vec<f32>>>>;

pub struct Recording<B> {
    inner: B,
    num_rows: usize,
    router_logits: RouterLogits,
}

impl<B> Recording<B> {
    pub fn new(inner: B) -> (Self, RouterLogits) {
        let router_logits = RouterLogits::default();
        (Self { inner, num_rows: 0, router_logits: Arc::clone(&router_logits) }, router_logits)
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
        self.inner.add_norm(AddNorm { residual, delta, delta_norm, weight, eps, out })
    }

    fn linear(&mut self, op: Linear<'_, Self>) -> Result<(), BackendError> {
        let Linear { x, weight, out } = op;
        self.inner.linear(Linear { x, weight, out })
    }

    fn add_lora(&mut self, op: AddLora<'_, Self>) -> Result<(), BackendError> {
        let AddLora { x, lora, out } = op;
        self.inner.add_lora(AddLora { x, lora, out })
    }

    fn rope_and_cache(&mut self, op: RopeAndCache<'_, Self>) -> Result<(), BackendError> {
        let RopeAndCache { qkv, shape, qk_norm, eps, rope, kv, layer } = op;
        self.inner.rope_and_cache(RopeAndCache { qkv, shape, qk_norm, eps, rope, kv, layer })
    }

    fn attention(&mut self, op: Attention<'_, Self>) -> Result<(), BackendError> {
        let Attention { qkv, shape, scale, soft_cap, window, sinks, kv, layer, out } = op;
        self.inner.attention(Attention { qkv, shape, scale, soft_cap, window, sinks, kv, layer, out })
    }

    fn mlp(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError> {
        let Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out } = op;
        self.inner.mlp(Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out })
    }

    fn moe(&mut self, op: Moe<'_, Self>) -> Result<(), BackendError> {
        let Moe { x, router, up, down, top_k, renormalise, activation, scratch, out } = op;
        let MoeScratch { logits, hidden, expert_out } = scratch;
        let scratch = MoeScratch { logits: &mut *logits, hidden, expert_out };
        self.inner.moe(Moe { x, router, up, down, top_k, renormalise, activation, scratch, out })?;
        let logits = self.inner.read(logits, self.num_rows)?;
        self.router_logits.lock().expect("nobody panics with it").push(logits);
        Ok(())
    }

    fn logits(&mut self, op: Logits<'_, Self>) -> Result<(), BackendError> {
        let Logits { x, head, soft_cap, out } = op;
        self.inner.logits(Logits { x, head, soft_cap, out })
    }

    fn all_reduce(&mut self, op: AllReduce<'_, Self>) -> Result<(), BackendError> {
        self.inner.all_reduce(AllReduce { buf: op.buf })
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
