//! Random use of the block tables against a shadow that knows what each block holds.

use quire_core::{BlockHash, BlockHasher, BlockId, ExecutorLimits, Micros, SchedulerOutput, StepId};

use crate::eviction::EvictionPolicy;
use crate::kv_cache::{BlockTable, KvCacheManager};
use crate::scheduler::SchedulerConfig;

const BLOCK_SIZE: u32 = 4;

struct Shadow {
    rng: u64,
    kv: KvCacheManager,
    tables: Vec<(BlockTable, Vec<BlockHash>)>,
    /// What was last written to each block.
    content: Vec<BlockHash>,
    now: u64,
    scheduled: u64,
    collected: u64,
    num_hits: u64,
    num_copies: u64,
}

impl Shadow {
    fn new(seed: u64) -> Self {
        let limits = ExecutorLimits {
            block_size: BLOCK_SIZE,
            num_blocks: 4 + (seed % 29) as u32,
            max_num_seqs: 8,
            max_num_batched_tokens: 256,
            max_model_len: 64,
            vocab_size: 100,
            max_steps_in_flight: 2,
            kv_groups: vec![None],
        };
        let mut config = SchedulerConfig::new(limits, BlockHasher::new((1, 2), BLOCK_SIZE));
        config.eviction = if seed.is_multiple_of(2) { EvictionPolicy::Lru } else { EvictionPolicy::Learned };
        let kv = KvCacheManager::new(&config);
        let content = vec![BlockHash(0); config.limits.num_blocks as usize];
        let (tables, now) = (Vec::new(), 0);
        Self { rng: seed, kv, tables, content, now, scheduled: 0, collected: 0, num_hits: 0, num_copies: 0 }
    }

    fn next(&mut self, below: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.rng >> 33) % below
    }

    /// A chain that shares its first blocks with others: two ways to go on after each block, one of them rare.
    fn chain(&mut self) -> Vec<BlockHash> {
        let mut path = 1_u128;
        let len = 1 + self.next(8);
        (0..len)
            .map(|_| {
                path = 2 * path + u128::from(self.next(4) == 0);
                // As a hash would spread it.
                BlockHash(path.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835))
            })
            .collect()
    }

    /// Admits a request with this chain, as the scheduler would: what is cached, then blocks for the rest, then publish.
    fn enter(&mut self) {
        let chain = self.chain();
        let len = chain.len() as u32;
        let hit = self.kv.lookup(chain.iter().copied(), len * BLOCK_SIZE - 1);
        if len - hit.num_blocks + hit.num_idle > self.kv.pool().num_available() {
            return;
        }
        let mut table = BlockTable::default();
        self.kv.take_hit(hit, &mut table);
        table.visit = self.kv.visit(chain.iter().copied(), len * BLOCK_SIZE, hit);
        for (&block, hash) in table.blocks.iter().zip(&chain) {
            assert_eq!(
                self.content[block.0 as usize], *hash,
                "the cache gave a block that holds something else"
            );
        }
        self.num_hits += u64::from(hit.num_blocks);
        if hit.num_blocks + 1 == len
            && self.kv.pool().num_available() >= 2
            && let Some(copy) = self.kv.copy_cached(chain.last().copied(), &mut table)
        {
            assert_eq!(self.content[copy.src.0 as usize], *chain.last().unwrap());
            self.content[copy.dst.0 as usize] = self.content[copy.src.0 as usize];
            self.kv.release(copy.src);
            self.num_copies += 1;
        }
        for &hash in &chain[table.blocks.len()..] {
            let block = self.kv.allocate();
            let held = self.tables.iter().any(|(other, _)| other.live().contains(&block));
            assert!(!held && !table.blocks.contains(&block), "a block in use was handed out");
            self.content[block.0 as usize] = hash;
            table.blocks.push(block);
        }
        for (&hash, &block) in chain.iter().zip(&table.blocks) {
            self.kv.publish(hash, block);
        }
        self.tables.push((table, chain));
    }

    fn leave(&mut self) {
        if self.tables.is_empty() {
            return;
        }
        let at = self.next(self.tables.len() as u64) as usize;
        let (mut table, chain) = self.tables.swap_remove(at);
        self.kv.release_table(&mut table, chain.len() as u32 * BLOCK_SIZE, 1, 0);
    }

    fn step(&mut self) {
        self.now += self.next(3_000_000);
        self.kv.advance(Micros(self.now));
        if self.scheduled < self.collected + 2 && self.next(2) == 0 {
            self.scheduled += 1;
            self.kv.step_scheduled(StepId(self.scheduled), &mut SchedulerOutput::default());
        } else if self.collected < self.scheduled {
            self.collected += 1;
            self.kv.step_collected(StepId(self.collected));
        }
    }

    fn check(&self) {
        self.kv.check(self.tables.iter().map(|(table, _)| table)).unwrap();
        for (table, chain) in &self.tables {
            let held = |block: &BlockId| self.content[block.0 as usize];
            assert!(
                table.blocks.iter().map(held).eq(chain.iter().copied()),
                "a block in use was overwritten"
            );
        }
        let pool = self.kv.pool();
        let mut used: Vec<BlockId> =
            self.tables.iter().flat_map(|(table, _)| table.live()).copied().collect();
        used.sort_unstable();
        used.dedup();
        let rest = pool.num_available() + pool.num_quarantined();
        assert_eq!(used.len() as u32 + rest, pool.len(), "used and not used are not all");
    }
}

/// `QUIRE_POOL_OPS=100000000 cargo test --release -p quire-scheduler shadow` for a long run.
#[test]
fn tables_agree_with_their_shadow() {
    const PER_SEED: u64 = 1000;
    let num_ops = std::env::var("QUIRE_POOL_OPS").map_or(60_000, |ops| ops.parse::<u64>().unwrap());
    let (mut num_hits, mut num_copies, mut num_evictions) = (0, 0, 0);
    for seed in 0..num_ops.div_ceil(PER_SEED) {
        let mut shadow = Shadow::new(seed);
        for _ in 0..PER_SEED {
            match shadow.next(5) {
                0 | 1 => shadow.enter(),
                2 | 3 => shadow.leave(),
                _ => shadow.step(),
            }
            shadow.check();
        }
        num_hits += shadow.num_hits;
        num_copies += shadow.num_copies;
        num_evictions += shadow.kv.num_evictions();
    }
    println!("{num_ops} operations: {num_hits} blocks found, {num_copies} copied, {num_evictions} evicted");
    let enough = num_ops / 100;
    assert!(num_hits > enough && num_copies > enough / 10 && num_evictions > enough, "it tested little");
}
