//! The CPU backend against the reference.

use quire_backend::Communicator;
use quire_backend::conformance::{self, Support, Tolerance};
use quire_core::QuantFormat;
use quire_cpu::{CpuBackend, CpuConfig, Isa, Precision};

fn backend(threads: usize, max_isa: Isa) -> CpuBackend {
    let config = CpuConfig { threads, max_isa, precision: Precision::F32 };
    CpuBackend::new(config).expect("threads can be started")
}

#[test]
fn one_thread() {
    conformance::run(|| backend(1, Isa::detect()));
}

#[test]
fn two_threads() {
    conformance::run(|| backend(2, Isa::detect()));
}

/// The suite compares bits between the backends it is given, so another number of threads each time shows that the number
/// does not matter.
#[test]
fn changing_number_of_threads() {
    let mut calls = 0;
    conformance::run(|| {
        calls += 1;
        backend(1 + calls % 3, Isa::detect())
    });
}

#[test]
fn host_tier() {
    conformance::run_host_copies(|| backend(1, Isa::detect()));
    conformance::run_host_copies(|| backend(2, Isa::detect()));
    conformance::run_host_copies(|| bf16_backend(2, Isa::detect()));
}

#[test]
fn ranks() {
    conformance::run_ranks(|world| {
        let group = Communicator::group(world).into_iter();
        group.map(|rank| backend(2, Isa::detect()).with_communicator(rank)).collect()
    });
}

#[test]
fn portable_code() {
    conformance::run(|| backend(3, Isa::Portable));
}

/// Where activations are rounded to bf16 (8 bits) on their way into each product, twice a layer and again after it.
const BF16_PRODUCTS: Tolerance = Tolerance { f32: 3e-2, f16_kv: 2e-3, bf16_kv: 1e-2, fp8_kv: 0.0 };

fn bf16_backend(threads: usize, max_isa: Isa) -> CpuBackend {
    let config = CpuConfig { threads, max_isa, precision: Precision::Bf16 };
    CpuBackend::new(config).expect("threads can be started")
}

#[test]
fn bf16_products() {
    let mut calls = 0;
    conformance::run_with(BF16_PRODUCTS, Support::default(), || {
        calls += 1;
        bf16_backend(1 + calls % 3, Isa::detect())
    });
}

/// The suite compares bits between its backends, so that this compares the emulation with the instruction, too.
#[test]
fn bf16_products_on_changing_instruction_sets() {
    let mut calls = 0;
    conformance::run_with(BF16_PRODUCTS, Support::default(), || {
        calls += 1;
        // What is not a product differs between portable code and AVX2, so not with `Isa::Portable`.
        bf16_backend(2, Isa::detect().min([Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16][calls % 3]))
    });
}

#[test]
fn bf16_products_in_portable_code() {
    conformance::run_with(BF16_PRODUCTS, Support::default(), || bf16_backend(2, Isa::Portable));
}

/// To the bit, on every instruction set and number of threads.
#[test]
fn quantized_layers_are_those_of_the_reference() {
    for quant in [QuantFormat::Int8, QuantFormat::Int4] {
        let mut calls = 0;
        conformance::run_quantized(quant, || {
            calls += 1;
            let isa = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16][calls % 4];
            bf16_backend(1 + calls % 3, Isa::detect().min(isa))
        });
        conformance::run_quantized(quant, || bf16_backend(2, Isa::detect()));
    }
}
