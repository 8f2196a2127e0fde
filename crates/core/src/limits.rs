//! What one deployment can take: the bounds every request is checked against.

/// Limits of an engine with its model, fixed at start.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Tokens of vocabulary; ids must be below.
    pub vocab_size: u32,
    /// Prompt plus output tokens of one sequence.
    pub max_model_len: u32,
    /// Sequences in the running batch.
    pub max_num_seqs: u32,
    /// Tokens computed in one step over all sequences.
    pub max_num_batched_tokens: u32,
    /// Requests that may wait beyond those running; more are refused with `Overloaded`.
    pub max_queued_requests: u32,
    /// Tokens in one KV block.
    pub block_size: u32,
    /// KV blocks in the pool.
    pub num_blocks: u32,
    /// Continuations of one request.
    pub max_n: u32,
    /// Alternatives reported per token.
    pub max_logprobs: u32,
    /// Entries of `logit_bias`.
    pub max_logit_bias: u32,
    /// Entries of `stop_token_ids`, the model's own included.
    pub max_stop_token_ids: u32,
}

impl Default for Limits {
    /// Small numbers that suit tests; a deployment computes its own from the model and the memory plan.
    fn default() -> Self {
        Self {
            vocab_size: 1024,
            max_model_len: 2048,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_queued_requests: 256,
            block_size: 16,
            num_blocks: 1024,
            max_n: 128,
            max_logprobs: 20,
            max_logit_bias: 1024,
            max_stop_token_ids: 128,
        }
    }
}

impl Limits {
    /// Tokens the KV pool can hold.
    pub const fn kv_tokens(&self) -> u64 {
        self.num_blocks as u64 * self.block_size as u64
    }
}
