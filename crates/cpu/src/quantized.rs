//! int8 and int4 weights as the byte kernels read them: in panels. [`quire_backend::quant`] defines the numbers; what they
//! are multiplied with is in `activations`.
//!
//! A panel is [`PANEL`] output channels. int8: for each quad of inputs one vector `[PANEL][4]` of codes + 128. int4: for
//! each 32 inputs four vectors, of which the low nibbles are the codes of quads 0 to 3 and the high nibbles those of
//! quads 4 to 7; after all of them, for each 32 inputs the [`PANEL`] bytes of steps and zeros. Channels past the last,
//! and inputs past the last, have the value zero.

use quire_backend::convert::to_f32;
use quire_backend::quant::{ACT_GROUP, INT4_GROUP, check_finite, int4_value, quantize_int4, quantize_int8};
use quire_backend::{BackendError, LinearSource};
use quire_core::{QuantFormat, TensorView};

pub(crate) use crate::activations::{ByteRows, Bytes};
use crate::buffer::{Aligned, Frozen, Shared};
use crate::pool::Pool;
use crate::simd::pairs::PANEL;

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
