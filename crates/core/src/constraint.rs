//! The seam for structured output: something that knows which tokens may come next.

use crate::TokenId;

/// Follows one sequence and masks its next token. Compiled in `llm`, owned per sequence by `engine`, unknown to the
/// scheduler. A mask is one bit per vocabulary entry, little-endian words of 32; 1 allows the token.
pub trait TokenConstraint: Send {
    /// Takes accepted tokens, in order.
    fn advance(&mut self, tokens: &[TokenId]);
    /// Undoes the last `num_tokens` tokens (rejected speculation).
    fn rollback(&mut self, num_tokens: usize);
    /// Writes the allowed set for the next token; `mask` has `vocab_size.div_ceil(32)` words.
    fn fill_mask(&self, mask: &mut [u32]);
}
