//! The conformance suite of the backend interface on the CUDA backend, under the double of a driver.

mod common;

use common::{MockGpu, mock};
use quire_backend::conformance::{Support, Tolerance, run_kv_dtype, run_quantized_with, run_ranks, run_with};
use quire_core::{DType, QuantFormat};
use quire_cuda::{Cuda, CudaOptions};

fn options(gpu: &MockGpu) -> CudaOptions {
    CudaOptions { ordinal: gpu.ordinal(), arena_chunk: 0, write_back: true, ..CudaOptions::default() }
}

/// Activations in bf16 between operations; the reference keeps f32.
const TOLERANCE: Tolerance = Tolerance { f32: 3e-2, f16_kv: 0.0, bf16_kv: 0.0, fp8_kv: 0.125 };
const SUPPORT: Support = Support { dtype: Some(DType::BF16), min_block_size: 16, head_dim_multiple: 8 };

#[test]
fn conforms_with_graphs_and_late_streams() {
    let Some(gpu) = MockGpu::new() else { return };
    gpu.delay(true);
    run_with(TOLERANCE, SUPPORT, || Cuda::new(mock::images(), options(&gpu)).expect("the double is a GPU"));
    assert!(!gpu.is_mock() || gpu.counters().graph_launches > 100);
    gpu.assert_nothing_left();
}

/// Keys and values that differ by rounding to bf16 may go to different numbers of fp8: an eighth apart at most.
#[test]
fn conforms_with_fp8_keys_and_values() {
    let Some(gpu) = MockGpu::new() else { return };
    let support = Support { head_dim_multiple: 16, ..SUPPORT };
    run_kv_dtype(DType::F8E4M3, TOLERANCE, support, || {
        Cuda::new(mock::images(), options(&gpu)).expect("the double is a GPU")
    });
    gpu.assert_nothing_left();
}

#[test]
fn quantized_layers_agree_with_the_reference() {
    let Some(gpu) = MockGpu::new() else { return };
    gpu.delay(true);
    for quant in [QuantFormat::Int8, QuantFormat::Int4, QuantFormat::Fp8] {
        run_quantized_with(quant, SUPPORT, || {
            Cuda::new(mock::images(), options(&gpu)).expect("the double is a GPU")
        });
    }
    gpu.assert_nothing_left();
}

#[test]
fn ranks_conform() {
    let Some(first) = MockGpu::new().filter(MockGpu::is_mock) else { return };
    let gpus = [Some(first), MockGpu::new(), MockGpu::new()].map(|gpu| gpu.expect("there was one before"));
    gpus.iter().for_each(|gpu| gpu.delay(true));
    let ordinals = gpus.each_ref().map(MockGpu::ordinal);
    run_ranks(|world| {
        let group = Cuda::group(mock::images(), &options(&gpus[0]), &ordinals[..world]);
        group.expect("the doubles are GPUs")
    });
    gpus.iter().for_each(MockGpu::assert_nothing_left);
}
