//! Random weights for `--load-format dummy`: load and speed tests of any shape without its files.

use half::{bf16, f16};
use quire_core::DType;

use crate::tensor::Tensor;

const NOT_STORED: &str = "a checkpoint's dtype is f32, f16 or bf16";
/// Draws that are worth a thread.
const MIN_DRAWS: usize = 1 << 16;

/// The tensor called `name`: a matrix gets uniform values of variance 1 / in_features (so activations keep their
/// scale), a norm ones, a bias zeros. A function of its arguments alone.
pub(crate) fn tensor(seed: u64, name: &str, shape: Vec<usize>, dtype: DType) -> Tensor<'static> {
    let count: usize = shape.iter().product();
    let data = match *shape.as_slice() {
        [_, in_features] => {
            let scale = (3.0 / in_features as f32).sqrt() / 32768.0;
            let stream = stream_seed(seed, name);
            match dtype {
                DType::F32 => random(count, stream, |draw| (f32::from(draw) * scale).to_le_bytes()),
                DType::F16 => {
                    random(count, stream, |draw| f16::from_f32(f32::from(draw) * scale).to_le_bytes())
                }
                DType::BF16 => {
                    random(count, stream, |draw| bf16::from_f32(f32::from(draw) * scale).to_le_bytes())
                }
                DType::I8 | DType::F8E4M3 => unreachable!("{NOT_STORED}, not {dtype}"),
            }
        }
        _ => {
            let value = if name.ends_with("bias") { 0.0 } else { 1.0 };
            encode(dtype, std::iter::repeat_n(value, count))
        }
    };
    Tensor { dtype, shape: shape.into(), data: data.into() }
}

/// `count` elements of `N` bytes, four from each 64-bit draw of `stream`. Large tensors are made by several threads:
/// a draw is a function of its index, so that their number does not show.
fn random<const N: usize>(count: usize, stream: u64, encode: impl Fn(i16) -> [u8; N] + Sync) -> Vec<u8> {
    let mut data = vec![0; count * N];
    let fill = |first_draw: usize, part: &mut [u8]| {
        for (index, four) in part.chunks_mut(4 * N).enumerate() {
            let draw = splitmix(stream.wrapping_add((first_draw + index) as u64));
            for (place, out) in four.as_chunks_mut::<N>().0.iter_mut().enumerate() {
                *out = encode((draw >> (16 * place)) as i16);
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let draws = count.div_ceil(4).div_ceil(threads).max(MIN_DRAWS);
    let fill = &fill;
    std::thread::scope(|scope| {
        for (index, part) in data.chunks_mut(draws * 4 * N).enumerate() {
            scope.spawn(move || fill(index * draws, part));
        }
    });
    data
}

fn encode(dtype: DType, values: impl ExactSizeIterator<Item = f32>) -> Vec<u8> {
    let mut data = Vec::with_capacity(values.len() * dtype.size());
    match dtype {
        DType::F32 => values.for_each(|value| data.extend_from_slice(&value.to_le_bytes())),
        DType::F16 => values.for_each(|value| data.extend_from_slice(&f16::from_f32(value).to_le_bytes())),
        DType::BF16 => values.for_each(|value| data.extend_from_slice(&bf16::from_f32(value).to_le_bytes())),
        DType::I8 | DType::F8E4M3 => unreachable!("{NOT_STORED}, not {dtype}"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_threads_does_not_show() {
        let (rows, cols) = (3, MIN_DRAWS + 1);
        let made = tensor(5, "w", vec![rows, 2 * cols], DType::F32);
        let scale = (3.0 / (2 * cols) as f32).sqrt() / 32768.0;
        let expected = |index: u64| {
            let draw = splitmix(stream_seed(5, "w").wrapping_add(index / 4));
            f32::from((draw >> (16 * (index % 4))) as i16) * scale
        };
        let values = made.data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        assert_eq!(values.len(), 2 * rows * cols);
        values.enumerate().for_each(|(index, value)| assert_eq!(value, expected(index as u64), "{index}"));
    }
}
