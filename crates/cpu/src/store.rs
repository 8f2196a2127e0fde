//! Keys and values into packed pages, rounded: whole panels of tokens at once where a prompt brings them, else token by
//! token. Both give the same bits.

use quire_backend::quant::TINY;

use crate::buffer::Shared;
use crate::pages::{PackedPages, PackedShape, Pairs};
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel};
use crate::simd::panel::load_some;

/// [`PackedPages`], written by several threads, each its own slots. Of values single halves are shared, since the tokens
/// of a pair may be written by two threads. Keys and values are parts of one array.
#[derive(Clone, Copy)]
pub(crate) struct SharedPackedPages<'a> {
    pairs: SharedPairs<'a>,
    shape: PackedShape,
}

#[derive(Clone, Copy)]
enum SharedPairs<'a> {
    Bf16 { k: Shared<'a, u32>, v: Shared<'a, u16> },
    Int8 { k: Shared<'a, u16>, v: Shared<'a, i8>, scales: Shared<'a, f32> },
}

impl<'a> SharedPackedPages<'a> {
    pub(crate) fn new(pages: &'a mut PackedPages) -> Self {
        let shape = pages.shape;
        let pairs = match &mut pages.pairs {
            Pairs::Bf16(pairs) => {
                let k = Shared::new(pairs);
                SharedPairs::Bf16 { k, v: k.halves() }
            }
            Pairs::Int8 { bytes, scales } => {
                let k = Shared::new(bytes);
                SharedPairs::Int8 { k, v: k.bytes(), scales: Shared::new(scales) }
            }
        };
        Self { pairs, shape }
    }
}

/// Stores keys and values of several rows; they are made finite. No other thread may write these slots.
pub(crate) struct StoreRows<'a> {
    pub pages: SharedPackedPages<'a>,
    /// `[rows]`
    pub slots: &'a [u32],
    /// `[rows, stride]`, of which the last columns are keys and then values.
    pub qkv: &'a [f32],
    pub stride: usize,
}

impl PairKernel for StoreRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let Self { pages, slots, qkv, stride } = self;
        let PackedShape { num_kv_heads, head_dim, .. } = pages.shape;
        let mut first = 0;
        while first < slots.len() {
            let whole = pages.is_panel(&slots[first..]);
            let rows = if whole { PANEL } else { 1 };
            for head in 0..num_kv_heads {
                let values = stride - (num_kv_heads - head) * head_dim;
                let keys = values - num_kv_heads * head_dim;
                let qkv = &qkv[first * stride..(first + rows) * stride];
                let rows = KeysAndValues { qkv, stride, keys, values, head_dim };
                // SAFETY: the caller's.
                unsafe {
                    if whole {
                        pages.store_panel::<D>(slots[first], head, &rows);
                    } else {
                        pages.store::<D>(slots[first], head, rows.key(0), rows.value(0));
                    }
                }
            }
            first += rows;
        }
    }
}

/// One head's keys and values of some rows.
struct KeysAndValues<'a> {
    qkv: &'a [f32],
    stride: usize,
    /// First columns.
    keys: usize,
    values: usize,
    head_dim: usize,
}

impl KeysAndValues<'_> {
    #[inline(always)]
    fn key(&self, row: usize) -> &[f32] {
        &self.qkv[row * self.stride + self.keys..][..self.head_dim]
    }

    #[inline(always)]
    fn value(&self, row: usize) -> &[f32] {
        &self.qkv[row * self.stride + self.values..][..self.head_dim]
    }
}

/// Dimensions that a whole panel takes at a time.
const CHUNK: usize = 4 * PANEL;

impl SharedPackedPages<'_> {
    /// Whether the first slots are a panel of keys from its beginning, of a head size that goes into whole chunks.
    #[inline(always)]
    pub(crate) fn is_panel(&self, slots: &[u32]) -> bool {
        let PackedShape { head_dim, block_size, .. } = self.shape;
        block_size.is_multiple_of(PANEL)
            && head_dim.is_multiple_of(CHUNK)
            && slots.len() >= PANEL
            && (slots[0] as usize).is_multiple_of(PANEL)
            && slots[..PANEL].iter().zip(slots[0]..).all(|(slot, expected)| *slot == expected)
    }

    /// [`PANEL`] tokens' keys and values of one head, from `slot` on: what [`Self::store`] does token by token.
    #[inline(always)]
    unsafe fn store_panel<D: ByteDot>(&self, slot: u32, head: usize, rows: &KeysAndValues<'_>) {
        let shape = self.shape;
        let (block, offset) = (slot as usize / shape.block_size, slot as usize % shape.block_size);
        let (key_at, value_at) = (shape.key_panel(block, head, offset), shape.value_row(block, head, offset));
        let len = PANEL / 2 * shape.head_dim;
        // SAFETY: slots are disjoint, and these are ours by contract; slices are checked; the rest is the caller's.
        unsafe {
            match self.pairs {
                SharedPairs::Bf16 { k, v } => {
                    pair_keys::<D>(rows, k.slice(key_at, len));
                    pair_values::<D>(rows, v.slice(2 * value_at, 2 * len));
                }
                SharedPairs::Int8 { k, v, scales } => {
                    let at = (block * shape.num_kv_heads + head) * 2 * shape.block_size + offset;
                    let mut inverse = [[0.0; PANEL]; 2];
                    for t in 0..PANEL {
                        for (i, values) in [rows.key(t), rows.value(t)].into_iter().enumerate() {
                            let largest = largest::<D>(values);
                            inverse[i][t] = 127.0 / largest;
                            scales.slice(at + i * shape.block_size + t, 1)[0] = largest / 127.0;
                        }
                    }
                    byte_keys::<D>(rows, &inverse[0], k.slice(key_at, len));
                    byte_values::<D>(rows, &inverse[1], v.slice(2 * value_at, 2 * len));
                }
            }
        }
    }
}

/// The first panel of what there is, zeros after its end, made finite: in the range of bf16; NaN becomes the lowest number.
#[inline(always)]
unsafe fn load_finite<D: ByteDot>(from: &[f32]) -> D::V {
    // SAFETY: the length is right; the rest is the caller's.
    unsafe {
        let x = D::max(load_some::<D>(from.as_ptr(), from.len().min(PANEL)), D::splat(-MAX));
        D::min(x, D::splat(MAX))
    }
}

/// `[head_dim / 2][token]` pairs.
#[inline(always)]
unsafe fn pair_keys<D: ByteDot>(rows: &KeysAndValues<'_>, to: &mut [u32]) {
    for (chunk, to) in to.as_chunks_mut::<{ PANEL * PANEL }>().0.iter_mut().enumerate() {
        let mut tokens = [[0; PANEL]; PANEL];
        for (t, pairs) in tokens.iter_mut().enumerate() {
            let key = &rows.key(t)[chunk * 2 * PANEL..];
            // SAFETY: `pairs` is a panel; the rest is the caller's.
            unsafe {
                D::store_pairs(pairs.as_mut_ptr(), load_finite::<D>(key), load_finite::<D>(&key[PANEL..]));
            }
        }
        // SAFETY: `to` is a square of panels.
        unsafe { D::transpose(&tokens, to.as_mut_ptr()) };
    }
}

/// `[pair of tokens][head_dim][2]` halves.
#[inline(always)]
unsafe fn pair_values<D: ByteDot>(rows: &KeysAndValues<'_>, to: &mut [u16]) {
    for (pair, to) in to.chunks_exact_mut(2 * rows.head_dim).enumerate() {
        let (even, odd) = (rows.value(2 * pair), rows.value(2 * pair + 1));
        for (i, to) in to.as_chunks_mut::<{ 2 * PANEL }>().0.iter_mut().enumerate() {
            // SAFETY: `to` has room for a panel of pairs; the rest is the caller's.
            unsafe {
                let (even, odd) = (load_finite::<D>(&even[i * PANEL..]), load_finite::<D>(&odd[i * PANEL..]));
                D::store_zipped(to.as_mut_ptr().cast(), even, odd);
            }
        }
    }
}

/// What becomes 127 as a byte.
#[inline(always)]
unsafe fn largest<D: ByteDot>(values: &[f32]) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let mut largest = D::splat(TINY);
        for panel in values.chunks(PANEL) {
            let x = load_finite::<D>(panel);
            largest = D::max(D::max(x, D::sub(D::zero(), x)), largest);
        }
        D::highest(largest)
    }
}

/// `head_dim / CHUNK` times [`CHUNK`] bytes.
#[inline(always)]
unsafe fn bytes_of<D: ByteDot>(values: &[f32], inverse: f32, to: &mut [i8; CHUNK]) {
    for (from, to) in values.as_chunks::<PANEL>().0.iter().zip(to.as_chunks_mut::<PANEL>().0) {
        // SAFETY: both are panels; the rest is the caller's.
        unsafe {
            D::store_bytes(to.as_mut_ptr(), D::mul(load_finite::<D>(from), D::splat(inverse)));
        }
    }
}

/// `[head_dim / 2][token][2]` bytes.
#[inline(always)]
unsafe fn byte_keys<D: ByteDot>(rows: &KeysAndValues<'_>, inverse: &[f32; PANEL], to: &mut [u16]) {
    for (chunk, to) in to.as_chunks_mut::<{ CHUNK / 2 * PANEL }>().0.iter_mut().enumerate() {
        let (mut tokens, mut quads) = ([[0; PANEL]; PANEL], [[0; PANEL]; PANEL]);
        for (t, words) in tokens.iter_mut().enumerate() {
            let mut bytes = [0; CHUNK];
            let key = &rows.key(t)[chunk * CHUNK..][..CHUNK];
            // SAFETY: the caller's.
            unsafe { bytes_of::<D>(key, inverse[t], &mut bytes) };
            for (word, quad) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *word = u32::from_le_bytes(quad.map(i8::cast_unsigned));
            }
        }
        // SAFETY: a square of panels.
        unsafe { D::transpose(&tokens, quads.as_flattened_mut().as_mut_ptr()) };
        for (quads, to) in quads.iter().zip(to.as_chunks_mut::<{ 2 * PANEL }>().0) {
            for t in 0..PANEL {
                (to[t], to[PANEL + t]) = (quads[t] as u16, (quads[t] >> 16) as u16);
            }
        }
    }
}

/// `[pair of tokens][head_dim][2]` bytes.
#[inline(always)]
unsafe fn byte_values<D: ByteDot>(rows: &KeysAndValues<'_>, inverse: &[f32; PANEL], to: &mut [i8]) {
    for (pair, to) in to.chunks_exact_mut(2 * rows.head_dim).enumerate() {
        for (chunk, to) in to.as_chunks_mut::<{ 2 * CHUNK }>().0.iter_mut().enumerate() {
            let mut codes = [[0; CHUNK]; 2];
            for (i, codes) in codes.iter_mut().enumerate() {
                let value = &rows.value(2 * pair + i)[chunk * CHUNK..][..CHUNK];
                // SAFETY: the caller's.
                unsafe { bytes_of::<D>(value, inverse[2 * pair + i], codes) };
            }
            for i in 0..CHUNK {
                (to[2 * i], to[2 * i + 1]) = (codes[0][i], codes[1][i]);
            }
        }
    }
}

impl SharedPackedPages<'_> {
    /// One head's key and value at `slot`, which is the caller's alone.
    #[inline(always)]
    unsafe fn store<D: ByteDot>(&self, slot: u32, head: usize, key: &[f32], value: &[f32]) {
        let shape = self.shape;
        let (block, offset) = (slot as usize / shape.block_size, slot as usize % shape.block_size);
        let key_at = shape.key_panel(block, head, offset) + offset % shape.lanes();
        let value_at = 2 * shape.value_row(block, head, offset) + offset % 2;
        let (lanes, pairs) = (shape.lanes(), shape.key_pairs());
        // SAFETY: in bounds as `strided` has checked; slots are disjoint, and this one is ours by contract.
        unsafe {
            match self.pairs {
                SharedPairs::Bf16 { k, v } => {
                    let (k, v) = (k.strided(key_at, lanes, pairs), v.strided(value_at, 2, shape.columns()));
                    each_pairs::<D>(key, |i, pairs| scatter(k.add(i / 2 * lanes), lanes, pairs));
                    each_pairs::<D>(value, |i, pairs| {
                        for (j, halves) in pairs.chunks(PANEL / 2).enumerate() {
                            D::spread_halves(v.add(2 * (i + j * PANEL)), halves.as_ptr().cast());
                        }
                    });
                }
                SharedPairs::Int8 { k, v, scales } => {
                    let at = (block * shape.num_kv_heads + head) * 2 * shape.block_size + offset;
                    let scales = scales.strided(at, shape.block_size, 2);
                    let (k, v) = (k.strided(key_at, lanes, pairs), v.strided(value_at, 2, shape.columns()));
                    *scales = each_bytes::<D>(key, |i, bytes| {
                        let pairs: [u16; PANEL / 2] =
                            std::array::from_fn(|j| u16::from_le_bytes([bytes[2 * j], bytes[2 * j + 1]]));
                        let number = (pairs.len()).min((key.len() - i).div_ceil(2));
                        scatter(k.add(i / 2 * lanes), lanes, &pairs[..number]);
                    });
                    *scales.add(shape.block_size) = each_bytes::<D>(value, |i, bytes| {
                        D::spread_bytes(v.add(2 * i), bytes.as_ptr().cast());
                    });
                }
            }
        }
    }
}

/// What bf16 can hold.
const MAX: f32 = 3.389_531_4e38;

/// Stores elements `stride` apart.
#[inline(always)]
unsafe fn scatter<T: Copy>(to: *mut T, stride: usize, from: &[T]) {
    for (i, x) in from.iter().enumerate() {
        // Volatile, so that no scatter instruction is made of it: those take longer than as many stores.
        // SAFETY: the caller's.
        unsafe { to.add(i * stride).write_volatile(*x) };
    }
}

/// Makes numbers finite, rounds them, and hands out the pairs of up to two panels with the number of their first element.
#[inline(always)]
unsafe fn each_pairs<D: ByteDot>(values: &[f32], mut to: impl FnMut(usize, &[u32])) {
    const WIDTH: usize = 2 * PANEL;
    for (chunk, values) in values.chunks(WIDTH).enumerate() {
        let mut pairs = [0; PANEL];
        let (low, high) = values.split_at(values.len().min(PANEL));
        // SAFETY: `pairs` is a panel; the rest is the caller's.
        unsafe { D::store_pairs(pairs.as_mut_ptr(), load_finite::<D>(low), load_finite::<D>(high)) };
        to(chunk * WIDTH, &pairs[..values.len().div_ceil(2)]);
    }
}

/// Rounds to bytes, whose largest becomes 127, and hands them out, a panel at a time, with the number of the first.
/// Returns the scale, which is positive.
#[inline(always)]
unsafe fn each_bytes<D: ByteDot>(values: &[f32], mut to: impl FnMut(usize, &[u8; PANEL])) -> f32 {
    // SAFETY: `bytes` is a panel; the rest is the caller's.
    unsafe {
        let largest = largest::<D>(values);
        let inverse = D::splat(127.0 / largest);
        for (panel, values) in values.chunks(PANEL).enumerate() {
            let mut bytes = [0; PANEL];
            D::store_bytes(bytes.as_mut_ptr().cast(), D::mul(load_finite::<D>(values), inverse));
            to(panel * PANEL, &bytes);
        }
        largest / 127.0
    }
}

#[cfg(test)]
mod tests {
    use quire_backend::{KvLayerShape, KvLayout};
    use quire_core::DType;

    use super::*;
    use crate::pages::{PackedPages, Pairs};
    use crate::simd::Isa;
    use crate::simd::pairs::dispatch_pairs;

    /// Everything in the pages, as bytes of numbers.
    fn content(pages: &PackedPages) -> Vec<u32> {
        match &pages.pairs {
            Pairs::Bf16(pairs) => pairs.to_vec(),
            Pairs::Int8 { bytes, scales } => {
                let codes = bytes.iter().map(|pair| u32::from(*pair));
                codes.chain(scales.iter().map(|scale| scale.to_bits())).collect()
            }
        }
    }

    #[test]
    fn whole_panels_are_stored_as_their_tokens_are_one_by_one() {
        let layer = KvLayerShape { num_kv_heads: 2, head_dim: 128 };
        // 21 + 40 + 3 tokens: a whole block, one cut by the ends, and strangers.
        let slots: Vec<u32> = (11..32).chain(48..88).chain([3, 40, 2]).collect();
        let stride = 5 * 128;
        let mut qkv: Vec<f32> =
            (0..slots.len() * stride).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect();
        (qkv[stride + 130], qkv[20 * stride + 400], qkv[25 * stride + 600]) =
            (f32::NAN, f32::INFINITY, -3e38);
        for dtype in [DType::BF16, DType::I8] {
            for (block_size, num_blocks) in [(8, 12), (16, 6), (32, 3)] {
                let layout = KvLayout { num_blocks, block_size, layers: vec![layer], dtype };
                let store = |isa: Isa, rows: usize| {
                    let mut pages = PackedPages::new(&layout, &layer).unwrap();
                    let shared = SharedPackedPages::new(&mut pages);
                    for (slots, qkv) in slots.chunks(rows).zip(qkv.chunks(rows * stride)) {
                        // SAFETY: the instruction set is there, and nobody else writes.
                        unsafe { dispatch_pairs(isa, StoreRows { pages: shared, slots, qkv, stride }) };
                    }
                    content(&pages)
                };
                let expected = store(Isa::Portable, 1);
                for isa in Isa::available() {
                    assert!(store(isa, 1) == expected, "{isa:?}, blocks of {block_size}, {dtype:?}");
                    assert!(store(isa, 64) == expected, "{isa:?}, blocks of {block_size}, {dtype:?}");
                }
            }
        }
    }
}
