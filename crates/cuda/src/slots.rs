//! What lives on the device from step to step, by slot: block tables, how each sequence samples, which tokens it has,
//! and its last one. The host keeps a mirror and sends only what changed.

use std::sync::Arc;

use quire_backend::{SeqState, StepInput};
use quire_core::SamplingParams;

use crate::driver::{Arena, CudaError, DeviceSlice, Stream};
use crate::params::SlotSampling;
use crate::staging::{Staging, bytes_of_u32};

/// Entries of `logit_bias` and `stop_token_ids` of one sequence: `Limits::default()` of the core.
const MAX_BIAS: usize = 1024;
const MAX_STOP: usize = 128;
/// In the mirror: not on the device yet.
const UNKNOWN: u32 = u32::MAX - 1;

/// Who samples in a slot, as the device knows it.
#[derive(Clone, Debug)]
struct Occupant {
    /// Compared by address: it is kept alive here, so nobody else can have it.
    params: Arc<SamplingParams>,
    seed: u64,
    prompt_len: u32,
    /// Tokens in the slot's row of counts, if it has penalties.
    counted: u32,
}

/// The resident state.
#[derive(Debug)]
pub struct Slots {
    num_slots: usize,
    /// Words of a block table.
    pub table_stride: usize,
    mirror: Vec<u32>,
    occupants: Vec<Option<Occupant>>,
    /// `[slots, table_stride]`.
    pub block_tables: DeviceSlice,
    /// `[slots]` tokens.
    pub last_tokens: DeviceSlice,
    /// `[slots]` of [`SlotSampling`].
    pub sampling: DeviceSlice,
    /// `[slots, vocab]`; null until a sequence with penalties comes.
    pub counts: DeviceSlice,
    /// `[slots, MAX_BIAS]`.
    pub bias_ids: DeviceSlice,
    /// As `bias_ids`.
    pub bias_values: DeviceSlice,
    /// `[slots, MAX_STOP]`.
    pub stop_ids: DeviceSlice,
}

/// Tokens of a sequence that must be counted on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recount {
    pub slot: usize,
    pub num_tokens: usize,
}

impl Slots {
    /// For `num_slots` sequences of up to `table_stride` pages.
    pub fn new(arena: &mut Arena, num_slots: usize, table_stride: usize) -> Result<Self, CudaError> {
        Ok(Self {
            num_slots,
            table_stride,
            mirror: vec![UNKNOWN; num_slots * table_stride],
            occupants: vec![None; num_slots],
            block_tables: arena.alloc(num_slots * table_stride * 4)?,
            last_tokens: arena.alloc(num_slots * 4)?,
            sampling: arena.alloc(num_slots * size_of::<SlotSampling>())?,
            counts: DeviceSlice::NULL,
            bias_ids: arena.alloc(num_slots * MAX_BIAS * 4)?,
            bias_values: arena.alloc(num_slots * MAX_BIAS * 4)?,
            stop_ids: arena.alloc(num_slots * MAX_STOP * 4)?,
        })
    }

    /// Whether a step fits.
    pub fn holds(&self, num_slots: usize, table_stride: usize) -> bool {
        num_slots <= self.num_slots && table_stride <= self.table_stride
    }

    /// How many slots there are.
    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// Brings the mirror of the block tables up to date and appends `(slot, column, page)` for what changed.
    pub fn table_changes(&mut self, input: &StepInput<'_>, page_tokens: usize, entries: &mut Vec<i32>) {
        let width = input.max_blocks_per_seq as usize;
        for (s, slot) in input.seq_slots.iter().enumerate() {
            let used = (input.seq_lens[s] as usize).div_ceil(page_tokens).min(width);
            let table = &input.block_tables[s * width..s * width + used];
            let start = slot.0 as usize * self.table_stride;
            let mirror = &mut self.mirror[start..start + used];
            if mirror == table {
                continue;
            }
            for (column, (known, &page)) in mirror.iter_mut().zip(table).enumerate() {
                if *known != page {
                    *known = page;
                    entries.extend([slot.0 as i32, column as i32, page as i32]);
                }
            }
        }
    }

    /// The table of counts is new: nothing is counted.
    pub fn forget_counts(&mut self) {
        self.occupants.iter_mut().flatten().for_each(|occupant| occupant.counted = UNKNOWN);
    }

    /// Sends how `slot` samples, if that changed. Returns the tokens to count before its row at `position` is sampled.
    ///
    /// # Errors
    /// The driver failed.
    pub fn update(
        &mut self,
        slot: usize,
        seq: &SeqState,
        position: u32,
        staging: &mut Staging,
        stream: &Stream,
    ) -> Result<Option<Recount>, CudaError> {
        let known = self.occupants[slot].as_ref().filter(|occupant| {
            Arc::ptr_eq(&occupant.params, &seq.params)
                && occupant.seed == seq.seed
                && occupant.prompt_len == seq.prompt_len
        });
        let is_counted = known.is_some_and(|occupant| occupant.counted == position);
        if known.is_none() {
            self.send(slot, seq, staging, stream)?;
        }
        let needs_history = seq.params.needs_history();
        let recount = (needs_history && !is_counted)
            .then(|| Recount { slot, num_tokens: seq.tokens.len().min(position as usize) });
        self.occupants[slot] = Some(Occupant {
            params: seq.params.clone(),
            seed: seq.seed,
            prompt_len: seq.prompt_len,
            // The kernel counts what it chooses.
            counted: position + 1,
        });
        Ok(recount)
    }

    fn send(
        &mut self,
        slot: usize,
        seq: &SeqState,
        staging: &mut Staging,
        stream: &Stream,
    ) -> Result<(), CudaError> {
        let params = &seq.params;
        let (num_bias, num_stop) = (params.logit_bias.len(), params.stop_token_ids.len());
        if num_bias > MAX_BIAS || num_stop > MAX_STOP {
            let status = format!(
                "{num_bias} entries of logit_bias (at most {MAX_BIAS}), {num_stop} stop_token_ids (at most {MAX_STOP})"
            );
            return Err(CudaError::new("sample", status));
        }
        let (bias_begin, stop_begin) = (slot * MAX_BIAS, slot * MAX_STOP);
        let entry = SlotSampling {
            seed: seq.seed,
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            repetition_penalty: params.repetition_penalty,
            top_k: params.top_k,
            prompt_len: seq.prompt_len,
            min_tokens: params.min_tokens,
            counts: if params.needs_history() { slot as i32 } else { -1 },
            bias_begin: bias_begin as i32,
            bias_count: num_bias as i32,
            stop_begin: stop_begin as i32,
            stop_count: num_stop as i32,
        };
        let bytes = size_of::<SlotSampling>();
        // SAFETY: the struct has no padding (its fields are one of 8 and fourteen of 4 bytes).
        let entry = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&entry).cast::<u8>(), bytes) };
        staging.upload(entry, self.sampling.part(slot * bytes, bytes), stream)?;
        if num_bias > 0 {
            let ids: Vec<u32> = params.logit_bias.iter().map(|&(id, _)| id).collect();
            let values: Vec<u32> = params.logit_bias.iter().map(|&(_, bias)| bias.to_bits()).collect();
            let part = |list: DeviceSlice| list.part(bias_begin * 4, num_bias * 4);
            staging.upload(bytes_of_u32(&ids), part(self.bias_ids), stream)?;
            staging.upload(bytes_of_u32(&values), part(self.bias_values), stream)?;
        }
        if num_stop > 0 {
            let part = self.stop_ids.part(stop_begin * 4, num_stop * 4);
            staging.upload(bytes_of_u32(&params.stop_token_ids), part, stream)?;
        }
        Ok(())
    }
}
