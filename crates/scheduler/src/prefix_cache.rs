//! Which block holds which content: a hash table from [`BlockHash`] to [`BlockId`].
//!
//! Addresses are outputs of a keyed pseudo-random function, so their low bits serve as bucket number. Chains run through
//! arrays indexed by block, sized once: no allocation later, and no iteration order to depend on.

use quire_core::{BlockHash, BlockId};

const NONE: u32 = u32::MAX;

/// At most one block per address, at most one address per block.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    /// First block of each chain; a power of two of them.
    buckets: Vec<u32>,
    /// Per block: the next one in its chain.
    next: Vec<u32>,
    /// Per block: its address.
    hashes: Vec<Option<BlockHash>>,
}

impl PrefixCache {
    pub(crate) fn new(num_blocks: u32) -> Self {
        Self {
            buckets: vec![NONE; (num_blocks as usize).next_power_of_two()],
            next: vec![NONE; num_blocks as usize],
            hashes: vec![None; num_blocks as usize],
        }
    }

    fn bucket(&self, hash: BlockHash) -> usize {
        hash.0 as usize & (self.buckets.len() - 1)
    }

    /// The block with this content.
    pub(crate) fn get(&self, hash: BlockHash) -> Option<BlockId> {
        let mut at = self.buckets[self.bucket(hash)];
        while at != NONE {
            if self.hashes[at as usize] == Some(hash) {
                return Some(BlockId(at));
            }
            at = self.next[at as usize];
        }
        None
    }

    /// Makes `block` the holder of `hash`. False, and nothing changes, if another block holds it or `block` has an
    /// address already.
    pub(crate) fn insert(&mut self, hash: BlockHash, block: BlockId) -> bool {
        if self.hashes[block.0 as usize].is_some() || self.get(hash).is_some() {
            return false;
        }
        let bucket = self.bucket(hash);
        self.next[block.0 as usize] = self.buckets[bucket];
        self.buckets[bucket] = block.0;
        self.hashes[block.0 as usize] = Some(hash);
        true
    }

    /// Forgets the content of `block`, if it had any.
    pub(crate) fn remove(&mut self, block: BlockId) {
        let Some(hash) = self.hashes[block.0 as usize].take() else { return };
        let bucket = self.bucket(hash);
        let after = self.next[block.0 as usize];
        if self.buckets[bucket] == block.0 {
            self.buckets[bucket] = after;
            return;
        }
        let mut at = self.buckets[bucket];
        while self.next[at as usize] != block.0 {
            at = self.next[at as usize];
        }
        self.next[at as usize] = after;
    }

    /// The address of `block`.
    pub(crate) fn hash_of(&self, block: BlockId) -> Option<BlockHash> {
        self.hashes[block.0 as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn agrees_with_a_map() {
        let mut state = 7_u64;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for len in 1..40_u32 {
            let mut cache = PrefixCache::new(len);
            let mut map: BTreeMap<u128, u32> = BTreeMap::new();
            for _ in 0..500 {
                // Few distinct low bits, so that chains form.
                let hash = BlockHash(u128::from(next(3)) | (u128::from(next(20)) << 64));
                let block = next(u64::from(len)) as u32;
                if next(2) == 0 {
                    let free = !map.contains_key(&hash.0) && !map.values().any(|&b| b == block);
                    assert_eq!(cache.insert(hash, BlockId(block)), free);
                    if free {
                        map.insert(hash.0, block);
                    }
                } else {
                    cache.remove(BlockId(block));
                    map.retain(|_, &mut b| b != block);
                }
                for high in 0..20_u128 {
                    for low in 0..3_u128 {
                        let hash = low | (high << 64);
                        assert_eq!(cache.get(BlockHash(hash)), map.get(&hash).map(|&b| BlockId(b)));
                    }
                }
            }
        }
    }
}
