//! The limits everything is sized from.

use quire_core::{DType, QuantFormat};

use crate::RunnerError;

/// Log-probabilities of prompts are wanted for many rows at once; fewer logit rows than this would mean many passes.
const MIN_LOGIT_ROWS: u32 = 64;

/// How large a batch may become, and how numbers are stored. Fixed at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerConfig {
    /// Slots; >= 1.
    pub max_num_seqs: u32,
    /// Tokens computed in one step; >= 1.
    pub max_num_batched_tokens: u32,
    /// Tokens of one sequence; >= 1.
    pub max_model_len: u32,
    /// Tokens in one KV block; >= 1.
    pub block_size: u32,
    /// Blocks in the pool; >= 1. [`crate::MemoryPlan::num_blocks_in`] computes it from a budget in bytes.
    pub num_blocks: u32,
    /// Element type of the KV cache.
    pub kv_dtype: DType,
    /// How linear layers are stored.
    pub quant: QuantFormat,
}

impl RunnerConfig {
    /// Blocks that a sequence of `max_model_len` tokens fills.
    pub fn max_blocks_per_seq(&self) -> u32 {
        self.max_model_len.div_ceil(self.block_size)
    }

    /// Rows of the logits buffer. Every sequence of a step can sample; a step that wants more rows than this
    /// (log-probabilities of long prompts) runs in several passes, so that the buffer stays small for large
    /// vocabularies.
    pub fn max_logit_rows(&self) -> u32 {
        self.max_num_seqs.max(MIN_LOGIT_ROWS).min(self.max_num_batched_tokens)
    }

    pub(crate) fn validate(&self) -> Result<(), RunnerError> {
        let at_least_one = [
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len),
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(RunnerError::Config { field, value: 0, rule: "must be at least 1".into() });
            }
        }
        let slots = u64::from(self.num_blocks) * u64::from(self.block_size);
        if slots > u64::from(u32::MAX) {
            let rule = format!("times block_size ({}) must be below 2^32", self.block_size);
            return Err(RunnerError::Config { field: "num_blocks", value: self.num_blocks.into(), rule });
        }
        Ok(())
    }
}
