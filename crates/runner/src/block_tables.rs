//! The block tables of one KV group, by slot: a matrix of fixed size, so that growing a table never allocates.

use quire_core::{BlockId, Slot};

use crate::error::PlanError;

/// Row `s` holds the physical blocks of the sequence in slot `s`, in order of position.
#[derive(Debug)]
pub(crate) struct BlockTables {
    /// `[max_num_seqs, max_blocks_per_seq]`, as device arrays want it.
    ids: Vec<u32>,
    /// `[max_num_seqs]` entries in use.
    lens: Vec<u32>,
    max_blocks_per_seq: u32,
    num_blocks: u32,
}

impl BlockTables {
    pub fn new(max_num_seqs: u32, max_blocks_per_seq: u32, num_blocks: u32) -> Self {
        Self {
            ids: vec![0; max_num_seqs as usize * max_blocks_per_seq as usize],
            lens: vec![0; max_num_seqs as usize],
            max_blocks_per_seq,
            num_blocks,
        }
    }

    /// The table of a slot.
    pub fn row(&self, slot: Slot) -> &[u32] {
        let start = self.start(slot);
        &self.ids[start..start + self.lens[slot.0 as usize] as usize]
    }

    /// Replaces the table of a slot.
    pub fn set(&mut self, slot: Slot, blocks: &[BlockId]) -> Result<(), PlanError> {
        self.lens[slot.0 as usize] = 0;
        blocks.iter().try_for_each(|&block| self.push(slot, block))
    }

    /// Appends a block to the table of a slot.
    pub fn push(&mut self, slot: Slot, block: BlockId) -> Result<(), PlanError> {
        let len = self.lens[slot.0 as usize];
        if len == self.max_blocks_per_seq {
            return Err(PlanError::TableFull { slot, max: self.max_blocks_per_seq });
        }
        if block.0 >= self.num_blocks {
            return Err(PlanError::NoSuchBlock { slot, block, num_blocks: self.num_blocks });
        }
        let start = self.start(slot);
        self.ids[start + len as usize] = block.0;
        self.lens[slot.0 as usize] = len + 1;
        Ok(())
    }

    fn start(&self, slot: Slot) -> usize {
        slot.0 as usize * self.max_blocks_per_seq as usize
    }
}
