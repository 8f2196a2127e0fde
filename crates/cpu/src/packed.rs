//! bf16 as the pair kernels read it: weights in panels, activations rounded.
//!
//! A panel is [`PANEL`] output channels: for each pair of inputs one vector, `[k / 2][PANEL][2]`. Channels past the last are
//! zero, and so is the second input of the last pair if their number is odd.

use half::bf16;
use quire_backend::{BackendError, LinearSource};

use crate::buffer::{Aligned, Frozen, Shared};
use crate::ops::grain;
use crate::ops::linear::Input;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::pairs::{PANEL, PairDot, PairKernel, dispatch_pairs};

/// Weights `[out_features, in_features]` in panels.
pub(crate) struct Packed {
    pairs: Frozen<u32>,
    /// Pairs of inputs.
    k2: usize,
}

impl Packed {
    /// Packs the rows of all parts, which must be bf16 with `k` columns and `n` rows in all.
    pub(crate) fn pack(
        pool: &mut Pool,
        source: &LinearSource<'_>,
        n: usize,
        k: usize,
    ) -> Result<Self, BackendError> {
        let k2 = k.div_ceil(2);
        let mut pairs = Aligned::zeroed(Self::num_pairs(n, k), source.name)?;
        let row_bytes =
            |part: &quire_backend::LinearPart<'_>| part.weight.data.len() / part.weight.shape[0].max(1);
        let rows: Vec<&[u8]> = source
            .parts
            .iter()
            .filter(|part| !part.weight.data.is_empty())
            .flat_map(|part| part.weight.data.chunks_exact(row_bytes(part)))
            .collect();
        let shared = Shared::new(&mut pairs);
        let grain = grain(rows.len().div_ceil(PANEL), PANEL * k, pool.num_threads());
        pool.split(rows.len().div_ceil(PANEL), grain, |_, panels| {
            for p in panels {
                // SAFETY: each panel is written by one piece.
                let panel = unsafe { shared.slice(p * PANEL * k2, PANEL * k2) };
                for (channel, row) in rows[p * PANEL..].iter().take(PANEL).enumerate() {
                    pack_row(row, panel, channel);
                }
            }
        })?;
        Ok(Self { pairs: pairs.into(), k2 })
    }

    /// Weights that were packed before, `k` columns wide.
    pub(crate) fn from_panels(pairs: Frozen<u32>, k: usize) -> Self {
        Self { pairs, k2: k.div_ceil(2) }
    }

    /// Pairs in all panels of `[n, k]`.
    pub(crate) const fn num_pairs(n: usize, k: usize) -> usize {
        n.div_ceil(PANEL) * PANEL * k.div_ceil(2)
    }

    /// All panels.
    pub(crate) const fn panels(&self) -> &Frozen<u32> {
        &self.pairs
    }

    /// Pairs of inputs of a row.
    pub(crate) const fn k2(&self) -> usize {
        self.k2
    }

    /// Panel `p`: `k2 * PANEL` pairs.
    #[inline(always)]
    pub(crate) fn panel(&self, p: usize) -> &[u32] {
        &self.pairs[p * PANEL * self.k2..(p + 1) * PANEL * self.k2]
    }

    /// Widens row `n` into `out`, which is as long as the row.
    pub(crate) fn row(&self, n: usize, out: &mut [f32]) {
        let pairs = self.panel(n / PANEL)[n % PANEL..].iter().step_by(PANEL);
        for (out, pair) in out.chunks_mut(2).zip(pairs) {
            let both = [bf16::from_bits(*pair as u16), bf16::from_bits((pair >> 16) as u16)];
            out.iter_mut().zip(both).for_each(|(out, x)| *out = x.to_f32());
        }
    }
}

fn pack_row(row: &[u8], panel: &mut [u32], channel: usize) {
    let (pairs, rest) = row.as_chunks::<4>();
    let slots = panel[channel..].iter_mut().step_by(PANEL);
    slots.zip(pairs).for_each(|(slot, pair)| *slot = u32::from_le_bytes(*pair));
    if let [low, high] = *rest {
        panel[pairs.len() * PANEL + channel] = u32::from_le_bytes([low, high, 0, 0]);
    }
}

/// Activations `[rows, k]` rounded to bf16 (to nearest, ties to even), in pairs.
pub(crate) struct Rounded {
    pairs: Aligned<u32>,
    stride: usize,
}

impl Rounded {
    pub(crate) fn new() -> Result<Self, BackendError> {
        Ok(Self { pairs: Aligned::zeroed(0, "rounded activations")?, stride: 0 })
    }

    /// Pairs from row to row: whole cache lines, and an odd number of them, so that rows do not compete for the same
    /// sets of a cache.
    const fn stride(k: usize) -> usize {
        let lines = k.div_ceil(2).div_ceil(16);
        (lines | 1) * 16
    }

    /// Makes room for `rows` of `k` columns.
    pub(crate) fn reserve(&mut self, rows: usize, k: usize) -> Result<(), BackendError> {
        let len = rows.saturating_mul(Self::stride(k));
        if len > self.pairs.len() {
            self.pairs = Aligned::zeroed(len, "rounded activations")?;
        }
        Ok(())
    }

    /// Makes room for `rows` of `k` columns, whose content is then undefined, and lends it to write to.
    pub(crate) fn reset(&mut self, rows: usize, k: usize) -> Result<RoundedRows<'_>, BackendError> {
        self.reserve(rows, k)?;
        self.stride = Self::stride(k);
        Ok(RoundedRows { stride: self.stride, pairs: Shared::new(&mut self.pairs) })
    }

    /// Rounds the rows of `x`.
    pub(crate) fn round(
        &mut self,
        pool: &mut Pool,
        isa: Isa,
        x: Input<'_>,
        k: usize,
    ) -> Result<(), BackendError> {
        let (rows, grain) = (x.rows.len(), grain(x.rows.len(), 2 * k, pool.num_threads()));
        let to = self.reset(rows, k)?;
        pool.split(rows, grain, |_, rows| {
            for m in rows {
                // SAFETY: `isa` was detected; row `m` belongs to this piece.
                unsafe { dispatch_pairs(isa, RoundRow { from: x.row(m, k), to: to.row(m) }) };
            }
        })?;
        Ok(())
    }

    /// Rows `first..first + rows`, for reading.
    #[inline(always)]
    pub(crate) fn rows(&self, first: usize, rows: usize) -> (&[u32], usize) {
        (&self.pairs[first * self.stride..(first + rows) * self.stride], self.stride)
    }
}

/// Rows of [`Rounded`], written by several threads.
#[derive(Clone, Copy)]
pub(crate) struct RoundedRows<'a> {
    stride: usize,
    pairs: Shared<'a, u32>,
}

impl<'a> RoundedRows<'a> {
    /// Row `m`, a little longer than it needs to be.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(&self, m: usize) -> &'a mut [u32] {
        // SAFETY: the caller's.
        unsafe { self.pairs.slice(m * self.stride, self.stride) }
    }

    /// Pairs `from..from + len` of row `m`.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, m: usize, from: usize, len: usize) -> &'a mut [u32] {
        assert!(from + len <= self.stride, "pairs {from}..{} of {}", from + len, self.stride);
        // SAFETY: the caller's.
        unsafe { self.pairs.slice(m * self.stride + from, len) }
    }
}

/// Rounds a row to pairs; the last one is filled up with zero.
struct RoundRow<'a> {
    from: &'a [f32],
    to: &'a mut [u32],
}

impl PairKernel for RoundRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: PairDot>(self) {
        // SAFETY: the caller's.
        unsafe { round_row::<D>(self.from, self.to) };
    }
}

/// [`RoundRow`], inside another kernel.
///
/// # Safety
/// As for [`PairDot`].
#[inline(always)]
pub(crate) unsafe fn round_row<D: PairDot>(from: &[f32], to: &mut [u32]) {
    assert!(to.len() * 2 >= from.len(), "{} pairs for {} numbers", to.len(), from.len());
    let (chunks, rest) = from.as_chunks::<{ 2 * PANEL }>();
    let (whole, after) = to.split_at_mut(chunks.len() * PANEL);
    for (from, to) in chunks.iter().zip(whole.as_chunks_mut::<PANEL>().0) {
        // SAFETY: both hold two panels of numbers; the rest is the caller's.
        unsafe {
            let low = D::load_sums(from.as_ptr());
            D::store_pairs(to.as_mut_ptr(), low, D::load_sums(from[PANEL..].as_ptr()));
        }
    }
    round_pairs(rest, after);
}

/// The portable form of [`round_row`].
#[inline(always)]
pub(crate) fn round_pairs(from: &[f32], to: &mut [u32]) {
    let (pairs, rest) = from.as_chunks::<2>();
    let (to, after) = to.split_at_mut(pairs.len());
    to.iter_mut().zip(pairs).for_each(|(to, &[even, odd])| *to = high_half(even) >> 16 | high_half(odd));
    if let [last] = *rest {
        after[0] = high_half(last) >> 16;
    }
}

/// `x` rounded to bf16, in the upper half.
#[inline(always)]
fn high_half(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // Rounding could carry a NaN over into infinity: make it a quiet one instead.
    let kept = if x.is_nan() { bits | 0x0040_0000 } else { rounded };
    kept & 0xFFFF_0000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_bf16_does() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                let (got, want) = ((high_half(x) >> 16) as u16, bf16::from_f32(x));
                assert_eq!(bf16::from_bits(got).is_nan(), x.is_nan(), "{x:e}");
                assert!(x.is_nan() || got == want.to_bits(), "{x:e}: {got:#x}, {want:e}");
            }
        }
        let mut to = [7; 3];
        round_pairs(&[1.0, -2.0, 0.5], &mut to);
        assert_eq!(to, [0xC000_3F80, 0x3F00, 7]);
    }
}
