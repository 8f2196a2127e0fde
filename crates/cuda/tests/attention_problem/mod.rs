//! Attention over random caches: the definition in f64, and the same by the kernels on the host.
#![allow(dead_code, reason = "each test binary uses a part")]

use half::{bf16, f16};
pub use quire_cuda::params::AttentionItem as Item;
use quire_cuda::params::{AttentionParams, AttentionPlanParams};

use crate::common::HostKernels;

pub const PREFILL_ROWS: i32 = 128;
const MAX_PARTIALS: usize = 2048;
const MAX_COUNTERS: usize = 64;
const LIMITS: Limits = Limits { items: 256, partials: MAX_PARTIALS, counters: MAX_COUNTERS };
const PREFILL_BLOCKS: u32 = 3;
/// A page that does not exist: reading it would leave the cache.
const NO_PAGE: i32 = 1 << 20;

/// What the lists may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub items: usize,
    pub partials: usize,
    pub counters: usize,
}

/// The sequences of a step, as the planner sees them.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    pub cu_seqlens_q: &'a [i32],
    pub seq_lens: &'a [i32],
    pub seq_slots: &'a [i32],
    pub group: usize,
    pub window: usize,
}

impl Sequences<'_> {
    /// The decode list and the prefill list.
    pub fn plan(
        &self,
        kernels: &HostKernels,
        num_kv_heads: usize,
        spread: Spread,
        limits: Limits,
        seed: u64,
    ) -> (Vec<Item>, Vec<Item>) {
        let poison = Item { seq: -1, num_rows: -1, ..Item::default() };
        let (mut decode, mut prefill) = (vec![poison; limits.items], vec![poison; limits.items]);
        let (mut num_decode, mut num_prefill, num_seqs) = (-1, -1, self.seq_lens.len() as i32);
        let plan = AttentionPlanParams {
            cu_seqlens_q: self.cu_seqlens_q.as_ptr() as u64,
            seq_lens: self.seq_lens.as_ptr() as u64,
            seq_slots: self.seq_slots.as_ptr() as u64,
            num_seqs: &raw const num_seqs as u64,
            decode_items: decode.as_mut_ptr() as u64,
            num_decode_items: &raw mut num_decode as u64,
            prefill_items: prefill.as_mut_ptr() as u64,
            num_prefill_items: &raw mut num_prefill as u64,
            num_kv_heads: num_kv_heads as i32,
            group: self.group as i32,
            window: self.window as i32,
            prefill_rows: PREFILL_ROWS,
            decode_blocks: spread.0,
            prefill_blocks: spread.0,
            max_items: limits.items as i32,
            max_partials: limits.partials as i32,
            max_counters: limits.counters as i32,
            reserved: 0,
        };
        kernels.launch("quire_attention_plan", [1, 1, 1], [256, 1, 1], 0, &plan, seed);
        decode.truncate(num_decode as usize);
        prefill.truncate(num_prefill as usize);
        (decode, prefill)
    }
}

/// Type of queries and outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    Bf16,
    F16,
}

impl Number {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
    fn bits(self, x: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(x).to_bits(),
            Self::F16 => f16::from_f32(x).to_bits(),
        }
    }
    pub fn value(self, bits: u16) -> f64 {
        match self {
            Self::Bf16 => bf16::from_bits(bits).to_f64(),
            Self::F16 => f16::from_bits(bits).to_f64(),
        }
    }
}

/// What a layer looks like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub number: Number,
    pub fp8: bool,
    /// Of the kernel.
    pub tile_dim: usize,
    pub head_dim: usize,
    pub num_kv_heads: usize,
    pub group: usize,
    pub page_tokens: usize,
    pub window: usize,
    pub soft_cap: f32,
    pub sinks: bool,
}

impl Shape {
    fn q_size(&self) -> usize {
        self.num_kv_heads * self.group * self.head_dim
    }
    fn tile_tokens(&self) -> usize {
        if self.tile_dim > 128 { 32 } else { 64 }
    }
    /// As the kernels' `kSharedBytes`.
    fn decode_smem(&self) -> usize {
        let (tokens, element) = (self.tile_tokens(), if self.fp8 { 1 } else { 2 });
        let tile = tokens * self.tile_dim * element;
        let stages = 32768 / tile;
        let fp8 = if self.fp8 { 32 * tokens + 2 * stages * tokens * 4 } else { 0 };
        2 * stages * tile + 32 * tokens + 256 + fp8
    }
    fn prefill_smem(&self) -> usize {
        let (tokens, element) = (self.tile_tokens(), if self.fp8 { 1 } else { 2 });
        let fp8 = if self.fp8 { 4 * tokens * 4 } else { 0 };
        128 * self.tile_dim * 2 + 4 * tokens * self.tile_dim * element + fp8
    }
}

/// Which kernel computes, over which list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Route {
    /// Each list by its own kernel.
    Planned,
    /// The decode list by the prefill kernel too.
    AllPrefill,
}

/// How many blocks the planner is told to fill: many make it cut caches into splits.
#[derive(Clone, Copy, Debug)]
pub struct Spread(pub i32);

/// Consecutive query rows `from..to` of sequence `seq`, the last of which sees `to` tokens.
pub type Chunk = (usize, usize, usize);

/// Sequences of random queries, keys and values, known at all positions.
pub struct Problem {
    pub shape: Shape,
    lens: Vec<usize>,
    /// `[seq][position, q_size]`.
    q: Vec<Vec<u16>>,
    /// `[seq][which][position, num_kv_heads, head_dim]`, in the cache's type.
    kv: Vec<[Vec<u16>; 2]>,
    scales: Vec<[Vec<f32>; 2]>,
    sinks: Vec<f32>,
}

/// xorshift32 of Marsaglia.
pub struct Rng(pub u32);

impl Rng {
    pub fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
    /// In -1..1.
    pub fn signed(&mut self) -> f32 {
        (self.next() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

fn e4m3_value(byte: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude =
        if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7) };
    if byte & 0x80 != 0 { -magnitude } else { magnitude }
}

impl Problem {
    pub fn random(shape: Shape, lens: &[usize]) -> Self {
        let mut rng = Rng(0x9e37_79b9 ^ (shape.head_dim * 31 + shape.group) as u32);
        let kv_size = shape.num_kv_heads * shape.head_dim;
        let (mut q, mut kv, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for &len in lens {
            q.push((0..len * shape.q_size()).map(|_| shape.number.bits(2.0 * rng.signed())).collect());
            let mut element = |_| match shape.fp8 {
                true => ((rng.next() >> 9 & 0xff) as u16 % 0x78) | (rng.next() >> 3 & 0x80) as u16,
                false => shape.number.bits(2.0 * rng.signed()),
            };
            kv.push([0, 1].map(|_| (0..len * kv_size).map(&mut element).collect()));
            let mut scale = |_| (1.0 + 0.5 * rng.signed()) / 64.0;
            scales.push([0, 1].map(|_| (0..len * shape.num_kv_heads).map(&mut scale).collect()));
        }
        let sinks = (0..shape.num_kv_heads * shape.group).map(|_| 3.0 * rng.signed()).collect();
        Self { shape, lens: lens.to_vec(), q, kv, scales, sinks }
    }

    fn element(&self, seq: usize, which: usize, position: usize, head: usize, d: usize) -> f64 {
        let row = position * self.shape.num_kv_heads + head;
        let bits = self.kv[seq][which][row * self.shape.head_dim + d];
        match self.shape.fp8 {
            true => e4m3_value(bits as u8) * f64::from(self.scales[seq][which][row]),
            false => self.shape.number.value(bits),
        }
    }

    fn scale(&self) -> f32 {
        (self.shape.head_dim as f32).powf(-0.5)
    }

    /// Query head `head` of a row, in f64.
    fn attend(&self, seq: usize, position: usize, head: usize) -> Vec<f64> {
        let Shape { head_dim, group, window, soft_cap, .. } = self.shape;
        let first = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
        let q = &self.q[seq][position * self.shape.q_size() + head * head_dim..][..head_dim];
        let score = |token: usize| {
            let products = q
                .iter()
                .enumerate()
                .map(|(d, &q)| self.shape.number.value(q) * self.element(seq, 0, token, head / group, d));
            let score = products.sum::<f64>() * f64::from(self.scale());
            let cap = f64::from(soft_cap);
            if cap > 0.0 { cap * (score / cap).tanh() } else { score }
        };
        let scores: Vec<f64> = (first..=position).map(score).collect();
        let sink = if self.shape.sinks { f64::from(self.sinks[head]) } else { f64::NEG_INFINITY };
        let max = scores.iter().copied().fold(sink, f64::max);
        let sum = scores.iter().map(|s| (s - max).exp()).sum::<f64>() + (sink - max).exp();
        let value = |d| {
            let weighted = scores
                .iter()
                .enumerate()
                .map(|(i, s)| (s - max).exp() * self.element(seq, 1, first + i, head / group, d));
            weighted.sum::<f64>() / sum
        };
        (0..head_dim).map(value).collect()
    }

    /// Largest relative error `|out - ref| / |ref|` over rows and heads.
    pub fn error(&self, chunks: &[Chunk], out: &[u16]) -> f64 {
        let mut worst = 0.0f64;
        let rows = chunks.iter().flat_map(|&(seq, from, to)| (from..to).map(move |position| (seq, position)));
        for ((seq, position), out) in rows.zip(out.chunks(self.shape.q_size())) {
            for (head, out) in out.chunks(self.shape.head_dim).enumerate() {
                let expected = self.attend(seq, position, head);
                let (mut difference, mut norm) = (0.0, 0.0);
                for (&out, expected) in out.iter().zip(expected) {
                    difference += (self.shape.number.value(out) - expected).powi(2);
                    norm += expected * expected;
                }
                let error = (difference / norm).sqrt();
                worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
            }
        }
        worst
    }

    /// The outputs of the chunks' rows, `[rows, q_size]`, as one step of the kernels computes them.
    pub fn run(
        &self,
        kernels: &HostKernels,
        chunks: &[Chunk],
        route: Route,
        spread: Spread,
        seed: u64,
    ) -> Vec<u16> {
        Step::new(self, chunks, seed).run(kernels, route, spread, seed)
    }
}

/// One step: the cache as it is then, with everything that must not be read poisoned.
struct Step<'a> {
    problem: &'a Problem,
    rows: usize,
    q: Vec<u16>,
    kv: Vec<u8>,
    kv_scales: Vec<f32>,
    block_tables: Vec<i32>,
    stride: usize,
    cu_seqlens_q: Vec<i32>,
    seq_lens: Vec<i32>,
    /// Rows of the block table, last sequence first.
    seq_slots: Vec<i32>,
}

impl<'a> Step<'a> {
    fn new(problem: &'a Problem, chunks: &[Chunk], seed: u64) -> Self {
        let Shape { page_tokens, num_kv_heads, head_dim, window, fp8, .. } = problem.shape;
        let stride = problem.lens.iter().max().expect("a problem has sequences").div_ceil(page_tokens) + 1;
        let num_pages = chunks.len() * stride;
        let element = if fp8 { 1 } else { 2 };
        let head_page = page_tokens * head_dim;
        let mut pages: Vec<i32> = (0..num_pages as i32).collect();
        let mut rng = Rng(seed as u32 * 2 + 1);
        for i in (1..num_pages).rev() {
            pages.swap(i, rng.next() as usize % (i + 1));
        }
        let mut step = Self {
            problem,
            rows: 0,
            q: Vec::new(),
            kv: vec![0xff; num_pages * 2 * num_kv_heads * head_page * element],
            kv_scales: vec![f32::NAN; if fp8 { num_pages * 2 * num_kv_heads * page_tokens } else { 0 }],
            block_tables: vec![NO_PAGE; chunks.len() * stride],
            stride,
            cu_seqlens_q: vec![0],
            seq_lens: Vec::new(),
            seq_slots: (0..chunks.len() as i32).rev().collect(),
        };
        for (i, &(seq, from, to)) in chunks.iter().enumerate() {
            let table = (chunks.len() - 1 - i) * stride;
            let q_size = problem.shape.q_size();
            step.q.extend(&problem.q[seq][from * q_size..to * q_size]);
            step.rows += to - from;
            step.cu_seqlens_q.push(step.rows as i32);
            step.seq_lens.push(to as i32);
            let first = if window > 0 { (from + 1).saturating_sub(window) } else { 0 };
            for position in first..to {
                let page = pages[table + position / page_tokens];
                step.block_tables[table + position / page_tokens] = page;
                for which in 0..2 {
                    for head in 0..num_kv_heads {
                        let slot = ((page as usize * 2 + which) * num_kv_heads + head) * page_tokens
                            + position % page_tokens;
                        let row = position * num_kv_heads + head;
                        let from = &problem.kv[seq][which][row * head_dim..(row + 1) * head_dim];
                        for (d, bits) in from.iter().enumerate() {
                            let at = (slot * head_dim + d) * element;
                            step.kv[at..at + element].copy_from_slice(&bits.to_le_bytes()[..element]);
                        }
                        if fp8 {
                            step.kv_scales[slot] = problem.scales[seq][which][row];
                        }
                    }
                }
            }
        }
        step
    }

    fn sequences(&self) -> Sequences<'_> {
        Sequences {
            cu_seqlens_q: &self.cu_seqlens_q,
            seq_lens: &self.seq_lens,
            seq_slots: &self.seq_slots,
            group: self.problem.shape.group,
            window: self.problem.shape.window,
        }
    }

    fn run(&self, kernels: &HostKernels, route: Route, spread: Spread, seed: u64) -> Vec<u16> {
        let shape = &self.problem.shape;
        let (decode, prefill) = self.sequences().plan(kernels, shape.num_kv_heads, spread, LIMITS, seed);
        let fp8 = if shape.fp8 { "_fp8" } else { "" };
        let suffix = format!("{}{fp8}_{}", shape.number.name(), shape.tile_dim);
        let mut out = vec![0xffff; self.rows * shape.q_size()];
        let mut counters = vec![0; MAX_COUNTERS * shape.num_kv_heads];
        let mut launch = |kernel: &str, items: &[Item], threads, blocks, smem: usize| {
            let (heads, num_items) = (shape.num_kv_heads, items.len() as i32);
            let mut partial_out = vec![f32::NAN; MAX_PARTIALS * heads * shape.head_dim];
            let mut partial_max_sum = vec![f32::NAN; MAX_PARTIALS * heads * 2];
            let mut carry = vec![f32::NAN; PREFILL_BLOCKS as usize * PREFILL_ROWS as usize * shape.tile_dim];
            let params = AttentionParams {
                q: self.q.as_ptr() as u64,
                kv: self.kv.as_ptr() as u64,
                kv_scales: self.kv_scales.as_ptr() as u64,
                out: out.as_mut_ptr() as u64,
                block_tables: self.block_tables.as_ptr() as u64,
                items: items.as_ptr() as u64,
                num_items: &raw const num_items as u64,
                partial_out: partial_out.as_mut_ptr() as u64,
                partial_max_sum: partial_max_sum.as_mut_ptr() as u64,
                counters: counters.as_mut_ptr() as u64,
                carry: carry.as_mut_ptr() as u64,
                sinks: if shape.sinks { self.problem.sinks.as_ptr() as u64 } else { 0 },
                scale: self.problem.scale(),
                soft_cap: shape.soft_cap,
                window: shape.window as i32,
                num_kv_heads: heads as i32,
                group: shape.group as i32,
                head_dim: shape.head_dim as i32,
                page_shift: shape.page_tokens.trailing_zeros() as i32,
                block_table_stride: self.stride as i32,
                q_stride: shape.q_size() as i32,
                out_stride: shape.q_size() as i32,
            };
            let name = format!("quire_attention_{kernel}_{suffix}");
            kernels.launch(&name, [blocks, 1, 1], [threads, 1, 1], smem as u32, &params, seed);
            assert!(counters.iter().all(|&c| c == 0), "{name} leaves counters for the next launch");
        };
        if route == Route::Planned {
            launch("decode", &decode, 128, 5, shape.decode_smem());
        } else {
            launch("prefill", &decode, 256, PREFILL_BLOCKS, shape.prefill_smem());
        }
        launch("prefill", &prefill, 256, PREFILL_BLOCKS, shape.prefill_smem());
        out
    }
}
