//! One suite for all backends: [`run`] holds a backend against [`crate::reference::RefBackend`] and against itself.
//!
//! * Values: every operation of a small two-layer decoder, over a grid of odd shapes, within a tolerance.
//! * Batch invariance: the same rows computed alone, in any batch, in any chunks, in any blocks, give the same bits.
//! * Mixtures of experts: the same two questions, and ties between experts.
//! * Adapters: values, and rows that do not show who has which.
//! * Quantized layers ([`run_quantized`]): the same numbers as the reference, in integers exactly.
//! * The host tier ([`run_host_copies`]): blocks come back as they went.
//! * Ranks ([`run_ranks`]): sums and gathers, exactly.
//! * Sampling: the same ids as the reference, and the same bits alone and in a batch.
//!
//! Every body handed to [`crate::Backend::run`] is run twice, and keys recur with other lengths, so that a backend which
//! records and replays is tested on replays. A failure panics with the name of the case.
//!
//! Reading order: `random`, `compare`, `model`, `schedule`, `forward`, `rows`, `moe`, `lora`, `quantized`, `ranks`, `sampling`.

mod compare;
mod forward;
mod lora;
mod model;
mod moe;
mod quantized;
mod random;
mod ranks;
mod rows;
mod sampling;
mod schedule;

#[cfg(test)]
pub(crate) use random::Rng;

use quire_core::{DType, QuantFormat};

use crate::Backend;

/// How far values may lie from the reference: `|a - b| <= tolerance * max(1, largest |b| of the buffer)`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Where nothing is rounded below f32.
    pub f32: f32,
    /// Added where the cache is f16: a key may round to the other neighbour.
    pub f16_kv: f32,
    /// Added where the cache is bf16.
    pub bf16_kv: f32,
    /// Added where the cache is fp8: neighbours lie an eighth apart.
    pub fp8_kv: f32,
}

impl Default for Tolerance {
    /// For backends that compute in f32.
    fn default() -> Self {
        Self { f32: 5e-5, f16_kv: 2e-3, bf16_kv: 1e-2, fp8_kv: 0.125 }
    }
}

/// What a backend computes with, where that is not whatever a case asks for. Cases are changed to fit, on the reference
/// too; none is left out.
#[derive(Clone, Copy, Debug)]
pub struct Support {
    /// Type of weights and of the cache, instead of the case's.
    pub dtype: Option<DType>,
    /// The smallest block.
    pub min_block_size: u32,
    /// What `head_dim` is a multiple of.
    pub head_dim_multiple: u32,
}

impl Default for Support {
    /// Everything.
    fn default() -> Self {
        Self { dtype: None, min_block_size: 1, head_dim_multiple: 1 }
    }
}

/// Runs the whole suite with the tolerance of f32 arithmetic. `make` gives a fresh backend for each case.
///
/// # Panics
/// At the first failure, with the case, the sequence and position, and the operation's output.
pub fn run<B: Backend>(make: impl FnMut() -> B) {
    run_with(Tolerance::default(), Support::default(), make);
}

/// [`run`] with another tolerance, for a backend that does not take everything.
///
/// # Panics
/// As [`run`].
pub fn run_with<B: Backend>(tolerance: Tolerance, support: Support, mut make: impl FnMut() -> B) {
    forward::run(tolerance, support, &mut make);
    moe::run(QuantFormat::None, tolerance, support, &mut make);
    lora::run(QuantFormat::None, tolerance, support, &mut make);
    sampling::run(&mut make);
}

/// The cases that are about the cache's type, with another one.
///
/// # Panics
/// As [`run`].
pub fn run_kv_dtype<B: Backend>(
    kv_dtype: DType,
    tolerance: Tolerance,
    support: Support,
    mut make: impl FnMut() -> B,
) {
    forward::run_kv_dtype(kv_dtype, tolerance, support, &mut make);
}

/// Holds the operations on quantized weights against [`crate::quant`]. For backends that quantize; apart from [`run`],
/// which all pass.
///
/// # Panics
/// As [`run`].
pub fn run_quantized<B: Backend>(quant: QuantFormat, make: impl FnMut() -> B) {
    run_quantized_with(quant, Support::default(), make);
}

/// [`run_quantized`], for a backend that rounds activations to `support.dtype` between operations.
///
/// # Panics
/// As [`run`].
pub fn run_quantized_with<B: Backend>(quant: QuantFormat, support: Support, mut make: impl FnMut() -> B) {
    quantized::run(quant, support, &mut make);
    moe::run(quant, Tolerance::default(), support, &mut make);
    lora::run(quant, Tolerance::default(), support, &mut make);
}

/// Copies between the device and the host tier. For backends that have one; apart from [`run`], which all pass.
///
/// # Panics
/// As [`run`].
pub fn run_host_copies<B: Backend>(mut make: impl FnMut() -> B) {
    forward::host_copies(&mut make);
}

/// Sums and gathers over ranks. `make` gives the members of a fresh group of so many, by rank; apart from [`run`], which
/// all pass.
///
/// # Panics
/// As [`run`].
pub fn run_ranks<B: Backend>(mut make: impl FnMut(usize) -> Vec<B>) {
    (1..=3).for_each(|world| ranks::run(make(world)));
}

#[cfg(test)]
mod tests {
    use quire_core::{DType, QuantFormat};

    use super::{Support, Tolerance};
    use crate::Communicator;
    use crate::reference::RefBackend;

    #[test]
    fn reference_conforms_to_itself() {
        super::run(RefBackend::new);
        super::run_host_copies(RefBackend::new);
        super::run_kv_dtype(DType::F8E4M3, Tolerance::default(), Support::default(), RefBackend::new);
        super::run_ranks(|world| {
            let group = Communicator::group(world).into_iter();
            group.map(|rank| RefBackend::new().with_communicator(rank)).collect()
        });
        super::run_quantized(QuantFormat::Int8, RefBackend::new);
        super::run_quantized(QuantFormat::Int4, RefBackend::new);
        super::run_quantized(QuantFormat::Fp8, RefBackend::new);
    }
}
