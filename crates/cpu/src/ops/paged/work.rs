//! What is computed of an item, tile by tile.

use std::marker::PhantomData;
use std::ops::Range;

use quire_backend::{AttnShape, StepBuffer};

use super::products::{HeadScores, Lines, Scores, Values};
use super::scratch::Buffers;
use super::softmax::{SCALES, ScoreRule, Softmax, State, sum_lanes};
use super::tile::{Bytes, Form, Tile, Wanted, Wide, find_scales, gather};
use super::tiling::{each_broad_panel, few_rows};
use super::{AHEAD_BYTES, Block, HEADS, Item, PANEL_PAIRS, PANELS, ROWS, SPLIT, TILE, WIDE};
use crate::buffer::{CpuBuf, Shared, SharedRows};
use crate::ops::tiles::{each_panel, each_wide_panel};
use crate::packed::round_row;
use crate::pages::{PackedPages, Pairs};
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairDot};

/// What all items share.
pub(super) struct Work<'a> {
    pub qkv: &'a CpuBuf,
    pub shape: AttnShape,
    /// Query heads of a KV head.
    pub group: usize,
    pub rule: ScoreRule,
    /// `[num_heads]`, see [`quire_backend::Attention::sinks`].
    pub sinks: Option<&'a [f32]>,
    pub window: usize,
    pub pages: &'a PackedPages,
    pub step: &'a StepBuffer,
    pub out: SharedRows<'a>,
}

impl Work<'_> {
    /// Cuts the step into items: the rows of each sequence into blocks of at most [`ROWS`] rows, one KV head each. A token
    /// alone is cut into no more items than threads need, as the heads of a block of keys lie one after the other and come
    /// fastest when they are read in that order.
    pub fn cut(&self, threads: usize, items: &mut Vec<Item>) {
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

    pub fn splits(&self, block: Block) -> Range<usize> {
        let seen = self.all_seen(block);
        seen.start / SPLIT..seen.end.div_ceil(SPLIT)
    }

    /// Rounds the queries of an item.
    #[inline(always)]
    pub unsafe fn load_queries<D: PairDot>(&self, item: Item, q: &mut [u32]) {
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
    pub unsafe fn split<D: ByteDot>(
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
        let lines = self.lines(item, ahead, start);
        let shown = Shown { item, start, keys: wanted.keys.clone(), panels, rows, lines };
        // SAFETY: the caller's; bytes are read as bytes.
        unsafe {
            let next = self.next_tile::<D>(item, ahead, start);
            if pages.is_bytes() {
                find_scales(pages, &wanted, s.tile.scales);
            }
            let found = Tile::in_place(pages, &wanted);
            // Few rows are one tile, which reads everything once.
            let once = heads > 1 || shown.rows.len() <= const { few_rows::<D>() };
            if let Some(tile) = found
                && pages.is_bytes()
                && once
            {
                return self.attend::<D, Bytes>(&shown, tile, self.ahead(&shown, &tile, next), s, state);
            }
            let (tile, next) = match found {
                Some(tile) if !pages.is_bytes() => (tile, self.ahead(&shown, &tile, next)),
                Some(bytes) => {
                    let tile = bytes.widen::<D>(pages, &shown.panels, &next.unwrap_or(bytes), &mut s.tile);
                    (tile, tile)
                }
                None => {
                    let tile = gather(pages, &wanted, &mut s.tile);
                    (tile, tile)
                }
            };
            self.attend::<D, Wide>(&shown, tile, next, s, state);
        }
    }

    /// See [`Tile::ahead`].
    fn ahead(&self, shown: &Shown, tile: &Tile, next: Option<Tile>) -> Tile {
        let [panel, _] = self.pages.head_strides();
        let panel = panel / (self.pages.shape.block_size / PANEL).max(1) * shown.item.heads;
        tile.ahead(&shown.panels, (AHEAD_BYTES / panel).clamp(1, PANELS), &next.unwrap_or(*tile))
    }

    /// Scores, weights, and the weighted values of a tile, while memory works on `next`.
    #[inline(always)]
    unsafe fn attend<D: ByteDot, F: Form>(
        &self,
        shown: &Shown,
        tile: Tile,
        next: Tile,
        s: &mut Buffers<'_>,
        state: &mut State<'_>,
    ) {
        let Shown { item, start, keys, panels, rows, .. } = shown;
        let (pairs, columns) = (self.pages.shape.key_pairs(), self.pages.shape.columns());
        let (head_rows, form) = (item.block.tokens * self.group, PhantomData::<F>);
        let rows_of = |head: usize| head * head_rows + rows.start..head * head_rows + rows.end;
        let all_rows = rows.start..rows_of(item.heads - 1).end;
        let strides = self.pages.head_strides();
        let many_rows = !F::FEW_ROWS && rows.len() > const { few_rows::<D>() };
        let shown_keys = |row: usize| {
            let end = self.seen(item.block, row / self.group % item.block.tokens).end;
            end.saturating_sub(*start).min(TILE)
        };
        // SAFETY: the tile was found, and the buffers have been made for its shape.
        unsafe {
            let (q, out) = (&*s.q, Shared::new(s.scores));
            if item.heads == 1 || !F::SIDE_BY_SIDE {
                for run in self.runs(shown) {
                    for head in 0..item.heads {
                        let (keys, next) = (tile.keys_of(head, strides), next.keys_of(head, strides));
                        let scores = Scores { q, pairs, keys, next, out, form };
                        if many_rows {
                            let until = |row: usize| shown_keys(row).div_ceil(PANEL);
                            each_broad_panel::<D, _>(&scores, rows_of(head), run.clone(), until);
                        } else {
                            each_panel::<D, _>(&scores, rows_of(head), run.clone());
                        }
                    }
                }
            } else {
                for panel in panels.clone() {
                    let (keys, next, stride) = (tile.keys[panel], next.keys[panel], strides[0]);
                    let scores = HeadScores { q, pairs, head_rows, keys, panel, next, stride, out, form };
                    each_wide_panel::<D, _, HEADS>(&scores, rows.clone(), 0..item.heads);
                }
            }
            let scaled = self.pages.is_bytes();
            for head in 0..item.heads {
                let scales = &mut s.tile.scales[head * SCALES..][..TILE];
                self.rule.cap::<D>(s.scores, scaled.then_some(&*scales), rows_of(head), panels.clone());
                if scaled {
                    self.rule.weigh::<D>(&mut scales[panels.start * PANEL..panels.end * PANEL]);
                }
            }
            self.hide(shown, s.scores);
            let softmax = Softmax {
                factor: self.rule.factor,
                scales: scaled.then_some(&*s.tile.scales),
                head_rows,
                rows: all_rows.clone(),
                panels: in_twos(panels),
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
                        lines: shown.lines,
                        until: |row: usize| shown_keys(row).div_ceil(2),
                        form,
                    };
                    if many_rows {
                        each_broad_panel::<D, _>(&values, rows_of(head), 0..columns / PANEL, |_| usize::MAX);
                    } else {
                        each_wide_panel::<D, _, WIDE>(&values, rows_of(head), 0..columns / PANEL);
                    }
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
        let Range { start: first, end } = in_twos(panels);
        let all = first * PANEL..end * PANEL;
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

    /// After the last tile of an item of several tokens: the queries of the next one, and its own results.
    fn lines(&self, item: Item, ahead: Ahead, start: usize) -> [Option<Lines>; 2] {
        let Item { block, first_head, .. } = item;
        if block.tokens == 1 || start + TILE < self.all_seen(block).end.min(ahead.until) {
            return [None; 2];
        }
        let (group, head_dim) = (self.group, self.shape.head_dim as usize);
        let size = group * head_dim;
        let lines = |start: &[f32], stride: usize| Lines { start: start.as_ptr(), stride, group, head_dim };
        let queries = ahead.after.map(|after| {
            let row = self.qkv.row(after.block.first_row);
            lines(&row[after.first_head * size..], row.len())
        });
        // SAFETY: the columns are this item's, by contract.
        let out = unsafe { self.out.part(block.first_row, first_head * size, size) };
        [queries, Some(lines(out, self.shape.q_size()))]
    }

    /// Divides by the sums and writes the rows of an item.
    #[inline(always)]
    pub unsafe fn finish(&self, item: Item, state: &mut State<'_>) {
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

/// With the other one of each two: weights are stored as pairs.
const fn in_twos(panels: &Range<usize>) -> Range<usize> {
    panels.start / 2 * 2..panels.end.next_multiple_of(2)
}

/// What a thread reads after a tile of an item: the item's next one, if it begins before `until`, or the first one of the
/// item `after`.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub until: usize,
    pub after: Option<Item>,
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
    /// See [`Values::lines`].
    lines: [Option<Lines>; 2],
}
