//! Weights in 8 and 4 bits, in the order in which the integer kernels read them (`kernels/include/int_gemm.cuh`): a
//! lane's 16 bytes are whole registers of matrix fragments.

use quire_backend::quant;

/// Outputs in a panel.
pub(crate) const PANEL: usize = 16;
/// Inputs in a unit: those that share a scale of the activations.
const UNIT: usize = quant::ACT_GROUP;
/// Steps and zeros of a unit: one byte for each row and [`quant::INT4_GROUP`] inputs.
const UNIT_STEPS: usize = PANEL * UNIT / quant::INT4_GROUP;

/// Bits of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// int8: the stored byte.
    Eight,
    /// int4: `step * (code - zero)`.
    Four,
}

/// A packed matrix; what lies beyond its rows and columns multiplies to zero.
#[derive(Clone, Debug)]
pub struct IntWeights {
    bits: Bits,
    out_features: usize,
    in_features: usize,
    /// `[panels, units]` of 4096 or 2048 bytes.
    pub weights: Vec<u8>,
    /// int4: `[panels, units, 128]`; int8: empty.
    pub steps: Vec<u8>,
    /// `[panels * 16]`.
    pub scales: Vec<f32>,
}

impl IntWeights {
    /// All zeros.
    pub fn new(bits: Bits, out_features: usize, in_features: usize) -> Self {
        let units = out_features.div_ceil(PANEL) * in_features.div_ceil(UNIT);
        let (weights, steps) = match bits {
            Bits::Eight => (PANEL * UNIT, 0),
            Bits::Four => (PANEL * UNIT / 2, UNIT_STEPS),
        };
        Self {
            bits,
            out_features,
            in_features,
            weights: vec![0; units * weights],
            steps: vec![0; units * steps],
            scales: vec![0.0; out_features.div_ceil(PANEL) * PANEL],
        }
    }

    /// Units of a row: groups of activations.
    pub fn groups(&self) -> usize {
        self.in_features.div_ceil(UNIT)
    }

    /// Quantizes and packs row `n`.
    ///
    /// # Panics
    /// There is no such row, or `row` has not `in_features` numbers.
    pub fn set_row(&mut self, n: usize, row: &[f32]) {
        assert!(n < self.out_features, "row {n} of {}", self.out_features);
        assert_eq!(row.len(), self.in_features, "row {n}");
        match self.bits {
            Bits::Eight => {
                let mut codes = vec![0; row.len()];
                self.scales[n] = quant::quantize_int8(row, &mut codes);
                for (k, code) in codes.into_iter().enumerate() {
                    let at = self.place(n, k).byte_of_int8();
                    self.weights[at] = code as u8;
                }
            }
            Bits::Four => {
                let (mut codes, mut steps) =
                    (vec![0; row.len()], vec![0; row.len().div_ceil(quant::INT4_GROUP)]);
                self.scales[n] = quant::quantize_int4(row, &mut codes, &mut steps);
                for (k, code) in codes.into_iter().enumerate() {
                    let (at, shift) = self.place(n, k).nibble_of_int4();
                    self.weights[at] = self.weights[at] & !(15 << shift) | code << shift;
                }
                for (group, step) in steps.into_iter().enumerate() {
                    let at = self.place(n, group * quant::INT4_GROUP).step();
                    self.steps[at] = step;
                }
            }
        }
    }

    fn place(&self, n: usize, k: usize) -> Place {
        Place {
            unit: n / PANEL * self.groups() + k / UNIT,
            half: n % PANEL / 8,
            tile: k % UNIT / 64,
            lane: n % 8 * 4 + k % 64 / 16,
            input: k % 16,
        }
    }
}

/// Where a weight lies.
struct Place {
    unit: usize,
    /// Row below or from 8 of the panel.
    half: usize,
    /// 64 inputs.
    tile: usize,
    lane: usize,
    /// Of the lane's 16.
    input: usize,
}

impl Place {
    fn byte_of_int8(&self) -> usize {
        self.unit * PANEL * UNIT + (2 * self.tile + self.half) * 512 + self.lane * 16 + self.input
    }

    /// Byte, and shift within it.
    fn nibble_of_int4(&self) -> (usize, usize) {
        let word = 8 * self.half + self.input / 8 * 4;
        let byte = self.unit * PANEL * UNIT / 2 + self.tile * 512 + self.lane * 16 + word + self.input % 4;
        (byte, self.input % 8 / 4 * 4)
    }

    fn step(&self) -> usize {
        self.unit * UNIT_STEPS + self.lane / 2 * 8 + self.half * 4 + self.tile
    }
}
