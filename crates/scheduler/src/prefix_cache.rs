//! Which block holds which content: a hash table from [`BlockHash`] to [`BlockId`].
//!
//! Addresses are outputs of a keyed pseudo-random function, so their low bits serve as bucket number. Open addressing
//! with linear probing, at most half full, sized once: a look-up is one memory access, and those of one prompt do not
//! wait for each other; nothing is allocated later, and there is no iteration order to depend on.

use quire_core::{BlockHash, BlockId};

/// Marks an empty bucket and a block without address. One address in 2^128 is like it; that content is not cached.
const NO_HASH: BlockHash = BlockHash(u128::MAX);

#[derive(Clone, Copy, Debug)]
struct Bucket {
    hash: BlockHash,
    block: BlockId,
}

/// At most one block per address, at most one address per block.
#[derive(Debug)]
pub(crate) struct PrefixCache {
    /// A power of two of them.
    buckets: Vec<Bucket>,
    /// Per block: its address.
    hashes: Vec<BlockHash>,
}

impl PrefixCache {
    pub(crate) fn new(num_blocks: u32) -> Self {
        let empty = Bucket { hash: NO_HASH, block: BlockId(0) };
        Self {
            buckets: vec![empty; 2 * (num_blocks as usize).next_power_of_two()],
            hashes: vec![NO_HASH; num_blocks as usize],
        }
    }

    /// The bucket that holds `hash`, or the empty one where it belongs.
    #[inline]
    fn bucket_of(&self, hash: BlockHash) -> usize {
        let mask = self.buckets.len() - 1;
        let mut at = hash.0 as usize & mask;
        while self.buckets[at].hash != hash && self.buckets[at].hash != NO_HASH {
            at = (at + 1) & mask;
        }
        at
    }

    /// The block with this content.
    #[inline]
    pub(crate) fn get(&self, hash: BlockHash) -> Option<BlockId> {
        let bucket = &self.buckets[self.bucket_of(hash)];
        (bucket.hash != NO_HASH).then_some(bucket.block)
    }

    /// Makes `block` the holder of `hash`. False, and nothing changes, if another block holds it or `block` has an
    /// address already.
    pub(crate) fn insert(&mut self, hash: BlockHash, block: BlockId) -> bool {
        if self.hashes[block.0 as usize] != NO_HASH || hash == NO_HASH {
            return false;
        }
        let at = self.bucket_of(hash);
        if self.buckets[at].hash != NO_HASH {
            return false;
        }
        self.buckets[at] = Bucket { hash, block };
        self.hashes[block.0 as usize] = hash;
        true
    }

    /// Forgets the content of `block`, if it had any.
    pub(crate) fn remove(&mut self, block: BlockId) {
        let hash = std::mem::replace(&mut self.hashes[block.0 as usize], NO_HASH);
        if hash == NO_HASH {
            return;
        }
        let mask = self.buckets.len() - 1;
        let mut hole = self.bucket_of(hash);
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let bucket = self.buckets[at];
            if bucket.hash == NO_HASH {
                break;
            }
            // It may move into the hole unless it would then lie before its own bucket.
            let home = bucket.hash.0 as usize & mask;
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.buckets[hole] = bucket;
                hole = at;
            }
        }
        self.buckets[hole].hash = NO_HASH;
    }

    /// The address of `block`.
    pub(crate) fn hash_of(&self, block: BlockId) -> Option<BlockHash> {
        let hash = self.hashes[block.0 as usize];
        (hash != NO_HASH).then_some(hash)
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
