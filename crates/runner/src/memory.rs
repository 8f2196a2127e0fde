//! Where the memory goes, computed from the model's shape before anything is loaded.

use quire_backend::{KvLayerShape, KvLayout};
use quire_core::Shard;
use quire_model::{Checkpoint, Mixer, ModelSpec};

use crate::sharding::spec_of_rank;
use crate::weights::adapter_bytes;
use crate::workspace::WorkspaceShape;
use crate::{RunnerConfig, RunnerError, WeightPlan};

/// Bytes by purpose. Backends may add padding of their own; what they pack differently differs by a few per cent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// All weights as stored after loading. Those that a backend maps from a file are page cache.
    pub weight_bytes: u64,
    /// Factors of all adapters in f32, as on the processor; a GPU keeps them in the type of activations, in half of it.
    pub adapter_bytes: u64,
    /// Activations and logits of the largest step, in f32.
    pub workspace_bytes: u64,
    /// One KV block, all layers, keys and values.
    pub kv_block_bytes: u64,
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Tokens in one block.
    pub block_size: u32,
}

impl MemoryPlan {
    /// The plan of a model without adapters under these limits.
    pub fn new(spec: &ModelSpec, config: &RunnerConfig) -> Self {
        Self::with_spec_of_rank(spec, config, 1)
    }

    /// The plan of each of `world` tensor-parallel ranks of a model with its adapters: of the first, which has most.
    ///
    /// # Errors
    /// The model cannot be split so.
    pub fn of_checkpoint(
        checkpoint: &Checkpoint,
        config: &RunnerConfig,
        world: u32,
    ) -> Result<Self, RunnerError> {
        let rank_spec = spec_of_rank(checkpoint.spec(), config.quant, world)?;
        let adapter_bytes = adapter_bytes(checkpoint.adapters(), &rank_spec)?;
        Ok(Self { adapter_bytes, ..Self::with_spec_of_rank(&rank_spec, config, world) })
    }

    /// The same without adapters, from the model's shape alone.
    ///
    /// # Errors
    /// The model cannot be split so.
    pub fn of_rank(spec: &ModelSpec, config: &RunnerConfig, world: u32) -> Result<Self, RunnerError> {
        Ok(Self::with_spec_of_rank(&spec_of_rank(spec, config.quant, world)?, config, world))
    }

    fn with_spec_of_rank(spec: &ModelSpec, config: &RunnerConfig, world: u32) -> Self {
        Self {
            adapter_bytes: 0,
            weight_bytes: WeightPlan::of_rank(spec, config.quant, world).bytes,
            workspace_bytes: WorkspaceShape::new(spec, config, Shard { rank: 0, world }).bytes(),
            kv_block_bytes: kv_layout(spec, config).block_bytes() as u64,
            num_blocks: config.num_blocks,
            block_size: config.block_size,
        }
    }

    /// The whole KV cache.
    pub fn kv_bytes(&self) -> u64 {
        self.kv_block_bytes * u64::from(self.num_blocks)
    }

    /// Tokens that the KV cache holds.
    pub fn kv_tokens(&self) -> u64 {
        u64::from(self.num_blocks) * u64::from(self.block_size)
    }

    /// Weights, adapters, workspace and KV cache.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.adapter_bytes + self.workspace_bytes + self.kv_bytes()
    }

    /// Blocks that fit into `bytes` of KV cache; what `num_blocks` should be. May be 0.
    pub fn num_blocks_in(&self, bytes: u64) -> u32 {
        let by_slots = u32::MAX / self.block_size.max(1);
        (bytes / self.kv_block_bytes.max(1)).min(by_slots.into()) as u32
    }
}

/// The cache of KV group 0, the only one today.
pub(crate) fn kv_layout(spec: &ModelSpec, config: &RunnerConfig) -> KvLayout {
    let layer = |layer: &quire_model::LayerSpec| {
        let Mixer::Gqa(gqa) = &layer.mixer;
        KvLayerShape { num_kv_heads: gqa.num_kv_heads as u32, head_dim: gqa.head_dim as u32 }
    };
    KvLayout {
        num_blocks: config.num_blocks,
        block_size: config.block_size,
        layers: spec.layers.iter().map(layer).collect(),
        dtype: config.kv_dtype,
    }
}

#[cfg(test)]
mod tests {
    use quire_core::{DType, QuantFormat};

    use super::*;

    fn spec() -> ModelSpec {
        ModelSpec::from_config_json(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
                "max_position_embeddings": 256, "torch_dtype": "bfloat16", "tie_word_embeddings": true}"#,
        )
        .unwrap()
    }

    fn config() -> RunnerConfig {
        RunnerConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 32,
            max_model_len: 256,
            block_size: 16,
            num_blocks: 10,
            kv_dtype: DType::BF16,
            quant: QuantFormat::None,
        }
    }

    #[test]
    fn plan_counts_every_byte() {
        let plan = MemoryPlan::new(&spec(), &config());
        // A layer: q, o 64x64; k, v 32x64; gate, up, down 64x128; two norms of 64 in f32.
        let matrices = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128;
        assert_eq!(plan.weight_bytes, 2 * (2 * matrices + 4 * 2 * 64) + 2 * 100 * 64 + 4 * 64);
        // Two layers, K and V, 2 heads of 16, 16 tokens, 2 bytes.
        assert_eq!(plan.kv_block_bytes, 2 * 2 * 2 * 16 * 16 * 2);
        // 32 tokens: residual, hidden, delta, qkv 128, attention 64, gate and up 256; 32 rows of 100 logits.
        assert_eq!(plan.workspace_bytes, 4 * (32 * (3 * 64 + 128 + 64 + 256) + 32 * 100));
        assert_eq!(plan.total_bytes(), plan.weight_bytes + plan.workspace_bytes + 10 * plan.kv_block_bytes);
        assert_eq!(plan.kv_tokens(), 160);
    }

    #[test]
    fn a_rank_has_its_part_of_the_plan() {
        let (whole, rank) =
            (MemoryPlan::new(&spec(), &config()), MemoryPlan::of_rank(&spec(), &config(), 2).unwrap());
        assert_eq!(rank.kv_block_bytes * 2, whole.kv_block_bytes);
        // The table of embeddings as a whole, half of the head and of the matrices, all norms.
        let matrices = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128;
        assert_eq!(rank.weight_bytes, matrices * 2 + 2 * (100 + 50) * 64 + 4 * (2 * 2 * 64 + 64));
        // 32 tokens: residual, hidden, delta, half of the rest; 32 rows of 100 logits, and of 50.
        assert_eq!(rank.workspace_bytes, 4 * (32 * (3 * 64 + 64 + 32 + 128) + 32 * 150));
        // As many ranks as twice the key/value heads: two hold the same one.
        assert_eq!(MemoryPlan::of_rank(&spec(), &config(), 4).unwrap().kv_block_bytes, rank.kv_block_bytes);
        assert!(MemoryPlan::of_rank(&spec(), &config(), 3).is_err());
    }

    #[test]
    fn budget_becomes_whole_blocks() {
        let plan = MemoryPlan::new(&spec(), &config());
        assert_eq!(plan.num_blocks_in(3 * plan.kv_block_bytes), 3);
        assert_eq!(plan.num_blocks_in(3 * plan.kv_block_bytes - 1), 2);
        assert_eq!(plan.num_blocks_in(0), 0);
        assert_eq!(plan.num_blocks_in(u64::MAX), u32::MAX / 16, "slots are numbered in 32 bits");
    }
}
