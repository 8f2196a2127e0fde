//! Activations in bytes, as the byte kernels read them: quads of consecutive inputs. [`quire_backend::quant`] defines the
//! numbers.

use std::ops::Range;

use quire_backend::BackendError;
use quire_backend::quant::{ACT_GROUP, INT4_GROUP, TINY};

use crate::buffer::{Aligned, Shared};
use crate::element::Plain;
use crate::ops::grain;
use crate::ops::linear::Input;
use crate::pool::Pool;
use crate::quantized::{ACT_QUADS, INT4_QUADS};
use crate::simd::Isa;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel, dispatch_bytes};

/// Quantized activations `[rows, k]`.
pub(crate) struct Bytes {
    /// `[rows, stride]` quads, zero past the last input.
    quads: Aligned<u32>,
    stride: usize,
    /// `[rows, groups]` scales, and the codes' sums times -128: what the weights' offset adds, taken back.
    scales: Aligned<f32>,
    offsets: Aligned<i32>,
    groups: usize,
    /// `[rows, small_groups]` sums of codes by [`INT4_GROUP`].
    sums: Aligned<i32>,
    small_groups: usize,
}

/// Consecutive rows of [`Bytes`]: where the first begins and how far it is from one to the next.
#[derive(Clone, Copy)]
pub(crate) struct ByteRows {
    pub quads: *const u32,
    pub stride: usize,
    pub scales: *const f32,
    pub offsets: *const i32,
    pub groups: usize,
    pub sums: *const i32,
    pub small_groups: usize,
}

impl Bytes {
    pub(crate) fn new() -> Result<Self, BackendError> {
        let what = "quantized activations";
        Ok(Self {
            quads: Aligned::zeroed(0, what)?,
            stride: 0,
            scales: Aligned::zeroed(0, what)?,
            offsets: Aligned::zeroed(0, what)?,
            groups: 0,
            sums: Aligned::zeroed(0, what)?,
            small_groups: 0,
        })
    }

    /// Quads from row to row: whole groups of [`INT4_GROUP`], and an odd number of cache lines, so that rows do not
    /// compete for the same sets of a cache.
    const fn stride(k: usize) -> usize {
        let lines = (k.div_ceil(INT4_GROUP) * INT4_QUADS).div_ceil(16);
        (lines | 1) * 16
    }

    /// Makes room for `rows` of `k` columns.
    pub(crate) fn reserve(&mut self, rows: usize, k: usize) -> Result<(), BackendError> {
        fn grow<T: Plain>(to: &mut Aligned<T>, len: usize) -> Result<(), BackendError> {
            if len > to.len() {
                *to = Aligned::zeroed(len, "quantized activations")?;
            }
            Ok(())
        }
        grow(&mut self.quads, rows.saturating_mul(Self::stride(k)))?;
        grow(&mut self.scales, rows.saturating_mul(k.div_ceil(ACT_GROUP)))?;
        grow(&mut self.offsets, rows.saturating_mul(k.div_ceil(ACT_GROUP)))?;
        grow(&mut self.sums, rows.saturating_mul(k.div_ceil(INT4_GROUP)))
    }

    /// Quantizes the rows of `x`.
    pub(crate) fn quantize(
        &mut self,
        pool: &mut Pool,
        isa: Isa,
        x: Input<'_>,
        k: usize,
    ) -> Result<(), BackendError> {
        let rows = x.rows.len();
        self.reserve(rows, k)?;
        (self.stride, self.groups, self.small_groups) =
            (Self::stride(k), k.div_ceil(ACT_GROUP), k.div_ceil(INT4_GROUP));
        let (stride, groups, small_groups) = (self.stride, self.groups, self.small_groups);
        let (quads, scales) = (Shared::new(&mut self.quads), Shared::new(&mut self.scales));
        let (offsets, sums) = (Shared::new(&mut self.offsets), Shared::new(&mut self.sums));
        pool.split(rows, grain(rows, 2 * k, pool.num_threads()), |_, rows| {
            let (first, len) = (rows.start, rows.len());
            // SAFETY: `isa` was detected; these rows belong to this piece.
            unsafe {
                let rows = QuantizeRows {
                    x,
                    k,
                    rows,
                    stride,
                    quads: quads.slice(first * stride, len * stride),
                    scales: scales.slice(first * groups, len * groups),
                    offsets: offsets.slice(first * groups, len * groups),
                    sums: sums.slice(first * small_groups, len * small_groups),
                };
                dispatch_bytes(isa, rows);
            }
        })?;
        Ok(())
    }

    /// Rows `first..first + rows`, with at least `quads` of them each.
    #[inline(always)]
    pub(crate) fn rows(&self, first: usize, rows: usize, quads: usize) -> ByteRows {
        let Self { stride, groups, small_groups, .. } = *self;
        assert!(quads <= stride, "rows of {stride} quads for weights of {quads}");
        let end = first + rows;
        ByteRows {
            quads: self.quads[first * stride..end * stride].as_ptr(),
            stride,
            scales: self.scales[first * groups..end * groups].as_ptr(),
            offsets: self.offsets[first * groups..end * groups].as_ptr(),
            groups,
            sums: self.sums[first * small_groups..end * small_groups].as_ptr(),
            small_groups,
        }
    }
}

/// As [`quire_backend::quant::quantize_activations`], with the sums that the kernels need: some rows.
struct QuantizeRows<'a> {
    x: Input<'a>,
    k: usize,
    /// Of `x`; all below hold as many.
    rows: Range<usize>,
    stride: usize,
    quads: &'a mut [u32],
    scales: &'a mut [f32],
    offsets: &'a mut [i32],
    sums: &'a mut [i32],
}

impl PairKernel for QuantizeRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let Self { x, k, rows, stride, quads, scales, offsets, sums } = self;
        let (groups, small_groups) = (k.div_ceil(ACT_GROUP), k.div_ceil(INT4_GROUP));
        for (i, m) in rows.enumerate() {
            let (quads, sums) =
                (&mut quads[i * stride..][..stride], &mut sums[i * small_groups..][..small_groups]);
            let to = quads.chunks_mut(ACT_QUADS).zip(sums.chunks_mut(ACT_GROUP / INT4_GROUP));
            let to = to.zip(&mut scales[i * groups..]).zip(&mut offsets[i * groups..]);
            for (x, (((quads, sums), scale), offset)) in x.row(m, k).chunks(ACT_GROUP).zip(to) {
                // SAFETY: the caller's.
                (*scale, *offset) = unsafe {
                    match (x.try_into(), (&mut *quads).try_into(), (&mut *sums).try_into()) {
                        (Ok(x), Ok(quads), Ok(sums)) => quantize_group::<D>(x, quads, sums),
                        _ => quantize_rest::<D>(x, quads, sums),
                    }
                };
            }
        }
    }
}

/// Codes of one group, with their sums; returns its scale and offset. Magnitudes are compared as integers, among which
/// infinity and NaN come last, so that they show in the scale.
#[inline(always)]
unsafe fn quantize_group<D: ByteDot>(
    x: &[f32; ACT_GROUP],
    quads: &mut [u32; ACT_QUADS],
    sums: &mut [i32; ACT_GROUP / INT4_GROUP],
) -> (f32, i32) {
    let panels = x.as_chunks::<PANEL>().0;
    // SAFETY: all hold a panel, or four of them; the rest is the caller's.
    unsafe {
        let mut bits = [D::splat_int(0); 2];
        for pair in panels.as_chunks::<2>().0 {
            for (bits, panel) in bits.iter_mut().zip(pair) {
                *bits = D::max_magnitude(*bits, D::load_sums(panel.as_ptr()));
            }
        }
        let max = f32::from_bits(D::highest_word(bits[0]).max(D::highest_word(bits[1])));
        if max < TINY {
            quads.fill(0);
            sums.fill(0);
            return (0.0, 0);
        }
        let inverse = D::splat(127.0 / max);
        for (panel, quads) in panels.iter().zip(quads.as_chunks_mut::<{ PANEL / 4 }>().0) {
            D::store_bytes(quads.as_mut_ptr().cast(), D::mul(D::load_sums(panel.as_ptr()), inverse));
        }
        *sums = D::sum_halves(quads.as_ptr());
        (max / 127.0, -128 * sums.iter().sum::<i32>())
    }
}

/// A group that is not whole, with zeros up to the end of `quads`.
#[inline(always)]
unsafe fn quantize_rest<D: ByteDot>(x: &[f32], quads: &mut [u32], sums: &mut [i32]) -> (f32, i32) {
    let (mut padded, mut codes, mut all) = ([0.0; ACT_GROUP], [0; ACT_QUADS], [0; ACT_GROUP / INT4_GROUP]);
    padded[..x.len()].copy_from_slice(x);
    // SAFETY: the caller's.
    let result = unsafe { quantize_group::<D>(&padded, &mut codes, &mut all) };
    quads.copy_from_slice(&codes[..quads.len()]);
    sums.copy_from_slice(&all[..sums.len()]);
    result
}
