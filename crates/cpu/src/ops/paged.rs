//! Causal attention over packed pages, as products of bf16 pairs: one code for a decoding row and for a long prompt.
//!
//! One item of work is a few consecutive tokens of a sequence and one KV head: the query heads that share it are rows of
//! the same products, so keys and values are read once for all of them. Keys come in tiles that begin at multiples of
//! [`TILE`] positions, merged in order by the online softmax (Milakov & Gimelshein, arXiv 1805.02867; blocks as in
//! FlashAttention, arXiv 2205.14135); every [`SPLIT`] positions a new partial result begins, and partial results are
//! folded in order (arXiv 2311.01282), whether one thread has computed them or several. So a row's bits depend on its
//! position alone. Weights are rounded to bf16 for the product with the values, while their sum keeps f32.

use std::marker::PhantomData;
use std::ops::Range;

use quire_backend::{Attention, AttnShape, StepBuffer};
use quire_core::ExecError;

use super::softmax::{SCALES, ScoreRule, Softmax, State, sum_lanes};
use super::tiles::{NARROW, Tiled, Turn, each_panel, each_wide_panel};
use crate::CpuBackend;
use crate::buffer::{CpuBuf, Shared, SharedRows};
use crate::packed::round_row;
use crate::pages::{PackedPages, Pairs};
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::bytes::{ByteDot, widen_pair};
use crate::simd::pairs::{PANEL, PairDot, PairKernel, dispatch_pairs};

/// Positions in a tile.
pub(super) const TILE: usize = 128;
/// Panels of keys in a tile.
pub(super) const PANELS: usize = TILE / PANEL;
/// Pairs of values in a panel of keys.
const PANEL_PAIRS: usize = PANEL / 2;
/// Bytes that come from memory together.
const LINE: usize = 64;
/// Panels of values that a few rows take at once.
const WIDE: usize = 8;
/// Positions of a partial result.
const SPLIT: usize = 1024;
/// Rows (tokens times query heads) of an item.
const ROWS: usize = 64;

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy)]
struct Block {
    seq: usize,
    first_row: usize,
    tokens: usize,
}

/// What one thread computes: these tokens, and some of the KV heads.
#[derive(Clone, Copy)]
struct Item {
    block: Block,
    first_head: usize,
    /// More than one if it is one token.
    heads: usize,
}

/// Memory to work in: the items of a step, partial results, and one [`Scratch`] a thread.
#[derive(Default)]
pub(crate) struct Workspace {
    items: Vec<Item>,
    partial: Vec<f32>,
    scratch: Vec<Scratch>,
}

/// Of one thread.
#[derive(Default)]
struct Scratch {
    /// `[ROWS][key_pairs]` queries.
    q: Vec<u32>,
    /// `[ROWS][TILE]` scores.
    scores: Vec<f32>,
    /// `[ROWS][TILE / 2]` weights.
    weights: Vec<u32>,
    /// `[ROWS]` highest scores of the tile at work, then what they shrink earlier weights by.
    highest: Vec<f32>,
    /// A [`State`]: of the split at work, and of those before.
    part: Vec<f32>,
    total: Vec<f32>,
    /// A tile that does not lie ready in the cache: `[PANELS][key_pairs][PANEL]`, `[TILE / 2][columns]`.
    keys: Vec<u32>,
    values: Vec<u32>,
    /// Of each KV head, of the tile's keys, then of its values, if they have any.
    scales: Vec<f32>,
}

impl Scratch {
    fn reserve(&mut self, rows: usize, key_pairs: usize, columns: usize) {
        self.q.resize(rows * key_pairs, 0);
        self.scores.resize(rows * TILE, 0.0);
        self.weights.resize(rows * TILE / 2, 0);
        self.highest.resize(rows.next_multiple_of(PANEL), 0.0);
        self.part.resize(State::len(rows, columns), 0.0);
        self.total.resize(State::len(rows, columns), 0.0);
        self.keys.resize(TILE * key_pairs, 0);
        self.values.resize(TILE / 2 * columns, 0);
        self.scales.resize(rows * SCALES, 1.0);
    }
}

/// The whole operation.
pub(crate) fn paged_attention(
    pool: &mut Pool,
    isa: Isa,
    step: &StepBuffer,
    workspace: &mut Workspace,
    pages: &PackedPages,
    op: Attention<'_, CpuBackend>,
) -> Result<(), ExecError> {
    let Attention { qkv, shape, scale, soft_cap, window, sinks, out, .. } = op;
    let (kv_heads, columns) = (shape.num_kv_heads as usize, pages.shape.columns());
    let group = (shape.num_heads / shape.num_kv_heads) as usize;
    let most_rows = ROWS.max(group);
    let Workspace { items, partial, scratch } = workspace;
    scratch.resize_with(pool.num_threads(), Scratch::default);
    scratch.iter_mut().for_each(|scratch| scratch.reserve(most_rows, pages.shape.key_pairs(), columns));
    let scratch = Shared::new(scratch);
    let work = Work {
        qkv,
        shape,
        group,
        rule: ScoreRule::new(scale, soft_cap),
        sinks: sinks.map(|sinks| &sinks[..]),
        window: window.map_or(usize::MAX, |window| window as usize),
        pages,
        step,
        out: out.shared(),
    };
    work.cut(pool.num_threads(), items);
    let count = items.len();
    // Later blocks see more keys: they go first, so that no long one is left at the end.
    let item = |i: usize| items[count - 1 - i.min(count - 1)];
    let splits = items.iter().map(|item| work.splits(item.block).end).max().unwrap_or(0);
    if splits < 2 || count >= 4 * pool.num_threads() {
        // Neighbours share a block of tokens, and each asks for what the next one reads first.
        let grain = (count / (8 * pool.num_threads())).clamp(1, kv_heads);
        return pool.split(count, grain, |worker, range| {
            for i in range.clone() {
                // SAFETY: `isa` was detected; scratch `worker` is this thread's, the item's columns of `out` its own.
                unsafe {
                    let scratch = &mut scratch.slice(worker, 1)[0];
                    let after = (i + 1 < range.end).then(|| item(i + 1));
                    let run = Run { work: &work, item: item(i), after, scratch, task: Task::Whole };
                    dispatch_pairs(isa, run);
                }
            }
        });
    }
    // Few items over a long context: their splits are computed side by side and folded afterwards.
    let len = State::len(most_rows, columns);
    partial.resize((count * splits * len).max(partial.len()), 0.0);
    let partial = Shared::new(partial);
    pool.split(count * splits, 1, |worker, range| {
        for i in range {
            let (item, split) = (item(i / splits), i % splits);
            // SAFETY: as above, and the partial result is this piece's own.
            unsafe {
                let (scratch, part) = (&mut scratch.slice(worker, 1)[0], partial.slice(i * len, len));
                let task = Task::Split(split, part);
                dispatch_pairs(isa, Run { work: &work, item, after: None, scratch, task });
            }
        }
    })?;
    pool.split(count, 1, |worker, range| {
        for i in range {
            // SAFETY: as above; this piece has all partial results of its items.
            unsafe {
                let scratch = &mut scratch.slice(worker, 1)[0];
                let parts = partial.slice(i * splits * len, splits * len);
                let task = Task::Fold(parts, len);
                dispatch_pairs(isa, Run { work: &work, item: item(i), after: None, scratch, task });
            }
        }
    })
}

/// What all items share.
struct Work<'a> {
    qkv: &'a CpuBuf,
    shape: AttnShape,
    /// Query heads of a KV head.
    group: usize,
    rule: ScoreRule,
    /// `[num_heads]`, see [`Attention::sinks`].
    sinks: Option<&'a [f32]>,
    window: usize,
    pages: &'a PackedPages,
    step: &'a StepBuffer,
    out: SharedRows<'a>,
}

impl Work<'_> {
    /// Cuts the step into items: the rows of each sequence into blocks of at most [`ROWS`] rows, one KV head each. A token
    /// alone is cut into no more items than threads need, as the heads of a block of keys lie one after the other and come
    /// fastest when they are read in that order.
    fn cut(&self, threads: usize, items: &mut Vec<Item>) {
        items.clear();
        let (kv_heads, most) = (self.shape.num_kv_heads as usize, (ROWS / self.group).max(1));
        let together = self.heads_together(threads);
        for seq in 0..self.step.num_seqs() {
            let rows = self.step.rows_of(seq);
            for first_row in rows.clone().step_by(most) {
                let block = Block { seq, first_row, tokens: most.min(rows.end - first_row) };
                let heads = if block.tokens == 1 { together } else { 1 };
                for first_head in (0..kv_heads).step_by(heads) {
                    items.push(Item { block, first_head, heads: heads.min(kv_heads - first_head) });
                }
            }
        }
    }

    /// KV heads of an item of one token.
    fn heads_together(&self, threads: usize) -> usize {
        let kv_heads = self.shape.num_kv_heads as usize;
        if self.pages.shape.block_size < PANEL {
            return 1; // keys are gathered, head by head
        }
        let splits = |seq: usize| (self.step.seq_lens[seq] as usize).div_ceil(SPLIT);
        let pieces = (0..self.step.num_seqs()).map(splits).sum::<usize>() * kv_heads;
        (pieces / (2 * threads)).clamp(1, kv_heads.min((ROWS / self.group).max(1)))
    }

    /// Positions that token `t` of a block sees.
    #[inline(always)]
    fn seen(&self, block: Block, t: usize) -> Range<usize> {
        let end = self.step.positions[block.first_row + t] as usize + 1;
        end.saturating_sub(self.window)..end
    }

    /// Positions that any token of a block sees.
    fn all_seen(&self, block: Block) -> Range<usize> {
        self.seen(block, 0).start..self.seen(block, block.tokens - 1).end
    }

    fn splits(&self, block: Block) -> Range<usize> {
        let seen = self.all_seen(block);
        seen.start / SPLIT..seen.end.div_ceil(SPLIT)
    }

    /// Rounds the queries of an item.
    #[inline(always)]
    unsafe fn load_queries<D: PairDot>(&self, item: Item, q: &mut [u32]) {
        let (head_dim, pairs) = (self.shape.head_dim as usize, self.pages.shape.key_pairs());
        let size = self.group * head_dim;
        let mut to = q.chunks_exact_mut(pairs);
        for kv_head in item.first_head..item.first_head + item.heads {
            for t in 0..item.block.tokens {
                let heads = &self.qkv.row(item.block.first_row + t)[kv_head * size..(kv_head + 1) * size];
                for (q, to) in heads.chunks_exact(head_dim).zip(&mut to) {
                    // SAFETY: the caller's.
                    unsafe { round_row::<D>(q, to) };
                }
            }
        }
    }

    /// Brings one split of an item into `state`.
    #[inline(always)]
    unsafe fn split<D: ByteDot>(
        &self,
        item: Item,
        ahead: Ahead,
        split: usize,
        s: &mut Buffers<'_>,
        state: &mut State<'_>,
    ) {
        state.clear();
        let seen = self.all_seen(item.block);
        let (from, to) = (seen.start.max(split * SPLIT), seen.end.min((split + 1) * SPLIT));
        for tile in from / TILE..to.div_ceil(TILE) {
            // SAFETY: the caller's.
            unsafe { self.tile::<D>(item, ahead, tile * TILE, s, state) };
        }
    }

    /// The keys of one tile, for the rows that see any of them.
    #[inline(always)]
    unsafe fn tile<D: ByteDot>(
        &self,
        item: Item,
        ahead: Ahead,
        start: usize,
        s: &mut Buffers<'_>,
        state: &mut State<'_>,
    ) {
        let Item { block, first_head, heads } = item;
        // Positions grow from token to token, so those that see part of the tile are neighbours.
        let sees = |t: usize| {
            let seen = self.seen(block, t);
            seen.start < start + TILE && seen.end > start
        };
        let first = (0..block.tokens).find(|&t| sees(t)).unwrap_or(block.tokens);
        let end = (first..block.tokens).find(|&t| !sees(t)).unwrap_or(block.tokens);
        if first == end {
            return;
        }
        let keys = self.seen(block, first).start.max(start) - start
            ..self.seen(block, end - 1).end.min(start + TILE) - start;
        let panels = keys.start / PANEL..keys.end.div_ceil(PANEL);
        let rows = first * self.group..end * self.group;
        let block_table = self.step.block_table(block.seq);
        let wanted = Wanted { block_table, first_head, heads, start, keys };
        let pages = self.pages;
        let shown = Shown { item, start, keys: wanted.keys.clone(), panels, rows };
        // SAFETY: the caller's; bytes are read as bytes.
        unsafe {
            let next = self.next_tile::<D>(item, ahead, start);
            if pages.is_bytes() {
                find_scales(pages, &wanted, s.tile.scales);
            }
            match Tile::in_place(pages, &wanted) {
                Some(tile) if !pages.is_bytes() => {
                    self.attend::<D, Wide>(&shown, tile, next.unwrap_or(tile), s, state);
                }
                // Few rows are one tile, which reads everything once.
                Some(tile) if heads > 1 || shown.rows.len() <= D::TILE_SUMS / NARROW => {
                    self.attend::<D, Bytes>(&shown, tile, next.unwrap_or(tile), s, state);
                }
                Some(bytes) => {
                    let tile = bytes.widen::<D>(pages, &shown.panels, &next.unwrap_or(bytes), &mut s.tile);
                    self.attend::<D, Wide>(&shown, tile, tile, s, state);
                }
                None => {
                    let tile = gather(pages, &wanted, &mut s.tile);
                    self.attend::<D, Wide>(&shown, tile, tile, s, state);
                }
            }
        }
    }

    /// Scores, weights, and the weighted values of a tile, while memory works on the next one.
    #[inline(always)]
    unsafe fn attend<D: ByteDot, F: Form>(
        &self,
        shown: &Shown,
        tile: Tile,
        next: Tile,
        s: &mut Buffers<'_>,
        state: &mut State<'_>,
    ) {
        let Shown { item, keys, panels, rows, .. } = shown;
        let (pairs, columns) = (self.pages.shape.key_pairs(), self.pages.shape.columns());
        let scales = self.pages.is_bytes().then_some(&*s.tile.scales);
        let (head_rows, form) = (item.block.tokens * self.group, PhantomData::<F>);
        let rows_of = |head: usize| head * head_rows + rows.start..head * head_rows + rows.end;
        let all_rows = rows.start..rows_of(item.heads - 1).end;
        let strides = self.pages.head_strides();
        // SAFETY: the tile was found, and the buffers have been made for its shape.
        unsafe {
            let mut scores =
                Scores { q: s.q, pairs, keys: tile.keys, next: next.keys, out: Shared::new(s.scores), form };
            for run in self.runs(shown) {
                for head in 0..item.heads {
                    (scores.keys, scores.next) = (tile.keys_of(head, strides), next.keys_of(head, strides));
                    each_panel::<D, _>(&scores, rows_of(head), run.clone());
                }
            }
            let mut key_scales = scales;
            for head in 0..item.heads {
                let scales = scales.map(|scales| &scales[head * SCALES..]);
                if self.rule.cap::<D>(s.scores, scales, rows_of(head), panels.clone()).is_none() {
                    key_scales = None;
                }
            }
            self.hide(shown, s.scores);
            let softmax = Softmax {
                factor: self.rule.factor,
                key_scales,
                value_scales: scales.map(|scales| &scales[TILE..]),
                head_rows,
                rows: all_rows.clone(),
                panels: panels.clone(),
            };
            softmax.run::<D>(s.scores, s.highest, s.weights, state);
            for run in self.runs(shown) {
                for head in 0..item.heads {
                    let values = Values {
                        weights: s.weights,
                        shrink: s.highest,
                        values: tile.values_of(head, strides),
                        next: next.values_of(head, strides),
                        pairs: run.start * PANEL_PAIRS..(run.end * PANEL_PAIRS).min(keys.end.div_ceil(2)),
                        columns,
                        out: Shared::new(state.out),
                        form,
                    };
                    each_wide_panel::<D, _, WIDE>(&values, rows_of(head), 0..columns / PANEL);
                }
                s.highest[all_rows.clone()].fill(1.0);
            }
        }
    }

    /// The panels of a tile in pieces, of which each is read head by head: blocks, where an item has several heads.
    fn runs(&self, shown: &Shown) -> impl Iterator<Item = Range<usize>> + use<> {
        let Range { start, end } = shown.panels;
        let len = if shown.item.heads > 1 {
            (self.pages.shape.block_size / PANEL).clamp(1, PANELS)
        } else {
            PANELS
        };
        (start / len * len..end).step_by(len).map(move |run| run.max(start)..(run + len).min(end))
    }

    /// Takes away the scores of keys in these panels that a row does not see.
    #[inline(always)]
    fn hide(&self, shown: &Shown, scores: &mut [f32]) {
        let Shown { item: Item { block, heads, .. }, start, panels, rows, .. } = shown;
        let all = panels.start * PANEL..panels.end * PANEL;
        for t in rows.start / self.group..rows.end / self.group {
            let seen = self.seen(*block, t);
            let seen = seen.start.max(*start) - start..seen.end.min(start + TILE) - start;
            if seen.len() == all.len() {
                continue;
            }
            for head in 0..*heads {
                let row = (head * block.tokens + t) * self.group;
                for scores in scores[row * TILE..][..self.group * TILE].chunks_exact_mut(TILE) {
                    scores[all.start..seen.start].fill(f32::NEG_INFINITY);
                    scores[seen.end..all.end].fill(f32::NEG_INFINITY);
                }
            }
        }
    }

    /// The tile that follows the one at `start`: after the last one that the item sees, the first one of the next item.
    /// Memory works on its scales from here on.
    #[inline(always)]
    unsafe fn next_tile<D: ByteDot>(&self, item: Item, ahead: Ahead, start: usize) -> Option<Tile> {
        let shape = self.pages.shape;
        let more = start + TILE < self.all_seen(item.block).end.min(ahead.until);
        let Item { block, first_head, heads } = if more { item } else { ahead.after? };
        let (seen, block_table) = (self.all_seen(block), self.step.block_table(block.seq));
        let start = if more { start + TILE } else { seen.start / TILE * TILE };
        let mut last = seen.start.max(start);
        let (mut keys, mut values) = ([std::ptr::null(); PANELS], [std::ptr::null(); PANELS]);
        for panel in 0..PANELS {
            let position = start + panel * PANEL;
            // What is not to be seen is not asked for: once more the one before instead.
            if position < seen.end && position + PANEL > seen.start {
                last = position;
            }
            let (block, offset) = (block_table[last / shape.block_size] as usize, last % shape.block_size);
            (keys[panel], values[panel]) = self.pages.address(block, first_head, offset);
            if let Pairs::Int8 { scales, .. } = &self.pages.pairs {
                for head in first_head..first_head + heads {
                    let at = (block * shape.num_kv_heads + head) * 2 * shape.block_size + offset;
                    let key = scales.as_ptr().wrapping_add(at);
                    // SAFETY: any address may be prefetched; the rest is the caller's.
                    unsafe {
                        D::prefetch(key.cast());
                        D::prefetch(key.wrapping_add(shape.block_size).cast());
                    }
                }
            }
        }
        Some(Tile { keys, values })
    }

    /// Divides by the sums and writes the rows of an item.
    #[inline(always)]
    unsafe fn finish(&self, item: Item, state: &mut State<'_>) {
        let head_dim = self.shape.head_dim as usize;
        let tokens = item.block.tokens;
        for r in 0..item.heads * tokens * self.group {
            let (head, t) = (r / (tokens * self.group), r / self.group % tokens);
            let head = (item.first_head + head) * self.group + r % self.group;
            // The sink's score, like the maximum, as an exponent of 2.
            let exponent = |sink: f32| sink * std::f32::consts::LOG2_E - state.max[r];
            let sink = self.sinks.map_or(0.0, |sinks| exponent(sinks[head]).exp2());
            let scale = 1.0 / (sum_lanes(state.sum[r]) + sink);
            // SAFETY: the columns are this item's, by contract.
            let out = unsafe { self.out.part(item.block.first_row + t, head * head_dim, head_dim) };
            out.iter_mut().zip(state.row(r)).for_each(|(out, x)| *out = *x * scale);
        }
    }
}

/// What a thread reads after a tile of an item: the item's next one, if it begins before `until`, or the first one of the
/// item `after`.
#[derive(Clone, Copy)]
struct Ahead {
    until: usize,
    after: Option<Item>,
}

/// The parts of [`Scratch`] that a tile works in.
struct Buffers<'a> {
    q: &'a mut [u32],
    scores: &'a mut [f32],
    weights: &'a mut [u32],
    highest: &'a mut [f32],
    tile: TileRoom<'a>,
}

/// Room for a tile.
struct TileRoom<'a> {
    keys: &'a mut [u32],
    values: &'a mut [u32],
    scales: &'a mut [f32],
}

impl Scratch {
    fn parts(&mut self) -> (Buffers<'_>, &mut [f32], &mut [f32]) {
        let Self { q, scores, weights, highest, part, total, keys, values, scales } = self;
        let tile = TileRoom { keys, values, scales };
        (Buffers { q, scores, weights, highest, tile }, part, total)
    }
}

/// What is to be done of an item.
enum Task<'a> {
    /// All splits one after the other.
    Whole,
    /// One split, into a partial result.
    Split(usize, &'a mut [f32]),
    /// The rest, from the partial results of all splits, each as long as this says.
    Fold(&'a mut [f32], usize),
}

/// A task. One kernel for all of them, as what it calls is compiled into it.
struct Run<'a> {
    work: &'a Work<'a>,
    item: Item,
    /// The one that the thread does next, if that is known.
    after: Option<Item>,
    scratch: &'a mut Scratch,
    task: Task<'a>,
}

impl PairKernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let Self { work, item, after, scratch, mut task } = self;
        let (mut buffers, mut part, mut total) = scratch.parts();
        let (rows, columns) = (item.heads * item.block.tokens * work.group, work.pages.shape.columns());
        let splits = work.splits(item.block);
        let (computes, folds) = (!matches!(task, Task::Fold(..)), !matches!(task, Task::Split(..)));
        // SAFETY: the caller's.
        unsafe {
            if computes {
                work.load_queries::<D>(item, buffers.q);
            }
            // Folding a single split into nothing would change nothing.
            let whole = matches!(task, Task::Whole);
            let single = whole && splits.len() == 1;
            if !single {
                State::of(total, rows, columns).clear();
            }
            for split in splits {
                let memory = match &mut task {
                    Task::Whole => &mut *part,
                    Task::Split(wanted, _) if *wanted != split => continue,
                    Task::Split(_, part) => &mut **part,
                    Task::Fold(parts, len) => &mut parts[split * *len..(split + 1) * *len],
                };
                let mut state = State::of(memory, rows, columns);
                if computes {
                    let until = if whole { usize::MAX } else { (split + 1) * SPLIT };
                    work.split::<D>(item, Ahead { until, after }, split, &mut buffers, &mut state);
                }
                if folds && !single {
                    State::of(total, rows, columns).fold::<D>(&mut state);
                }
            }
            if single {
                std::mem::swap(&mut part, &mut total);
            }
            if folds {
                work.finish(item, &mut State::of(total, rows, columns));
            }
        }
    }
}

/// How operands lie in memory, in vectors of a panel's pairs.
trait Form: Copy {
    /// Bytes of a vector.
    const SIZE: usize;

    /// Vector `i` from `at` on.
    ///
    /// # Safety
    /// It can be read; the rest as for [`PairDot`].
    unsafe fn load<D: ByteDot>(at: *const u8, i: usize) -> D::W;
}

/// As pairs of bf16.
#[derive(Clone, Copy)]
struct Wide;

/// As pairs of bytes.
#[derive(Clone, Copy)]
struct Bytes;

impl Form for Wide {
    const SIZE: usize = PANEL * size_of::<u32>();

    #[inline(always)]
    unsafe fn load<D: ByteDot>(at: *const u8, i: usize) -> D::W {
        // SAFETY: the caller's.
        unsafe { D::load(at.add(i * Self::SIZE).cast()) }
    }
}

impl Form for Bytes {
    const SIZE: usize = PANEL * size_of::<u16>();

    #[inline(always)]
    unsafe fn load<D: ByteDot>(at: *const u8, i: usize) -> D::W {
        // SAFETY: the caller's.
        unsafe { D::widen_pairs(at.add(i * Self::SIZE).cast()) }
    }
}

/// Where the keys and values of a tile's first head lie: panels of 16 keys, `[key_pairs][PANEL]`, and the values of the same keys,
/// `[PANEL_PAIRS][columns]`. Panels without a visible key are null, or in a tile to come like their neighbours.
#[derive(Clone, Copy)]
struct Tile {
    keys: [*const u8; PANELS],
    values: [*const u8; PANELS],
}

/// Who sees what of a tile.
struct Shown {
    item: Item,
    /// Position of the tile.
    start: usize,
    /// Within the tile: those that any row sees, and the panels that hold them.
    keys: Range<usize>,
    panels: Range<usize>,
    /// Rows of the first head that see any of them.
    rows: Range<usize>,
}

/// The keys of a tile that are to be found.
struct Wanted<'a> {
    block_table: &'a [u32],
    first_head: usize,
    heads: usize,
    /// Position of the tile.
    start: usize,
    /// Within the tile.
    keys: Range<usize>,
}

impl Wanted<'_> {
    /// Block and offset of a key.
    #[inline(always)]
    fn at(&self, key: usize, block_size: usize) -> (usize, usize) {
        let position = self.start + key;
        (self.block_table[position / block_size] as usize, position % block_size)
    }
}

impl Tile {
    /// The tile with the wanted keys as it lies in the cache, unless its panels are in pieces. Panics if a block lies
    /// outside the cache.
    #[inline(always)]
    fn in_place(pages: &PackedPages, wanted: &Wanted<'_>) -> Option<Self> {
        let shape = pages.shape;
        let mut tile = Self { keys: [std::ptr::null(); PANELS], values: [std::ptr::null(); PANELS] };
        if shape.block_size < PANEL {
            return None;
        }
        for panel in wanted.keys.start / PANEL..wanted.keys.end.div_ceil(PANEL) {
            let (block, offset) = wanted.at(panel * PANEL, shape.block_size);
            pages.check(block);
            (tile.keys[panel], tile.values[panel]) = pages.address(block, wanted.first_head, offset);
        }
        Some(tile)
    }

    /// The keys of another head, `strides` apart.
    #[inline(always)]
    fn keys_of(&self, head: usize, strides: [usize; 2]) -> [*const u8; PANELS] {
        self.keys.map(|at| at.wrapping_add(head * strides[0]))
    }

    /// The values of another head.
    #[inline(always)]
    fn values_of(&self, head: usize, strides: [usize; 2]) -> [*const u8; PANELS] {
        self.values.map(|at| at.wrapping_add(head * strides[1]))
    }

    /// A tile of bytes as one of pairs, in `room`, while memory works on the next one.
    ///
    /// # Safety
    /// The panels can be read; the rest as for [`PairDot`].
    #[inline(always)]
    unsafe fn widen<D: ByteDot>(
        &self,
        pages: &PackedPages,
        panels: &Range<usize>,
        next: &Self,
        room: &mut TileRoom<'_>,
    ) -> Self {
        let (pairs, columns) = (pages.shape.key_pairs(), pages.shape.columns());
        let mut tile = *self;
        for i in panels.clone() {
            let keys = &mut room.keys[i * PANEL * pairs..(i + 1) * PANEL * pairs];
            let values = &mut room.values[i * PANEL_PAIRS * columns..(i + 1) * PANEL_PAIRS * columns];
            // SAFETY: the caller's.
            unsafe {
                widen::<D>(self.keys[i], keys, next.keys[i]);
                widen::<D>(self.values[i], values, next.values[i]);
            }
            (tile.keys[i], tile.values[i]) = (keys.as_ptr().cast(), values.as_ptr().cast());
        }
        tile
    }
}

/// Whole panels of bytes as bf16.
#[inline(always)]
unsafe fn widen<D: ByteDot>(from: *const u8, to: &mut [u32], next: *const u8) {
    for (i, to) in to.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
        // SAFETY: `to` holds a panel, any address may be prefetched; the rest is the caller's.
        unsafe {
            D::prefetch(next.wrapping_add(i * Bytes::SIZE).cast());
            D::store_words(to.as_mut_ptr(), Bytes::load::<D>(from, i));
        }
    }
}

/// The scales of a tile's keys, then those of its values.
#[inline(always)]
fn find_scales(pages: &PackedPages, wanted: &Wanted<'_>, to: &mut [f32]) {
    let shape = pages.shape;
    if let Pairs::Int8 { scales, .. } = &pages.pairs {
        let lanes = shape.lanes();
        for head in 0..wanted.heads {
            let (keys, values) = to[head * SCALES..][..SCALES].split_at_mut(TILE);
            for key in (wanted.keys.start / lanes * lanes..wanted.keys.end).step_by(lanes) {
                let (block, offset) = wanted.at(key, shape.block_size);
                let head = block * shape.num_kv_heads + wanted.first_head + head;
                let from = &scales[head * 2 * shape.block_size..][..2 * shape.block_size];
                keys[key..key + lanes].copy_from_slice(&from[offset..offset + lanes]);
                values[key..key + lanes].copy_from_slice(&from[shape.block_size + offset..][..lanes]);
            }
        }
    }
}

/// Copies the keys and values of a tile together.
fn gather(pages: &PackedPages, wanted: &Wanted<'_>, room: &mut TileRoom<'_>) -> Tile {
    let shape = pages.shape;
    let (pairs, columns, lanes) = (shape.key_pairs(), shape.columns(), shape.lanes());
    for key in wanted.keys.clone() {
        let (block, offset) = wanted.at(key, shape.block_size);
        let from = shape.key_panel(block, wanted.first_head, offset) + offset;
        for i in 0..pairs {
            room.keys[(key / PANEL * pairs + i) * PANEL + key % PANEL] = match &pages.pairs {
                Pairs::Bf16 { k, .. } => k[from + i * lanes],
                Pairs::Int8 { k, .. } => widen_pair(k[from + i * lanes]),
            };
        }
        let from = shape.value_row(block, wanted.first_head, offset);
        for column in 0..columns {
            let pair = match &pages.pairs {
                Pairs::Bf16 { v, .. } => v[from + column],
                Pairs::Int8 { v, .. } => widen_pair(v[from + column]),
            };
            let half = if offset % 2 == 0 { pair & 0xFFFF } else { pair >> 16 };
            let to = &mut room.values[key / 2 * columns + column];
            *to = if key % 2 == 0 { *to & 0xFFFF_0000 | half } else { *to & 0xFFFF | half << 16 };
        }
    }
    let tile = |i: usize, of: &[u32]| of[i * (of.len() / PANELS)..].as_ptr().cast::<u8>();
    let (keys, values) = (&room.keys[..TILE * pairs], &room.values[..TILE / 2 * columns]);
    Tile { keys: std::array::from_fn(|i| tile(i, keys)), values: std::array::from_fn(|i| tile(i, values)) }
}

/// `scores = q · keysᵀ`: rows by panels of keys.
struct Scores<'a, F> {
    q: &'a [u32],
    pairs: usize,
    keys: [*const u8; PANELS],
    /// Of the next tile.
    next: [*const u8; PANELS],
    out: Shared<'a, f32>,
    form: PhantomData<F>,
}

impl<F: Form> Tiled for Scores<'_, F> {
    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, panel: usize, _: Turn) {
        let q = &self.q[row * self.pairs..(row + M) * self.pairs];
        // SAFETY: `q` holds M rows; each panel holds `pairs` vectors, and so do its values or more of them.
        unsafe {
            let rows: [*const u32; M] = std::array::from_fn(|r| q.as_ptr().add(r * self.pairs));
            let keys: [*const u8; P] = std::array::from_fn(|i| self.keys[panel + i]);
            let next: [*const u8; P] = std::array::from_fn(|i| self.next[panel + i]);
            let mut sums = [[D::zero(); P]; M];
            for line in (0..self.pairs).step_by(LINE / F::SIZE) {
                for i in 0..P {
                    D::prefetch(next[i].wrapping_add(line * F::SIZE).cast());
                }
                for k in line..(line + LINE / F::SIZE).min(self.pairs) {
                    let mut weights = [F::load::<D>(keys[0], 0); P];
                    for i in 0..P {
                        weights[i] = F::load::<D>(keys[i], k);
                    }
                    for r in 0..M {
                        for i in 0..P {
                            sums[r][i] = D::dot(sums[r][i], weights[i], rows[r].add(k));
                        }
                    }
                }
            }
            for r in 0..M {
                let out = self.out.slice((row + r) * TILE + panel * PANEL, P * PANEL);
                for i in 0..P {
                    D::store(out[i * PANEL..].as_mut_ptr(), sums[r][i]);
                }
            }
        }
    }
}

/// `out = out * shrink + weights · values`: rows by panels of columns.
struct Values<'a, F> {
    weights: &'a [u32],
    shrink: &'a [f32],
    values: [*const u8; PANELS],
    /// Of the next tile.
    next: [*const u8; PANELS],
    /// Pairs of keys.
    pairs: Range<usize>,
    columns: usize,
    out: Shared<'a, f32>,
    form: PhantomData<F>,
}

impl<F: Form> Tiled for Values<'_, F> {
    #[inline(always)]
    unsafe fn tile<D: ByteDot, const M: usize, const P: usize>(&self, row: usize, panel: usize, _: Turn) {
        let weights = &self.weights[row * TILE / 2..(row + M) * TILE / 2];
        // SAFETY: `weights` holds M rows of TILE / 2, `out` its rows; values reach to the last column.
        unsafe {
            let rows: [*const u32; M] = std::array::from_fn(|r| weights.as_ptr().add(r * TILE / 2));
            let out: [*mut f32; M] = std::array::from_fn(|r| {
                self.out.slice((row + r) * self.columns + panel * PANEL, P * PANEL).as_mut_ptr()
            });
            let mut sums = [[D::zero(); P]; M];
            for r in 0..M {
                let shrink = D::splat(self.shrink[row + r]);
                for i in 0..P {
                    sums[r][i] = D::mul(D::load_sums(out[r].add(i * PANEL)), shrink);
                }
            }
            let mut pair = self.pairs.start;
            while pair < self.pairs.end {
                let end = (pair + PANEL_PAIRS).min(self.pairs.end);
                let (from, next) = (self.values[pair / PANEL_PAIRS], self.next[pair / PANEL_PAIRS]);
                for k in 0..end - pair {
                    let mut values = [F::load::<D>(from, panel); P];
                    for i in 0..P {
                        let at = k * (self.columns / PANEL) + panel + i;
                        values[i] = F::load::<D>(from, at);
                        if i % (LINE / F::SIZE) == 0 {
                            D::prefetch(next.wrapping_add(at * F::SIZE).cast());
                        }
                    }
                    for r in 0..M {
                        for i in 0..P {
                            sums[r][i] = D::dot(sums[r][i], values[i], rows[r].add(pair + k));
                        }
                    }
                }
                pair = end;
            }
            for r in 0..M {
                for i in 0..P {
                    D::store(out[r].add(i * PANEL), sums[r][i]);
                }
            }
        }
    }
}
