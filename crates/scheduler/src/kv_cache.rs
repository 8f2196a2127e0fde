//! Block tables: how many blocks a sequence needs, which of them are already computed, and when they go back.
//!
//! There is one KV group today. With a sliding window of `w` tokens, the row at position `p` sees positions
//! `p - w + 1 ..= p`; blocks wholly below are given back and their table entries turn stale.

use quire_core::{BlockCopy, BlockHash, BlockId, HostBlockId, Micros, SchedulerOutput, StepId};

use crate::block_pool::BlockPool;
use crate::duel::Duel;
use crate::eviction::{Choice, EvictionPolicy};
use crate::history::History;
use crate::host_tier::{BlockCosts, HostTier};
use crate::prefix_cache::PrefixCache;
use crate::reuse::{Levels, ReuseModel, Visit, WANTED};
use crate::scheduler::SchedulerConfig;

/// What an entry of a table holds where the content was never present.
pub(crate) const STALE: BlockId = BlockId(0);
/// What [`KvCacheManager::lookup`] notes where the content lies in the host tier.
pub(crate) const ON_HOST: BlockId = BlockId(u32::MAX);

/// The block table of one sequence.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    /// Logical block to physical block; entries below `first_live` are stale.
    pub(crate) blocks: Vec<BlockId>,
    /// First entry that holds a reference.
    pub(crate) first_live: u32,
    /// What admission learned about the request, for the blocks' release.
    pub(crate) visit: Visit,
}

impl BlockTable {
    /// The entries that hold references.
    pub(crate) fn live(&self) -> &[BlockId] {
        &self.blocks[self.first_live as usize..]
    }
}

/// A prefix found in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PrefixHit {
    /// Blocks of the table that need no computation.
    pub(crate) num_blocks: u32,
    /// The first of them that is still visible.
    pub(crate) first_live: u32,
    /// How many of the visible ones are idle, so that taking them shrinks what is available.
    pub(crate) num_idle: u32,
    /// How many of the visible ones lie in the host tier, and need a block on the device as well.
    pub(crate) num_on_host: u32,
}

/// What a chain's deeper blocks say of a block: it is used at least as often, and worth at least as much.
#[derive(Clone, Copy, Default)]
struct Deeper {
    uses: u8,
    levels: Levels,
    class: u8,
}

#[derive(Debug)]
struct Learning {
    model: ReuseModel,
    history: History,
    duel: Duel,
}

/// Owns the blocks of one KV group.
#[derive(Debug)]
pub(crate) struct KvCacheManager {
    pub(crate) pool: BlockPool,
    pub(crate) cache: PrefixCache,
    pub(crate) host: Option<Box<HostTier>>,
    block_size: u32,
    window: Option<u32>,
    caching: bool,
    /// What is learned of reuse, and from what; `None` under LRU.
    learning: Option<Box<Learning>>,
    pub(crate) now: Micros,
    /// The longest row of one sequence and step.
    max_chunk: u32,
    num_evictions: u64,
    /// Physical blocks of the last lookup.
    found: Vec<BlockId>,
    /// Those of them in the host tier, by place.
    pub(crate) found_on_host: Vec<(u32, HostBlockId)>,
}

impl KvCacheManager {
    pub(crate) fn new(config: &SchedulerConfig) -> Self {
        let limits = &config.limits;
        let learning = config.enable_prefix_caching && config.eviction == EvictionPolicy::Learned;
        let host_tier = config.host_tier.as_ref().filter(|host| host.num_blocks > 0);
        let num_host_blocks = host_tier.map_or(0, |host| host.num_blocks);
        Self {
            pool: BlockPool::new(limits.num_blocks),
            cache: PrefixCache::new(limits.num_blocks),
            host: host_tier.map(|host| Box::new(HostTier::new(host))),
            block_size: limits.block_size,
            window: limits.kv_groups[0],
            caching: config.enable_prefix_caching || num_host_blocks > 0,
            learning: learning.then(|| {
                // The tiers together are as one pool.
                let num_blocks = limits.num_blocks.saturating_add(num_host_blocks);
                let history = History::new(num_blocks, limits.block_size);
                let duel = Duel::new(history.num_sampled());
                Box::new(Learning { model: ReuseModel::new(), history, duel })
            }),
            now: Micros(0),
            max_chunk: config.max_prefill_chunk.min(limits.max_num_batched_tokens),
            num_evictions: 0,
            found: Vec::with_capacity(limits.max_model_len.div_ceil(limits.block_size) as usize),
            found_on_host: Vec::new(),
        }
    }

    pub(crate) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    pub(crate) fn host(&self) -> Option<&HostTier> {
        self.host.as_deref()
    }

    /// What copying and computing a block takes from now on.
    pub(crate) fn set_costs(&mut self, costs: BlockCosts) {
        if let Some(host) = &mut self.host {
            host.set_costs(costs);
        }
    }

    pub(crate) fn num_evictions(&self) -> u64 {
        self.num_evictions
    }

    pub(crate) fn has_window(&self) -> bool {
        self.window.is_some()
    }

    /// Blocks that `num_tokens` tokens fill or begin.
    pub(crate) fn blocks_for(&self, num_tokens: u32) -> u32 {
        num_tokens.div_ceil(self.block_size)
    }

    /// The most blocks a sequence holds at one time while its first `num_tokens` tokens are computed.
    pub(crate) fn peak_blocks(&self, num_tokens: u32) -> u32 {
        let all = self.blocks_for(num_tokens);
        match self.window {
            None => all,
            Some(window) => {
                let visible = u64::from(window) + u64::from(self.max_chunk);
                all.min((visible.div_ceil(u64::from(self.block_size)) + 1).min(u64::from(u32::MAX)) as u32)
            }
        }
    }

    /// The first block that the row at position `num_computed_tokens`, or any later one, can see.
    pub(crate) fn first_visible_block(&self, num_computed_tokens: u32) -> u32 {
        self.window.map_or(0, |window| (num_computed_tokens + 1).saturating_sub(window) / self.block_size)
    }

    /// Time has come to `now`; later calls count from there.
    pub(crate) fn advance(&mut self, now: Micros) {
        self.now = now;
        if let Some(learning) = &mut self.learning {
            learning.history.advance(now, &mut learning.model);
            if let Some(host) = &self.host {
                let device = f64::from(self.pool.len());
                let part = (device + host.num_worth_it()) / (device + f64::from(host.len()));
                learning.history.set_lru_part(part);
            }
        }
    }

    /// Learns from the admission of a request with these addresses, of `num_tokens` known tokens, which took `hit`; what
    /// it learned is for the request's table.
    pub(crate) fn visit(
        &mut self,
        hashes: impl Iterator<Item = BlockHash>,
        num_tokens: u32,
        hit: PrefixHit,
    ) -> Visit {
        let Some(Learning { model, history, duel }) = self.learning.as_deref_mut() else {
            return Visit::default();
        };
        let (mut deepest, mut num_known) = (None, hit.num_blocks);
        for (hash, at) in hashes.zip(1..) {
            if !history.samples(hash) {
                continue;
            }
            let memory = history.touch(hash, self.now, model);
            duel.count(at <= hit.num_blocks, memory.is_some_and(|memory| memory.under_lru));
            if memory.is_some() {
                deepest = memory;
                num_known = num_known.max(at);
            }
        }
        let (turn, goes_on) = deepest.map_or((1, false), |memory| memory.next_turn());
        let pause = deepest.filter(|_| goes_on);
        Visit {
            turn,
            pause: pause.map(|memory| (self.now.0.saturating_sub(memory.at.0) / 1_000_000) as u32),
            num_new_tokens: num_tokens.saturating_sub(num_known * self.block_size),
        }
    }

    /// Finds the longest cached prefix of at most `max_tokens` tokens. Only whole blocks count, and only those that
    /// later rows can see need to be present: without a window all, with one the last few.
    ///
    /// With a host tier content is present there, too, unless computing it takes less time than copying.
    pub(crate) fn lookup(
        &mut self,
        hashes: impl Iterator<Item = BlockHash> + Clone,
        max_tokens: u32,
    ) -> PrefixHit {
        let hit = self.lookup_in(hashes.clone(), max_tokens, true);
        let Some(host) = self.host.as_ref().filter(|_| hit.num_on_host > 0) else { return hit };
        let computed_from = self.found_on_host.first().map_or(hit.num_blocks, |&(at, _)| at);
        if host.costs().is_worth_copying(hit.num_on_host, hit.num_blocks - computed_from) {
            return hit;
        }
        self.lookup_in(hashes, max_tokens, false)
    }

    fn lookup_in(
        &mut self,
        hashes: impl Iterator<Item = BlockHash>,
        max_tokens: u32,
        on_host: bool,
    ) -> PrefixHit {
        self.found.clear();
        self.found_on_host.clear();
        let mut hit = PrefixHit::default();
        if !self.caching {
            return hit;
        }
        let host = self.host.as_deref().filter(|_| on_host);
        // Present blocks in a row up to here.
        let mut run = 0;
        for (hash, at) in hashes.zip(0..max_tokens / self.block_size) {
            let mut block = self.cache.get(hash);
            if block.is_none()
                && let Some(copy) = host.and_then(|host| host.get(hash))
            {
                self.found_on_host.push((at, copy));
                block = Some(ON_HOST);
            }
            if block.is_none() && self.window.is_none() {
                break;
            }
            run = if block.is_some() { run + 1 } else { 0 };
            self.found.push(block.unwrap_or(STALE));
            let first_live = self.first_visible_block((at + 1) * self.block_size);
            if run >= (at + 1).saturating_sub(first_live) {
                hit = PrefixHit { num_blocks: at + 1, first_live, ..PrefixHit::default() };
            }
        }
        let live = hit.first_live.min(hit.num_blocks)..hit.num_blocks;
        self.found_on_host.retain(|(at, _)| live.contains(at));
        hit.num_on_host = self.found_on_host.len() as u32;
        let live = &self.found[live.start as usize..live.end as usize];
        let is_idle = |&&block: &&BlockId| block != ON_HOST && self.pool.is_idle(block);
        hit.num_idle = live.iter().filter(is_idle).count() as u32;
        hit
    }

    /// Fills an empty table with the blocks of the latest [`Self::lookup`]. What lies in the host tier is copied to the
    /// device, for which the caller has checked that blocks are available.
    pub(crate) fn take_hit(&mut self, hit: PrefixHit, table: &mut BlockTable) {
        debug_assert!(table.blocks.is_empty());
        table.blocks.extend_from_slice(&self.found[..hit.num_blocks as usize]);
        table.first_live = hit.first_live.min(hit.num_blocks);
        for &block in table.live().iter().filter(|&&block| block != ON_HOST) {
            self.pool.acquire(block);
        }
        if hit.num_on_host > 0 {
            self.copy_in(table);
        }
        // Entries that nobody can see.
        for block in table.blocks[..table.first_live as usize].iter_mut().filter(|block| **block == ON_HOST) {
            *block = STALE;
        }
    }

    /// Appends a copy of the cached block with this address, for writing; the caller has checked that two blocks are
    /// available. The copy's source is referenced until the caller releases it. `None`: it is not cached.
    pub(crate) fn copy_cached(
        &mut self,
        hash: Option<BlockHash>,
        table: &mut BlockTable,
    ) -> Option<BlockCopy> {
        if self.has_window() {
            return None;
        }
        let src = self.cache.get(hash?)?;
        self.pool.acquire(src);
        let dst = self.allocate();
        table.blocks.push(dst);
        Some(BlockCopy { group: 0, src, dst })
    }

    /// Shares the first `num_blocks` blocks of `from`, of which those from `first_live` on must be live there.
    pub(crate) fn share(&mut self, from: &[BlockId], first_live: u32, table: &mut BlockTable) {
        debug_assert!(table.blocks.is_empty());
        table.blocks.extend_from_slice(from);
        table.first_live = first_live;
        for &block in table.live() {
            self.pool.acquire(block);
        }
    }

    /// A block for the end of a table. The caller has checked that one is available.
    #[inline]
    pub(crate) fn allocate(&mut self) -> BlockId {
        self.pool.allocate_free().unwrap_or_else(|| self.allocate_evicting())
    }

    /// A block whose content makes room.
    fn allocate_evicting(&mut self) -> BlockId {
        let choice = match &self.learning {
            Some(learning) if !learning.duel.prefers_lru() => Choice::Least(&learning.model),
            _ => Choice::Oldest,
        };
        let (block, evicted) =
            self.pool.allocate(self.now, choice).expect("the caller checked num_available()");
        if let Some(evicted) = evicted {
            if let Some(host) = &mut self.host
                && let Some(hash) = self.cache.hash_of(block)
            {
                let model = self.learning.as_ref().map(|learning| &learning.model);
                host.keep(hash, evicted, self.now, choice, model);
            }
            self.cache.remove(block);
            self.num_evictions += 1;
        }
        block
    }

    /// One reference fewer to `block`, for another reason than the end of its request: nothing is learned.
    pub(crate) fn release(&mut self, block: BlockId) {
        self.pool.release(block, self.pool.class(block), self.now);
    }

    /// Gives back all blocks after a prompt of `prompt_tokens` and an answer of `output_tokens`; last first, because the
    /// tail of a chain is worth least. Somebody waits for the first `num_wanted`.
    pub(crate) fn release_table(
        &mut self,
        table: &mut BlockTable,
        prompt_tokens: u32,
        output_tokens: u32,
        num_wanted: u32,
    ) {
        let mut deeper = Deeper::default();
        for at in (table.first_live as usize..table.blocks.len()).rev() {
            let block = table.blocks[at];
            deeper = self.learn_release(block, table.visit, prompt_tokens, output_tokens, deeper);
            let class = if at < num_wanted as usize { WANTED } else { deeper.class };
            self.pool.release(block, class, self.now);
        }
        table.blocks.clear();
        table.first_live = 0;
        table.visit = Visit::default();
    }

    /// Learns from the release of a block after those `deeper` in its chain.
    fn learn_release(
        &mut self,
        block: BlockId,
        visit: Visit,
        prompt_tokens: u32,
        output_tokens: u32,
        mut deeper: Deeper,
    ) -> Deeper {
        if let Some(Learning { model, history, .. }) = self.learning.as_deref_mut()
            && self.pool.is_last_reference(block)
        {
            let sampled = self.cache.hash_of(block).filter(|&hash| history.samples(hash));
            // The pool forgets its count with an eviction.
            let remembered = sampled.map_or(0, |hash| history.uses(hash).saturating_add(1));
            let uses = deeper.uses.max(self.pool.uses(block)).max(remembered);
            if uses > deeper.uses {
                deeper.uses = uses;
                deeper.levels = visit.levels(prompt_tokens, output_tokens, uses);
                deeper.class = deeper.class.max(model.class(deeper.levels, uses));
            }
            if let Some(hash) = sampled {
                history.release(hash, self.now, visit.turn, deeper.levels, deeper.class);
            }
        }
        deeper
    }

    /// Gives back the blocks that no row from `num_computed_tokens` on can see.
    pub(crate) fn release_below_window(&mut self, table: &mut BlockTable, num_computed_tokens: u32) {
        let first = self.first_visible_block(num_computed_tokens).min(table.blocks.len() as u32);
        while table.first_live < first {
            self.release(table.blocks[table.first_live as usize]);
            table.first_live += 1;
        }
    }

    /// Makes the content of a full, computed block available to others. If another block has it already, that one
    /// stays the cached one.
    pub(crate) fn publish(&mut self, hash: BlockHash, block: BlockId) {
        if self.cache.insert(hash, block) {
            self.pool.mark_cached(block);
        }
    }

    /// The plan is `step`; copies between the tiers go into it.
    pub(crate) fn step_scheduled(&mut self, step: StepId, out: &mut SchedulerOutput) {
        self.pool.step_scheduled(step);
        if let Some(host) = &mut self.host {
            host.step_scheduled(step, out);
        }
    }

    pub(crate) fn step_collected(&mut self, step: StepId) {
        self.pool.step_collected(step, self.now);
        if let Some(host) = &mut self.host {
            host.step_collected(step);
        }
    }

    /// Recounts references from the tables of all sequences, and compares cache and pool.
    pub(crate) fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut held = vec![0; self.pool.len() as usize];
        for block in tables.flat_map(BlockTable::live) {
            held[block.0 as usize] += 1;
        }
        self.pool.check(&held)?;
        for block in (0..self.pool.len()).map(BlockId) {
            let hash = self.cache.hash_of(block);
            if let Some(hash) = hash
                && self.cache.get(hash) != Some(block)
            {
                return Err(format!("block {block} cannot be found under its own address"));
            }
            if hash.is_some() != self.pool.is_cached(block) {
                return Err(format!("block {block}: pool and prefix cache disagree whether it is cached"));
            }
        }
        self.host.as_ref().map_or(Ok(()), |host| host.check(!self.pool.has_steps_in_flight()))
    }
}
