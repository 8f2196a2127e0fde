//! What several tests need: golden checkpoints, engines over them, a small random generator.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quire_core::Executor;
use quire_core::{
    BlockHasher, CacheSalt, DType, Micros, QuantFormat, Request, RequestId, SamplingParams, TenantId,
};
use quire_cpu::{CpuBackend, CpuConfig, Precision};
use quire_engine::EngineCore;
use quire_model::Checkpoint;
use quire_runner::{ModelRunner, RunnerConfig};
use quire_scheduler::{CostModel, HostTierConfig, SchedulerConfig};

/// `tests/data/golden/<name>`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name)
}

/// How to run a model; the defaults are roomy.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub threads: usize,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    pub max_prefill_chunk: u32,
    pub block_size: u32,
    pub num_blocks: u32,
    pub max_model_len: u32,
    pub kv_dtype: DType,
    pub precision: Precision,
    pub quant: QuantFormat,
    pub prefix_caching: bool,
    pub num_host_blocks: u32,
}

impl Setup {
    pub const ROOMY: Self = Self {
        threads: 1,
        max_num_seqs: 64,
        max_num_batched_tokens: 256,
        max_prefill_chunk: u32::MAX,
        block_size: 16,
        num_blocks: 512,
        max_model_len: 128,
        kv_dtype: DType::F32,
        precision: Precision::F32,
        quant: QuantFormat::None,
        prefix_caching: false,
        num_host_blocks: 0,
    };
}

impl Default for Setup {
    fn default() -> Self {
        Self::ROOMY
    }
}

/// A machine on which everything goes through the host tier that may.
const COPIES_ARE_CHEAP: CostModel = CostModel {
    fixed: 1.0,
    per_row: 1.0,
    weights: 0.0,
    per_token: 1000.0,
    per_context_token: 0.0,
    per_attention: 0.0,
    per_copied_block: 1.0,
};

pub const HASH_KEY: (u64, u64) = (7, 9);

/// A passive engine over a checkpoint on the CPU.
pub fn engine(checkpoint: &Checkpoint, setup: Setup) -> EngineCore {
    let backend = CpuBackend::new(CpuConfig {
        threads: setup.threads,
        precision: setup.precision,
        ..CpuConfig::default()
    })
    .unwrap();
    let config = RunnerConfig {
        max_num_seqs: setup.max_num_seqs,
        max_num_batched_tokens: setup.max_num_batched_tokens,
        max_model_len: setup.max_model_len,
        block_size: setup.block_size,
        num_blocks: setup.num_blocks,
        kv_dtype: setup.kv_dtype,
        quant: setup.quant,
    };
    let mut runner = ModelRunner::load(backend, checkpoint, &config, |_| {}).unwrap();
    let mut host_tier = None;
    if setup.num_host_blocks > 0 {
        runner = runner.with_host_blocks(setup.num_host_blocks).unwrap();
        host_tier = Some(HostTierConfig {
            num_blocks: setup.num_host_blocks,
            block_bytes: runner.memory_plan().kv_block_bytes,
            cost: COPIES_ARE_CHEAP,
        });
    }
    let scheduler = SchedulerConfig {
        enable_prefix_caching: setup.prefix_caching,
        max_prefill_chunk: setup.max_prefill_chunk,
        host_tier,
        ..SchedulerConfig::new(runner.limits(), BlockHasher::new(HASH_KEY, setup.block_size))
    };
    EngineCore::new(scheduler, Box::new(runner))
}

/// A request without deadline from the default tenant; its prompt is hashed for `block_size`.
pub fn request(id: u64, prompt: &[u32], params: SamplingParams, block_size: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt: prompt.into(),
        block_hashes: BlockHasher::new(HASH_KEY, block_size).chain(CacheSalt(1), prompt).into(),
        salt: CacheSalt(1),
        adapter: None,
        params: Arc::new(params),
        tenant: TenantId(0),
        priority: 0,
        arrival: Micros(id),
        deadline: None,
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
