//! KV that waits in host memory: a second pool of blocks, with an index of its own.
//!
//! What the device evicts is kept here if it is worth the copy and worth more than what it displaces; what is found here
//! is copied back before a step reads it, and then lies on the device alone. So the two pools together hold what one pool
//! of their size would hold: the block that is lost is the one least worth its room of all.
//!
//! Copies are part of a step ([`SchedulerOutput::copies_to_host`]). A block is *busy* from the plan that copies it until
//! that step is collected, in either direction, and no other plan writes it before. What a plan copies out can be found
//! again at once, since steps take effect in order.

use std::collections::VecDeque;

use quire_core::{BlockHash, BlockId, HostBlockId, HostCopy, Micros, SchedulerOutput, StepId};

use crate::block_pool::Evicted;
use crate::cost::CostModel;
use crate::eviction::{Choice, Idle, IdleBlocks};
use crate::prefix_cache::PrefixCache;
use crate::reuse::{HELD, ReuseModel};

/// A host tier, fixed at start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostTierConfig {
    /// Blocks in host memory.
    pub num_blocks: u32,
    /// Bytes of one block, all layers; for statistics.
    pub block_bytes: u64,
    /// What steps take, before any was measured; `per_copied_block` is a block's bytes over the bandwidth of the link.
    /// Latency targets bring a model of their own, of which only `per_copied_block` is replaced by this one's.
    pub cost: CostModel,
}

/// What a block is worth at present, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct BlockCosts {
    /// Of copying it in one direction.
    pub(crate) copy: f64,
    /// Of computing it, as part of a prompt.
    pub(crate) compute: f64,
}

impl BlockCosts {
    /// Whether it pays to copy a block that is wanted again with probability `chance` out now and in then.
    fn is_worth_keeping(&self, chance: f64) -> bool {
        chance * (self.compute - self.copy) > self.copy
    }

    /// Whether copying `num_copied` blocks takes less time than computing `num_computed`.
    pub(crate) fn is_worth_copying(&self, num_copied: u32, num_computed: u32) -> bool {
        self.copy * f64::from(num_copied) < self.compute * f64::from(num_computed)
    }
}

/// What tokens cost to compute as part of the prompts that come: deep ones cost more than shallow ones.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct PromptCosts {
    /// Means over about the last [`PROMPT_MEMORY`] prompts.
    micros: f64,
    num_tokens: f64,
}

/// See [`PromptCosts`].
const PROMPT_MEMORY: f64 = 256.0;

impl PromptCosts {
    /// A prompt of `num_tokens` takes so long to compute.
    pub(crate) fn learn(&mut self, num_tokens: u32, micros: f64) {
        if self.num_tokens == 0.0 {
            (self.micros, self.num_tokens) = (micros, f64::from(num_tokens));
        }
        self.micros += (micros - self.micros) / PROMPT_MEMORY;
        self.num_tokens += (f64::from(num_tokens) - self.num_tokens) / PROMPT_MEMORY;
    }

    /// Microseconds per token, if there was a prompt.
    pub(crate) fn per_token(&self) -> Option<f64> {
        (self.num_tokens > 0.0).then_some(self.micros / self.num_tokens)
    }
}

/// Where a block is. The three sets partition the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Idle,
    Busy,
}

#[derive(Clone, Copy, Debug)]
struct HostBlock {
    place: Place,
    /// Copies, of the plan in the making and of steps in flight, that touch it.
    num_copies: u32,
    /// As when it was evicted from the device.
    class: u8,
    uses: u8,
    since: Micros,
}

/// Counts since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostCounters {
    pub(crate) num_copied_out: u64,
    pub(crate) num_copied_in: u64,
    pub(crate) num_evictions: u64,
}

/// See the page above.
#[derive(Debug)]
pub(crate) struct HostTier {
    blocks: Vec<HostBlock>,
    free: Vec<HostBlockId>,
    idle: IdleBlocks,
    cache: PrefixCache,
    costs: BlockCosts,
    /// Copies of the plan in the making.
    to_host: Vec<HostCopy>,
    to_device: Vec<HostCopy>,
    /// Blocks that steps in flight touch, one entry per copy; ascending.
    in_flight: VecDeque<(StepId, HostBlockId)>,
    counters: HostCounters,
    block_bytes: u64,
    /// Part of the latest evictions that were worth a copy.
    worth_it: f64,
}

/// How many evictions [`HostTier::worth_it`] is about.
const WORTH_MEMORY: f64 = 1024.0;

/// The pools and the index below speak of blocks of any memory.
const fn as_block(host: HostBlockId) -> BlockId {
    BlockId(host.0)
}

impl HostTier {
    pub(crate) fn new(config: &HostTierConfig) -> Self {
        let num_blocks = config.num_blocks;
        let block = HostBlock { place: Place::Free, num_copies: 0, class: 0, uses: 0, since: Micros(0) };
        Self {
            blocks: vec![block; num_blocks as usize],
            free: (0..num_blocks).rev().map(HostBlockId).collect(),
            idle: IdleBlocks::new(num_blocks),
            cache: PrefixCache::new(num_blocks),
            costs: BlockCosts::default(),
            to_host: Vec::new(),
            to_device: Vec::new(),
            in_flight: VecDeque::new(),
            counters: HostCounters::default(),
            block_bytes: config.block_bytes,
            worth_it: 1.0,
        }
    }

    pub(crate) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    pub(crate) fn len(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks with content or in use by a copy.
    pub(crate) fn num_used(&self) -> u32 {
        self.len() - self.free.len() as u32
    }

    pub(crate) fn counters(&self) -> HostCounters {
        self.counters
    }

    /// Blocks that would be in use if content went by age alone, as far as it is worth a copy.
    pub(crate) fn num_worth_it(&self) -> f64 {
        f64::from(self.len()) * self.worth_it
    }

    pub(crate) fn costs(&self) -> BlockCosts {
        self.costs
    }

    pub(crate) fn set_costs(&mut self, costs: BlockCosts) {
        self.costs = costs;
    }

    /// Copies in the plan in the making.
    pub(crate) fn num_planned(&self) -> u32 {
        (self.to_host.len() + self.to_device.len()) as u32
    }

    /// The block with this content.
    pub(crate) fn get(&self, hash: BlockHash) -> Option<HostBlockId> {
        self.cache.get(hash).map(|block| HostBlockId(block.0))
    }

    /// The device gives up `evicted`, the content with address `hash`: copies it out if that pays, as far as is known.
    pub(crate) fn keep(
        &mut self,
        hash: BlockHash,
        evicted: Evicted,
        now: Micros,
        choice: Choice<'_>,
        model: Option<&ReuseModel>,
    ) {
        if let Some(host) = self.get(hash) {
            // It was computed again meanwhile; the copy here is as good.
            return self.refresh(host, evicted);
        }
        let Idle { id: device, class, since } = evicted.idle;
        let chance = model.map_or(1.0, |model| model.chance(class, evicted.idle.age(now, model)));
        let is_worth_it = self.costs.is_worth_keeping(chance);
        self.worth_it += (f64::from(u8::from(is_worth_it)) - self.worth_it) / WORTH_MEMORY;
        if !is_worth_it {
            return;
        }
        let Some(host) = self.make_place(&evicted.idle, now, choice) else { return };
        self.cache.insert(hash, as_block(host));
        let uses = evicted.uses;
        self.blocks[host.0 as usize] = HostBlock { place: Place::Busy, num_copies: 1, class, uses, since };
        self.to_host.push(HostCopy { group: 0, device, host });
        self.counters.num_copied_out += 1;
    }

    /// A free block, or that of content worth less than `idle`.
    fn make_place(&mut self, idle: &Idle, now: Micros, choice: Choice<'_>) -> Option<HostBlockId> {
        if let Some(host) = self.free.pop() {
            return Some(host);
        }
        let least = self.idle.first(now, choice)?;
        if !choice.prefers(idle, &least, now) {
            return None;
        }
        self.idle.remove(least.id);
        self.cache.remove(least.id);
        self.counters.num_evictions += 1;
        Some(HostBlockId(least.id.0))
    }

    fn refresh(&mut self, host: HostBlockId, evicted: Evicted) {
        let Idle { class, since, .. } = evicted.idle;
        let block = &mut self.blocks[host.0 as usize];
        (block.class, block.since, block.uses) = (class, since, block.uses.max(evicted.uses));
        if block.place == Place::Idle {
            self.idle.remove(as_block(host));
            self.idle.push_since(as_block(host), class, since);
        }
    }

    /// Reserves a block whose content goes back to the device, so that nothing displaces it, and forgets it here.
    /// Requests that used the content so far.
    pub(crate) fn reserve(&mut self, host: HostBlockId) -> u8 {
        let block = &mut self.blocks[host.0 as usize];
        if block.place == Place::Idle {
            self.idle.remove(as_block(host));
        }
        block.place = Place::Busy;
        block.num_copies += 1;
        self.cache.remove(as_block(host));
        block.uses
    }

    /// Copies a reserved block to `device`.
    pub(crate) fn copy_in(&mut self, host: HostBlockId, device: BlockId) {
        self.to_device.push(HostCopy { group: 0, device, host });
        self.counters.num_copied_in += 1;
    }

    /// The address of a block.
    pub(crate) fn hash_of(&self, host: HostBlockId) -> Option<BlockHash> {
        self.cache.hash_of(as_block(host))
    }

    /// Nobody waits for this content any more. `forget`: nobody ever will.
    pub(crate) fn unhold(&mut self, hash: BlockHash, now: Micros, forget: bool) {
        let Some(host) = self.get(hash) else { return };
        let block = &mut self.blocks[host.0 as usize];
        if block.class == HELD {
            (block.class, block.since) = (0, now);
        } else if !forget {
            return;
        }
        let is_idle = block.place == Place::Idle;
        if is_idle {
            self.idle.remove(as_block(host));
        }
        if forget {
            self.cache.remove(as_block(host));
        }
        if is_idle {
            self.retire(host);
        }
    }

    /// The plan is `step`, which is about to be submitted.
    pub(crate) fn step_scheduled(&mut self, step: StepId, out: &mut SchedulerOutput) {
        let copies = self.to_host.iter().chain(&self.to_device);
        self.in_flight.extend(copies.map(|copy| (step, copy.host)));
        out.copies_to_host.append(&mut self.to_host);
        out.copies_to_device.append(&mut self.to_device);
    }

    /// `step` touches no block any more.
    pub(crate) fn step_collected(&mut self, step: StepId) {
        while let Some(&(touched_by, host)) = self.in_flight.front()
            && touched_by <= step
        {
            self.in_flight.pop_front();
            let block = &mut self.blocks[host.0 as usize];
            block.num_copies -= 1;
            if block.num_copies == 0 {
                self.retire(host);
            }
        }
    }

    /// Puts a block that no copy touches where it can be taken from.
    fn retire(&mut self, host: HostBlockId) {
        let block = &mut self.blocks[host.0 as usize];
        if self.cache.hash_of(as_block(host)).is_some() {
            block.place = Place::Idle;
            self.idle.push_since(as_block(host), block.class, block.since);
        } else {
            block.place = Place::Free;
            self.free.push(host);
        }
    }

    /// Recounts the pool. `is_idle`: no step is in flight.
    pub(crate) fn check(&self, is_idle: bool) -> Result<(), String> {
        let mut places = [0_usize; 3];
        let mut copies = vec![0; self.blocks.len()];
        for &(_, host) in &self.in_flight {
            copies[host.0 as usize] += 1;
        }
        for (id, (block, &num_copies)) in (0..).map(HostBlockId).zip(self.blocks.iter().zip(&copies)) {
            places[block.place as usize] += 1;
            if block.num_copies != num_copies || (block.place == Place::Busy) != (num_copies > 0) {
                return Err(format!(
                    "host block {id}: {block:?}, but {num_copies} copies in flight touch it"
                ));
            }
            let hash = self.hash_of(id);
            if (block.place == Place::Free && hash.is_some())
                || (block.place == Place::Idle && hash.is_none())
            {
                return Err(format!("host block {id}: {:?} with address {hash:?}", block.place));
            }
            if hash.is_some_and(|hash| self.get(hash) != Some(id)) {
                return Err(format!("host block {id} cannot be found under its own address"));
            }
        }
        if places[..2] != [self.free.len(), self.idle.len() as usize] {
            return Err(format!("host blocks (free, idle, busy): {places:?}, but {} free", self.free.len()));
        }
        if self.num_planned() > 0 || (is_idle && !self.in_flight.is_empty()) {
            return Err("copies to or from the host tier belong to no step in flight".into());
        }
        self.idle.check(|id| self.blocks[id as usize].place == Place::Idle)
    }
}
