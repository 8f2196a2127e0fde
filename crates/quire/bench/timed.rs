//! A backend that hands every call to another one and keeps the time it took, with the work that was in it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quire_backend::quant::row_bytes;
use quire_backend::{
    AddLora, AddNorm, AllGather, AllReduce, Attention, Backend, BackendError, BufRole, Embed, GraphKey,
    KvLayout, Linear, LinearSource, Logits, LoraSource, Mlp, Moe, MoeScratch, RopeAndCache, RopeTable,
    SeqState, StepInput,
};
use quire_core::{HostCopy, LateInputs, ModelRunnerOutput, StepId, TensorView};

/// The operations of a step, in the order of their first use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Embed,
    Norm,
    Qkv,
    Rope,
    Attention,
    O,
    Mlp,
    LmHead,
    Sample,
}

impl Op {
    pub(crate) const ALL: [Self; 9] = [
        Self::Embed,
        Self::Norm,
        Self::Qkv,
        Self::Rope,
        Self::Attention,
        Self::O,
        Self::Mlp,
        Self::LmHead,
        Self::Sample,
    ];

    /// As in the rows' names.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Qkv => "qkv",
            Self::Rope => "rope",
            Self::Attention => "attention",
            Self::O => "o",
            Self::Mlp => "mlp",
            Self::LmHead => "lm_head",
            Self::Sample => "sample",
        }
    }
}

/// Time and work of one operation. Those on activations alone count no work: what they touch is in the caches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Work {
    pub(crate) time: Duration,
    /// Floating-point operations; a multiply-add counts two.
    pub(crate) flops: f64,
    /// Bytes of weights and KV, each read once.
    pub(crate) bytes: f64,
}

impl Work {
    pub(crate) fn add(&mut self, other: Self) {
        self.time += other.time;
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

/// Time and work by operation, in the order of [`Op::ALL`].
pub(crate) type Tally = [Work; Op::ALL.len()];

/// Where a [`Timed`] backend writes, and others read between steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedTally(Arc<Mutex<Tally>>);

impl SharedTally {
    /// What was counted since the last call.
    pub(crate) fn take(&self) -> Tally {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add(&self, op: Op, work: Work) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[op as usize].add(work);
    }
}

/// What tells the time between two points of a backend's work.
pub(crate) trait Watch<B>: Send + 'static {
    /// A point behind everything that was asked for so far.
    type Mark: Send;

    fn mark(&self, backend: &B) -> Result<Self::Mark, BackendError>;

    /// From one point to another; the work before both is done.
    fn between(&self, begin: &Self::Mark, end: &Self::Mark) -> Result<Duration, BackendError>;
}

/// The host's clock, for backends that compute inside the calls ([`Backend::INLINE`]).
#[derive(Clone, Copy)]
pub(crate) struct HostWatch;

impl<B: Backend> Watch<B> for HostWatch {
    type Mark = Instant;

    fn mark(&self, _: &B) -> Result<Instant, BackendError> {
        Ok(Instant::now())
    }

    fn between(&self, begin: &Instant, end: &Instant) -> Result<Duration, BackendError> {
        Ok(*end - *begin)
    }
}

/// An operation that was asked for, and the points before and behind it.
struct Timing<M> {
    op: Op,
    work: Work,
    begin: M,
    end: M,
}

/// A backend with a watch on every operation.
pub(crate) struct Timed<B, W: Watch<B>> {
    inner: B,
    watch: W,
    tally: SharedTally,
    /// Of passes that were prepared and not fetched, oldest first.
    timings: VecDeque<Vec<Timing<W::Mark>>>,
    /// Bytes of one element of the KV cache.
    kv_element: usize,
    /// Of the step prepared last.
    positions: Vec<u32>,
    seq_lens: Vec<u32>,
    num_logit_rows: usize,
}

/// A weight that knows its size.
pub(crate) struct TimedWeight<W> {
    inner: W,
    is_output: bool,
    in_features: usize,
    out_features: usize,
    bytes: f64,
}

impl<W> TimedWeight<W> {
    /// Of a product with `rows` rows.
    fn work(&self, rows: usize) -> Work {
        let flops = 2.0 * (rows * self.in_features) as f64 * self.out_features as f64;
        Work { flops, bytes: self.bytes, ..Work::default() }
    }
}

impl<B: Backend, W: Watch<B>> Timed<B, W> {
    pub(crate) fn new(inner: B, watch: W, tally: SharedTally) -> Self {
        let (positions, seq_lens) = (Vec::new(), Vec::new());
        let timings = VecDeque::new();
        Self { inner, watch, tally, timings, kv_element: 0, positions, seq_lens, num_logit_rows: 0 }
    }

    fn time(
        &mut self,
        op: Op,
        work: Work,
        body: impl FnOnce(&mut B) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let begin = self.watch.mark(&self.inner)?;
        body(&mut self.inner)?;
        let end = self.watch.mark(&self.inner)?;
        if let Some(timings) = self.timings.back_mut() {
            timings.push(Timing { op, work, begin, end });
        }
        Ok(())
    }

    fn attention_work(&self, op: &Attention<'_, Self>) -> Work {
        let seen = |len: u32| f64::from(op.window.map_or(len, |window| len.min(window)));
        let pairs: f64 = self.positions.iter().map(|position| seen(position + 1)).sum();
        let tokens: f64 = self.seq_lens.iter().map(|&len| seen(len)).sum();
        // Scores and weighted sum, each a multiply-add for every element of the query.
        let flops = 4.0 * op.shape.q_size() as f64 * pairs;
        let bytes = tokens * (2 * op.shape.kv_size() * self.kv_element) as f64;
        Work { flops, bytes, ..Work::default() }
    }
}

/// Bytes of a weight as stored, with its scales.
fn stored_bytes(source: &LinearSource<'_>) -> f64 {
    let bytes = |weight: &TensorView<'_>| match *weight.shape {
        [rows, cols] => rows * row_bytes(weight.dtype, source.quant, cols),
        // The backend will refuse it.
        _ => 0,
    };
    source.parts.iter().map(|part| bytes(&part.weight) as f64).sum()
}

impl<B: Backend, W: Watch<B>> Backend for Timed<B, W> {
    type Buf = B::Buf;
    type Weight = TimedWeight<B::Weight>;
    type Lora = B::Lora;
    type Norm = B::Norm;
    type Rope = B::Rope;
    type Kv = B::Kv;

    const INLINE: bool = B::INLINE;

    fn name(&self) -> String {
        self.inner.name()
    }

    fn load_linear(&mut self, source: &LinearSource<'_>) -> Result<Self::Weight, BackendError> {
        let shapes = || source.parts.iter().map(|part| part.weight.shape);
        Ok(TimedWeight {
            is_output: source.name.ends_with(".o"),
            in_features: shapes().next().and_then(|shape| shape.last()).copied().unwrap_or(0),
            out_features: shapes().filter_map(|shape| shape.first()).sum(),
            bytes: stored_bytes(source),
            inner: self.inner.load_linear(source)?,
        })
    }

    fn load_lora(&mut self, source: &LoraSource<'_>) -> Result<Self::Lora, BackendError> {
        self.inner.load_lora(source)
    }

    fn load_norm(&mut self, name: &str, weight: TensorView<'_>) -> Result<Self::Norm, BackendError> {
        self.inner.load_norm(name, weight)
    }

    fn load_rope(&mut self, table: &RopeTable) -> Result<Self::Rope, BackendError> {
        self.inner.load_rope(table)
    }

    fn alloc(&mut self, role: BufRole, rows: usize, cols: usize) -> Result<Self::Buf, BackendError> {
        self.inner.alloc(role, rows, cols)
    }

    fn alloc_kv(&mut self, layout: &KvLayout) -> Result<Self::Kv, BackendError> {
        self.kv_element = layout.dtype.size();
        self.inner.alloc_kv(layout)
    }

    fn alloc_host_kv(&mut self, kv: &mut Self::Kv, layout: &KvLayout) -> Result<(), BackendError> {
        self.inner.alloc_host_kv(kv, layout)
    }

    fn copy_host_blocks(
        &mut self,
        kv: &mut Self::Kv,
        to_host: &[HostCopy],
        to_device: &[HostCopy],
    ) -> Result<(), BackendError> {
        self.inner.copy_host_blocks(kv, to_host, to_device)
    }

    fn prepare(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        self.positions.clear();
        self.positions.extend_from_slice(input.positions);
        self.seq_lens.clear();
        self.seq_lens.extend_from_slice(input.seq_lens);
        self.num_logit_rows = input.logit_rows.len();
        self.timings.push_back(Vec::new());
        self.inner.prepare(input)
    }

    fn run(
        &mut self,
        _key: Option<GraphKey>,
        mut body: impl FnMut(&mut Self) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        // What it does before any body. Nothing is recorded: each operation is to be seen.
        self.inner.run(None, |_| Ok(()))?;
        body(self)
    }

    fn copy_blocks(&mut self, kv: &mut Self::Kv) -> Result<(), BackendError> {
        self.inner.copy_blocks(kv)
    }

    fn embed(&mut self, op: Embed<'_, Self>) -> Result<(), BackendError> {
        self.time(Op::Embed, Work::default(), |inner| {
            inner.embed(Embed { table: &op.table.inner, scale: op.scale, out: op.out })
        })
    }

    fn add_norm(&mut self, op: AddNorm<'_, Self>) -> Result<(), BackendError> {
        let AddNorm { residual, delta, delta_norm, weight, eps, out } = op;
        self.time(Op::Norm, Work::default(), |inner| {
            inner.add_norm(AddNorm { residual, delta, delta_norm, weight, eps, out })
        })
    }

    fn linear(&mut self, op: Linear<'_, Self>) -> Result<(), BackendError> {
        let Linear { x, weight, out } = op;
        let (kind, work) =
            (if weight.is_output { Op::O } else { Op::Qkv }, weight.work(self.positions.len()));
        self.time(kind, work, |inner| inner.linear(Linear { x, weight: &weight.inner, out }))
    }

    /// No benchmark by operation has adapters.
    fn add_lora(&mut self, op: AddLora<'_, Self>) -> Result<(), BackendError> {
        let AddLora { x, lora, out } = op;
        self.inner.add_lora(AddLora { x, lora, out })
    }

    fn rope_and_cache(&mut self, op: RopeAndCache<'_, Self>) -> Result<(), BackendError> {
        let RopeAndCache { qkv, shape, qk_norm, eps, rope, kv, layer } = op;
        self.time(Op::Rope, Work::default(), |inner| {
            inner.rope_and_cache(RopeAndCache { qkv, shape, qk_norm, eps, rope, kv, layer })
        })
    }

    fn attention(&mut self, op: Attention<'_, Self>) -> Result<(), BackendError> {
        let work = self.attention_work(&op);
        let Attention { qkv, shape, scale, soft_cap, window, sinks, kv, layer, out } = op;
        self.time(Op::Attention, work, |inner| {
            inner.attention(Attention { qkv, shape, scale, soft_cap, window, sinks, kv, layer, out })
        })
    }

    fn mlp(&mut self, op: Mlp<'_, Self>) -> Result<(), BackendError> {
        let Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out } = op;
        let mut work = up.work(self.positions.len());
        work.add(down.work(self.positions.len()));
        let (up, down) = (&up.inner, &down.inner);
        self.time(Op::Mlp, work, |inner| {
            inner.mlp(Mlp { x, shape, up, down, activation, up_lora, down_lora, scratch, out })
        })
    }

    fn moe(&mut self, op: Moe<'_, Self>) -> Result<(), BackendError> {
        let Moe { x, router, up, down, top_k, renormalise, activation, scratch, out } = op;
        let MoeScratch { logits, hidden, expert_out } = scratch;
        let rows = self.positions.len();
        let mut work = router.work(rows);
        // Of every row, its own experts; bytes as if no two rows shared one, but each at most once.
        let share = top_k as f64 / router.out_features as f64;
        for weight in [up, down] {
            let Work { flops, bytes, .. } = weight.work(rows);
            let bytes = bytes * (share * rows as f64).min(1.0);
            work.add(Work { flops: flops * share, bytes, ..Work::default() });
        }
        let (router, up, down) = (&router.inner, &up.inner, &down.inner);
        self.time(Op::Mlp, work, |inner| {
            let scratch = MoeScratch { logits, hidden, expert_out };
            inner.moe(Moe { x, router, up, down, top_k, renormalise, activation, scratch, out })
        })
    }

    fn logits(&mut self, op: Logits<'_, Self>) -> Result<(), BackendError> {
        let Logits { x, head, soft_cap, out } = op;
        let work = head.work(self.num_logit_rows);
        let head = &head.inner;
        self.time(Op::LmHead, work, |inner| inner.logits(Logits { x, head, soft_cap, out }))
    }

    /// Takes no time: there is one rank.
    fn all_reduce(&mut self, op: AllReduce<'_, Self>) -> Result<(), BackendError> {
        self.inner.all_reduce(AllReduce { buf: op.buf })
    }

    fn all_gather(&mut self, op: AllGather<'_, Self>) -> Result<(), BackendError> {
        self.inner.all_gather(AllGather { part: op.part, out: op.out })
    }

    fn sample(
        &mut self,
        logits: &mut Self::Buf,
        seqs: &[Option<SeqState>],
        late: &LateInputs,
    ) -> Result<(), BackendError> {
        self.time(Op::Sample, Work::default(), |inner| inner.sample(logits, seqs, late))
    }

    fn fetch(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), BackendError> {
        self.inner.fetch(step, out)?;
        for Timing { op, work, begin, end } in self.timings.pop_front().unwrap_or_default() {
            self.tally.add(op, Work { time: self.watch.between(&begin, &end)?, ..work });
        }
        Ok(())
    }

    fn read(&mut self, buf: &Self::Buf, rows: usize) -> Result<Vec<f32>, BackendError> {
        self.inner.read(buf, rows)
    }

    fn write(&mut self, buf: &mut Self::Buf, values: &[f32]) -> Result<(), BackendError> {
        self.inner.write(buf, values)
    }
}
