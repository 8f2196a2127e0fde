//! What the scheduler knows of each sequence, split by how often it is touched.
//!
//! A decode step reads and writes one cache line per sequence ([`Sequence`]) and writes its token into another
//! ([`TokenTail`]); a [`Boundary`] is touched when a block is full. Everything else sits in [`SequenceData`]: for
//! admission, a new block, every sixty-fourth token and the end. All live in slabs under the same index
//! (`sequence_table`).

use std::sync::Arc;

use quire_core::{
    AdapterId, BlockHash, BlockHasher, BlockId, CacheSalt, RequestId, SamplingParams, TenantId, TokenId,
    Usage,
};

use crate::kv_cache::BlockTable;
use crate::note::WaitCause;
use crate::policy::OrderKey;

/// Index of a sequence in the slabs; reused after its end.
pub(crate) type SeqIndex = u32;

/// Stop ids kept in the hot line; sequences with more look into their parameters.
const NUM_INLINE_STOPS: usize = 2;
/// Fills unused places of the inline stop ids; no vocabulary is that large.
const NO_TOKEN: TokenId = TokenId::MAX;

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SeqState {
    /// The slab entry is empty.
    Vacant,
    /// A continuation whose prompt is being computed by its leader.
    Follower,
    /// In the waiting queue.
    Waiting,
    /// In the batch.
    Running,
}

/// The hot line of a sequence.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(crate) struct Sequence {
    pub(crate) request: RequestId,
    /// Tokens whose KV is computed or scheduled.
    pub(crate) num_computed_tokens: u32,
    /// Prompt and accepted tokens.
    pub(crate) num_tokens: u32,
    /// Prompt and output tokens at most.
    pub(crate) max_total_tokens: u32,
    /// Length of the block table.
    pub(crate) num_blocks: u32,
    /// Collected tokens at which the next full block can be published; `u32::MAX` without prefix caching.
    pub(crate) publish_at: u32,
    /// A stop id counts at this position or later.
    pub(crate) stop_from: u32,
    pub(crate) slot: u32,
    pub(crate) index: u32,
    pub(crate) tenant: TenantId,
    /// Tells users of one slab entry apart.
    pub(crate) identity: u32,
    pub(crate) stop_ids: [TokenId; NUM_INLINE_STOPS],
    /// It has more stop ids than fit here.
    pub(crate) more_stops: bool,
    /// Tells block tables of one sequence apart (a preemption ends one).
    pub(crate) epoch: u8,
    /// Sampled tokens on their way.
    pub(crate) num_in_flight: u8,
    pub(crate) state: SeqState,
    /// In the batch, and not all known tokens are scheduled yet.
    pub(crate) prefilling: bool,
    /// Other continuations wait for this one's prompt.
    pub(crate) leads: bool,
    /// At least one token was accepted.
    pub(crate) has_output: bool,
}

/// Tokens that [`TokenTail`] holds.
pub(crate) const TAIL_LEN: u32 = 64;

/// The latest generated tokens, by position modulo [`TAIL_LEN`], those that are not in [`SequenceData::generated`] yet
/// among them. These never span more than one aligned window, because they are moved before a window begins.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(crate) struct TokenTail(pub(crate) [TokenId; TAIL_LEN as usize]);

/// What a full block needs to be published without a look at [`SequenceData`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boundary {
    /// Address of the block before the next one to be published; the root before the first.
    pub(crate) last_hash: BlockHash,
    pub(crate) prompt_len: u32,
    /// The last two entries of the block table, latest first.
    pub(crate) last_blocks: [BlockId; 2],
}

impl Sequence {
    pub(crate) fn vacant(identity: u32) -> Self {
        Self {
            request: RequestId(0),
            num_computed_tokens: 0,
            num_tokens: 0,
            max_total_tokens: 0,
            num_blocks: 0,
            publish_at: u32::MAX,
            stop_from: u32::MAX,
            slot: 0,
            index: 0,
            tenant: TenantId(0),
            identity,
            stop_ids: [NO_TOKEN; NUM_INLINE_STOPS],
            more_stops: false,
            epoch: 0,
            num_in_flight: 0,
            state: SeqState::Vacant,
            prefilling: false,
            leads: false,
            has_output: false,
        }
    }

    /// Tokens that exist, those on their way included.
    pub(crate) fn num_existing_tokens(&self) -> u32 {
        self.num_tokens + u32::from(self.num_in_flight)
    }

    /// Tokens that could be computed now. The last token of a sequence is never an input.
    pub(crate) fn num_schedulable(&self) -> u32 {
        self.num_existing_tokens().min(self.max_total_tokens - 1).saturating_sub(self.num_computed_tokens)
    }

    pub(crate) fn set_stops(&mut self, params: &SamplingParams, prompt_len: u32) {
        let ids = &params.stop_token_ids;
        self.stop_from = prompt_len.saturating_add(params.min_tokens);
        self.more_stops = ids.len() > NUM_INLINE_STOPS;
        self.stop_ids = [NO_TOKEN; NUM_INLINE_STOPS];
        if !self.more_stops {
            self.stop_ids[..ids.len()].copy_from_slice(ids);
        }
    }

    /// Whether this line alone says what the next row is: one token, into a block that is there.
    pub(crate) fn decodes_in_place(&self, block_size: u32) -> bool {
        !self.prefilling
            && self.num_computed_tokens < self.num_blocks * block_size
            && self.num_schedulable() == 1
    }

    /// Whether this line and the tail alone take in `token`: it is neither the first
    /// nor the last one, and nobody waits for it.
    pub(crate) fn takes_in_place(&self, token: TokenId) -> bool {
        let usual = self.has_output & !self.leads & !self.more_stops;
        let stops = self.stop_ids.iter().fold(false, |stops, &stop| stops | (stop == token));
        usual
            && !stops
            && self.num_tokens + 1 < self.max_total_tokens
            && !self.num_tokens.is_multiple_of(TAIL_LEN)
    }
}

/// The rest of a sequence.
#[derive(Debug)]
pub(crate) struct SequenceData {
    /// Its request, as an index into the slab of requests.
    pub(crate) request: u32,
    pub(crate) key: OrderKey,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) prompt_hashes: Arc<[BlockHash]>,
    pub(crate) salt: CacheSalt,
    pub(crate) adapter: Option<AdapterId>,
    pub(crate) params: Arc<SamplingParams>,
    /// Accepted tokens but for those in the tail ([`SequenceTable::flush_tail`]); survive preemption.
    pub(crate) generated: Vec<TokenId>,
    /// Addresses of full blocks after those of `prompt_hashes`, as far as [`Self::extend_hashes`] has computed them.
    pub(crate) later_hashes: Vec<BlockHash>,
    pub(crate) table: BlockTable,
    /// Waiting, but already holding the blocks of its leader's prompt.
    pub(crate) parked: bool,
    /// Rows of the prompt whose log-probabilities were reported.
    pub(crate) num_reported_rows: u32,
    /// The address of its last, partly filled block, while that is held for it: nobody else has it.
    pub(crate) held_tail: Option<BlockHash>,
    /// Tokens that were computed when it was taken out of the batch.
    pub(crate) num_lost_tokens: u32,
    /// Prompt tokens that were computed once, or found; its tenant has paid for them.
    pub(crate) num_charged_tokens: u32,
    pub(crate) usage: Usage,
    /// Whether it was ever in the batch.
    pub(crate) started: bool,
    /// The reason for waiting that was noted last.
    pub(crate) wait_cause: WaitCause,
}

impl SequenceData {
    pub(crate) fn prompt_len(&self) -> u32 {
        self.prompt.len() as u32
    }

    /// Addresses of the full blocks known so far.
    pub(crate) fn hashes(&self) -> impl Iterator<Item = BlockHash> + Clone + '_ {
        self.prompt_hashes.iter().chain(&self.later_hashes).copied()
    }

    /// The address of block `at`, if known.
    pub(crate) fn hash(&self, at: usize) -> Option<BlockHash> {
        match at.checked_sub(self.prompt_hashes.len()) {
            None => Some(self.prompt_hashes[at]),
            Some(later) => self.later_hashes.get(later).copied(),
        }
    }

    /// Rows of the prompt whose log-probabilities are still wanted: all but the last, whose logits belong to the first
    /// generated token. Only continuation 0 reports.
    pub(crate) fn unreported_rows(&self, index: u32) -> std::ops::Range<u32> {
        if index == 0 && self.params.prompt_logprobs.is_some() {
            self.num_reported_rows..self.prompt_len() - 1
        } else {
            0..0
        }
    }

    /// The address of block `at`, whose tokens are known, after the block with address `parent`. `tokens`: scratch.
    pub(crate) fn hash_block(
        &self,
        at: usize,
        parent: BlockHash,
        hasher: &BlockHasher,
        tokens: &mut Vec<TokenId>,
    ) -> BlockHash {
        let size = hasher.block_size() as usize;
        let start = at * size;
        // Nearly always the block lies on one side.
        if let Some(start) = start.checked_sub(self.prompt.len()) {
            return hasher.next(parent, &self.generated[start..start + size]);
        }
        self.copy_tokens(start, tokens, size);
        hasher.next(parent, tokens)
    }

    /// Whether its blocks have addresses that others may look up. If not, they get addresses of their own once they are
    /// to be kept for itself.
    pub(crate) fn is_shared(&self) -> bool {
        !self.prompt_hashes.is_empty()
    }

    /// Computes the addresses of all full blocks, so that they can be looked up. `salt`: of the chain.
    pub(crate) fn extend_hashes(&mut self, salt: CacheSalt, hasher: &BlockHasher, tokens: &mut Vec<TokenId>) {
        let num_full = (self.prompt.len() + self.generated.len()) / hasher.block_size() as usize;
        for at in self.prompt_hashes.len() + self.later_hashes.len()..num_full {
            let parent = at.checked_sub(1).and_then(|before| self.hash(before));
            let parent = parent.unwrap_or_else(|| hasher.root(salt));
            let hash = self.hash_block(at, parent, hasher, tokens);
            self.later_hashes.push(hash);
        }
    }

    /// Copies tokens `start..start + len`.
    fn copy_tokens(&self, start: usize, out: &mut Vec<TokenId>, len: usize) {
        out.clear();
        let in_prompt = self.prompt.get(start..).unwrap_or_default();
        let in_prompt = &in_prompt[..in_prompt.len().min(len)];
        out.extend_from_slice(in_prompt);
        if in_prompt.len() < len {
            let start = start + in_prompt.len() - self.prompt.len();
            out.extend_from_slice(&self.generated[start..start + len - in_prompt.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hot_part_is_one_cache_line() {
        assert_eq!(size_of::<Sequence>(), 64);
    }
}
