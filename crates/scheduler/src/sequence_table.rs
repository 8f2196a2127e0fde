//! The slabs of sequences, and what touches several of them at once: taking in a token, publishing a block.

use quire_core::{BlockHash, BlockHasher, BlockId, TokenId};

use crate::scheduler::InFlightRow;
use crate::sequence::{Boundary, SeqIndex, Sequence, SequenceData, TAIL_LEN, TokenTail};

/// The slabs.
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
