//! Test data that is the same on every machine.

use half::{bf16, f16};
use quire_core::{DType, TensorView};

use crate::sampling_rng::philox4x32;

/// A stream of numbers from a seed.
pub(crate) struct Rng {
    key: u32,
    counter: u32,
}

impl Rng {
    pub(crate) const fn new(seed: u32) -> Self {
        Self { key: seed, counter: 0 }
    }

    pub(crate) fn next_u32(&mut self) -> u32 {
        self.counter += 1;
        philox4x32([self.counter, 0, 0, 1], [self.key, 0x5EED])[0]
    }

    /// In `0..n`.
    pub(crate) fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// In `[-1, 1)`.
    pub(crate) fn signed(&mut self) -> f32 {
        self.next_u32() as i32 as f32 / 2_147_483_648.0
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u32 + 1) as usize);
        }
    }
}

/// A tensor as a checkpoint holds it; its bytes start at an odd address more often than not.
pub(super) struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// `mean + scale * [-1, 1)`.
    pub(super) fn random(rng: &mut Rng, dtype: DType, shape: &[usize], mean: f32, scale: f32) -> Self {
        let mut bytes = vec![0u8];
        for _ in 0..shape.iter().product() {
            let value = mean + scale * rng.signed();
            match dtype {
                DType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                DType::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                _ => bytes.extend(value.to_le_bytes()),
            }
        }
        Self { dtype, shape: shape.to_vec(), bytes }
    }

    pub(super) fn view(&self) -> TensorView<'_> {
        TensorView { dtype: self.dtype, shape: &self.shape, data: &self.bytes[1..] }
    }
}
