//! The CPU backend against the reference.

use quire_backend::conformance;
use quire_cpu::{CpuBackend, CpuConfig, Isa};

fn backend(threads: usize, max_isa: Isa) -> CpuBackend {
    CpuBackend::new(CpuConfig { threads, max_isa }).expect("threads can be started")
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
fn portable_code() {
    conformance::run(|| backend(3, Isa::Portable));
}
