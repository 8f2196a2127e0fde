//! The prefix cache alone, with the production pool, index and eviction: requests come one after the other, each looks
//! up its prefix, computes the rest at once and leaves. For measuring what a policy keeps, without a scheduler's timing.

use quire_core::{BlockHash, BlockHasher, ExecutorLimits, Micros, SchedulerOutput, StepId};

use crate::cost::{CostModel, StepShape};
use crate::eviction::EvictionPolicy;
use crate::host_tier::{BlockCosts, HostTierConfig, PromptCosts};
use crate::kv_cache::{BlockTable, KvCacheManager};
use crate::scheduler::SchedulerConfig;
use crate::stats::HostStats;

/// One pool of blocks.
#[derive(Debug)]
pub struct CacheReplay {
    kv: KvCacheManager,
    table: BlockTable,
    block_size: u32,
    step: StepId,
    host_cost: Option<CostModel>,
    prompt_costs: PromptCosts,
    /// For the copies, which nobody does.
    plan: SchedulerOutput,
}

impl CacheReplay {
    /// A pool of `num_blocks` blocks of `block_size` tokens.
    pub fn new(num_blocks: u32, block_size: u32, policy: EvictionPolicy) -> Self {
        Self::with_host_tier(num_blocks, block_size, policy, None)
    }

    /// The same with a host tier, whose cost model says what is worth a copy.
    pub fn with_host_tier(
        num_blocks: u32,
        block_size: u32,
        policy: EvictionPolicy,
        host_tier: Option<HostTierConfig>,
    ) -> Self {
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
        config.host_tier = host_tier;
        Self {
            kv: KvCacheManager::new(&config),
            table: BlockTable::default(),
            block_size,
            step: StepId(0),
            host_cost: host_tier.map(|host| host.cost),
            prompt_costs: PromptCosts::default(),
            plan: SchedulerOutput::default(),
        }
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
        self.learn_cost(prompt_tokens);
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
        self.step = StepId(self.step.0 + 1);
        self.plan.clear();
        self.kv.step_scheduled(self.step, &mut self.plan);
        self.kv.step_collected(self.step);
        self.kv.release_table(&mut self.table, prompt_tokens, output_tokens, 0);
        hit.num_blocks
    }

    /// What a block costs to copy and to compute, as the scheduler would have learned it.
    fn learn_cost(&mut self, prompt_tokens: u32) {
        let Some(model) = &self.host_cost else { return };
        let micros = model.predict(&StepShape::default().with_row(0, prompt_tokens))
            - model.predict(&StepShape::default());
        self.prompt_costs.learn(prompt_tokens, micros);
        let per_token = self.prompt_costs.per_token().unwrap_or_default();
        let compute = per_token * f64::from(self.block_size);
        self.kv.set_costs(BlockCosts { copy: model.per_copied_block, compute });
    }

    /// What moved between the tiers so far.
    pub fn host_stats(&self) -> HostStats {
        self.kv.host().map_or(HostStats::default(), |host| host.stats(HostStats::default()))
    }

    /// Recounts the pool. See [`crate::Scheduler::check_invariants`].
    ///
    /// # Errors
    /// The first broken invariant, in words.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.kv.check([&self.table].into_iter())
    }
}
