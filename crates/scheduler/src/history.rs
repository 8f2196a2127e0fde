//! What became of blocks that were released, evicted ones included: the memory that the reuse model learns from.
//!
//! A ring of releases, oldest first, and a hash table from content to its latest release. Large pools remember only a
//! sample of contents, chosen by their address, so that memory and work have a bound whatever the pool's size. As time
//! passes, one pointer per age group walks the ring and tells the model who reached that age without being wanted; at
//! most [`MAX_WALK`] steps at a time, since a late report is as good as an early one.

use quire_core::{BlockHash, Micros};

use crate::reuse::{FIRST_EDGE, Levels, NUM_AGES, ReuseModel};

const NONE: u32 = u32::MAX;
/// Releases remembered per sampled block of the pool.
const DEPTH: u32 = 16;
/// Pools with more blocks than this are sampled.
const MAX_SAMPLED: u32 = 16_384;
/// One block in about so many tokens is sampled, but of small pools at least so many blocks.
const SAMPLE_TOKENS: u32 = 256;
const MIN_SAMPLED: u32 = 256;
/// Reports per call of [`History::advance`].
const MAX_WALK: u32 = 4096;
/// Uses from which a prefix counts as shared by conversations, not as one of them.
const SHARED_USES: u8 = 3;

/// One release.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// See [`key`].
    key: u64,
    at: Micros,
    levels: Levels,
    class: u8,
    /// The turn of the conversation that first computed the content.
    turn: u8,
    /// Requests that used the content, at most 255.
    uses: u8,
    /// The age group not reported yet.
    next_age: u8,
    /// Nobody wanted the content since.
    open: bool,
    /// The content was not released again since.
    latest: bool,
}

/// Half of an address: random enough to tell contents apart, and an error costs a little knowledge only.
fn key(hash: BlockHash) -> u64 {
    (hash.0 >> 32) as u64
}

/// What is remembered of a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// See [`Entry::turn`].
    pub(crate) turn: u8,
    /// Uses before this one.
    pub(crate) uses: u8,
    /// Its latest release.
    pub(crate) at: Micros,
    /// Whether a pool of the same size that evicts the least recently used would still hold it.
    pub(crate) under_lru: bool,
}

impl Memory {
    /// The turn of a request that goes on after this content, and whether it goes on a conversation.
    pub(crate) fn next_turn(&self) -> (u8, bool) {
        if self.uses >= SHARED_USES { (self.turn, false) } else { (self.turn.saturating_add(1), true) }
    }
}

/// See the page above.
#[derive(Debug)]
pub(crate) struct History {
    /// Bits of a key that must be zero for its content to be remembered.
    sample_mask: u64,
    /// Power of two.
    capacity: u32,
    ring: Vec<Entry>,
    /// Entries ever written; entry `n` lies at `n % capacity`.
    num_written: u64,
    /// Open addressing with linear probing, at most half full: places in the ring, or `NONE`.
    table: Vec<u32>,
    /// Per age group: the first entry that may not have passed it yet.
    walked: [u64; NUM_AGES - 1],
    /// Sampled blocks in the pool.
    num_sampled: u32,
    /// How many of them LRU is granted.
    lru_room: u32,
    /// What LRU would hold: the latest releases of contents from this entry on, and how many they are.
    lru_from: u64,
    lru_len: u32,
    /// Nothing reaches an age before.
    next_due: Micros,
}

impl History {
    pub(crate) fn new(num_blocks: u32, block_size: u32) -> Self {
        let too_many = num_blocks.div_ceil(MAX_SAMPLED).next_power_of_two().ilog2();
        let too_dense = (SAMPLE_TOKENS / block_size).max(1).min(num_blocks.div_ceil(MIN_SAMPLED)).ilog2();
        let sample_shift = too_many.max(too_dense);
        let num_sampled = (num_blocks >> sample_shift).max(1);
        let capacity = (num_sampled * DEPTH).next_power_of_two();
        Self {
            // The lowest bits choose buckets; these are as random.
            sample_mask: ((1 << sample_shift) - 1) << 40,
            capacity,
            ring: Vec::with_capacity(capacity as usize),
            num_written: 0,
            table: vec![NONE; 2 * capacity as usize],
            walked: [0; NUM_AGES - 1],
            num_sampled,
            lru_room: num_sampled,
            lru_from: 0,
            lru_len: 0,
            next_due: Micros(u64::MAX),
        }
    }

    /// Sampled blocks in the pool.
    pub(crate) fn num_sampled(&self) -> u32 {
        self.num_sampled
    }

    /// From now on compares with LRU in this part of the pool.
    pub(crate) fn set_lru_part(&mut self, part: f64) {
        self.lru_room = ((f64::from(self.num_sampled) * part) as u32).max(1);
    }

    /// Whether this content is in the sample.
    pub(crate) fn samples(&self, hash: BlockHash) -> bool {
        key(hash) & self.sample_mask == 0
    }

    /// Someone wants this content, cached or not. What is remembered of it, if anything; the model learns of the reuse.
    pub(crate) fn touch(&mut self, hash: BlockHash, now: Micros, model: &mut ReuseModel) -> Option<Memory> {
        let at = self.table[self.bucket_of(key(hash))];
        let under_lru = at != NONE && self.number_of(at) >= self.lru_from;
        let entry = self.ring.get_mut(at as usize)?;
        let memory = Memory { turn: entry.turn, uses: entry.uses, at: entry.at, under_lru };
        if std::mem::take(&mut entry.open) {
            let idle = now.0.saturating_sub(entry.at.0);
            let age = model.age(idle);
            for passed in usize::from(entry.next_age)..age {
                model.stayed(entry.levels, entry.class, passed);
            }
            model.reused(entry.levels, entry.class, age, idle);
        }
        Some(memory)
    }

    /// Releases of this content so far, at most 255; 0 if it is not remembered.
    pub(crate) fn uses(&self, hash: BlockHash) -> u8 {
        self.ring.get(self.table[self.bucket_of(key(hash))] as usize).map_or(0, |entry| entry.uses)
    }

    /// The last reference to this content went. `turn`: of its request.
    pub(crate) fn release(&mut self, hash: BlockHash, now: Micros, turn: u8, levels: Levels, class: u8) {
        let mut entry = Entry {
            key: key(hash),
            at: now,
            levels,
            class,
            turn,
            uses: 1,
            next_age: 0,
            open: true,
            latest: true,
        };
        let place = (self.num_written % u64::from(self.capacity)) as u32;
        // First, because removal moves others in the table.
        if self.ring.len() == self.capacity as usize {
            self.forget(place);
            let oldest = self.num_written - u64::from(self.capacity);
            if self.lru_from == oldest {
                self.lru_len -= u32::from(self.ring[place as usize].latest);
                self.lru_from += 1;
            }
        }
        let bucket = self.bucket_of(entry.key);
        let before = self.table[bucket];
        if before != NONE {
            self.lru_len -= u32::from(self.number_of(before) >= self.lru_from);
            let before = &mut self.ring[before as usize];
            entry.turn = before.turn;
            entry.uses = before.uses.saturating_add(1);
            before.open = false;
            before.latest = false;
        }
        self.table[bucket] = place;
        match self.ring.get_mut(place as usize) {
            Some(slot) => *slot = entry,
            None => self.ring.push(entry),
        }
        self.num_written += 1;
        self.lru_len += 1;
        while self.lru_len > self.lru_room {
            let leaves = &self.ring[(self.lru_from % u64::from(self.capacity)) as usize];
            self.lru_len -= u32::from(leaves.latest);
            self.lru_from += 1;
        }
        self.next_due = Micros(self.next_due.0.min(now.0 + FIRST_EDGE));
    }

    /// Tells the model what reached its next age by `now`.
    pub(crate) fn advance(&mut self, now: Micros, model: &mut ReuseModel) {
        if now < self.next_due {
            return;
        }
        let oldest = self.num_written - self.ring.len() as u64;
        let mut budget = MAX_WALK;
        self.next_due = Micros(u64::MAX);
        for age in 0..NUM_AGES - 1 {
            let walked = &mut self.walked[age];
            *walked = (*walked).max(oldest);
            while *walked < self.num_written {
                let entry = &mut self.ring[(*walked % u64::from(self.capacity)) as usize];
                let due = entry.at.0 + model.edge(age + 1);
                if now.0 < due || budget == 0 {
                    self.next_due = Micros(self.next_due.0.min(due));
                    break;
                }
                if entry.open && usize::from(entry.next_age) == age {
                    entry.next_age += 1;
                    model.stayed(entry.levels, entry.class, age);
                }
                *walked += 1;
                budget -= 1;
            }
        }
    }

    /// Which entry lies at `place`, counted from the first ever.
    fn number_of(&self, place: u32) -> u64 {
        let newest = self.num_written - 1;
        newest - (newest.wrapping_sub(u64::from(place)) & u64::from(self.capacity - 1))
    }

    /// The bucket that holds `key`, or the empty one where it belongs.
    fn bucket_of(&self, key: u64) -> usize {
        let mask = self.table.len() - 1;
        let mut bucket = key as usize & mask;
        while let Some(entry) = self.ring.get(self.table[bucket] as usize) {
            if entry.key == key {
                break;
            }
            bucket = (bucket + 1) & mask;
        }
        bucket
    }

    /// Takes the entry at `place` out of the table, unless a later release of the same content has its bucket.
    fn forget(&mut self, place: u32) {
        let mut hole = self.bucket_of(self.ring[place as usize].key);
        if self.table[hole] != place {
            return;
        }
        let mask = self.table.len() - 1;
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let Some(entry) = self.ring.get(self.table[at] as usize) else { break };
            // It may move into the hole unless it would then lie before its own bucket.
            let home = entry.key as usize & mask;
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.table[hole] = self.table[at];
                hole = at;
            }
        }
        self.table[hole] = NONE;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn remembers_the_latest_releases_and_no_others() {
        let (mut history, mut model) = (History::new(4, 512), ReuseModel::new());
        assert_eq!(history.capacity, 64);
        let mut state = 3_u64;
        let mut releases: Vec<u128> = Vec::new();
        for step in 0..20_000_u64 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Few low bits, so that probes collide.
            let hash = BlockHash(u128::from(state >> 60) << 32 | u128::from(state >> 40 & 15) << 70);
            let now = Micros(step * 100_000);
            history.advance(now, &mut model);
            let known = releases[releases.len().saturating_sub(64)..].contains(&hash.0);
            assert_eq!(history.touch(hash, now, &mut model).is_some(), known, "step {step}");
            if state >> 20 & 1 == 0 {
                history.release(hash, now, 1, Levels::default(), 3);
                releases.push(hash.0);
            }
        }
        let mut held: BTreeMap<u64, u32> = BTreeMap::new();
        history.table.iter().filter(|&&at| at != NONE).for_each(|&at| {
            *held.entry(history.ring[at as usize].key).or_default() += 1;
        });
        assert!(held.values().all(|&n| n == 1), "a content has two buckets");
    }

    #[test]
    fn every_age_is_reported_once() {
        let (mut history, mut model) = (History::new(64, 512), ReuseModel::new());
        for n in 0..50 {
            history.release(BlockHash(n << 32), Micros(0), 1, Levels::default(), 0);
        }
        for second in 0..3000 {
            history.advance(Micros(second * 1_000_000), &mut model);
        }
        history.touch(BlockHash(7 << 32), Micros(3_000_000_000), &mut model);
        assert_eq!(model.observations(0), (50 * (NUM_AGES as u32 - 1) + 1, 1));
    }
}
