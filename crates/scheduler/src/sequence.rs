//! What the scheduler knows of each sequence, split by how often it is touched.
//!
//! A decode step reads and writes one cache line per sequence ([`Sequence`]); everything else sits in [`SequenceData`]
//! and is touched on admission, at block boundaries and at the end. Both live in slabs under the same index.

use std::sync::Arc;

use quire_core::{BlockHash, CacheSalt, RequestId, SamplingParams, TokenId, Usage};

use crate::kv_cache::BlockTable;
use crate::policy::OrderKey;

/// Index of a sequence in the slabs; reused after its end.
pub(crate) type SeqIndex = u32;

/// Stop ids kept in the hot line; sequences with more look into their parameters.
const NUM_INLINE_STOPS: usize = 2;
const MORE_STOPS: u8 = u8::MAX;

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
    /// Tells users of one slab entry apart.
    pub(crate) identity: u32,
    stop_ids: [TokenId; NUM_INLINE_STOPS],
    num_stops: u8,
    /// Tells block tables of one sequence apart (a preemption ends one).
    pub(crate) epoch: u8,
    /// Sampled tokens on their way.
    pub(crate) num_in_flight: u8,
    pub(crate) state: SeqState,
    /// In the batch, and not all known tokens are scheduled yet.
    pub(crate) prefilling: bool,
    /// Other continuations wait for this one's prompt.
    pub(crate) leads: bool,
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
            identity,
            stop_ids: [0; NUM_INLINE_STOPS],
            num_stops: 0,
            epoch: 0,
            num_in_flight: 0,
            state: SeqState::Vacant,
            prefilling: false,
            leads: false,
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
        self.num_stops = MORE_STOPS;
        if ids.len() <= NUM_INLINE_STOPS {
            self.num_stops = ids.len() as u8;
            self.stop_ids[..ids.len()].copy_from_slice(ids);
        }
    }

    /// Whether `token`, at the position after the known ones, ends the sequence.
    pub(crate) fn is_stop(&self, token: TokenId, data: &SequenceData) -> bool {
        if self.num_stops == 0 || self.num_tokens < self.stop_from {
            return false;
        }
        match self.num_stops {
            MORE_STOPS => data.params.stop_token_ids.contains(&token),
            n => self.stop_ids[..usize::from(n)].contains(&token),
        }
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
    /// Accepted tokens; survive preemption.
    pub(crate) generated: Vec<TokenId>,
    /// Addresses of full blocks after those of `prompt_hashes`.
    pub(crate) later_hashes: Vec<BlockHash>,
    pub(crate) table: BlockTable,
    /// Waiting, but already holding the blocks of its leader's prompt.
    pub(crate) parked: bool,
    /// Rows of the prompt whose log-probabilities were reported.
    pub(crate) num_reported_rows: u32,
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

    /// Copies tokens `start..start + out.len()`.
    pub(crate) fn copy_tokens(&self, start: usize, out: &mut Vec<TokenId>, len: usize) {
        out.clear();
        out.extend(self.prompt.iter().chain(&self.generated).skip(start).take(len));
    }
}

/// The two slabs.
#[derive(Debug)]
pub(crate) struct SequenceTable {
    hot: Vec<Sequence>,
    data: Vec<Option<SequenceData>>,
    vacant: Vec<SeqIndex>,
}

impl SequenceTable {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            hot: Vec::with_capacity(capacity),
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
        if let Some(seq) = self.vacant.pop() {
            self.data[seq as usize] = Some(data);
            return seq;
        }
        self.hot.push(Sequence::vacant(0));
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
