//! Where the device's memory went, and how much of it is left for keys and values.

use std::collections::BTreeMap;

use quire_backend::BackendError;

use crate::Cuda;

/// Of a device's memory, what recorded steps may take: they are recorded after the cache was allocated. 1.1 GiB of an
/// H200's, for about 30 graphs of 10 to 20 MB.
const GRAPHS_PART: u64 = 128;

/// What allocations are called that are not weights of the model.
const PURPOSES: &[&str] = &[
    "activations",
    "adapters",
    "attention",
    "kv cache",
    "logits of all GPUs",
    "rotary table",
    "routing",
    "sampler",
    "step",
    "token counts",
];

/// Bytes taken so far, by purpose.
#[derive(Debug, Default)]
pub(crate) struct Ledger(BTreeMap<&'static str, u64>);

impl Ledger {
    /// Notes an allocation; `what` is a purpose or the name of a weight.
    pub fn note(&mut self, what: &str, bytes: usize) {
        let purpose = PURPOSES.iter().find(|&&purpose| purpose == what).copied().unwrap_or("weights");
        *self.0.entry(purpose).or_default() += bytes as u64;
    }
}

/// A device's memory in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// All of it.
    pub total: u64,
    /// What can be allocated, as the driver says.
    pub free: u64,
    /// Taken by this backend: purposes in alphabetical order, then `other`, which is workspaces, per-slot state, and what
    /// is left of the last piece.
    pub taken: Vec<(&'static str, u64)>,
}

impl MemoryUse {
    /// Neither free nor taken by the backend: contexts, kernels, recorded steps, other processes.
    pub fn outside(&self) -> u64 {
        let taken: u64 = self.taken.iter().map(|(_, bytes)| bytes).sum();
        (self.total - self.free).saturating_sub(taken)
    }

    /// What keys and values may take: a share of the whole device, less what is in use, less something for the steps that
    /// will be recorded.
    pub fn kv_budget(&self, utilization: f64) -> u64 {
        let usable = (self.total as f64 * utilization) as u64;
        usable.saturating_sub(self.total - self.free + self.total / GRAPHS_PART)
    }
}

impl Cuda {
    /// Where the memory is now. Waits for nothing.
    ///
    /// # Errors
    /// The driver failed.
    pub fn memory_use(&self) -> Result<MemoryUse, BackendError> {
        let (free, total) = self.context.memory().map_err(|error| self.refused(error.to_string()))?;
        let mut taken: Vec<_> = self.ledger.0.iter().map(|(&purpose, &bytes)| (purpose, bytes)).collect();
        let noted: u64 = taken.iter().map(|(_, bytes)| bytes).sum();
        taken.push(("other", self.allocated_bytes().saturating_sub(noted)));
        Ok(MemoryUse { total, free, taken })
    }
}
