//! Where the sums of a tile go.

use quire_backend::Activation;

use super::lora::Expand;
use super::mlp::activate_lanes;
use crate::buffer::SharedRows;
use crate::packed::RoundedRows;
use crate::simd::bytes::ByteDot;
use crate::simd::pairs::{PANEL, PairDot, PairKernel};

/// What becomes of the sums of a tile. One type for all: each that a product is generic over doubles the machine code.
#[derive(Clone, Copy)]
pub(crate) enum Sink<'a> {
    Rows(ToRows<'a>),
    Gated(ToGated<'a>),
}

impl Sink<'_> {
    /// Takes the sums of token `m` for panels `p..p + P`.
    ///
    /// # Safety
    /// As for [`PairDot`]; nobody else touches these columns of row `m`.
    #[inline(always)]
    pub unsafe fn take<D: PairDot, const P: usize>(&self, m: usize, p: usize, sums: [D::V; P]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Rows(to) => to.take::<D, P>(m, p, sums),
                Self::Gated(to) => to.take::<D, P>(m, p, sums),
            }
        }
    }
}

/// Hands over the sums of rows `m..m + M`.
///
/// # Safety
/// As for [`Sink::take`].
#[inline(always)]
pub(crate) unsafe fn give<D: PairDot, const M: usize, const P: usize>(
    to: &Sink<'_>,
    m: usize,
    p: usize,
    sums: [[D::V; P]; M],
) {
    // Through memory, and to a function of its own: a sink is a long loop body, whose constants would push the sums of
    // the product out of the registers (109 instructions for 24 products instead of 62).
    let mut rows = [[[0.0; PANEL]; P]; M];
    // SAFETY: every array holds a panel; the rest is the caller's.
    unsafe {
        for r in 0..M {
            for i in 0..P {
                D::store(rows[r][i].as_mut_ptr(), sums[r][i]);
            }
        }
        D::apart(Give { rows: &rows, m, p, to: *to });
    }
}

/// What [`give`] does with sums in memory.
struct Give<'a, const P: usize> {
    rows: &'a [[[f32; PANEL]; P]],
    m: usize,
    p: usize,
    to: Sink<'a>,
}

impl<const P: usize> PairKernel for Give<'_, P> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<D: ByteDot>(self) {
        for (r, sums) in self.rows.iter().enumerate() {
            // SAFETY: every array holds a panel; the rest is the caller's.
            unsafe {
                let mut row = [D::zero(); P];
                for i in 0..P {
                    row[i] = D::load_sums(sums[i].as_ptr());
                }
                self.to.take::<D, P>(self.m + r, self.p, row);
            }
        }
    }
}

/// Plain rows of `n` columns.
#[derive(Clone, Copy)]
pub(crate) struct ToRows<'a> {
    pub bias: Option<&'a [f32]>,
    pub out: SharedRows<'a>,
    pub n: usize,
}

impl ToRows<'_> {
    #[inline(always)]
    unsafe fn take<D: PairDot, const P: usize>(&self, m: usize, p: usize, sums: [D::V; P]) {
        let first = p * PANEL;
        let width = (P * PANEL).min(self.n - first);
        // SAFETY: the columns are ours by contract; `out` holds whole panels if all are.
        unsafe {
            let out = self.out.part(m, first, width);
            if width == P * PANEL && self.bias.is_none() {
                for i in 0..P {
                    D::store(out.as_mut_ptr().add(i * PANEL), sums[i]);
                }
                return;
            }
            for (i, out) in out.chunks_mut(PANEL).enumerate() {
                let mut values = [0.0; PANEL];
                D::store(values.as_mut_ptr(), sums[i]);
                let values = &mut values[..out.len()];
                add_bias(values, self.bias, first + i * PANEL);
                out.copy_from_slice(values);
            }
        }
    }
}

/// The hidden layer of a gated feed-forward: even panels are the gate's, odd ones up's.
#[derive(Clone, Copy)]
pub(crate) struct ToGated<'a> {
    pub bias: Option<&'a [f32]>,
    pub lora: Option<&'a Expand<'a>>,
    pub activation: Activation,
    pub out: Hidden<'a>,
    pub n: usize,
}

/// Where it goes to: rounded, or as it is into the first columns.
#[derive(Clone, Copy)]
pub(crate) enum Hidden<'a> {
    Pairs(RoundedRows<'a>),
    Rows(SharedRows<'a>),
}

impl ToGated<'_> {
    #[inline(always)]
    unsafe fn take<D: PairDot, const P: usize>(&self, m: usize, p: usize, sums: [D::V; P]) {
        // One panel alone cannot be: both halves have the same number.
        for i in (0..P - 1).step_by(2) {
            let panel = (p + i) / 2;
            // SAFETY: the biases reach to the last channel; the columns are ours by contract.
            unsafe {
                let [mut gate, mut up] = [sums[i], sums[i + 1]];
                if let Some(bias) = self.bias {
                    gate = D::add(gate, D::load_sums(bias[panel * PANEL..][..PANEL].as_ptr()));
                    up = D::add(up, D::load_sums(bias[self.n + panel * PANEL..][..PANEL].as_ptr()));
                }
                if let Some(lora) = self.lora {
                    let (low, high) = (panel * PANEL, self.n + panel * PANEL);
                    gate = lora.panel::<D>(m, low).map_or(gate, |added| D::add(gate, added));
                    up = lora.panel::<D>(m, high).map_or(up, |added| D::add(up, added));
                }
                let hidden = D::mul(activate_lanes::<D>(self.activation, gate), up);
                match self.out {
                    Hidden::Pairs(out) => {
                        let mut pairs = [0; PANEL];
                        D::store_pairs(pairs.as_mut_ptr(), hidden, D::zero());
                        let out = out.part(m, panel * PANEL / 2, PANEL / 2);
                        out.copy_from_slice(&pairs[..PANEL / 2]);
                    }
                    Hidden::Rows(out) => D::store(out.part(m, panel * PANEL, PANEL).as_mut_ptr(), hidden),
                }
            }
        }
    }
}

#[inline(always)]
fn add_bias(values: &mut [f32], bias: Option<&[f32]>, first: usize) {
    if let Some(bias) = bias {
        values.iter_mut().zip(&bias[first..]).for_each(|(x, bias)| *x += bias);
    }
}
