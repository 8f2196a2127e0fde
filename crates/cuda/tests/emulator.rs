//! The emulation that all kernel tests stand on: what it must compute, and the faults it must find.

mod common;

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};

use common::build::{CppLibrary, compiler, files, repository};
use libloading::Library;

#[repr(C)]
#[derive(Clone, Copy)]
struct Uint3([c_uint; 3]);

type Emulate = unsafe extern "C" fn(*const c_char, Uint3, Uint3, c_uint, *const c_void, c_ulonglong) -> c_int;
type Error = unsafe extern "C" fn() -> *const c_char;

#[repr(C)]
struct Params {
    out: *mut u32,
    input: *const u32,
}

struct Emulator(Library);

impl Emulator {
    fn load() -> Option<Self> {
        let Some(compiler) = compiler() else {
            eprintln!("skipped: no g++ (nor CXX)");
            return None;
        };
        let kernels = repository().join("kernels");
        let mut headers = files(&kernels.join("include"), &["h", "cuh"]);
        headers.extend(files(&kernels.join("emulate"), &["h"]));
        let library = CppLibrary {
            file_name: "libquire_emulator_test.so",
            sources: vec![kernels.join("tests/emulator.cu"), kernels.join("emulate/engine.cpp")],
            headers,
            flags: ["-std=c++17", "-O1", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
                .map(String::from)
                .into_iter()
                .chain([format!("-I{}", kernels.join("include").display())])
                .collect(),
        };
        // SAFETY: our own library, whose initialisers only register kernels.
        Some(Self(unsafe { Library::new(library.build(&compiler)) }.expect("the library was just built")))
    }

    /// Runs `name` over `out`; the error's text if it was refused.
    fn launch(
        &self,
        name: &str,
        (grid, block, smem): ([u32; 3], [u32; 3], u32),
        input: &[u32],
        out: &mut [u32],
        seed: u64,
    ) -> Result<(), String> {
        let name = CString::new(name).expect("names are C identifiers");
        let params = Params { out: out.as_mut_ptr(), input: input.as_ptr() };
        // SAFETY: the symbols have these types (kernels/emulate/engine.h); the kernels stay within `input` and `out`.
        unsafe {
            let emulate = self.0.get::<Emulate>(b"quire_emulate\0").expect("engine.cpp defines it");
            let error = self.0.get::<Error>(b"quire_emulate_error\0").expect("engine.cpp defines it");
            let params = std::ptr::from_ref(&params).cast();
            match emulate(name.as_ptr(), Uint3(grid), Uint3(block), smem, params, seed) {
                0 => Ok(()),
                _ => Err(CStr::from_ptr(error()).to_string_lossy().into_owned()),
            }
        }
    }
}

const SEEDS: std::ops::Range<u64> = 0..8;

#[test]
fn every_thread_of_every_block_runs_once_in_its_place() {
    let Some(emulator) = Emulator::load() else { return };
    for seed in SEEDS {
        let mut out = vec![0; 30 * 42];
        emulator.launch("quire_test_places", ([5, 3, 2], [7, 2, 3], 0), &[], &mut out, seed).unwrap();
        for (i, &x) in out.iter().enumerate() {
            assert_eq!(x as usize, i / 42 * 10000 + i % 42);
        }
    }
}

#[test]
fn warps_shuffle_and_vote_as_cuda_says() {
    let Some(emulator) = Emulator::load() else { return };
    let value = |lane: u32| lane * lane + 7;
    let cases: [&dyn Fn(u32) -> u32; 11] = [
        &|_| value(5),
        &|lane| value(lane / 8 * 8 + (lane + 1) % 8),
        &|lane| value(if lane < 3 { lane } else { lane - 3 }),
        &|lane| value(if lane % 16 > 12 { lane } else { lane + 3 }),
        &|lane| value(lane ^ 4),
        &|_| (0..32).filter(|l| l % 3 == 0).map(|l| 1 << l).sum(),
        &|_| (0..32).map(value).sum(),
        &|_| value(31),
        &|lane| (0..32).filter(|l| l % 5 == lane % 5).map(|l| 1 << l).sum(),
        &|_| 1,
        &|lane| value(lane ^ 1),
    ];
    for seed in SEEDS {
        let mut out = vec![!0; 32 * cases.len()];
        emulator.launch("quire_test_warp", ([1; 3], [32, 1, 1], 0), &[], &mut out, seed).unwrap();
        for (i, case) in cases.iter().enumerate() {
            let want: Vec<u32> = (0..32).map(case).collect();
            assert_eq!(out[32 * i..32 * i + 32], want, "case {i}, seed {seed}");
        }
    }
}

#[test]
fn blocks_meet_at_barriers_and_begin_with_poison() {
    let Some(emulator) = Emulator::load() else { return };
    let first = |t: u32| (95 - t) * 3 + (t + 1) % 96 * 5 + 24_000;
    let want: Vec<u32> = (0..96).map(|t| first(if t < 32 { t } else { 32 + (t + 7) % 64 })).collect();
    for seed in SEEDS {
        let mut out = vec![0; 96];
        // Two blocks: the second finds poison too, not what the first left.
        emulator.launch("quire_test_block", ([2, 1, 1], [96, 1, 1], 384), &[], &mut out, seed).unwrap();
        assert_eq!(out, want, "seed {seed}");
        let mut out = vec![0; 64];
        emulator.launch("quire_test_early_return", ([1; 3], [64, 1, 1], 0), &[], &mut out, seed).unwrap();
        assert_eq!(out.iter().sum::<u32>(), 40);
    }
}

#[test]
fn asynchronous_copies_arrive_when_waited_for() {
    let Some(emulator) = Emulator::load() else { return };
    // CUDA promises 16 bytes of alignment to what the host allocates.
    #[repr(align(16))]
    struct Aligned([u32; 12]);
    let input = Aligned(std::array::from_fn(|i| 100 + i as u32));
    let mut out = vec![0; 6];
    emulator.launch("quire_test_async", ([1; 3], [1; 3], 0), &input.0, &mut out, 0).unwrap();
    assert_eq!(out, [!0, 100, !0, 104, 109, 0]);
}

#[test]
fn a_missing_barrier_shows() {
    let Some(emulator) = Emulator::load() else { return };
    let right: Vec<u32> = (0..64).rev().collect();
    for seed in SEEDS {
        let mut out = vec![0; 64];
        emulator.launch("quire_test_missing_barrier", ([1; 3], [64, 1, 1], 0), &[], &mut out, seed).unwrap();
        assert_ne!(out, right, "seed {seed}");
    }
}

#[test]
fn divergence_and_impossible_launches_are_errors_that_name_the_kernel() {
    let Some(emulator) = Emulator::load() else { return };
    let mut out = vec![0; 64];
    let cases = [
        ("quire_test_divergent_barrier", [64, 1, 1], "threads diverge at a barrier"),
        ("quire_test_divergent_shuffle", [32, 1, 1], "ended"),
        ("quire_test_foreign_mask", [32, 1, 1], "without being in its mask"),
        ("quire_test_foreign_mask", [64, 1, 1], "more than its launch bounds"),
        ("quire_test_no_such_kernel", [32, 1, 1], "there is no kernel"),
    ];
    for ((name, block, message), seed) in cases.into_iter().flat_map(|case| SEEDS.map(move |s| (case, s))) {
        let error = emulator.launch(name, ([1; 3], block, 0), &[], &mut out, seed).unwrap_err();
        assert!(error.contains(name) && error.contains(message), "{name}: {error}");
    }
    // A failed launch leaves nothing behind.
    emulator.launch("quire_test_early_return", ([1; 3], [64, 1, 1], 0), &[], &mut out, 0).unwrap();
}
