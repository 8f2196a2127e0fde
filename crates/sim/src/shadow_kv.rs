//! A KV cache that stores, instead of keys and values, what they stand for.

use std::ops::Range;

use quire_core::{BlockCopy, BlockId, HostCopy};

/// For every slot of every block the number of the prefix that ends there ([`crate::oracle`]), 0 if never written.
#[derive(Debug)]
pub struct ShadowKv {
    block_size: u32,
    window: Option<u32>,
    entries: Vec<u64>,
    /// The same of the host tier.
    host: Vec<u64>,
}

impl ShadowKv {
    /// An empty cache. `window`: the sliding window of the only KV group.
    pub fn new(num_blocks: u32, block_size: u32, window: Option<u32>) -> Self {
        let entries = vec![0; num_blocks as usize * block_size as usize];
        Self { block_size, window, entries, host: Vec::new() }
    }

    /// With a host tier of so many blocks.
    #[must_use]
    pub fn with_host_blocks(mut self, num_host_blocks: u32) -> Self {
        self.host = vec![0; num_host_blocks as usize * self.block_size as usize];
        self
    }

    /// Copies a whole block to the host tier.
    ///
    /// # Errors
    /// It holds nothing.
    pub fn copy_to_host(&mut self, copy: HostCopy) -> Result<(), String> {
        let (device, host) = self.ranges(copy);
        if self.entries[device.start] == 0 {
            return Err(format!("block {} was copied to the host tier but holds nothing", copy.device));
        }
        self.host[host].copy_from_slice(&self.entries[device]);
        Ok(())
    }

    /// Copies a whole block of the host tier to the device.
    pub fn copy_to_device(&mut self, copy: HostCopy) {
        let (device, host) = self.ranges(copy);
        self.entries[device].copy_from_slice(&self.host[host]);
    }

    fn ranges(&self, copy: HostCopy) -> (Range<usize>, Range<usize>) {
        let size = self.block_size as usize;
        let range = |block: u32| block as usize * size..(block as usize + 1) * size;
        (range(copy.device.0), range(copy.host.0))
    }

    /// The first position that the row at `position` can see.
    pub fn first_visible(&self, position: u32) -> u32 {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Copies a whole block.
    pub fn copy(&mut self, copy: BlockCopy) {
        let size = self.block_size as usize;
        let src = copy.src.0 as usize * size;
        self.entries.copy_within(src..src + size, copy.dst.0 as usize * size);
    }

    /// The entry of `position` in `table`.
    pub fn get(&self, table: &[BlockId], position: u32) -> u64 {
        self.entries[self.index(table, position)]
    }

    /// Writes the entry of `position`.
    pub fn set(&mut self, table: &[BlockId], position: u32, entry: u64) {
        let index = self.index(table, position);
        self.entries[index] = entry;
    }

    /// Proves that everything a row at `position` can see in `table` is what `chain` says: `chain[p + 1]` sums up the
    /// tokens `0..=p`.
    ///
    /// # Errors
    /// The first position that holds something else.
    pub fn verify(&self, table: &[BlockId], chain: &[u64], position: u32) -> Result<(), String> {
        for at in self.first_visible(position)..position {
            let found = self.get(table, at);
            if found != chain[at as usize + 1] {
                let what = if found == 0 { "nothing" } else { "another prefix" };
                let block = table[(at / self.block_size) as usize];
                return Err(format!("KV of position {at} (block {block}) holds {what}"));
            }
        }
        Ok(())
    }

    fn index(&self, table: &[BlockId], position: u32) -> usize {
        let block = table[(position / self.block_size) as usize].0;
        (block * self.block_size + position % self.block_size) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_entry_is_found_only_where_it_is_visible() {
        let table = [BlockId(1), BlockId(0)];
        let chain = [9, 11, 12, 13, 14];
        for (window, sees) in [(None, true), (Some(2), false), (Some(4), true)] {
            let mut kv = ShadowKv::new(2, 2, window);
            (0..4).for_each(|at| kv.set(&table, at, chain[at as usize + 1]));
            kv.verify(&table, &chain, 4).unwrap();
            kv.set(&table, 1, 99);
            assert_eq!(kv.verify(&table, &chain, 4).is_err(), sees);
        }
    }

    #[test]
    fn a_copy_takes_the_whole_block() {
        let mut kv = ShadowKv::new(2, 2, None);
        kv.set(&[BlockId(0)], 1, 5);
        kv.copy(BlockCopy { group: 0, src: BlockId(0), dst: BlockId(1) });
        assert_eq!(kv.get(&[BlockId(1)], 1), 5);
    }
}
