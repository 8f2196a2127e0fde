//! The prefix cache alone, with the production pool, index and eviction: requests come one after the other, each looks
//! up its prefix, computes the rest at once and leaves. For measuring what a policy keeps, without a scheduler's timing.

use quire_core::{BlockHash, BlockHasher, ExecutorLimits, Micros};

use crate::eviction::EvictionPolicy;
use crate::kv_cache::{BlockTable, KvCacheManager};
use crate::scheduler::SchedulerConfig;

/// One pool of blocks.
#[derive(Debug)]
pub struct CacheReplay {
    kv: KvCacheManager,
    table: BlockTable,
    block_size: u32,
}

impl CacheReplay {
    /// A pool of `num_blocks` blocks of `block_size` tokens.
    pub fn new(num_blocks: u32, block_size: u32, policy: EvictionPolicy) -> Self {
        let limits = ExecutorLimits {
            block_size,
            num_blocks,
            max_num_seqs: 1,
            max_num_batched_tokens: u32::MAX,
            max_model_len: u32::MAX,
            vocab_size: 1,
            max_steps_in_flight: 1,
            kv_groups: vec![None],
        };
        let mut config = SchedulerConfig::new(limits, BlockHasher::new((0, 0), block_size));
        config.eviction = policy;
        Self { kv: KvCacheManager::new(&config), table: BlockTable::default(), block_size }
    }

    /// A request at `now` whose prompt's full blocks have these addresses. How many of them were found.
    ///
    /// # Panics
    /// If the pool is smaller than the prompt.
    pub fn request(
        &mut self,
        now: Micros,
        hashes: &[BlockHash],
        prompt_tokens: u32,
        output_tokens: u32,
    ) -> u32 {
        let num_full = hashes.len() as u32;
        let num_blocks = num_full.max(prompt_tokens.div_ceil(self.block_size));
        self.kv.advance(now);
        let hit = self.kv.lookup(hashes.iter().copied(), num_full * self.block_size);
        self.kv.take_hit(hit, &mut self.table);
        self.table.visit = self.kv.visit(hashes.iter().copied(), prompt_tokens, hit);
        for _ in hit.num_blocks..num_blocks {
            assert!(self.kv.pool().num_available() > 0, "{num_blocks} blocks do not fit the pool");
            self.table.blocks.push(self.kv.allocate());
        }
        for (&hash, &block) in hashes.iter().zip(&self.table.blocks).skip(hit.num_blocks as usize) {
            self.kv.publish(hash, block);
        }
        self.kv.release_table(&mut self.table, prompt_tokens, output_tokens);
        hit.num_blocks
    }

    /// Recounts the pool. See [`crate::Scheduler::check_invariants`].
    ///
    /// # Errors
    /// The first broken invariant, in words.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.kv.check([&self.table].into_iter())
    }
}
