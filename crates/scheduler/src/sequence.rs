//! What the scheduler knows of each sequence, split by how often it is touched.
//!
//! A decode step reads and writes one cache line per sequence ([`Sequence`]) and writes its token into another
//! ([`TokenTail`]); everything else sits in [`SequenceData`] and is touched on admission, at block boundaries, every
//! sixteenth token and at the end. All three live in slabs under the same index.

use std::sync::Arc;

use quire_core::{
    BlockHash, BlockHasher, BlockId, CacheSalt, RequestId, SamplingParams, TenantId, TokenId, Usage,
};

use crate::kv_cache::BlockTable;
use crate::policy::OrderKey;
use crate::scheduler::InFlightRow;

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
    stop_ids: [TokenId; NUM_INLINE_STOPS],
    /// It has more stop ids than fit here.
    more_stops: bool,
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
pub(crate) struct TokenTail([TokenId; TAIL_LEN as usize]);

/// What a full block needs to be published without a look at [`SequenceData`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boundary {
    /// Address of the block before the next one to be published; the root before the first.
    pub(crate) last_hash: BlockHash,
    prompt_len: u32,
    /// The last two entries of the block table, latest first.
    last_blocks: [BlockId; 2],
}

impl Sequence {
    fn vacant(identity: u32) -> Self {
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
    fn takes_in_place(&self, token: TokenId) -> bool {
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
    /// Prompt tokens that were computed once, or found; its tenant has paid for them.
    pub(crate) num_charged_tokens: u32,
    pub(crate) usage: Usage,
    /// Whether it was ever in the batch.
    pub(crate) started: bool,
}

impl SequenceData {
    pub(crate) fn prompt_len(&self) -> u32 {
        self.prompt.len() as u32
    }

    /// Addresses of the full blocks known so far.
    pub(crate) fn hashes(&self) -> impl Iterator<Item = BlockHash> + '_ {
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

    /// Computes the addresses of all full blocks, so that they can be looked up.
    pub(crate) fn extend_hashes(&mut self, hasher: &BlockHasher, tokens: &mut Vec<TokenId>) {
        if self.prompt_hashes.is_empty() {
            return;
        }
        let num_full = (self.prompt.len() + self.generated.len()) / hasher.block_size() as usize;
        for at in self.prompt_hashes.len() + self.later_hashes.len()..num_full {
            let parent = at.checked_sub(1).and_then(|before| self.hash(before));
            let parent = parent.unwrap_or_else(|| hasher.root(self.salt));
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

/// The two slabs.
#[derive(Debug)]
pub(crate) struct SequenceTable {
    hot: Vec<Sequence>,
    tails: Vec<TokenTail>,
    boundaries: Vec<Boundary>,
    data: Vec<Option<SequenceData>>,
    vacant: Vec<SeqIndex>,
}

impl SequenceTable {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            hot: Vec::with_capacity(capacity),
            tails: Vec::with_capacity(capacity),
            boundaries: Vec::with_capacity(capacity),
            data: Vec::with_capacity(capacity),
            vacant: Vec::with_capacity(capacity),
        }
    }

    /// Number of live sequences.
    pub(crate) fn len(&self) -> usize {
        self.hot.len() - self.vacant.len()
    }

    /// Takes an entry; the caller fills the hot line.
    pub(crate) fn insert(&mut self, data: SequenceData) -> SeqIndex {
        let boundary = Boundary {
            last_hash: BlockHash(0),
            prompt_len: data.prompt_len(),
            last_blocks: [BlockId::default(); 2],
        };
        if let Some(seq) = self.vacant.pop() {
            self.data[seq as usize] = Some(data);
            self.boundaries[seq as usize] = boundary;
            return seq;
        }
        self.hot.push(Sequence::vacant(0));
        self.tails.push(TokenTail([0; TAIL_LEN as usize]));
        self.boundaries.push(boundary);
        self.data.push(Some(data));
        self.hot.len() as SeqIndex - 1
    }

    pub(crate) fn remove(&mut self, seq: SeqIndex) -> Option<SequenceData> {
        let hot = &mut self.hot[seq as usize];
        *hot = Sequence::vacant(hot.identity.wrapping_add(1));
        self.vacant.push(seq);
        self.data[seq as usize].take()
    }

    pub(crate) fn hot(&self, seq: SeqIndex) -> &Sequence {
        &self.hot[seq as usize]
    }

    pub(crate) fn hot_mut(&mut self, seq: SeqIndex) -> &mut Sequence {
        &mut self.hot[seq as usize]
    }

    pub(crate) fn data(&self, seq: SeqIndex) -> &SequenceData {
        self.data[seq as usize].as_ref().expect("a live sequence has data")
    }

    pub(crate) fn data_mut(&mut self, seq: SeqIndex) -> &mut SequenceData {
        self.data[seq as usize].as_mut().expect("a live sequence has data")
    }

    /// Both parts at once.
    pub(crate) fn both_mut(&mut self, seq: SeqIndex) -> (&mut Sequence, &mut SequenceData) {
        let data = self.data[seq as usize].as_mut().expect("a live sequence has data");
        (&mut self.hot[seq as usize], data)
    }

    /// Whether `token`, at the position after the known ones, ends the sequence.
    pub(crate) fn is_stop(&self, seq: SeqIndex, token: TokenId) -> bool {
        let hot = self.hot(seq);
        let listed = if hot.more_stops {
            self.data(seq).params.stop_token_ids.contains(&token)
        } else {
            hot.stop_ids.contains(&token)
        };
        listed && hot.num_tokens >= hot.stop_from
    }

    /// Appends a block to the table of a running sequence.
    pub(crate) fn push_block(&mut self, seq: SeqIndex, block: BlockId) {
        self.data_mut(seq).table.blocks.push(block);
        self.hot_mut(seq).num_blocks += 1;
        let last = &mut self.boundaries[seq as usize].last_blocks;
        *last = [block, last[0]];
    }

    /// Takes note of the table with which a sequence enters the batch, and of the address of its last full block.
    pub(crate) fn note_table(&mut self, seq: SeqIndex, last_hash: BlockHash) {
        let (hot, data) = self.both_mut(seq);
        let blocks = &data.table.blocks;
        hot.num_blocks = blocks.len() as u32;
        let mut last = blocks.iter().rev().copied();
        let last_blocks = [last.next().unwrap_or_default(), last.next().unwrap_or_default()];
        let boundary = &mut self.boundaries[seq as usize];
        *boundary = Boundary { last_hash, last_blocks, ..*boundary };
    }

    /// Address and place of the next block to be published, if it holds nothing but tokens of the tail and is one of the
    /// last two of the table.
    #[inline]
    pub(crate) fn block_of_tail(&self, seq: SeqIndex, hasher: &BlockHasher) -> Option<(BlockHash, BlockId)> {
        let (hot, boundary) = (&self.hot[seq as usize], &self.boundaries[seq as usize]);
        let size = hasher.block_size();
        let (start, window) = (hot.publish_at - size, (hot.num_tokens - 1) / TAIL_LEN * TAIL_LEN);
        if start < boundary.prompt_len.max(window) {
            return None;
        }
        let tokens = &self.tails[seq as usize].0[(start - window) as usize..][..size as usize];
        let behind = (hot.num_blocks * size - hot.publish_at) / size;
        let block = *boundary.last_blocks.get(behind as usize)?;
        Some((hasher.next(boundary.last_hash, tokens), block))
    }

    /// Whether `row` completed exactly one block, of a sequence that still holds it.
    #[inline]
    pub(crate) fn ends_block(&self, row: &InFlightRow) -> bool {
        let hot = &self.hot[row.seq as usize];
        row.end == hot.publish_at && hot.identity == row.identity && hot.epoch == row.epoch
    }

    /// The address of the block before the next one to be published.
    pub(crate) fn last_hash_mut(&mut self, seq: SeqIndex) -> &mut BlockHash {
        &mut self.boundaries[seq as usize].last_hash
    }

    /// Takes in the usual token, if it is one ([`Sequence::takes_in_place`]); returns the line it changed.
    #[inline]
    pub(crate) fn take_in_place(&mut self, row: &InFlightRow, token: TokenId) -> Option<&Sequence> {
        let hot = &mut self.hot[row.seq as usize];
        let same = hot.identity == row.identity && hot.epoch == row.epoch;
        if !same || row.end >= hot.publish_at || !hot.takes_in_place(token) {
            return None;
        }
        self.tails[row.seq as usize].0[(hot.num_tokens % TAIL_LEN) as usize] = token;
        hot.num_tokens += 1;
        hot.num_in_flight -= 1;
        Some(hot)
    }

    /// Appends an accepted token.
    pub(crate) fn push_token(&mut self, seq: SeqIndex, token: TokenId) {
        let position = self.hot(seq).num_tokens;
        if position.is_multiple_of(TAIL_LEN) {
            self.flush_tail(seq);
        }
        self.tails[seq as usize].0[(position % TAIL_LEN) as usize] = token;
        self.hot_mut(seq).num_tokens = position + 1;
    }

    /// Moves the tail to [`SequenceData::generated`], before that is read.
    pub(crate) fn flush_tail(&mut self, seq: SeqIndex) {
        let num_tokens = self.hot[seq as usize].num_tokens;
        let data = self.data[seq as usize].as_mut().expect("a live sequence has data");
        let num_known = data.prompt_len() + data.generated.len() as u32;
        debug_assert!(num_tokens - num_known <= TAIL_LEN);
        let start = (num_known % TAIL_LEN) as usize;
        let len = (num_tokens - num_known) as usize;
        data.generated.extend_from_slice(&self.tails[seq as usize].0[start..start + len]);
    }

    /// All live sequences, by index.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (SeqIndex, &Sequence, &SequenceData)> {
        let both = self.hot.iter().zip(&self.data).zip(0..);
        both.filter_map(|((hot, data), seq)| data.as_ref().map(|data| (seq, hot, data)))
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
