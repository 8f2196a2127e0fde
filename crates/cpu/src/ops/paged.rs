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

use super::softmax::{ScoreRule, Softmax, State, sum_lanes};
use super::tiles::{NARROW, Tiled, Turn, each_panel};
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
/// Positions of a partial result.
const SPLIT: usize = 1024;
/// Rows (tokens times query heads of a KV head) of an item.
const ROWS: usize = 64;

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy)]
struct Block {
    seq: usize,
    first_row: usize,
    tokens: usize,
}

/// Memory to work in: the blocks of a step, partial results, and one [`Scratch`] a thread.
#[derive(Default)]
pub(crate) struct Workspace {
    blocks: Vec<Block>,
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
    /// Of the tile's keys, then of its values, if they have any.
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
        self.scales.resize(2 * TILE, 1.0);
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
    let Workspace { blocks, partial, scratch } = workspace;
    cut_blocks(step, (ROWS / group).max(1), blocks);
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
    let items = blocks.len() * kv_heads;
    // Later blocks see more keys: they go first, so that no long one is left at the end.
    let item = |i: usize| {
        let i = i.min(items - 1);
        Item { block: blocks[blocks.len() - 1 - i / kv_heads], kv_head: i % kv_heads }
    };
    let splits = blocks.iter().map(|&block| work.splits(block).end).max().unwrap_or(0);
    if splits < 2 || items >= 4 * pool.num_threads() {
        // Neighbours share a block of tokens, and each asks for what the next one reads first.
        let grain = (items / (8 * pool.num_threads())).clamp(1, kv_heads);
        return pool.split(items, grain, |worker, range| {
            for i in range {
                // SAFETY: `isa` was detected; scratch `worker` is this thread's, the item's columns of `out` its own.
                unsafe {
                    let scratch = &mut scratch.slice(worker, 1)[0];
                    let items = (item(i), item(i + 1));
                    dispatch_pairs(isa, Run { work: &work, items, scratch, task: Task::Whole });
                }
            }
        });
    }
    // Few items over a long context: their splits are computed side by side and folded afterwards.
    let len = State::len(most_rows, columns);
    partial.resize((items * splits * len).max(partial.len()), 0.0);
    let partial = Shared::new(partial);
    pool.split(items * splits, 1, |worker, range| {
        for i in range {
            let (item, split) = (item(i / splits), i % splits);
            // SAFETY: as above, and the partial result is this piece's own.
            unsafe {
                let (scratch, part) = (&mut scratch.slice(worker, 1)[0], partial.slice(i * len, len));
                let (items, task) = ((item, item), Task::Split(split, part));
                dispatch_pairs(isa, Run { work: &work, items, scratch, task });
            }
        }
    })?;
    pool.split(items, 1, |worker, range| {
        for i in range {
            // SAFETY: as above; this piece has all partial results of its items.
            unsafe {
                let scratch = &mut scratch.slice(worker, 1)[0];
                let parts = partial.slice(i * splits * len, splits * len);
                let (items, task) = ((item(i), item(i)), Task::Fold(parts, len));
                dispatch_pairs(isa, Run { work: &work, items, scratch, task });
            }
        }
    })
}

/// Cuts the rows of each sequence into blocks of at most `most` tokens.
fn cut_blocks(step: &StepBuffer, most: usize, blocks: &mut Vec<Block>) {
    blocks.clear();
    for seq in 0..step.num_seqs() {
        let rows = step.rows_of(seq);
        for first_row in rows.clone().step_by(most) {
            blocks.push(Block { seq, first_row, tokens: most.min(rows.end - first_row) });
        }
    }
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

#[derive(Clone, Copy)]
struct Item {
    block: Block,
    kv_head: usize,
}

impl Work<'_> {
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
        let first = item.kv_head * self.group * head_dim;
        let mut to = q.chunks_exact_mut(pairs);
        for t in 0..item.block.tokens {
            let heads = &self.qkv.row(item.block.first_row + t)[first..first + self.group * head_dim];
            for (q, to) in heads.chunks_exact(head_dim).zip(&mut to) {
                // SAFETY: the caller's.
                unsafe { round_row::<D>(q, to) };
            }
        }
    }

    /// Brings one split of an item into `state`.
    #[inline(always)]
    unsafe fn split<D: ByteDot>(
        &self,
        items: (Item, Item),
        split: usize,
        s: &mut Buffers<'_>,
        state: &mut State<'_>,
    ) {
        state.clear();
        let seen = self.all_seen(items.0.block);
        let (from, to) = (seen.start.max(split * SPLIT), seen.end.min((split + 1) * SPLIT));
        for tile in from / TILE..to.div_ceil(TILE) {
            // SAFETY: the caller's.
            unsafe { self.tile::<D>(items, tile * TILE, s, state) };
        }
    }

    /// The keys of one tile, for the rows that see any of them.
    #[inline(always)]
    unsafe fn tile<D: ByteDot>(
        &self,
        items: (Item, Item),
        start: usize,
        s: &mut Buffers<'_>,
        state: &mut State<'_>,
    ) {
        let Item { block, kv_head } = items.0;
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
        let wanted = Wanted { block_table, head: kv_head, start, keys };
        let pages = self.pages;
        let shown = Shown { block, start, keys: wanted.keys.clone(), panels, rows };
        // SAFETY: the caller's; bytes are read as bytes.
        unsafe {
            let next = self.next_tile::<D>(items, start);
            if pages.is_bytes() {
                find_scales(pages, &wanted, s.tile.scales);
            }
            match Tile::in_place(pages, &wanted) {
                Some(tile) if !pages.is_bytes() => self.attend::<D, Wide>(&shown, tile, next, s, state),
                // Few rows are one tile, which reads everything once.
                Some(tile) if shown.rows.len() <= D::TILE_SUMS / NARROW => {
                    self.attend::<D, Bytes>(&shown, tile, next, s, state);
                }
                Some(bytes) => {
                    let tile = bytes.widen::<D>(pages, &shown.panels, &next, &mut s.tile);
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
        let Shown { keys, panels, rows, .. } = shown;
        let (pairs, columns) = (self.pages.shape.key_pairs(), self.pages.shape.columns());
        let scales = self.pages.is_bytes().then_some(&*s.tile.scales);
        let form = PhantomData::<F>;
        let scores =
            Scores { q: s.q, pairs, keys: tile.keys, next: next.keys, out: Shared::new(s.scores), form };
        // SAFETY: the tile was found, and the buffers have been made for its shape.
        unsafe {
            each_panel::<D, _>(&scores, rows.clone(), panels.clone());
            let key_scales = self.rule.cap::<D>(s.scores, scales, rows.clone(), panels.clone());
            self.hide(shown, s.scores);
            let softmax = Softmax {
                factor: self.rule.factor,
                key_scales,
                value_scales: scales.map(|scales| &scales[TILE..]),
                rows: rows.clone(),
                panels: panels.clone(),
            };
            softmax.run::<D>(s.scores, s.highest, s.weights, state);
            let values = Values {
                weights: s.weights,
                shrink: s.highest,
                values: tile.values,
                next: next.values,
                pairs: panels.start * PANEL_PAIRS..keys.end.div_ceil(2),
                columns,
                out: Shared::new(state.out),
                form,
            };
            each_panel::<D, _>(&values, rows.clone(), 0..columns / PANEL);
        }
    }

    /// Takes away the scores of keys in these panels that a row does not see.
    #[inline(always)]
    fn hide(&self, shown: &Shown, scores: &mut [f32]) {
        let Shown { block, start, panels, rows, .. } = shown;
        let all = panels.start * PANEL..panels.end * PANEL;
        for t in rows.start / self.group..rows.end / self.group {
            let seen = self.seen(*block, t);
            let seen = seen.start.max(*start) - start..seen.end.min(start + TILE) - start;
            if seen.len() < all.len() {
                for scores in scores[t * self.group * TILE..][..self.group * TILE].chunks_exact_mut(TILE) {
                    scores[all.start..seen.start].fill(f32::NEG_INFINITY);
                    scores[seen.end..all.end].fill(f32::NEG_INFINITY);
                }
            }
        }
    }

    /// The tile that follows the one at `start`: after the last one that the item sees, the first one of the next item.
    /// Memory works on its scales from here on.
    #[inline(always)]
    unsafe fn next_tile<D: ByteDot>(&self, (item, after): (Item, Item), start: usize) -> Tile {
        let shape = self.pages.shape;
        let more = start + TILE < self.all_seen(item.block).end;
        let Item { block, kv_head } = if more { item } else { after };
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
            (keys[panel], values[panel]) = self.pages.address(block, kv_head, offset);
            if let Pairs::Int8 { scales, .. } = &self.pages.pairs {
                let at = (block * shape.num_kv_heads + kv_head) * 2 * shape.block_size + offset;
                let key = scales.as_ptr().wrapping_add(at);
                // SAFETY: any address may be prefetched; the rest is the caller's.
                unsafe {
                    D::prefetch(key.cast());
                    D::prefetch(key.wrapping_add(shape.block_size).cast());
                }
            }
        }
        Tile { keys, values }
    }

    /// Divides by the sums and writes the rows of an item.
    #[inline(always)]
    unsafe fn finish(&self, item: Item, state: &mut State<'_>) {
        let head_dim = self.shape.head_dim as usize;
        for t in 0..item.block.tokens {
            for h in 0..self.group {
                let (r, head) = (t * self.group + h, item.kv_head * self.group + h);
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
    /// The item, and the one that the thread is likely to do next.
    items: (Item, Item),
    scratch: &'a mut Scratch,
    task: Task<'a>,
}

impl PairKernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let Self { work, items, scratch, mut task } = self;
        let item = items.0;
        let (mut buffers, mut part, mut total) = scratch.parts();
        let (rows, columns) = (item.block.tokens * work.group, work.pages.shape.columns());
        let splits = work.splits(item.block);
        let (computes, folds) = (!matches!(task, Task::Fold(..)), !matches!(task, Task::Split(..)));
        // SAFETY: the caller's.
        unsafe {
            if computes {
                work.load_queries::<D>(item, buffers.q);
            }
            // Folding a single split into nothing would change nothing.
            let single = matches!(task, Task::Whole) && splits.len() == 1;
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
                    work.split::<D>(items, split, &mut buffers, &mut state);
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

/// Where the keys and values of a tile lie: panels of 16 keys, `[key_pairs][PANEL]`, and the values of the same keys,
/// `[PANEL_PAIRS][columns]`. Panels without a visible key are null, or in a tile to come like their neighbours.
#[derive(Clone, Copy)]
struct Tile {
    keys: [*const u8; PANELS],
    values: [*const u8; PANELS],
}

/// Who sees what of a tile.
struct Shown {
    block: Block,
    /// Position of the tile.
    start: usize,
    /// Within the tile: those that any row sees, and the panels that hold them.
    keys: Range<usize>,
    panels: Range<usize>,
    /// Rows of the block's that see any of them.
    rows: Range<usize>,
}

/// The keys of a tile that are to be found.
struct Wanted<'a> {
    block_table: &'a [u32],
    head: usize,
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
            (tile.keys[panel], tile.values[panel]) = pages.address(block, wanted.head, offset);
        }
        Some(tile)
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
        for key in wanted.keys.clone() {
            let (block, offset) = wanted.at(key, shape.block_size);
            let at = (block * shape.num_kv_heads + wanted.head) * 2 * shape.block_size + offset;
            (to[key], to[TILE + key]) = (scales[at], scales[at + shape.block_size]);
        }
    }
}

/// Copies the keys and values of a tile together.
fn gather(pages: &PackedPages, wanted: &Wanted<'_>, room: &mut TileRoom<'_>) -> Tile {
    let shape = pages.shape;
    let (pairs, columns, lanes) = (shape.key_pairs(), shape.columns(), shape.lanes());
    for key in wanted.keys.clone() {
        let (block, offset) = wanted.at(key, shape.block_size);
        let from = shape.key_panel(block, wanted.head, offset) + offset;
        for i in 0..pairs {
            room.keys[(key / PANEL * pairs + i) * PANEL + key % PANEL] = match &pages.pairs {
                Pairs::Bf16 { k, .. } => k[from + i * lanes],
                Pairs::Int8 { k, .. } => widen_pair(k[from + i * lanes]),
            };
        }
        let from = shape.value_row(block, wanted.head, offset);
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
            for k in 0..self.pairs {
                let mut weights = [F::load::<D>(keys[0], 0); P];
                for i in 0..P {
                    weights[i] = F::load::<D>(keys[i], k);
                    D::prefetch(next[i].wrapping_add(k * F::SIZE).cast());
                }
                for r in 0..M {
                    for i in 0..P {
                        sums[r][i] = D::dot(sums[r][i], weights[i], rows[r].add(k));
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
                        D::prefetch(next.wrapping_add(at * F::SIZE).cast());
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
