//! How long a step takes: a model with seven coefficients, and its correction by what steps really took.
//!
//! A step with rows `i`, each of `p_i` new tokens that start at position `s_i`, takes
//!
//! ```text
//! fixed + per_row · rows + max(weights, per_token · Σ p_i) + per_context_token · Σ s_i
//!       + per_attention · Σ p_i (s_i + p_i / 2)          (the last sum over rows with p_i > 1)
//!       + per_copied_block · blocks copied from or to host memory
//! ```
//!
//! microseconds: launches, work per sequence, the linear layers (bound by reading the weights, or by arithmetic), reading
//! the KV cache, the arithmetic of attention in prefill, and the link to the host tier. [`CostModel`] is that formula; [`OnlineCostModel`] learns a
//! factor for each coefficient while the engine runs, so that it also learns from how many tokens on arithmetic takes
//! longer than reading the weights. The simulator uses the first as the truth, the policies use the second.

use crate::host_tier::HostTierConfig;

/// Everything about a step that its duration depends on. Sums over rows, so that a row can be added at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepShape {
    /// Rows, one per scheduled sequence.
    pub num_rows: u32,
    /// New tokens of all rows.
    pub num_tokens: u32,
    /// Tokens whose KV is read: the positions before the first new token, over all rows.
    pub num_context_tokens: u64,
    /// Σ p (s + p / 2) over rows of more than one token: pairs of positions that attend to each other.
    pub num_attended_pairs: f64,
    /// KV blocks copied between device and host memory.
    pub num_copied_blocks: u32,
}

impl StepShape {
    /// Adds a row of `num_new_tokens` tokens that starts at position `start`.
    #[must_use]
    pub fn with_row(mut self, start: u32, num_new_tokens: u32) -> Self {
        self.add_row(start, num_new_tokens);
        self
    }

    /// Adds a row of `num_new_tokens` tokens that starts at position `start`.
    pub fn add_row(&mut self, start: u32, num_new_tokens: u32) {
        self.num_rows += 1;
        self.num_tokens += num_new_tokens;
        self.num_context_tokens += u64::from(start);
        if num_new_tokens > 1 {
            let (start, len) = (f64::from(start), f64::from(num_new_tokens));
            self.num_attended_pairs += len * (start + len / 2.0);
        }
    }
}

/// The step-time model: plain coefficients in microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Of any step.
    pub fixed: f64,
    /// Of each row: sampling, metadata.
    pub per_row: f64,
    /// Of reading all weights once; hides arithmetic that takes less.
    pub weights: f64,
    /// Of each token in the linear layers.
    pub per_token: f64,
    /// Of reading the KV of one token.
    pub per_context_token: f64,
    /// Of one pair of positions in prefill attention, all layers and heads.
    pub per_attention: f64,
    /// Of copying one KV block to or from host memory; 0 where there is no host tier.
    pub per_copied_block: f64,
}

/// What each coefficient comes to in a step, in microseconds, in the order of the fields.
type Terms = [f64; 7];
/// Places of the two of which the longer hides the other.
const WEIGHTS: usize = 2;
const PER_TOKEN: usize = 3;
const PER_COPIED_BLOCK: usize = 6;

impl CostModel {
    /// Predicted duration in microseconds.
    pub fn predict(&self, shape: &StepShape) -> f64 {
        duration(&self.terms(shape))
    }

    fn terms(&self, shape: &StepShape) -> Terms {
        [
            self.fixed,
            self.per_row * f64::from(shape.num_rows),
            self.weights,
            self.per_token * f64::from(shape.num_tokens),
            self.per_context_token * shape.num_context_tokens as f64,
            self.per_attention * shape.num_attended_pairs,
            self.per_copied_block * f64::from(shape.num_copied_blocks),
        ]
    }
}

fn duration(&[fixed, rows, weights, tokens, context, attention, copies]: &Terms) -> f64 {
    fixed + rows + weights.max(tokens) + context + attention + copies
}

/// A model on a device, in the units in which they are published; [`Self::cost`] turns it into a [`CostModel`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Calibration {
    /// The device's name, as `--gpu` takes it.
    pub gpu: &'static str,
    /// The model's name, as `--model` takes it.
    pub model: &'static str,
    /// Bytes of weights read in a step.
    pub weight_bytes: f64,
    /// Parameters of the linear layers; two floating-point operations each per token.
    pub linear_params: f64,
    /// Bytes of KV per token.
    pub kv_bytes_per_token: f64,
    /// Layers.
    pub num_layers: f64,
    /// Width of all query heads together.
    pub hidden_size: f64,
    /// Tokens of KV that fit beside the weights.
    pub kv_capacity_tokens: u32,
    /// Reached in the linear layers, operations per second.
    pub linear_flops: f64,
    /// Reached in prefill attention, operations per second.
    pub attention_flops: f64,
    /// Reached when reading KV, bytes per second.
    pub kv_bandwidth: f64,
    /// Reached when reading weights, bytes per second.
    pub weight_bandwidth: f64,
    /// Microseconds per row.
    pub per_row_us: f64,
    /// Microseconds per step.
    pub fixed_us: f64,
}

impl Calibration {
    /// Llama-3.1-8B in FP8 on one H200, fitted to ten points of TensorRT-LLM 1.0's `perf-overview.md` (rms 1.8 %).
    pub const H200_LLAMA_3_1_8B: Self = Self {
        gpu: "h200",
        model: "llama-3.1-8b",
        weight_bytes: 8.5e9,
        linear_params: 7.50e9,
        kv_bytes_per_token: 65_536.0,
        num_layers: 32.0,
        hidden_size: 4096.0,
        kv_capacity_tokens: 1_800_000,
        linear_flops: 1.14e15,
        attention_flops: 5.9e14,
        kv_bandwidth: 4.26e12,
        weight_bandwidth: 3.84e12,
        per_row_us: 6.7,
        fixed_us: 700.0,
    };

    /// Llama-3.3-70B in FP8 on one H200, from the same table (rms 4.1 %).
    pub const H200_LLAMA_3_3_70B: Self = Self {
        gpu: "h200",
        model: "llama-3.3-70b",
        weight_bytes: 70.5e9,
        linear_params: 69.5e9,
        kv_bytes_per_token: 163_840.0,
        num_layers: 80.0,
        hidden_size: 8192.0,
        kv_capacity_tokens: 330_000,
        linear_flops: 1.25e15,
        attention_flops: 5.9e14,
        kv_bandwidth: 2.06e12,
        weight_bandwidth: 3.84e12,
        per_row_us: 14.4,
        fixed_us: 1500.0,
    };

    /// All of them.
    pub const ALL: [Self; 2] = [Self::H200_LLAMA_3_1_8B, Self::H200_LLAMA_3_3_70B];

    /// The calibration of `model` on `gpu`, if there is one.
    pub fn find(gpu: &str, model: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.gpu == gpu && known.model == model)
    }

    /// A host tier of `bytes` behind a link of `bytes_per_second`, in blocks of `block_size` tokens.
    pub fn host_tier(&self, bytes: f64, bytes_per_second: f64, block_size: u32) -> HostTierConfig {
        let block_bytes = self.kv_bytes_per_token * f64::from(block_size);
        let per_copied_block = 1e6 * block_bytes / bytes_per_second;
        HostTierConfig {
            num_blocks: (bytes / block_bytes) as u32,
            block_bytes: block_bytes as u64,
            cost: CostModel { per_copied_block, ..self.cost() },
        }
    }

    /// The coefficients in microseconds.
    pub fn cost(&self) -> CostModel {
        const MICROS: f64 = 1e6;
        CostModel {
            fixed: self.fixed_us,
            per_row: self.per_row_us,
            weights: MICROS * self.weight_bytes / self.weight_bandwidth,
            per_token: MICROS * 2.0 * self.linear_params / self.linear_flops,
            per_context_token: MICROS * self.kv_bytes_per_token / self.kv_bandwidth,
            per_attention: MICROS * 4.0 * self.hidden_size * self.num_layers / self.attention_flops,
            per_copied_block: 0.0,
        }
    }
}

/// Factors stay within these bounds of the base model, so that no run of odd measurements makes a prediction absurd.
const FACTOR_BOUNDS: (f64, f64) = (1.0 / 256.0, 256.0);
/// Variance of a factor, relative to it, before anything was measured: the base model may be quite wrong.
const PRIOR_VARIANCE: f64 = 1.0;
/// How much a factor may drift per step (variance): clocks throttle, neighbours come, batches change character.
const DRIFT_VARIANCE: f64 = 1e-5;
/// Variance of one relative measurement.
const NOISE_VARIANCE: f64 = 4e-4;
/// A measurement moves the factors by at most so many mean deviations; a page fault is not a trend.
const MAX_DEVIATIONS: f64 = 3.0;
/// Nor by more than this at a time, up or down: beyond, what a step would do to the factors is not what its errors say.
const MAX_INCREASE: f64 = 1.0;
const MAX_DECREASE: f64 = 0.5;
/// Weight of the newest deviation in their mean.
const DEVIATION_WEIGHT: f64 = 0.05;
/// The quantile of the error that is tracked, and how fast.
const ERROR_QUANTILE: f64 = 0.9;
const QUANTILE_RATE: f64 = 0.05;

/// A [`CostModel`] corrected by measurements: one factor per coefficient, by an extended Kalman filter on the logarithm of
/// the duration, so that the unit of the base model does not matter (recursive least squares with a random walk in place
/// of forgetting, so that a term that does not occur for a while keeps what was learned). Of reading weights and
/// arithmetic on tokens, which hide each other, a step teaches the one that is thought to take longer. Errors are clipped,
/// and what was clipped is not taken for knowledge. Factors stay positive, so predictions grow with the step.
/// Deterministic; about two hundred operations a step.
#[derive(Clone, Debug)]
pub struct OnlineCostModel {
    base: CostModel,
    factors: Terms,
    covariance: [Terms; 7],
    /// Mean absolute innovation.
    deviation: f64,
    last_error: f64,
    error_p90: f64,
    num_observed: u64,
}

impl OnlineCostModel {
    /// Starts with the base model as it is.
    pub fn new(base: CostModel) -> Self {
        let mut covariance = [Terms::default(); 7];
        for (at, row) in covariance.iter_mut().enumerate() {
            row[at] = PRIOR_VARIANCE;
        }
        Self {
            base,
            factors: [1.0; 7],
            covariance,
            deviation: 1.0,
            last_error: 0.0,
            error_p90: 0.0,
            num_observed: 0,
        }
    }

    /// Predicted duration in microseconds.
    pub fn predict(&self, shape: &StepShape) -> f64 {
        duration(&self.terms(shape))
    }

    fn terms(&self, shape: &StepShape) -> Terms {
        let mut terms = self.base.terms(shape);
        terms.iter_mut().zip(&self.factors).for_each(|(term, factor)| *term *= factor);
        terms
    }

    /// What copying one block takes, in microseconds.
    pub fn copied_block(&self) -> f64 {
        self.base.per_copied_block * self.factors[PER_COPIED_BLOCK]
    }

    /// The most tokens, `<= max_tokens`, that a row starting at `start` may have beside `shape` for the step to take at
    /// most `limit_us`. 0: not even one.
    pub fn largest_row(&self, shape: &StepShape, start: u32, max_tokens: u32, limit_us: f64) -> u32 {
        let fits = |len: u32| self.predict(&shape.with_row(start, len)) <= limit_us;
        if max_tokens == 0 || fits(max_tokens) {
            return max_tokens;
        }
        // The duration grows with the length: `low` fits, `high` does not.
        let (mut low, mut high) = (0, max_tokens);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle) { low = middle } else { high = middle }
        }
        low
    }

    /// Learns that a step of this shape took `measured_us`. What is not a positive number is ignored.
    pub fn observe(&mut self, shape: &StepShape, measured_us: f64) {
        let mut terms = self.terms(shape);
        let predicted = duration(&terms);
        if !(measured_us.is_finite() && measured_us > 0.0 && predicted > 0.0) {
            return;
        }
        self.record_error(predicted, measured_us);
        let hidden = if terms[PER_TOKEN] > terms[WEIGHTS] { WEIGHTS } else { PER_TOKEN };
        terms[hidden] = 0.0;
        // One division, not eight.
        let inverse = 1.0 / predicted;
        let shares = terms.map(|term| term * inverse);
        let error = (measured_us - predicted) * inverse;
        let bound = MAX_DEVIATIONS * self.deviation;
        let innovation = error.clamp(-bound.min(MAX_DECREASE), bound.min(MAX_INCREASE));
        self.deviation += DEVIATION_WEIGHT * (innovation.abs() - self.deviation);
        self.deviation = self.deviation.max(NOISE_VARIANCE.sqrt());
        self.correct(&shares, innovation, innovation == error);
    }

    /// A step whose terms had these shares took longer by `innovation` of what was predicted, or, if not `exact`, by more.
    fn correct(&mut self, shares: &Terms, innovation: f64, exact: bool) {
        let mut spread = Terms::default();
        for (at, row) in self.covariance.iter_mut().enumerate() {
            row[at] = (row[at] + DRIFT_VARIANCE).min(PRIOR_VARIANCE);
            spread[at] = row.iter().zip(shares).map(|(c, share)| c * share).sum();
        }
        let variance = NOISE_VARIANCE + spread.iter().zip(shares).map(|(s, share)| s * share).sum::<f64>();
        let gains = spread.map(|spread| spread * (1.0 / variance));
        // What may be a stall must not tell terms apart that have not been told apart yet.
        let limit = if exact { f64::INFINITY } else { 1.0 };
        for (factor, gain) in self.factors.iter_mut().zip(&gains) {
            let change = 1.0 + gain.clamp(-limit, limit) * innovation;
            let change = change.clamp(1.0 - MAX_DECREASE, 1.0 + MAX_INCREASE);
            *factor = (*factor * change).clamp(FACTOR_BOUNDS.0, FACTOR_BOUNDS.1);
        }
        if exact {
            for (row, gain) in self.covariance.iter_mut().zip(&gains) {
                row.iter_mut().zip(&spread).for_each(|(cell, spread)| *cell -= gain * spread);
            }
        }
    }

    /// Stochastic approximation of a quantile (Robbins & Monro, 1951), with steps in proportion to its size.
    fn record_error(&mut self, predicted: f64, measured: f64) {
        self.last_error = (predicted - measured).abs() / measured;
        self.num_observed += 1;
        if self.num_observed == 1 {
            self.error_p90 = self.last_error;
            return;
        }
        let step = QUANTILE_RATE * self.error_p90.max(1e-3);
        self.error_p90 += if self.last_error > self.error_p90 {
            step * ERROR_QUANTILE / (1.0 - ERROR_QUANTILE)
        } else {
            -step
        };
    }

    /// `|predicted - measured| / measured` of the latest step, predicted before it was measured.
    pub fn last_error(&self) -> f64 {
        self.last_error
    }

    /// The error that nine in ten of the latest hundred or so steps stay below.
    pub fn error_p90(&self) -> f64 {
        self.error_p90
    }

    /// Steps measured.
    pub fn num_observed(&self) -> u64 {
        self.num_observed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decodes(num: u32, context: u32) -> StepShape {
        (0..num).fold(StepShape::default(), |shape, _| shape.with_row(context, 1))
    }

    #[test]
    fn presets_give_the_published_cases() {
        let [small, large] = Calibration::ALL.map(|known| known.cost());
        let prefill = |tokens| StepShape::default().with_row(0, tokens);
        let mixed = |tokens| decodes(256, 2048).with_row(0, tokens);
        for (model, shape, ms) in [
            (small, decodes(1, 1024), 2.9),
            (small, decodes(64, 2048), 5.4),
            (small, decodes(256, 2048), 13.8),
            (small, decodes(1024, 1024), 37.2),
            (small, prefill(2048), 29.5),
            (small, prefill(8192), 138.0),
            (small, mixed(512), 20.7),
            (small, mixed(2048), 42.6),
            (large, decodes(1, 1024), 20.0),
            (large, decodes(64, 2048), 31.0),
            (large, prefill(2048), 239.0),
            (large, prefill(8192), 1062.0),
        ] {
            let predicted = model.predict(&shape) / 1000.0;
            assert!((predicted / ms - 1.0).abs() < 0.015, "{shape:?}: {predicted} ms, published {ms}");
        }
        assert_eq!(Calibration::find("h200", "llama-3.1-8b"), Some(Calibration::H200_LLAMA_3_1_8B));
        assert_eq!(Calibration::find("h200", "llama"), None);
    }

    fn shapes() -> impl Iterator<Item = StepShape> {
        let mut state = 9_u64;
        let mut next = move |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % below) as u32
        };
        std::iter::repeat_with(move || {
            let shape = decodes(next(256), 64 + next(4000));
            if next(3) == 0 { shape.with_row(next(8000), 1 + next(2048)) } else { shape.with_row(100, 1) }
        })
    }

    /// Below what error nine in ten of `steps` are on a device that takes `scale` times what `truth` says, with noise of
    /// ±3 %, and a stall in every fiftieth step, which does not count.
    fn error_on(truth: &CostModel, scale: f64, steps: std::ops::Range<usize>) -> f64 {
        let mut model = OnlineCostModel::new(Calibration::H200_LLAMA_3_1_8B.cost());
        let mut errors = Vec::new();
        for (step, shape) in shapes().take(steps.end).enumerate() {
            let noise = 0.97 + 0.06 * ((step * 7919 % 101) as f64 / 100.0);
            let stall = if step % 50 == 7 { 20.0 } else { 1.0 };
            model.observe(&shape, scale * noise * stall * truth.predict(&shape));
            if step >= steps.start && stall == 1.0 {
                errors.push(model.last_error());
            }
        }
        assert!(model.error_p90() < 0.15, "with stalls: {}", model.error_p90());
        errors.sort_by(f64::total_cmp);
        errors[errors.len() * 9 / 10]
    }

    #[test]
    fn the_error_of_the_corrected_model_is_small_on_another_machine() {
        let base = Calibration::H200_LLAMA_3_1_8B.cost();
        let other = CostModel {
            fixed: base.fixed * 3.0,
            per_row: base.per_row * 0.3,
            per_context_token: base.per_context_token * 2.5,
            per_attention: base.per_attention * 0.6,
            ..base
        };
        // Arithmetic takes longer than reading the weights from 168 tokens on, from 34, from 900.
        for (weights, per_token) in [(1.6, 1.6), (0.6, 3.0), (1.6, 0.3)] {
            let weights = other.weights * weights;
            let truth = CostModel { weights, per_token: other.per_token * per_token, ..other };
            for scale in [1.0, 0.05, 40.0] {
                let error = error_on(&truth, scale, 200..1000);
                assert!(error < 0.08, "{truth:?} times {scale}: {error}");
            }
        }
    }

    /// Whatever was measured, predictions are positive numbers that grow with every part of a step.
    #[test]
    fn predictions_grow_with_the_step() {
        let mut model = OnlineCostModel::new(Calibration::H200_LLAMA_3_1_8B.cost());
        for (step, shape) in shapes().take(3000).enumerate() {
            // From a nanosecond to a quarter of an hour.
            model.observe(&shape, 10_f64.powi((step * 7919 % 13) as i32 - 3));
            let mut before = model.predict(&shape);
            assert!(before > 0.0);
            for len in [1, 2, 3, 40, 41, 500, 8000] {
                let longer = model.predict(&shape.with_row(700, len));
                assert!(longer.is_finite() && longer >= before, "{len} tokens: {longer}, fewer {before}");
                before = longer;
            }
            assert!(model.predict(&shape.with_row(900, 8000)) >= before);
        }
    }

    #[test]
    fn nonsense_does_not_hurt() {
        let base = Calibration::H200_LLAMA_3_1_8B.cost();
        let mut model = OnlineCostModel::new(base);
        let shape = decodes(64, 2048);
        for _ in 0..100 {
            model.observe(&shape, 1.1 * base.predict(&shape));
        }
        for nonsense in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            model.observe(&shape, nonsense);
        }
        assert_eq!(model.num_observed(), 100);
        for _ in 0..3 {
            model.observe(&shape, 1e12);
        }
        assert!((model.predict(&shape) / base.predict(&shape) - 1.1).abs() < 0.11);
        for _ in 0..100_000 {
            model.observe(&shape, 1e12);
        }
        assert!(model.predict(&shape).is_finite());
    }

    #[test]
    fn the_largest_row_fills_the_limit_and_no_more() {
        let model = OnlineCostModel::new(Calibration::H200_LLAMA_3_1_8B.cost());
        let shape = decodes(256, 2048);
        for (start, limit) in [(0, 50_000.0), (30_000, 50_000.0), (0, 20_000.0)] {
            let len = model.largest_row(&shape, start, 8192, limit);
            assert!(len > 0 && len < 8192);
            assert!(model.predict(&shape.with_row(start, len)) <= limit);
            assert!(model.predict(&shape.with_row(start, len + 1)) > limit);
        }
        assert_eq!(model.largest_row(&shape, 0, 8192, 10_000.0), 0, "the decodes alone take longer");
        assert_eq!(model.largest_row(&shape, 0, 64, 1e9), 64);
    }
}
