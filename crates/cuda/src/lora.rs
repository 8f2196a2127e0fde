//! LoRA adapters: the factors of all of them in device memory, and two launches for each layer that they adapt.
//!
//! Which row has which adapter goes up with the step, where a row has one at all; the table of a layer's adapters never
//! moves. So a recorded step with adapters serves every mix of them.

use quire_backend::convert::to_f32;
use quire_backend::{AddLora, BackendError, LoraPart, LoraSource, StepInput};

use crate::Cuda;
use crate::buffers::CudaBuf;
use crate::driver::DeviceSlice;
use crate::kernels::LoraKernels;
use crate::params::{LoraAdapterEntry, LoraExpandParams, LoraPartEntry, LoraShrinkParams};
use crate::staging::bytes_of_i32;
use crate::step::{Layout, bucket};

/// What ranks are filled up to: eight numbers are read at once.
const RANKS: usize = 8;
/// Merged parts of a layer: `QUIRE_LORA_PARTS`.
const MAX_PARTS: usize = 3;
/// What their memory is called.
const PURPOSE: &str = "adapters";
/// Of a row without an adapter.
const NONE: i32 = -1;

/// What all adapters add to one linear layer.
#[derive(Debug)]
pub struct CudaLora {
    name: String,
    /// [`LoraAdapterEntry`] by id.
    table: DeviceSlice,
    in_features: usize,
    out_features: usize,
    /// The most ranks of an adapter, those of all its parts together.
    max_rank: usize,
}

/// What the launches of a step work in, made at the first use.
#[derive(Debug)]
pub(crate) struct LoraStep {
    /// `[T]` ids.
    row_adapters: DeviceSlice,
    /// `[T, max_rank]` f32.
    shrunk: DeviceSlice,
    words: Vec<i32>,
}

impl LoraStep {
    pub fn empty() -> Self {
        Self { row_adapters: DeviceSlice::NULL, shrunk: DeviceSlice::NULL, words: Vec::new() }
    }
}

impl Cuda {
    pub(crate) fn lora_from(&mut self, source: &LoraSource<'_>) -> Result<CudaLora, BackendError> {
        source.check()?;
        let mut table = Vec::new();
        let mut max_rank = RANKS;
        for parts in source.adapters {
            let entry = self.adapter_from(source, parts)?;
            max_rank = max_rank.max(entry.rank as usize);
            encode(&entry, &mut table);
        }
        let slice = self.take(PURPOSE, table.len())?;
        self.send(&table, slice)?;
        let (in_features, out_features) = (source.in_features, source.out_features);
        Ok(CudaLora { name: source.name.to_owned(), table: slice, in_features, out_features, max_rank })
    }

    fn adapter_from(
        &mut self,
        source: &LoraSource<'_>,
        parts: &[LoraPart<'_>],
    ) -> Result<LoraAdapterEntry, BackendError> {
        let name = source.name;
        if parts.len() > MAX_PARTS {
            let message =
                format!("{} parts of an adapter; at most {MAX_PARTS} are supported on CUDA", parts.len());
            return Err(BackendError::Tensor { name: name.to_owned(), message });
        }
        let element = self.options.activations;
        let mut entry = LoraAdapterEntry { num_parts: parts.len() as i32, ..LoraAdapterEntry::default() };
        let mut a = Vec::new();
        for (part, to) in parts.iter().zip(&mut entry.parts) {
            let (rank, padded) = (part.rank(), part.rank().next_multiple_of(RANKS));
            a.extend(to_f32(name, &part.a)?);
            a.resize(a.len() + (padded - rank) * source.in_features, 0.0);
            let b = to_f32(name, &part.b)?;
            let padding = || std::iter::repeat_n(0.0, padded - rank);
            let rows = b.chunks_exact(rank).flat_map(|row| row.iter().copied().chain(padding()));
            *to = LoraPartEntry {
                b: self.store(PURPOSE, rows, element)?.address(),
                first: part.first as i32,
                count: part.outputs().len() as i32,
                rank_begin: entry.rank,
                rank: padded as i32,
                scaling: part.scaling,
                reserved: 0,
            };
            entry.rank += padded as i32;
        }
        if !a.is_empty() {
            entry.a = self.store(PURPOSE, a.into_iter(), element)?.address();
        }
        Ok(entry)
    }

    /// Sends which row has which adapter, if one has.
    pub(crate) fn send_adapters(&mut self, input: &StepInput<'_>) -> Result<(), BackendError> {
        if input.seq_adapters.iter().all(Option::is_none) {
            return Ok(());
        }
        if input.seq_adapters.len() != input.num_seqs() {
            let (adapters, seqs) = (input.seq_adapters.len(), input.num_seqs());
            return Err(self.refused(format!("step {}: {adapters} adapters of {seqs} sequences", input.step)));
        }
        let rows = self.max_rows.max(bucket(input.num_tokens()));
        if self.lora.row_adapters.bytes() < rows * 4 {
            self.lora.row_adapters = self.take("step", rows * 4)?;
        }
        let words = &mut self.lora.words;
        words.clear();
        for (adapter, rows) in input.seq_adapters.iter().zip(input.cu_seqlens_q.windows(2)) {
            let id = adapter.map_or(NONE, |adapter| adapter.0 as i32);
            words.resize(words.len() + (rows[1] - rows[0]) as usize, id);
        }
        let to = self.lora.row_adapters.part(0, words.len() * 4);
        let sent = self.staging.upload(bytes_of_i32(words), to, &self.stream);
        self.check(sent)
    }

    pub(crate) fn add_lora_rows(&mut self, op: &AddLora<'_, Self>) -> Result<(), BackendError> {
        let act = self.options.activations;
        self.expect("add_lora input", op.x, self.rows, op.lora.in_features, act)?;
        self.add_lora_to(op.x.slice, op.lora, op.out)
    }

    /// The same for dense rows of `x`.
    pub(crate) fn add_lora_to(
        &mut self,
        x: DeviceSlice,
        lora: &CudaLora,
        out: &CudaBuf,
    ) -> Result<(), BackendError> {
        let act = self.options.activations;
        self.expect("add_lora output", out, self.rows, lora.out_features, act)?;
        let bytes = self.max_rows * lora.max_rank * 4;
        if self.lora.shrunk.bytes() < bytes {
            self.lora.shrunk = self.take("activations", bytes)?;
        }
        if self.lora.row_adapters == DeviceSlice::NULL {
            return Err(self.refused(format!("{}: the step has no adapters", lora.name)));
        }
        let shrink = LoraShrinkParams {
            x: x.address(),
            adapters: lora.table.address(),
            row_adapters: self.lora.row_adapters.address(),
            out: self.lora.shrunk.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            in_features: lora.in_features as i32,
            stride: lora.max_rank as i32,
        };
        let expand = LoraExpandParams {
            x: self.lora.shrunk.address(),
            adapters: lora.table.address(),
            row_adapters: self.lora.row_adapters.address(),
            out: out.slice.address(),
            num_rows: self.step_address(Layout::NUM_TOKENS),
            out_features: lora.out_features as i32,
            stride: lora.max_rank as i32,
        };
        let is_decode = self.query_lengths.1 <= 1;
        let (kernels, rows) = self.kernels.lora(is_decode, self.rows);
        let launched = self
            .launch(&kernels.shrink, LoraKernels::shrink_shape(rows, lora.max_rank), &shrink)
            .and_then(|()| {
                self.launch(&kernels.expand, LoraKernels::expand_shape(rows, lora.out_features), &expand)
            });
        self.check(launched)
    }
}

/// As the kernels read it.
fn encode(entry: &LoraAdapterEntry, out: &mut Vec<u8>) {
    out.extend(entry.a.to_le_bytes());
    [entry.rank, entry.num_parts].iter().for_each(|word| out.extend(word.to_le_bytes()));
    for part in &entry.parts {
        out.extend(part.b.to_le_bytes());
        let words = [part.first, part.count, part.rank_begin, part.rank];
        words.iter().for_each(|word| out.extend(word.to_le_bytes()));
        out.extend(part.scaling.to_le_bytes());
        out.extend(part.reserved.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_encoded_without_gaps() {
        let mut bytes = Vec::new();
        encode(&LoraAdapterEntry::default(), &mut bytes);
        assert_eq!(bytes.len(), size_of::<LoraAdapterEntry>());
    }
}
