//! Causal attention over packed pages, as products of bf16 pairs: one code for a decoding row and for a long prompt.
//!
//! One item of work is a few consecutive tokens of a sequence and one KV head, or one token and several: the query heads
//! that share a KV head are rows of the same products, so keys and values are read once for all of them. Keys come in tiles that begin at multiples of
//! [`TILE`] positions, merged in order by the online softmax (Milakov & Gimelshein, arXiv 1805.02867; blocks as in
//! FlashAttention, arXiv 2205.14135); every [`SPLIT`] positions a new partial result begins, and partial results are
//! folded in order (arXiv 2311.01282), whether one thread has computed them or several. So a row's bits depend on its
//! position alone. Weights are rounded to bf16 for the product with the values, while their sum keeps f32.

mod products;
mod scratch;
mod softmax;
mod tile;
mod tiling;
mod work;

use quire_backend::{Attention, StepBuffer};
use quire_core::ExecError;

use self::scratch::Scratch;
use self::softmax::{ScoreRule, State};
use self::work::{Ahead, Work};
use crate::CpuBackend;
use crate::buffer::Shared;
use crate::pages::PackedPages;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel, dispatch_pairs};

/// Positions in a tile.
const TILE: usize = 128;
/// Panels of keys in a tile.
const PANELS: usize = TILE / PANEL;
/// Pairs of values in a panel of keys.
const PANEL_PAIRS: usize = PANEL / 2;
/// Panels of values that a few rows take at once.
const WIDE: usize = 8;
/// Heads whose scores a few rows take at once.
const HEADS: usize = 4;
/// How far ahead of the work memory is asked for keys and values, up to a panel of all heads more: what arrives within its
/// latency several times over, and little beside the caches.
const AHEAD_BYTES: usize = 16 * 1024;
/// Positions of a partial result.
const SPLIT: usize = 1024;
/// Rows (tokens times query heads) of an item.
const ROWS: usize = 128;

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
    let item = |i: usize| items[count - 1 - i];
    let splits = items.iter().map(|item| work.splits(item.block).end).max().unwrap_or(0);
    if splits < 2 || count >= 4 * pool.num_threads() {
        // Neighbours share a block of tokens, and each asks for what the next one reads first.
        let grain = (count / (16 * pool.num_threads())).clamp(1, kv_heads);
        return pool.split_ahead(count, grain, |worker, range, next| {
            for i in range.clone() {
                // SAFETY: `isa` was detected; scratch `worker` is this thread's, the item's columns of `out` its own.
                unsafe {
                    let scratch = &mut scratch.slice(worker, 1)[0];
                    let after = if i + 1 < range.end { Some(i + 1) } else { next };
                    let after = after.map(item);
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
