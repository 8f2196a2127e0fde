//! int8 and int4 as the byte kernels read them: weights in panels, activations in quads. [`quire_backend::quant`] defines
//! the numbers.
//!
//! A panel is [`PANEL`] output channels. int8: for each quad of inputs one vector `[PANEL][4]` of codes + 128. int4: for
//! each 32 inputs four vectors, of which the low nibbles are the codes of quads 0 to 3 and the high nibbles those of
//! quads 4 to 7; after all of them, for each 32 inputs the [`PANEL`] bytes of steps and zeros. Channels past the last,
//! and inputs past the last, have the value zero.

use quire_backend::convert::to_f32;
use quire_backend::quant::{
    ACT_GROUP, INT4_GROUP, TINY, check_finite, int4_value, quantize_int4, quantize_int8,
};
use quire_backend::{BackendError, LinearSource};
use quire_core::{QuantFormat, TensorView};

use crate::buffer::{Aligned, Frozen, Shared};
use crate::ops::grain;
use crate::ops::linear::Input;
use crate::pool::Pool;
use crate::simd::Isa;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairKernel, dispatch_pairs};

/// Quads of inputs that share an activation scale.
pub(crate) const ACT_QUADS: usize = ACT_GROUP / 4;
/// Quads of inputs that share a step and zero.
pub(crate) const INT4_QUADS: usize = INT4_GROUP / 4;
/// Vectors of codes of as many inputs.
pub(crate) const INT4_VECTORS: usize = INT4_QUADS / 2;
/// Words of a panel for as many inputs: codes, then steps and zeros.
const INT4_WORDS: usize = INT4_VECTORS * PANEL + PANEL / 4;

/// How the codes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codes {
    Int8,
    Int4,
}

impl Codes {
    /// Words of a panel of `k` inputs.
    pub(crate) const fn panel_words(self, k: usize) -> usize {
        match self {
            Self::Int8 => k.div_ceil(4) * PANEL,
            Self::Int4 => k.div_ceil(INT4_GROUP) * INT4_WORDS,
        }
    }
}

/// Quantized weights `[out_features, in_features]` in panels.
pub(crate) struct Quantized {
    codes: Codes,
    words: Frozen<u32>,
    /// One per channel, zero past the last.
    scales: Frozen<f32>,
    k: usize,
}

impl Quantized {
    /// Quantizes the rows of all parts, which have `k` columns and `n` rows in all.
    pub(crate) fn pack(
        pool: &mut Pool,
        source: &LinearSource<'_>,
        codes: Codes,
        n: usize,
        k: usize,
    ) -> Result<Self, BackendError> {
        let (panels, len) = (n.div_ceil(PANEL), codes.panel_words(k));
        let mut words = Aligned::zeroed(panels * len, source.name)?;
        let mut scales = Aligned::zeroed(panels * PANEL, source.name)?;
        let (to_words, to_scales) = (Shared::new(&mut words), Shared::new(&mut scales));
        let rows = source_rows(source);
        let failure = parking_lot::Mutex::new(None);
        pool.split(panels, 1, |_, range| {
            for p in range {
                // SAFETY: each panel is written by one piece.
                let (panel, scales) =
                    unsafe { (to_words.slice(p * len, len), to_scales.slice(p * PANEL, PANEL)) };
                if codes == Codes::Int8 {
                    panel.fill(0x8080_8080); // zeros, past the last channel and input
                }
                for (channel, row) in rows[p * PANEL..].iter().take(PANEL).enumerate() {
                    let at = Place { name: source.name, row: p * PANEL + channel, channel };
                    match pack_row(at, row, codes, panel, k) {
                        Ok(scale) => scales[channel] = scale,
                        Err(error) => *failure.lock() = Some(error),
                    }
                }
            }
        })?;
        match failure.into_inner() {
            Some(error) => Err(error),
            None => Ok(Self::from_panels(codes, words.into(), scales.into(), k)),
        }
    }

    /// Weights that were quantized before, `k` columns wide.
    pub(crate) const fn from_panels(codes: Codes, words: Frozen<u32>, scales: Frozen<f32>, k: usize) -> Self {
        Self { codes, words, scales, k }
    }

    /// All panels, and the scales of all channels.
    pub(crate) const fn panels(&self) -> (&Frozen<u32>, &Frozen<f32>) {
        (&self.words, &self.scales)
    }

    pub(crate) const fn codes(&self) -> Codes {
        self.codes
    }

    /// Quads of a row.
    pub(crate) const fn quads(&self) -> usize {
        match self.codes {
            Codes::Int8 => self.k.div_ceil(4),
            Codes::Int4 => self.k.div_ceil(INT4_GROUP) * INT4_QUADS,
        }
    }

    /// Words of panel `p`.
    #[inline(always)]
    pub(crate) fn panel(&self, p: usize) -> &[u32] {
        let len = self.codes.panel_words(self.k);
        &self.words[p * len..(p + 1) * len]
    }

    /// Where steps and zeros begin in a panel of int4, in words.
    #[inline(always)]
    pub(crate) const fn steps_at(&self) -> usize {
        self.k.div_ceil(INT4_GROUP) * INT4_VECTORS * PANEL
    }

    /// Scales of panel `p`.
    #[inline(always)]
    pub(crate) fn scales(&self, p: usize) -> &[f32] {
        &self.scales[p * PANEL..(p + 1) * PANEL]
    }

    /// Row `n` in f32, into `out`, which is as long as the row.
    pub(crate) fn row(&self, n: usize, out: &mut [f32]) {
        let (panel, channel, scale) = (self.panel(n / PANEL), n % PANEL, self.scales[n]);
        let byte = |word: usize, byte: usize| (panel[word] >> (8 * byte)) as u8;
        for (i, out) in out.iter_mut().enumerate() {
            let (quad, lane) = (i / 4, i % 4);
            let value = match self.codes {
                Codes::Int8 => i32::from(byte(quad * PANEL + channel, lane)) - 128,
                Codes::Int4 => {
                    let (group, quad) = (quad / INT4_QUADS, quad % INT4_QUADS);
                    let vector = group * INT4_VECTORS + quad % INT4_VECTORS;
                    let both = byte(vector * PANEL + channel, lane);
                    let code = if quad < INT4_VECTORS { both & 15 } else { both >> 4 };
                    let steps = self.steps_at() + group * (PANEL / 4);
                    int4_value(byte(steps + channel / 4, channel % 4), code)
                }
            };
            *out = value as f32 * scale;
        }
    }
}

/// Where a row of weights comes from and goes to.
#[derive(Clone, Copy)]
struct Place<'a> {
    name: &'a str,
    row: usize,
    channel: usize,
}

fn pack_row(
    at: Place<'_>,
    row: &TensorView<'_>,
    codes: Codes,
    panel: &mut [u32],
    k: usize,
) -> Result<f32, BackendError> {
    let weights = to_f32(at.name, row)?;
    check_finite(at.name, at.row, &weights)?;
    Ok(match codes {
        Codes::Int8 => {
            let mut q = vec![0; k.next_multiple_of(4)];
            let scale = quantize_int8(&weights, &mut q[..k]);
            for (quad, q) in q.as_chunks::<4>().0.iter().enumerate() {
                panel[quad * PANEL + at.channel] = u32::from_le_bytes(q.map(|q| q.cast_unsigned() ^ 0x80));
            }
            scale
        }
        Codes::Int4 => {
            let groups = k.div_ceil(INT4_GROUP);
            let (mut q, mut steps) = (vec![0; groups * INT4_GROUP], vec![0; groups]);
            let scale = quantize_int4(&weights, &mut q[..k], &mut steps);
            if let (Some(&last), true) = (steps.last(), !k.is_multiple_of(INT4_GROUP)) {
                q[k..].fill(last >> 4); // the code of zero
            }
            let (vectors, tail) = panel.split_at_mut(groups * INT4_VECTORS * PANEL);
            for (group, (q, steps)) in q.as_chunks::<INT4_GROUP>().0.iter().zip(steps).enumerate() {
                let (low, high) = q.split_at(INT4_GROUP / 2);
                let both = low.as_chunks::<4>().0.iter().zip(high.as_chunks::<4>().0);
                for (vector, (low, high)) in both.enumerate() {
                    vectors[(group * INT4_VECTORS + vector) * PANEL + at.channel] =
                        u32::from_le_bytes(*low) | u32::from_le_bytes(*high) << 4;
                }
                let byte = at.channel % 4;
                tail[group * (PANEL / 4) + at.channel / 4] |= u32::from(steps) << (8 * byte);
            }
            scale
        }
    })
}

/// The rows of all parts.
fn source_rows<'a>(source: &LinearSource<'a>) -> Vec<TensorView<'a>> {
    let rows = source.parts.iter().filter(|part| !part.weight.data.is_empty()).flat_map(|part| {
        let TensorView { dtype, shape, data } = part.weight;
        let row = data.chunks_exact(data.len() / shape[0].max(1));
        row.map(move |data| TensorView { dtype, shape: &shape[1..], data })
    });
    rows.collect()
}

/// The codes that a format of the checkpoint's loader asks for.
pub(crate) const fn codes_of(quant: QuantFormat) -> Option<Codes> {
    match quant {
        QuantFormat::Int8 => Some(Codes::Int8),
        QuantFormat::Int4 => Some(Codes::Int4),
        QuantFormat::None | QuantFormat::Fp8 => None,
    }
}

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
        fn grow<T: crate::element::Plain>(to: &mut Aligned<T>, len: usize) -> Result<(), BackendError> {
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
            for m in rows {
                // SAFETY: `isa` was detected; row `m` belongs to this piece.
                unsafe {
                    let row = QuantizeRow {
                        x: x.row(m, k),
                        quads: quads.slice(m * stride, stride),
                        scales: scales.slice(m * groups, groups),
                        offsets: offsets.slice(m * groups, groups),
                        sums: sums.slice(m * small_groups, small_groups),
                    };
                    dispatch_pairs(isa, row);
                }
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

/// As [`quire_backend::quant::quantize_activations`], with the sums that the kernels need.
struct QuantizeRow<'a> {
    x: &'a [f32],
    quads: &'a mut [u32],
    scales: &'a mut [f32],
    offsets: &'a mut [i32],
    sums: &'a mut [i32],
}

impl PairKernel for QuantizeRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        let to = self.quads.chunks_mut(ACT_QUADS).zip(self.sums.chunks_mut(ACT_GROUP / INT4_GROUP));
        let scales = self.scales.iter_mut().zip(self.offsets);
        for ((x, (quads, sums)), (scale, offset)) in self.x.chunks(ACT_GROUP).zip(to).zip(scales) {
            // SAFETY: the caller's.
            *scale = unsafe { quantize_group::<D>(x, quads) };
            for (sums, quads) in sums.chunks_mut(2).zip(quads.chunks(2 * INT4_QUADS)) {
                let (mut padded, mut by_quad) = ([0; PANEL], [0; PANEL]);
                padded[..quads.len()].copy_from_slice(quads);
                // SAFETY: as above, and both are one vector.
                unsafe {
                    let quads = D::load(padded.as_ptr());
                    D::store_words(by_quad.as_mut_ptr(), D::sum_bytes(quads));
                }
                for (sum, by_quad) in sums.iter_mut().zip(by_quad.as_chunks::<INT4_QUADS>().0) {
                    *sum = by_quad.iter().map(|x| x.cast_signed()).sum();
                }
            }
            *offset = -128 * sums.iter().sum::<i32>();
        }
    }
}

/// Codes of one group, with zeros up to the end of `quads`; returns its scale. Magnitudes are compared as integers,
/// among which infinity and NaN come last, so that they show in the scale.
#[inline(always)]
unsafe fn quantize_group<D: ByteDot>(x: &[f32], quads: &mut [u32]) -> f32 {
    let (panels, rest) = x.as_chunks::<PANEL>();
    let (mut max, mut last) = ([0u32; PANEL], [0.0; PANEL]);
    last[..rest.len()].copy_from_slice(rest);
    // SAFETY: all hold a panel; the rest is the caller's.
    unsafe {
        let mut bits = D::max_magnitude(D::splat_int(0), D::load_sums(last.as_ptr()));
        for panel in panels {
            bits = D::max_magnitude(bits, D::load_sums(panel.as_ptr()));
        }
        D::store_words(max.as_mut_ptr(), bits);
    }
    let max = f32::from_bits(max.into_iter().fold(0, u32::max));
    let (to, after) = quads.split_at_mut(panels.len() * (PANEL / 4));
    after.fill(0);
    if max < TINY {
        to.fill(0);
        return 0.0;
    }
    // SAFETY: all hold a panel; the rest is the caller's.
    unsafe {
        let inverse = D::splat(127.0 / max);
        let code = |from: &[f32; PANEL], to: &mut [u32; PANEL / 4]| {
            let scaled = D::mul(D::load_sums(from.as_ptr()), inverse);
            D::store_bytes(to.as_mut_ptr().cast(), D::round(scaled));
        };
        panels.iter().zip(to.as_chunks_mut().0).for_each(|(from, to)| code(from, to));
        if !rest.is_empty() {
            let mut codes = [0; PANEL / 4];
            code(&last, &mut codes);
            let len = after.len().min(PANEL / 4);
            after[..len].copy_from_slice(&codes[..len]);
        }
    }
    max / 127.0
}
