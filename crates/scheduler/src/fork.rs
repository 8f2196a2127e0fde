//! Several continuations of one prompt.
//!
//! Continuation 0, the leader, computes the prompt; the others follow. Once the prompt is computed each follower is
//! *parked*: it shares the leader's blocks that hold all prompt tokens but the last, and waits for a place. On admission
//! it gets a copy of the block it will write to (copy-on-write, Kwon et al., arXiv 2309.06180, section 4.4), computes
//! the last prompt token and samples with its own seed. Parked blocks are a convenience: under pressure they are given
//! back, and the follower computes the prompt itself, or finds it in the prefix cache.

use crate::kv_cache::KvCacheManager;
use crate::scheduler::{ENDED, Scheduler};
use crate::sequence::{SeqIndex, SeqState, SequenceData};

impl Scheduler {
    /// If `seq` leads, lets the next follower lead instead.
    pub(crate) fn promote_follower(&mut self, seq: SeqIndex) {
        if !std::mem::take(&mut self.seqs.hot_mut(seq).leads) {
            return;
        }
        let entry = self.seqs.data(seq).request;
        let followers = self.followers(entry);
        let Some(&next) = followers.first() else { return };
        self.enqueue_follower(next);
        self.seqs.hot_mut(next).leads = followers.len() > 1;
    }

    /// The leader's prompt is computed: its followers share the blocks and queue up.
    pub(crate) fn park_followers(&mut self, leader: SeqIndex) {
        self.seqs.hot_mut(leader).leads = false;
        let entry = self.seqs.data(leader).request;
        for seq in self.followers(entry) {
            self.enqueue_follower(seq);
            // Two entries of one slab: take the table out while the leader's is read.
            let mut table = std::mem::take(&mut self.seqs.data_mut(seq).table);
            let data = self.seqs.data(leader);
            let (num_shared, first_live) = shared_prefix(&self.kv, data);
            if num_shared > 0 && data.table.first_live <= first_live {
                self.kv.share(&data.table.blocks[..num_shared as usize], first_live, &mut table);
            }
            let cached_tokens = data.usage.cached_tokens;
            let (hot, data) = self.seqs.both_mut(seq);
            data.parked = !table.blocks.is_empty();
            hot.num_blocks = table.blocks.len() as u32;
            data.table = table;
            data.usage.cached_tokens = cached_tokens;
            self.num_parked += u32::from(data.parked);
        }
    }

    /// Parked sequences give their blocks back and will compute the prompt themselves.
    pub(crate) fn release_parked(&mut self) {
        if self.num_parked == 0 {
            return;
        }
        for seq in self.waiting.seqs() {
            let (hot, data) = self.seqs.both_mut(seq);
            if std::mem::take(&mut data.parked) {
                self.kv.release_table(&mut data.table, data.prompt.len() as u32, 0, 0);
                hot.num_blocks = 0;
            }
        }
        self.num_parked = 0;
    }

    fn followers(&self, entry: u32) -> Vec<SeqIndex> {
        let seqs = self.entry(entry).seqs.iter().copied();
        seqs.filter(|&seq| seq != ENDED && self.seqs.hot(seq).state == SeqState::Follower).collect()
    }

    fn enqueue_follower(&mut self, seq: SeqIndex) {
        self.seqs.hot_mut(seq).state = SeqState::Waiting;
        self.enqueue(seq);
        self.num_followers -= 1;
    }
}

/// How many of the leader's blocks hold prompt tokens before the last one, and the first of them that is visible from
/// there.
fn shared_prefix(kv: &KvCacheManager, leader: &SequenceData) -> (u32, u32) {
    let num_computed_tokens = leader.prompt_len() - 1;
    let num_shared = kv.blocks_for(num_computed_tokens);
    (num_shared, kv.first_visible_block(num_computed_tokens).min(num_shared))
}
