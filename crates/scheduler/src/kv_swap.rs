//! The manager's part of moving blocks between the tiers: copying in what a prompt found in the host tier, and keeping
//! what a preempted sequence will want again.

use quire_core::{BlockHash, BlockId, HostBlockId};

use crate::kv_cache::{BlockTable, KvCacheManager, ON_HOST};
use crate::reuse::{HELD, Visit};

impl KvCacheManager {
    /// Gives each block of the latest look-up that lies in the host tier one on the device, and makes that one the
    /// holder of the content.
    pub(crate) fn copy_in(&mut self, table: &mut BlockTable) {
        let Some(host) = &mut self.host else { return };
        // All before the first is allocated: what makes room on the device looks for room in the host tier.
        let reserve =
            |&(at, block): &(u32, HostBlockId)| (at, block, host.hash_of(block), host.reserve(block));
        let found: Vec<_> = self.found_on_host.iter().map(reserve).collect();
        for (at, host_block, hash, uses) in found {
            let device = self.allocate();
            debug_assert_eq!(table.blocks[at as usize], ON_HOST);
            table.blocks[at as usize] = device;
            if let Some(host) = &mut self.host {
                host.copy_in(host_block, device);
            }
            if let Some(hash) = hash {
                self.publish(hash, device);
            }
            self.pool.set_uses(device, uses.saturating_add(1));
        }
    }

    /// Makes a block known under an address that only its sequence has. False: it has another, or others hold it.
    pub(crate) fn publish_own(&mut self, address: BlockHash, block: BlockId) -> bool {
        if !self.pool.is_only_reference(block) || self.pool.is_cached(block) {
            return false;
        }
        self.publish(address, block);
        true
    }

    /// Appends the block with this address of its own to the table that it was held for, to be written again. The caller
    /// has checked that a block is available. False: it was given up, or a step in flight still touches it.
    pub(crate) fn take_own(&mut self, address: BlockHash, table: &mut BlockTable) -> bool {
        let on_device = self.cache.get(address).filter(|&block| self.pool.is_idle(block));
        if let Some(block) = on_device {
            self.pool.acquire(block);
            self.forget(block);
            table.blocks.push(block);
            return true;
        }
        let Some(host) = &mut self.host else { return false };
        let Some(host_block) = host.get(address) else { return false };
        host.reserve(host_block);
        let device = self.allocate();
        if let Some(host) = &mut self.host {
            host.copy_in(host_block, device);
        }
        table.blocks.push(device);
        true
    }

    /// Gives back all blocks of a sequence that will go on: its content is the last to be given up. Last first, as ever.
    pub(crate) fn hold_table(&mut self, table: &mut BlockTable) {
        for &block in table.live().iter().rev() {
            self.pool.release(block, HELD, self.now);
        }
        table.blocks.clear();
        table.first_live = 0;
        table.visit = Visit::default();
    }

    /// The sequence for which this content was held does not want it any more. `forget`: the address is its own, so that
    /// nobody else ever will.
    pub(crate) fn unhold(&mut self, hash: BlockHash, forget: bool) {
        if let Some(block) = self.cache.get(hash) {
            self.pool.unhold(block, self.now);
            if forget {
                self.forget(block);
            }
        }
        if let Some(host) = &mut self.host {
            host.unhold(hash, self.now, forget);
        }
    }

    fn forget(&mut self, block: BlockId) {
        self.cache.remove(block);
        self.pool.forget(block);
    }

    /// How many blocks of this table nobody else holds.
    pub(crate) fn num_own_blocks(&self, table: &BlockTable) -> u32 {
        table.live().iter().filter(|&&block| self.pool.is_only_reference(block)).count() as u32
    }
}
