//! The host build of the kernels itself.

mod common;

use common::HostKernels;

#[test]
fn every_kernel_is_in_the_table() {
    let Some(kernels) = HostKernels::load() else { return };
    for (name, size) in kernels.params_sizes() {
        assert!(name.starts_with("quire_"), "{name}: kernels are called quire_<op>_<variant>");
        assert!(*size > 0 && *size <= 4096, "{name}: parameters of {size} bytes");
    }
}
