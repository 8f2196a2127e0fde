//! Linear layers: `out = x · weightᵀ + bias`, split over output rows.
//!
//! A thread takes a range of weight rows and goes through the tokens in groups that stay in its L2 cache, so that weights
//! come from memory once per group of tokens and activations come from cache.

use std::ops::Range;

use half::{bf16, f16};
use quire_backend::{BackendError, LogitRow};

use super::dot::dot_tile;
use super::gemm::{Gemm, Places};
use super::grain;
use super::int_gemm::{IntGemm, Panels};
use super::sink::{Sink, ToRows};
use crate::buffer::{CpuBuf, SharedRows};
use crate::element::Element;
use crate::packed::Rounded;
use crate::pool::Pool;
use crate::quantized::Bytes;
use crate::simd::pairs::PANEL;
use crate::simd::{Isa, Kernel, Simd, dispatch};
use crate::weights::{CpuWeight, Matrix};

/// Weight rows, and tokens, of one register tile: twelve sums, as many as sixteen vector registers carry.
const TILE_ROWS: usize = 4;
const TILE_TOKENS: usize = 3;
/// Weight rows at once where there is one token: enough sums to hide the latency of an addition.
const SINGLE_ROWS: usize = 8;
/// Floats of activations that stay in cache while weights stream by: half of a 1 MiB L2.
const GROUP_FLOATS: usize = 128 * 1024;

/// The rows of `x` that a linear layer reads.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// Rows `0..n`.
    First(usize),
    /// One row per logit row.
    Gather(&'a [LogitRow]),
    /// Of each slot, the row that it belongs to: rows have `per_row` slots each.
    Slots { slots: &'a [u32], per_row: usize },
}

impl Rows<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::First(n) => *n,
            Self::Gather(rows) => rows.len(),
            Self::Slots { slots, .. } => slots.len(),
        }
    }

    fn index(&self, m: usize) -> usize {
        match self {
            Self::First(_) => m,
            Self::Gather(rows) => rows[m].row as usize,
            Self::Slots { slots, per_row } => slots[m] as usize / per_row,
        }
    }
}

/// Columns `0..in_features` of the rows of a buffer.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub values: &'a [f32],
    pub stride: usize,
    pub rows: Rows<'a>,
}

impl<'a> Input<'a> {
    pub(crate) fn new(buf: &'a CpuBuf, rows: Rows<'a>) -> Self {
        Self { values: &buf.values, stride: buf.cols, rows }
    }

    /// The first `k` elements of row `m`.
    #[inline(always)]
    pub(crate) fn row(&self, m: usize, k: usize) -> &'a [f32] {
        let start = self.rows.index(m) * self.stride;
        &self.values[start..start + k]
    }
}

/// Room for the inputs of a layer in the form that its kernel reads, and for expanded panels.
pub(crate) struct Inputs {
    pub rounded: Rounded,
    pub bytes: Bytes,
    /// One per thread.
    pub panels: Vec<Panels>,
}

impl Inputs {
    pub(crate) fn new(threads: usize) -> Result<Self, BackendError> {
        let panels = (0..threads).map(|_| Vec::new()).collect();
        Ok(Self { rounded: Rounded::new()?, bytes: Bytes::new()?, panels })
    }
}

/// The whole operation; `inputs` is room to work in.
pub(crate) fn linear(
    pool: &mut Pool,
    isa: Isa,
    weight: &CpuWeight,
    x: Input<'_>,
    inputs: &mut Inputs,
    out: SharedRows<'_>,
) -> Result<(), BackendError> {
    let tokens = x.rows.len();
    let (n, k, bias) = (weight.out_features, weight.in_features, weight.bias.as_deref());
    match &weight.matrix {
        Matrix::Packed(packed) => {
            inputs.rounded.round(pool, isa, x, k)?;
            let gemm = Gemm { weight: packed, bias, x: &inputs.rounded, tokens, n };
            return Ok(gemm.run(pool, isa, out)?);
        }
        Matrix::Quantized(quantized) => {
            inputs.bytes.quantize(pool, isa, x, k)?;
            let gemm = IntGemm { weight: quantized, x: &inputs.bytes, tokens };
            let to = Sink::Rows(ToRows { bias, out, n });
            return Ok(gemm.run(pool, isa, &mut inputs.panels, n.div_ceil(PANEL), Places::IN_ORDER, to)?);
        }
        Matrix::F32(_) | Matrix::F16(_) | Matrix::Bf16(_) => {}
    }
    let pieces = n.div_ceil(SINGLE_ROWS);
    let work = SINGLE_ROWS * weight.in_features * tokens;
    let grain = grain(pieces, work, pool.num_threads());
    pool.split(pieces, grain, |_, pieces| {
        let rows = pieces.start * SINGLE_ROWS..(pieces.end * SINGLE_ROWS).min(n);
        // SAFETY: `isa` was detected; each thread has weight rows, that is columns of `out`, of its own.
        unsafe { linear_rows(isa, weight, 0, rows, x, out) };
    })?;
    Ok(())
}

/// Output columns `rows` for all tokens, of a layer that begins at row `first` of `weight`; not of packed weights.
///
/// # Safety
/// `isa` is available; nobody else touches these columns of `out`.
pub(crate) unsafe fn linear_rows(
    isa: Isa,
    weight: &CpuWeight,
    first: usize,
    rows: Range<usize>,
    x: Input<'_>,
    out: SharedRows<'_>,
) {
    let (k, bias) = (weight.in_features, weight.bias.as_deref().map(|bias| &bias[first..]));
    let from = first * k;
    // SAFETY: the caller's.
    unsafe {
        match &weight.matrix {
            Matrix::F32(all) => dispatch(isa, RowGemm::<f32> { matrix: &all[from..], k, bias, rows, x, out }),
            Matrix::F16(all) => dispatch(isa, RowGemm::<f16> { matrix: &all[from..], k, bias, rows, x, out }),
            Matrix::Bf16(all) => {
                dispatch(isa, RowGemm::<bf16> { matrix: &all[from..], k, bias, rows, x, out });
            }
            Matrix::Packed(_) | Matrix::Quantized(_) => {
                unreachable!("packed weights have an operation of their own")
            }
        }
    }
}

struct RowGemm<'a, E> {
    matrix: &'a [E],
    k: usize,
    bias: Option<&'a [f32]>,
    rows: Range<usize>,
    x: Input<'a>,
    out: SharedRows<'a>,
}

impl<E: Element> Kernel for RowGemm<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let tokens = self.x.rows.len();
        let group = (GROUP_FLOATS / self.k.max(1)).next_multiple_of(TILE_TOKENS).max(TILE_TOKENS);
        for first in (0..tokens).step_by(group) {
            let group = first..(first + group).min(tokens);
            // SAFETY: the caller's.
            unsafe {
                if group.len() == 1 {
                    self.columns::<S, SINGLE_ROWS>(group);
                } else {
                    self.columns::<S, TILE_ROWS>(group);
                }
            }
        }
    }
}

impl<E: Element> RowGemm<'_, E> {
    /// All rows for one group of tokens, `R` rows at a time.
    #[inline(always)]
    unsafe fn columns<S: Simd, const R: usize>(&self, group: Range<usize>) {
        let mut n = self.rows.start;
        // SAFETY: the caller's; the tiles cover `rows` and `group`.
        unsafe {
            while n + R <= self.rows.end {
                self.panel::<S, R>(n, group.clone());
                n += R;
            }
            while n < self.rows.end {
                self.panel::<S, 1>(n, group.clone());
                n += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn panel<S: Simd, const R: usize>(&self, n: usize, group: Range<usize>) {
        let mut m = group.start;
        // SAFETY: the caller's.
        unsafe {
            if R <= TILE_ROWS {
                while m + TILE_TOKENS <= group.end {
                    self.tile::<S, R, TILE_TOKENS>(n, m);
                    m += TILE_TOKENS;
                }
                if m + 2 == group.end {
                    self.tile::<S, R, 2>(n, m);
                    m += 2;
                }
            }
            if m < group.end {
                self.tile::<S, R, 1>(n, m);
            }
        }
    }

    /// `out[m..m + M][n..n + R]`.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const M: usize>(&self, n: usize, m: usize) {
        let k = self.k;
        let weights = &self.matrix[n * k..(n + R) * k];
        // SAFETY: `weights` holds R rows of k, `Input::row` checks k elements; the columns are ours by contract.
        unsafe {
            let rows = std::array::from_fn(|r| weights.as_ptr().add(r * k));
            let xs = std::array::from_fn(|i| self.x.row(m + i, k).as_ptr());
            let dots = dot_tile::<S, E, R, M>(rows, xs, k);
            for i in 0..M {
                let out = self.out.part(m + i, n, R);
                for r in 0..R {
                    out[r] = dots[r][i] + self.bias.map_or(0.0, |bias| bias[n + r]);
                }
            }
        }
    }
}
