//! Mixtures of experts: rows are sorted by expert, and each expert's two layers run over its rows.
//!
//! A slot is a token and a rank: token `t` has slots `t * top_k ..`, in rank order. Sorted rows are slots by expert, and
//! in each expert ascending; what a slot's row becomes does not depend on where it lies among them. Experts without rows
//! are not touched, and the others share the threads: there are two hand-overs a layer, however many experts there are.

use std::ops::Range;

use quire_backend::{Activation, BackendError};
use quire_core::ExecError;

use super::gemm::{Gemm, Places};
use super::grain;
use super::int_gemm::IntGemm;
use super::linear::{Input, Inputs, Rows, linear, linear_rows};
use super::mlp::Activate;
use super::sink::{Hidden, Sink, ToGated, ToRows};
use super::tiles::NARROW;
use crate::buffer::{CpuBuf, Shared, SharedRows};
use crate::pool::Pool;
use crate::simd::pairs::PANEL;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::weights::{CpuWeight, Matrix};

/// Weight rows that a thread takes at once where they are not packed.
const PIECE: usize = 8;

/// A mixture of experts over `tokens` rows.
pub(crate) struct MoeArgs<'a> {
    pub x: &'a CpuBuf,
    pub tokens: usize,
    pub router: &'a CpuWeight,
    pub up: &'a CpuWeight,
    pub down: &'a CpuWeight,
    pub top_k: usize,
    pub renormalise: bool,
    pub activation: Activation,
    pub logits: &'a mut CpuBuf,
    pub hidden: &'a mut CpuBuf,
    pub expert_out: &'a mut CpuBuf,
    pub out: SharedRows<'a>,
}

/// The whole operation; `inputs` and `routing` are room to work in.
pub(crate) fn moe(
    pool: &mut Pool,
    isa: Isa,
    args: MoeArgs<'_>,
    inputs: &mut Inputs,
    routing: &mut Routing,
) -> Result<(), BackendError> {
    let MoeArgs { x, tokens, router, up, down, top_k, activation, logits, hidden, expert_out, .. } = args;
    let (num_experts, width, cols) = (router.out_features, down.in_features, x.cols);
    let first = Input::new(x, Rows::First(tokens));
    linear(pool, isa, router, first, inputs, logits.shared())?;
    routing.choose(pool, logits, tokens, top_k, args.renormalise)?;
    routing.sort(num_experts);

    let x = Input::new(x, Rows::Slots { slots: &routing.order, per_row: top_k });
    let layer = Experts { weight: up, rows: 2 * width, x };
    layer.gated(pool, isa, activation, inputs, routing, SharedRows::new(&mut hidden.values, 2 * width))?;
    let sorted = Rows::First(tokens * top_k);
    let hidden = Input { values: &hidden.values, stride: 2 * width, rows: sorted };
    let layer = Experts { weight: down, rows: cols, x: hidden };
    layer.plain(pool, isa, inputs, routing, SharedRows::new(&mut expert_out.values, cols))?;

    let (rows, out, routing) = (&expert_out.values, args.out, &*routing);
    pool.split(tokens, grain(tokens, top_k * cols, pool.num_threads()), |_, range| {
        for t in range {
            let slots = t * top_k..(t + 1) * top_k;
            let (places, weights) = (&routing.places[slots.clone()], &routing.weights[slots]);
            // SAFETY: `isa` was detected; row `t` belongs to this piece.
            unsafe { dispatch(isa, Combine { rows, places, weights, out: out.row(t) }) };
        }
    })?;
    Ok(())
}

/// Which experts the slots of a step go to.
#[derive(Default)]
pub(crate) struct Routing {
    /// By slot: the expert, its weight, and the sorted row.
    experts: Vec<u32>,
    weights: Vec<f32>,
    places: Vec<u32>,
    /// By sorted row: the slot.
    order: Vec<u32>,
    /// By expert: the first of its sorted rows; one more for the end.
    starts: Vec<u32>,
    /// Those that have any.
    active: Vec<usize>,
}

impl Routing {
    /// Experts and weights of every slot, as [`quire_backend::Moe`] defines them.
    fn choose(
        &mut self,
        pool: &mut Pool,
        logits: &CpuBuf,
        tokens: usize,
        top_k: usize,
        renormalise: bool,
    ) -> Result<(), ExecError> {
        self.experts.resize(tokens * top_k, 0);
        self.weights.resize(tokens * top_k, 0.0);
        let (experts, weights) = (Shared::new(&mut self.experts), Shared::new(&mut self.weights));
        // An exponential is about as much as 16 multiply-adds.
        let grain = grain(tokens, 16 * logits.cols, pool.num_threads());
        pool.split(tokens, grain, |_, range| {
            for t in range {
                // SAFETY: the slots of row `t` belong to this piece.
                let (experts, weights) =
                    unsafe { (experts.slice(t * top_k, top_k), weights.slice(t * top_k, top_k)) };
                route(logits.row(t), renormalise, experts, weights);
            }
        })
    }

    /// Counting sort by expert.
    fn sort(&mut self, num_experts: usize) {
        let Self { experts, places, order, starts, active, .. } = self;
        starts.clear();
        starts.resize(num_experts + 1, 0);
        experts.iter().for_each(|&expert| starts[expert as usize + 1] += 1);
        active.clear();
        active.extend((0..num_experts).filter(|expert| starts[expert + 1] > 0));
        for expert in 0..num_experts {
            starts[expert + 1] += starts[expert];
        }
        order.resize(experts.len(), 0);
        places.resize(experts.len(), 0);
        for (slot, &expert) in experts.iter().enumerate() {
            let place = &mut starts[expert as usize];
            (order[*place as usize], places[slot]) = (slot as u32, *place);
            *place += 1;
        }
        // Each start has moved to the next one's place.
        starts.rotate_right(1);
        starts[0] = 0;
    }

    fn rows(&self, expert: usize) -> Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }

    /// Hands out `units` of each expert that has rows: `work(worker, expert, its rows, some of its units)`. A unit costs
    /// `work_per_row` multiply-adds a row.
    fn split(
        &self,
        pool: &mut Pool,
        units: usize,
        work_per_row: usize,
        work: impl Fn(usize, usize, Range<usize>, Range<usize>) + Sync,
    ) -> Result<(), ExecError> {
        let total = units * self.active.len();
        let mean_rows = self.order.len().div_ceil(self.active.len().max(1));
        pool.split(total, grain(total, work_per_row * mean_rows, pool.num_threads()), |worker, range| {
            let mut at = range.start;
            while at < range.end {
                let (expert, first) = (self.active[at / units], at % units);
                let last = units.min(first + range.end - at);
                work(worker, expert, self.rows(expert), first..last);
                at += last - first;
            }
        })
    }
}

/// One layer of all experts: `rows` rows of `weight` each. Row `i` of `x` is sorted row `i`.
struct Experts<'a> {
    weight: &'a CpuWeight,
    rows: usize,
    x: Input<'a>,
}

impl Experts<'_> {
    /// `activation(gate) * up` of each sorted row, into the first half of a row of `out`.
    fn gated(
        &self,
        pool: &mut Pool,
        isa: Isa,
        activation: Activation,
        inputs: &mut Inputs,
        routing: &Routing,
        out: SharedRows<'_>,
    ) -> Result<(), BackendError> {
        let n = self.rows / 2;
        let to = Sink::Gated(ToGated { bias: None, lora: None, activation, out: Hidden::Rows(out), n });
        if self.panels(pool, isa, inputs, routing, Places::gate_and_up(n / PANEL), to)? {
            return Ok(());
        }
        let work = 2 * PIECE * self.weight.in_features;
        routing.split(pool, n.div_ceil(PIECE), work, |_, expert, rows, pieces| {
            let columns = pieces.start * PIECE..(pieces.end * PIECE).min(n);
            let others = columns.start + n..columns.end + n;
            let (first, x, out) = (expert * self.rows, self.part(&rows), out.after(rows.start));
            // SAFETY: `isa` was detected; the columns of these rows, and those of the other half, belong to this thread.
            unsafe {
                linear_rows(isa, self.weight, first, columns.clone(), x, out);
                linear_rows(isa, self.weight, first, others.clone(), x, out);
                for m in 0..rows.len() {
                    let values = out.part(m, columns.start, columns.len());
                    let up = Some(&*out.part(m, others.start, others.len()));
                    dispatch(isa, Activate { activation, values, up });
                }
            }
        })?;
        Ok(())
    }

    /// The product of each sorted row, into a row of `out`.
    fn plain(
        &self,
        pool: &mut Pool,
        isa: Isa,
        inputs: &mut Inputs,
        routing: &Routing,
        out: SharedRows<'_>,
    ) -> Result<(), BackendError> {
        let n = self.rows;
        let to = Sink::Rows(ToRows { bias: None, out, n });
        if self.panels(pool, isa, inputs, routing, Places::IN_ORDER, to)? {
            return Ok(());
        }
        let work = PIECE * self.weight.in_features;
        routing.split(pool, n.div_ceil(PIECE), work, |_, expert, rows, pieces| {
            let columns = pieces.start * PIECE..(pieces.end * PIECE).min(n);
            let (x, out) = (self.part(&rows), out.after(rows.start));
            // SAFETY: `isa` was detected; the columns of these rows belong to this thread.
            unsafe { linear_rows(isa, self.weight, expert * n, columns, x, out) };
        })?;
        Ok(())
    }

    /// The product where weights are packed, which is `false` if they are not. An expert's panels lie at `places` of all of
    /// its own.
    fn panels(
        &self,
        pool: &mut Pool,
        isa: Isa,
        inputs: &mut Inputs,
        routing: &Routing,
        places: Places,
        to: Sink<'_>,
    ) -> Result<bool, BackendError> {
        let (k, panels) = (self.weight.in_features, self.rows / PANEL);
        let (units, work) = (panels.div_ceil(NARROW), NARROW * PANEL * k);
        let some = |units: Range<usize>| units.start * NARROW..(units.end * NARROW).min(panels);
        match &self.weight.matrix {
            Matrix::Packed(weight) => {
                inputs.rounded.round(pool, isa, self.x, k)?;
                let gemm =
                    Gemm { weight, bias: None, x: &inputs.rounded, tokens: self.x.rows.len(), n: self.rows };
                routing.split(pool, units, work, |_, expert, rows, units| {
                    // SAFETY: `isa` was detected; each piece has panels, that is columns, of its own of these rows.
                    unsafe { gemm.piece(isa, rows, some(units), places.from(expert * panels), to) };
                })?;
            }
            Matrix::Quantized(weight) => {
                inputs.bytes.quantize(pool, isa, self.x, k)?;
                let gemm = IntGemm { weight, x: &inputs.bytes, tokens: self.x.rows.len() };
                gemm.reserve(&mut inputs.panels, gemm.tokens);
                let scratch = Shared::new(&mut inputs.panels);
                routing.split(pool, units, work / 2, |worker, expert, rows, units| {
                    // SAFETY: as above, and each thread has its scratch.
                    unsafe {
                        let scratch = &mut scratch.slice(worker, 1)[0];
                        gemm.piece(isa, scratch, rows, some(units), places.from(expert * panels), to);
                    }
                })?;
            }
            Matrix::F32(_) | Matrix::F16(_) | Matrix::Bf16(_) => return Ok(false),
        }
        Ok(true)
    }

    /// The input of some sorted rows.
    fn part(&self, rows: &Range<usize>) -> Input<'_> {
        match self.x.rows {
            Rows::Slots { slots, per_row } => {
                Input { rows: Rows::Slots { slots: &slots[rows.clone()], per_row }, ..self.x }
            }
            _ => Input {
                values: &self.x.values[rows.start * self.x.stride..],
                rows: Rows::First(rows.len()),
                ..self.x
            },
        }
    }
}

/// The experts of a token in rank order, and their weights.
fn route(logits: &[f32], renormalise: bool, experts: &mut [u32], weights: &mut [f32]) {
    let key = |logit: f32| if logit.is_nan() { f32::NEG_INFINITY } else { logit };
    let mut len = 0;
    for (expert, &logit) in logits.iter().enumerate() {
        // Behind all that are as large: of equals, the lower number comes first. `weights` hold the logits meanwhile.
        let rank = weights[..len].iter().rposition(|&chosen| chosen >= key(logit)).map_or(0, |last| last + 1);
        if rank == weights.len() {
            continue;
        }
        len = (len + 1).min(weights.len());
        weights[rank..len].rotate_right(1);
        experts[rank..len].rotate_right(1);
        (weights[rank], experts[rank]) = (key(logit), expert as u32);
    }
    let max = weights[0];
    let sum: f32 = logits.iter().map(|logit| (logit - max).exp()).sum();
    weights.iter_mut().zip(&*experts).for_each(|(w, &e)| *w = (logits[e as usize] - max).exp() / sum);
    if renormalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
}

/// A token's results times their weights, added in rank order.
struct Combine<'a> {
    rows: &'a [f32],
    places: &'a [u32],
    weights: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let cols = self.out.len();
        self.out.fill(0.0);
        for (&place, &weight) in self.places.iter().zip(self.weights) {
            let row = &self.rows[place as usize * cols..][..cols];
            self.out.iter_mut().zip(row).for_each(|(out, y)| *out += weight * y);
        }
    }
}
