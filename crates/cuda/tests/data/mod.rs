//! Test data: seeded numbers, 16-bit activations, addresses.
#![allow(dead_code, reason = "each test binary uses a part")]

use half::{bf16, f16};
use quire_backend::sampling_rng::philox4x32;

/// A stream of numbers from a seed.
pub struct Rng {
    key: u32,
    counter: u32,
}

impl Rng {
    pub fn new(seed: u32) -> Self {
        Self { key: seed, counter: 0 }
    }

    pub fn next_u32(&mut self) -> u32 {
        self.counter += 1;
        philox4x32([self.counter, 0, 0, 2], [self.key, 0xCDA])[0]
    }

    /// In `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.next_u32()) * n as u64) >> 32) as usize
    }

    /// In `[-scale, scale)`.
    pub fn signed(&mut self, scale: f32) -> f32 {
        self.next_u32() as i32 as f32 / 2_147_483_648.0 * scale
    }

    pub fn vector(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.signed(scale)).collect()
    }
}

/// A type of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Bf16,
    F16,
}

pub const ACTS: [Act; 2] = [Act::Bf16, Act::F16];

impl Act {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    pub fn bits(self, x: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(x).to_bits(),
            Self::F16 => f16::from_f32(x).to_bits(),
        }
    }

    pub fn value(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
            Self::F16 => f16::from_bits(bits).to_f32(),
        }
    }

    pub fn round(self, x: f32) -> f32 {
        self.value(self.bits(x))
    }

    pub fn pack(self, values: &[f32]) -> Vec<u16> {
        values.iter().map(|&x| self.bits(x)).collect()
    }

    pub fn unpack(self, bits: &[u16]) -> Vec<f32> {
        bits.iter().map(|&x| self.value(x)).collect()
    }

    /// The largest relative error of one rounding.
    pub fn epsilon(self) -> f32 {
        match self {
            Self::Bf16 => 1.0 / 256.0,
            Self::F16 => 1.0 / 2048.0,
        }
    }
}

/// Memory that nothing has written yet: NaN in every format used here.
pub const POISON: u16 = 0xFFFF;

/// The address of a slice's first element, as the kernels' structs hold it.
pub fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as u64
}

/// The same of a slice that the kernel writes.
pub fn address_mut<T>(slice: &mut [T]) -> u64 {
    slice.as_mut_ptr() as u64
}

/// `[n]` as kernels read counts: an int32 in device memory.
pub fn count(n: usize) -> [i32; 1] {
    [i32::try_from(n).expect("a test is small")]
}

/// Checks `have` against `want` to within `relative` of the larger of `want` and `floor`.
pub fn assert_close(what: &str, have: &[f32], want: &[f32], relative: f32, floor: f32) {
    assert_eq!(have.len(), want.len(), "{what}: lengths differ");
    for (i, (&have, &want)) in have.iter().zip(want).enumerate() {
        let allowed = relative * want.abs().max(floor);
        assert!((have - want).abs() <= allowed, "{what}: element {i} is {have}, not {want} +- {allowed}");
    }
}
