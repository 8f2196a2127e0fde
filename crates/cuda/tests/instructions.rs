//! The matrix instructions and asynchronous copies as the kernels see them, against loops over their definition.

mod common;

use common::{HostKernels, under_sanitizers};
use half::{bf16, f16};

#[repr(C)]
#[derive(Clone, Copy)]
struct CheckParams {
    a: *const u8,
    b: *const u8,
    c: *mut u8,
    bytes: i32,
    reserved: i32,
}

fn launch(kernels: &HostKernels, name: &str, a: &[u8], b: &[u8], c: &mut [u8], bytes: usize) {
    let params =
        CheckParams { a: a.as_ptr(), b: b.as_ptr(), c: c.as_mut_ptr(), bytes: bytes as i32, reserved: 0 };
    kernels.launch(name, [1, 1, 1], [32, 1, 1], 0, &params, bytes as u64);
}

/// A different small number for every index.
fn number(i: usize) -> i32 {
    (i * 37 % 101) as i32 - 50
}

#[test]
fn products_of_16_bits() {
    let Some(kernels) = HostKernels::load() else { return };
    for (name, is_bf16) in [("bf16", true), ("f16", false)] {
        let bits = |i: usize| {
            let x = number(i) as f32;
            if is_bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() }
        };
        let operand = |len: usize, first: usize| -> Vec<u8> {
            (0..len).flat_map(|i| bits(first + i).to_le_bytes()).collect()
        };
        let (a, b) = (operand(256, 0), operand(128, 1000));
        for trans in [false, true] {
            let mut c: Vec<u8> = (0..128).flat_map(|i| (i as f32).to_le_bytes()).collect();
            let infix = if trans { "trans_" } else { "" };
            launch(kernels, &format!("quire_check_mma_{infix}{name}"), &a, &b, &mut c, 0);
            for (i, out) in c.as_chunks::<4>().0.iter().enumerate() {
                let (row, column) = (i / 8, i % 8);
                let of_b = |k: usize| if trans { k * 8 + column } else { column * 16 + k };
                let sum: i32 = (0..16).map(|k| number(row * 16 + k) * number(1000 + of_b(k))).sum();
                assert_eq!(
                    f32::from_le_bytes(*out),
                    (sum + i as i32) as f32,
                    "{name}, {trans}, {row}, {column}"
                );
            }
        }
    }
}

#[test]
fn products_of_8_bits() {
    let Some(kernels) = HostKernels::load() else { return };
    let operand =
        |len: usize, first: usize| -> Vec<u8> { (0..len).map(|i| number(first + i) as u8).collect() };
    let (a, b) = (operand(512, 0), operand(256, 1000));
    let mut c: Vec<u8> = (0..128i32).flat_map(i32::to_le_bytes).collect();
    launch(kernels, "quire_check_mma_int8", &a, &b, &mut c, 0);
    for (i, out) in c.as_chunks::<4>().0.iter().enumerate() {
        let sum: i32 = (0..32).map(|k| number(i / 8 * 32 + k) * number(1000 + i % 8 * 32 + k)).sum();
        assert_eq!(i32::from_le_bytes(*out), sum + i as i32, "{}, {}", i / 8, i % 8);
    }
}

#[test]
fn copies_end_in_zeros_and_read_nothing_there() {
    let Some(kernels) = HostKernels::load() else { return };
    for bytes in [0, 16, 200, 512, 516, 640] {
        // No longer than what may be read: the sanitizers would see it.
        let a: Vec<u8> = (0..bytes).map(|i| (i % 251 + 1) as u8).collect();
        let mut c = vec![0xff; 640];
        launch(kernels, "quire_check_copy", &a, &[], &mut c, bytes);
        for (i, &out) in c.iter().enumerate() {
            let piece = if i < 512 { 16 } else { 4 };
            let is_copied = i / piece * piece + piece <= bytes;
            assert_eq!(out, if is_copied { a[i] } else { 0 }, "{bytes} bytes, {i}");
        }
    }
}

#[test]
fn sanitizers_find_nothing() {
    under_sanitizers("copies");
}
