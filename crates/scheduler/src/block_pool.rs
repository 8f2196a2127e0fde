//! Who holds which physical KV block: reference counts, the free list, the idle cached blocks, and the quarantine
//! of blocks that a step in flight may still touch.
//!
//! Every block is in exactly one [`Place`]. A block whose last reference goes while steps are in flight rests in
//! quarantine until the youngest of those steps is collected: no step in flight ever loses a block to another sequence.

use std::collections::VecDeque;

use quire_core::{BlockId, Micros, StepId};

use crate::eviction::{Choice, Idle, IdleBlocks};
use crate::reuse::HELD;

/// Where a block is. The four sets partition the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// No reference, no content worth keeping.
    Free,
    /// No reference, content kept for prefix hits.
    Idle,
    /// In at least one block table.
    Referenced,
    /// No reference, but a step in flight may read or write it.
    Quarantined,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    ref_count: u32,
    place: Place,
    /// Whether the prefix cache knows its content.
    cached: bool,
    /// Requests that used the content, at most 255.
    uses: u8,
    /// Its eviction class, from its latest release.
    class: u8,
}

/// Content that made room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Evicted {
    /// Where it lay, and what it was worth.
    pub(crate) idle: Idle,
    /// See [`BlockPool::uses`].
    pub(crate) uses: u8,
}

/// The pool of one KV group.
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    idle: IdleBlocks,
    /// Blocks in quarantine, each with the step that must be collected first; ascending.
    quarantine: VecDeque<(StepId, BlockId)>,
    last_scheduled: StepId,
    last_collected: StepId,
}

impl BlockPool {
    pub(crate) fn new(num_blocks: u32) -> Self {
        let block = Block { ref_count: 0, place: Place::Free, cached: false, uses: 0, class: 0 };
        Self {
            blocks: vec![block; num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            idle: IdleBlocks::new(num_blocks),
            quarantine: VecDeque::with_capacity(num_blocks as usize),
            last_scheduled: StepId(0),
            last_collected: StepId(0),
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks without reference and without content.
    pub(crate) fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks without reference whose content may be hit.
    pub(crate) fn num_idle(&self) -> u32 {
        self.idle.len()
    }

    /// Blocks that come back when the steps in flight are collected.
    pub(crate) fn num_quarantined(&self) -> u32 {
        self.quarantine.len() as u32
    }

    /// Blocks in some table.
    pub(crate) fn num_referenced(&self) -> u32 {
        self.len() - self.num_free() - self.num_idle() - self.num_quarantined()
    }

    /// Blocks that [`Self::allocate`] can hand out now.
    pub(crate) fn num_available(&self) -> u32 {
        self.num_free() + self.num_idle()
    }

    pub(crate) fn is_cached(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].cached
    }

    /// Whether taking a reference would make the pool's available blocks one fewer.
    pub(crate) fn is_idle(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].place == Place::Idle
    }

    /// A free block, with one reference.
    #[inline]
    pub(crate) fn allocate_free(&mut self) -> Option<BlockId> {
        let id = self.free.pop()?;
        self.take(id);
        Some(id)
    }

    /// A block with one reference: a free one, else the idle one that `choice` gives up at `now`. What was evicted comes
    /// with the block, so that the caller can forget its address. `None`: nothing is available.
    pub(crate) fn allocate(&mut self, now: Micros, choice: Choice<'_>) -> Option<(BlockId, Option<Evicted>)> {
        if let Some(id) = self.allocate_free() {
            return Some((id, None));
        }
        let idle = self.idle.pop(now, choice)?;
        let evicted = Evicted { idle, uses: self.uses(idle.id) };
        self.take(idle.id);
        Some((idle.id, Some(evicted)))
    }

    #[inline]
    fn take(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        debug_assert_eq!(block.ref_count, 0);
        *block = Block { ref_count: 1, place: Place::Referenced, cached: false, uses: 1, class: 0 };
    }

    /// One more table holds `block`, which is referenced already or has cached content.
    pub(crate) fn acquire(&mut self, id: BlockId) {
        if self.is_idle(id) {
            self.idle.remove(id);
        }
        let block = &mut self.blocks[id.0 as usize];
        debug_assert!(block.place != Place::Free, "block {id} has no content to share");
        if block.place == Place::Quarantined {
            self.quarantine.retain(|&(_, other)| other != id);
        }
        block.ref_count += 1;
        block.uses = block.uses.saturating_add(1);
        block.class = if block.class >= HELD { 0 } else { block.class };
        block.place = Place::Referenced;
    }

    /// Requests that used the content of `block`, at most 255.
    pub(crate) fn uses(&self, block: BlockId) -> u8 {
        self.blocks[block.0 as usize].uses
    }

    /// The class of the latest release of `block`; 0 before the first.
    pub(crate) fn class(&self, block: BlockId) -> u8 {
        self.blocks[block.0 as usize].class
    }

    /// Whether `block` is in one table only and its content is cached: the next release makes it idle.
    pub(crate) fn is_last_reference(&self, block: BlockId) -> bool {
        let block = &self.blocks[block.0 as usize];
        block.ref_count == 1 && block.cached
    }

    /// Whether `block` is in one table only.
    pub(crate) fn is_only_reference(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].ref_count == 1
    }

    /// One table fewer holds `block`. If it was the last, `class` says with whom it is evicted, counting from `now`.
    pub(crate) fn release(&mut self, id: BlockId, class: u8, now: Micros) {
        let in_flight = self.has_steps_in_flight();
        let block = &mut self.blocks[id.0 as usize];
        debug_assert!(block.ref_count > 0, "block {id} is released more often than acquired");
        block.ref_count -= 1;
        if block.ref_count > 0 {
            return;
        }
        block.class = class;
        if in_flight {
            block.place = Place::Quarantined;
            self.quarantine.push_back((self.last_scheduled, id));
        } else {
            self.retire(id, now);
        }
    }

    /// The prefix cache now knows the content of `block`.
    pub(crate) fn mark_cached(&mut self, id: BlockId) {
        self.blocks[id.0 as usize].cached = true;
    }

    /// `block` now holds content that was used elsewhere before.
    pub(crate) fn set_uses(&mut self, block: BlockId, uses: u8) {
        self.blocks[block.0 as usize].uses = uses;
    }

    /// The prefix cache no longer knows the content of `block`.
    pub(crate) fn forget(&mut self, id: BlockId) {
        self.blocks[id.0 as usize].cached = false;
        if self.is_idle(id) {
            self.idle.remove(id);
            self.blocks[id.0 as usize].place = Place::Free;
            self.free.push(id);
        }
    }

    /// Nobody waits for the content of `block` any more: it is as good as any other.
    pub(crate) fn unhold(&mut self, id: BlockId, now: Micros) {
        let block = &mut self.blocks[id.0 as usize];
        if block.class != HELD {
            return;
        }
        block.class = 0;
        if block.place == Place::Idle {
            self.idle.remove(id);
            self.idle.push(id, 0, now);
        }
    }

    /// Releases from here on belong to `step` or later.
    pub(crate) fn step_scheduled(&mut self, step: StepId) {
        self.last_scheduled = step;
    }

    /// `step` touches no block any more; what waited for it becomes available.
    pub(crate) fn step_collected(&mut self, step: StepId, now: Micros) {
        self.last_collected = step;
        while let Some(&(release_after, id)) = self.quarantine.front()
            && release_after <= step
        {
            self.quarantine.pop_front();
            self.retire(id, now);
        }
    }

    pub(crate) fn has_steps_in_flight(&self) -> bool {
        self.last_scheduled > self.last_collected
    }

    /// Puts an unreferenced block where it can be allocated from.
    fn retire(&mut self, id: BlockId, now: Micros) {
        let block = &mut self.blocks[id.0 as usize];
        if block.cached {
            block.place = Place::Idle;
            self.idle.push(id, block.class, now);
        } else {
            block.place = Place::Free;
            self.free.push(id);
        }
    }

    /// Recounts everything from the blocks themselves. `tables[b]` is the number of tables that hold block `b`.
    pub(crate) fn check(&self, tables: &[u32]) -> Result<(), String> {
        let mut places = [0_u32; 4];
        for (id, (block, &held)) in self.blocks.iter().zip(tables).enumerate() {
            places[block.place as usize] += 1;
            if block.ref_count != held {
                return Err(format!("block {id}: ref_count {} but {held} tables hold it", block.ref_count));
            }
            if (block.place == Place::Referenced) != (block.ref_count > 0) {
                return Err(format!("block {id}: {:?} with ref_count {}", block.place, block.ref_count));
            }
            if (block.place == Place::Idle && !block.cached) || (block.place == Place::Free && block.cached) {
                return Err(format!("block {id}: {:?} with cached = {}", block.place, block.cached));
            }
        }
        let counted = [self.num_free(), self.num_idle(), self.num_referenced(), self.num_quarantined()];
        if places != counted {
            return Err(format!(
                "blocks (free, idle, referenced, quarantined): {places:?} but counted {counted:?}"
            ));
        }
        if !self.has_steps_in_flight() && !self.quarantine.is_empty() {
            return Err(format!("{} blocks in quarantine with no step in flight", self.quarantine.len()));
        }
        self.idle.check(|id| self.blocks[id as usize].place == Place::Idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same pool, written naively.
    #[derive(Default)]
    struct Model {
        refs: Vec<u32>,
        cached: Vec<bool>,
        lru: Vec<u32>,
        quarantine: Vec<(u64, u32)>,
        scheduled: u64,
        collected: u64,
    }

    impl Model {
        fn retire(&mut self, id: u32) {
            if self.cached[id as usize] {
                self.lru.push(id);
            }
        }

        fn release(&mut self, id: u32) {
            self.refs[id as usize] -= 1;
            if self.refs[id as usize] == 0 {
                if self.scheduled > self.collected {
                    self.quarantine.push((self.scheduled, id));
                } else {
                    self.retire(id);
                }
            }
        }
    }

    fn next(state: &mut u64, below: u64) -> u64 {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*state >> 33) % below
    }

    /// `QUIRE_POOL_OPS=100000000 cargo test --release -p quire-scheduler naive` for a long run.
    #[test]
    fn agrees_with_a_naive_model() {
        const PER_SEED: u64 = 400;
        let num_ops = std::env::var("QUIRE_POOL_OPS").map_or(80_000, |ops| ops.parse::<u64>().unwrap());
        for seed in 0..num_ops.div_ceil(PER_SEED) {
            let mut rng = seed;
            let len = 1 + next(&mut rng, 12) as u32;
            let mut pool = BlockPool::new(len);
            let mut model =
                Model { refs: vec![0; len as usize], cached: vec![false; len as usize], ..Model::default() };
            for _ in 0..PER_SEED {
                one_operation(&mut rng, &mut pool, &mut model);
                pool.check(&model.refs).unwrap();
                assert_eq!(pool.num_idle() as usize, model.lru.len());
                assert_eq!(pool.num_quarantined() as usize, model.quarantine.len());
            }
        }
    }

    fn one_operation(rng: &mut u64, pool: &mut BlockPool, model: &mut Model) {
        let id = next(rng, u64::from(pool.len())) as u32;
        let held = model.refs[id as usize] > 0;
        match next(rng, 6) {
            0 | 1 => {
                let in_quarantine = |b: u32| model.quarantine.iter().any(|&(_, q)| q == b);
                let any_free = (0..pool.len())
                    .any(|b| model.refs[b as usize] == 0 && !model.lru.contains(&b) && !in_quarantine(b));
                match pool.allocate(Micros(0), Choice::Oldest) {
                    None => assert!(!any_free && model.lru.is_empty(), "refused with blocks available"),
                    Some((got, evicted)) => {
                        assert_eq!(model.refs[got.0 as usize], 0, "a block in use was handed out");
                        assert!(!in_quarantine(got.0), "a block in quarantine was handed out");
                        assert_eq!(evicted.is_some(), !any_free);
                        if evicted.is_some() {
                            assert_eq!(model.lru.remove(0), got.0, "not the least recently used");
                        }
                        model.refs[got.0 as usize] = 1;
                        model.cached[got.0 as usize] = false;
                    }
                }
            }
            2 if held => {
                pool.release(BlockId(id), 0, Micros(0));
                model.release(id);
            }
            3 if held || model.cached[id as usize] => {
                pool.acquire(BlockId(id));
                model.refs[id as usize] += 1;
                model.lru.retain(|&b| b != id);
                model.quarantine.retain(|&(_, b)| b != id);
            }
            4 if held => {
                pool.mark_cached(BlockId(id));
                model.cached[id as usize] = true;
            }
            5 => {
                if model.scheduled < model.collected + 2 && next(rng, 2) == 0 {
                    model.scheduled += 1;
                    pool.step_scheduled(StepId(model.scheduled));
                } else if model.collected < model.scheduled {
                    model.collected += 1;
                    pool.step_collected(StepId(model.collected), Micros(0));
                    let collected = model.collected;
                    let (done, rest) = model.quarantine.drain(..).partition(|&(step, _)| step <= collected);
                    model.quarantine = rest;
                    let done: Vec<(u64, u32)> = done;
                    done.into_iter().for_each(|(_, b)| model.retire(b));
                }
            }
            _ => {}
        }
    }

    #[test]
    fn a_block_freed_in_flight_waits_for_the_youngest_step() {
        let mut pool = BlockPool::new(1);
        let (id, _) = pool.allocate(Micros(0), Choice::Oldest).unwrap();
        pool.step_scheduled(StepId(1));
        pool.step_scheduled(StepId(2));
        pool.release(id, 0, Micros(0));
        assert_eq!(pool.allocate(Micros(0), Choice::Oldest), None);
        pool.step_collected(StepId(1), Micros(0));
        assert_eq!(pool.allocate(Micros(0), Choice::Oldest), None, "step 2 may still write it");
        pool.step_collected(StepId(2), Micros(0));
        assert_eq!(pool.allocate(Micros(0), Choice::Oldest), Some((id, None)));
    }
}
