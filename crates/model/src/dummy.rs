//! Random weights for `--load-format dummy`: load and speed tests of any shape without its files.

use half::{bf16, f16};
use quire_core::DType;

use crate::tensor::Tensor;

/// The tensor called `name`: a matrix gets uniform values of variance 1 / in_features (so activations keep their
/// scale), a norm ones, a bias zeros. A function of its arguments alone.
pub(crate) fn tensor(seed: u64, name: &str, shape: Vec<usize>, dtype: DType) -> Tensor<'static> {
    let count: usize = shape.iter().product();
    let data = match *shape.as_slice() {
        [_, in_features] => {
            let scale = (3.0 / in_features as f32).sqrt() / 32768.0;
            let stream = stream_seed(seed, name);
            // Four values from each 64-bit draw.
            let value = |index: usize| {
                let draw = splitmix(stream.wrapping_add(index as u64 / 4));
                f32::from((draw >> (16 * (index % 4))) as i16) * scale
            };
            encode(dtype, (0..count).map(value))
        }
        _ => {
            let value = if name.ends_with("bias") { 0.0 } else { 1.0 };
            encode(dtype, std::iter::repeat_n(value, count))
        }
    };
    Tensor { dtype, shape: shape.into(), data: data.into() }
}

fn encode(dtype: DType, values: impl ExactSizeIterator<Item = f32>) -> Vec<u8> {
    let mut data = Vec::with_capacity(values.len() * dtype.size());
    match dtype {
        DType::F32 => values.for_each(|value| data.extend_from_slice(&value.to_le_bytes())),
        DType::F16 => values.for_each(|value| data.extend_from_slice(&f16::from_f32(value).to_le_bytes())),
        DType::BF16 => values.for_each(|value| data.extend_from_slice(&bf16::from_f32(value).to_le_bytes())),
        DType::I8 | DType::F8E4M3 => unreachable!("a checkpoint's dtype is f32, f16 or bf16, not {dtype}"),
    }
    data
}

/// A stream of its own for each tensor, so that the order of loading does not matter (FNV-1a over the name).
fn stream_seed(seed: u64, name: &str) -> u64 {
    name.bytes().fold(splitmix(seed), |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// SplitMix64 (Steele, Lea, Flood 2014) at a given counter.
fn splitmix(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
