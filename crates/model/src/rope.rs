//! Rotary position embeddings: the inverse frequencies of each scaling in use.
//!
//! RoPE is Su et al. 2021 (arXiv:2104.09864). The scalings have the meaning that Hugging Face transformers gives
//! them in `modeling_rope_utils.py`, because checkpoints are written against it, with one difference: the
//! frequencies are fixed when the model is loaded, from `max_model_len`, so that a token's keys never depend on
//! how long its sequence becomes. This matters to `Dynamic` only.
//!
//! Powers are taken in f64 and rounded; all else is f32 in transformers' order of operations, so that the results
//! agree with it to the last bit or two: at position 100,000 a relative error of 1e-6 would turn a key by 0.1.

use std::f64::consts::TAU;

/// Rotary positions of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Rotated elements of a head; even. Today always `head_dim`.
    pub dim: usize,
    /// The base: pair i turns by `theta^(-2i/dim)` per position before scaling.
    pub theta: f64,
    /// How the frequencies are changed for contexts longer than the pretraining's.
    pub scaling: RopeScaling,
}

/// A change of the rotary frequencies. Factors are at least 1.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As in the RoPE paper.
    Default,
    /// All frequencies divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware base change that grows with the context length (used by early long-context Llama finetunes).
    Dynamic {
        /// How strongly the base grows.
        factor: f64,
        /// Up to this length nothing changes.
        original_max_position_embeddings: usize,
    },
    /// Low frequencies divided by `factor`, high ones kept, a linear blend between (Llama 3.1).
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The pretraining context length.
        original_max_position_embeddings: usize,
    },
    /// Blend by the number of rotations over the original context (Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        /// The divisor of the interpolated frequencies.
        factor: f64,
        /// The pretraining context length.
        original_max_position_embeddings: usize,
        /// Pairs that turn more often than this over the original context are not scaled.
        beta_fast: f64,
        /// Pairs that turn less often than this are scaled fully.
        beta_slow: f64,
        /// Multiplies cos and sin, so the attention scores by its square.
        attention_factor: f32,
        /// Whether the ends of the blend are rounded outwards to whole pairs.
        truncate: bool,
    },
}

impl RopeSpec {
    /// The angle per position of each pair, `dim / 2` values, for a server whose sequences never exceed
    /// `max_model_len` tokens.
    pub fn inv_freq(&self, max_model_len: usize) -> Vec<f32> {
        match self.scaling {
            RopeScaling::Default => self.unscaled(self.theta),
            RopeScaling::Linear { factor } => {
                let factor = factor as f32;
                self.unscaled(self.theta).into_iter().map(|f| f / factor).collect()
            }
            RopeScaling::Dynamic { factor, original_max_position_embeddings: original } => {
                self.unscaled(self.dynamic_theta(factor, original, max_model_len))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => llama3(&self.unscaled(self.theta), factor as f32, low as f32, high as f32, original as f32),
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => self.yarn(factor as f32, original as f64, [beta_fast, beta_slow], truncate),
        }
    }

    /// Multiplies cos and sin. 1 for all but YaRN.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Positions per radian of each unscaled pair: `theta^(2i/dim)`.
    fn periods(&self, theta: f64) -> impl Iterator<Item = f32> {
        let dim = self.dim as f64;
        (0..self.dim).step_by(2).map(move |i| theta.powf(i as f64 / dim) as f32)
    }

    fn unscaled(&self, theta: f64) -> Vec<f32> {
        self.periods(theta).map(|period| 1.0 / period).collect()
    }

    fn dynamic_theta(&self, factor: f64, original: usize, max_model_len: usize) -> f64 {
        if max_model_len <= original {
            return self.theta;
        }
        let (dim, ratio) = (self.dim as f64, max_model_len as f64 / original as f64);
        self.theta * (factor * ratio - (factor - 1.0)).powf(dim / (dim - 2.0))
    }

    fn yarn(&self, factor: f32, original: f64, betas: [f64; 2], truncate: bool) -> Vec<f32> {
        let dim = self.dim as f64;
        // The (fractional) pair that turns `rotations` times over the original context.
        let pair_of = |rotations: f64| dim * (original / (rotations * TAU)).ln() / (2.0 * self.theta.ln());
        let [mut low, mut high] = betas.map(pair_of);
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let (low, span) = (low as f32, (high - low) as f32);
        self.periods(self.theta)
            .enumerate()
            .map(|(i, period)| {
                let kept = 1.0 - ((i as f32 - low) / span).clamp(0.0, 1.0);
                (1.0 / (factor * period)) * (1.0 - kept) + (1.0 / period) * kept
            })
            .collect()
    }
}

fn llama3(unscaled: &[f32], factor: f32, low: f32, high: f32, original: f32) -> Vec<f32> {
    let scale = |&freq: &f32| {
        let wavelength = TAU as f32 / freq;
        if wavelength > original / low {
            freq / factor
        } else if wavelength < original / high {
            freq
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * freq / factor + smooth * freq
        }
    };
    unscaled.iter().map(scale).collect()
}
