//! Arguments of the operations, as structs: a new field does not touch the callers of other operations.
//!
//! Buffers are row-major `[rows, cols]`; a step uses the first `T` rows (or, for logits, one row per [`crate::LogitRow`]).

use quire_core::{DType, QuantFormat, TensorView};

use crate::Backend;

/// Part of a fused linear layer: its rows follow those of the previous part.
#[derive(Clone, Copy, Debug)]
pub struct LinearPart<'a> {
    /// `[out_features, in_features]`.
    pub weight: TensorView<'a>,
    /// `[out_features]`.
    pub bias: Option<TensorView<'a>>,
}

/// A linear layer as it comes from the checkpoint, or what a rank has of it. Parts are concatenated along the output: q, k and v become one GEMM.
#[derive(Clone, Copy, Debug)]
pub struct LinearSource<'a> {
    /// For messages.
    pub name: &'a str,
    /// At least one; all with the same `in_features`.
    pub parts: &'a [LinearPart<'a>],
    /// How to store it.
    pub quant: QuantFormat,
}

/// Rotary embedding of one kind of layer (RoFormer, arXiv 2104.09864), half-split layout: dimension `i` is paired with
/// `i + rotary_dim / 2`. Interleaved checkpoints are permuted at load.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// `[rotary_dim / 2]` inverse frequencies in radians per position, scaling already applied.
    pub inv_freq: Vec<f32>,
    /// Multiplies sine and cosine (YaRN's attention factor; 1 otherwise).
    pub attention_factor: f32,
    /// Positions that can occur: `max_model_len`.
    pub max_positions: u32,
}

impl RopeTable {
    /// Sine and cosine for dimension pair `i` at `position`. The angle is a product in f32, as in the models' own code:
    /// far out its rounding is visible, and the models were trained with it.
    pub fn sin_cos(&self, position: u32, i: usize) -> (f32, f32) {
        let angle = f64::from(position as f32 * self.inv_freq[i]);
        let factor = f64::from(self.attention_factor);
        ((angle.sin() * factor) as f32, (angle.cos() * factor) as f32)
    }
}

/// Heads of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttnShape {
    /// Query heads.
    pub num_heads: u32,
    /// Key/value heads; divides `num_heads`. Query head `h` reads KV head `h / (num_heads / num_kv_heads)`.
    pub num_kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
}

impl AttnShape {
    /// Columns of the query part of a `qkv` row, and of the attention output.
    pub const fn q_size(&self) -> usize {
        self.num_heads as usize * self.head_dim as usize
    }

    /// Columns of the key part (and of the value part) of a `qkv` row.
    pub const fn kv_size(&self) -> usize {
        self.num_kv_heads as usize * self.head_dim as usize
    }

    /// Columns of a `qkv` row: query, key, value.
    pub const fn qkv_size(&self) -> usize {
        self.q_size() + 2 * self.kv_size()
    }
}

/// K and V of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayerShape {
    /// Key/value heads.
    pub num_kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
}

/// The paged cache of one KV group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Blocks in the pool.
    pub num_blocks: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// One entry per layer of the group.
    pub layers: Vec<KvLayerShape>,
    /// Element type.
    pub dtype: DType,
}

impl KvLayout {
    /// Bytes of one block over all layers, K and V.
    pub fn block_bytes(&self) -> usize {
        let per_token: usize =
            self.layers.iter().map(|l| 2 * l.num_kv_heads as usize * l.head_dim as usize).sum();
        // Bytes come with one scale per key and one per value.
        let scales = if matches!(self.dtype, DType::I8 | DType::F8E4M3) {
            self.layers.iter().map(|l| 2 * l.num_kv_heads as usize * size_of::<f32>()).sum()
        } else {
            0
        };
        (per_token * self.dtype.size() + scales) * self.block_size as usize
    }
}

/// Names a shape of step whose launches can be captured once and replayed. Whatever varies within a key lives in device
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GraphKey(pub u32);

/// `out[t] = scale * table[token_ids[t]]`.
pub struct Embed<'a, B: Backend> {
    /// `[vocab, hidden]`; the same weight may serve as the output head.
    pub table: &'a B::Weight,
    /// 1 in most models.
    pub scale: f32,
    /// `[T, hidden]`.
    pub out: &'a mut B::Buf,
}

/// `residual += delta` (if any, and normalised first if it has a weight for that), then
/// `out = residual / rms(residual) * weight` (RMSNorm, arXiv 1910.07467).
pub struct AddNorm<'a, B: Backend> {
    /// `[T, hidden]`, updated in place.
    pub residual: &'a mut B::Buf,
    /// `[T, hidden]` to add first.
    pub delta: Option<&'a B::Buf>,
    /// `[hidden]`: `delta / rms(delta) * delta_norm` is added in place of `delta`.
    pub delta_norm: Option<&'a B::Norm>,
    /// `[hidden]`.
    pub weight: &'a B::Norm,
    /// Added to the mean squares.
    pub eps: f32,
    /// `[T, hidden]`.
    pub out: &'a mut B::Buf,
}

/// `out = x · weightᵀ + bias`.
pub struct Linear<'a, B: Backend> {
    /// `[T, in_features]`.
    pub x: &'a B::Buf,
    /// With its bias, if it has one.
    pub weight: &'a B::Weight,
    /// `[T, out_features]`.
    pub out: &'a mut B::Buf,
}

/// `out[t] += scaling · B (A · x[t])`, with the factors of row `t`'s adapter; rows without one are left alone.
///
/// A row depends on its own adapter and values only, not on who else has which. `A · x` stays in f32. It is an operation of
/// its own, behind [`Linear`], so that a step in which nobody has an adapter makes the same calls as without any.
pub struct AddLora<'a, B: Backend> {
    /// `[T, in_features]`.
    pub x: &'a B::Buf,
    /// The factors of all adapters.
    pub lora: &'a B::Lora,
    /// `[T, out_features]`, updated in place.
    pub out: &'a mut B::Buf,
}

/// Per-head RMSNorm of q and k (if any), rotation of q and k by their positions, and k, v into the cache.
pub struct RopeAndCache<'a, B: Backend> {
    /// `[T, qkv_size]`; the query and key parts are updated in place.
    pub qkv: &'a mut B::Buf,
    /// Its heads.
    pub shape: AttnShape,
    /// `([head_dim], [head_dim])` weights for q and k, applied before the rotation.
    pub qk_norm: Option<(&'a B::Norm, &'a B::Norm)>,
    /// For `qk_norm`.
    pub eps: f32,
    /// Sine and cosine; `None` for layers without positions (NoPE).
    pub rope: Option<&'a B::Rope>,
    /// The cache, written at `slot_mapping`.
    pub kv: &'a mut B::Kv,
    /// Layer within the cache.
    pub layer: usize,
}

/// Causal attention of every row over its sequence's cache: position `p` sees `max(0, p + 1 - window)..=p`.
pub struct Attention<'a, B: Backend> {
    /// `[T, qkv_size]`; only the query part is read.
    pub qkv: &'a B::Buf,
    /// Its heads.
    pub shape: AttnShape,
    /// Multiplies the scores; usually `head_dim^-0.5`.
    pub scale: f32,
    /// `cap * tanh(score / cap)` in place of every scaled score, before those that the row does not see are taken away
    /// (Gemma 2, arXiv 2408.00118, section 2). Positive.
    pub soft_cap: Option<f32>,
    /// Sliding window in tokens, the current one included.
    pub window: Option<u32>,
    /// `[num_heads]`, loaded as a norm's weight is: a score of each query head for nothing, which takes part in the sum
    /// that the weights are divided by and carries no value (StreamingLLM, arXiv 2309.17453; gpt-oss).
    pub sinks: Option<&'a B::Norm>,
    /// The cache.
    pub kv: &'a B::Kv,
    /// Layer within the cache.
    pub layer: usize,
    /// `[T, q_size]`.
    pub out: &'a mut B::Buf,
}

/// Nonlinearity of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`.
    GeluTanh,
    /// `0.5 x (1 + erf(x / √2))`.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// The definition, computed in f64.
    pub fn apply(self, x: f32) -> f32 {
        let x = f64::from(x);
        let y = match self {
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::GeluTanh => {
                let inner = std::f64::consts::FRAC_2_PI.sqrt() * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            Self::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
            Self::Relu => x.max(0.0),
        };
        y as f32
    }
}

/// Error function by its series without cancellation (Abramowitz & Stegun 7.1.6), to about 1e-15.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 || x.is_nan() {
        return if x.is_nan() { x } else { x.signum() };
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-17 * sum.abs() {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// Whether a feed-forward layer has a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpShape {
    /// `down(act(gate(x)) * up(x))`; `up` holds gate's rows, then up's: `[2 * intermediate, hidden]`.
    Gated,
    /// `down(act(up(x)))`; `up` is `[intermediate, hidden]`.
    Plain,
}

/// A feed-forward layer.
pub struct Mlp<'a, B: Backend> {
    /// `[T, hidden]`.
    pub x: &'a B::Buf,
    /// Gate.
    pub shape: MlpShape,
    /// First layer, see [`MlpShape`].
    pub up: &'a B::Weight,
    /// `[hidden, intermediate]`.
    pub down: &'a B::Weight,
    /// Nonlinearity.
    pub activation: Activation,
    /// What rows with adapters add to the first layer, before the nonlinearity; see [`AddLora`].
    pub up_lora: Option<&'a B::Lora>,
    /// What they add to `down`.
    pub down_lora: Option<&'a B::Lora>,
    /// `[T, up's out_features]` to work in.
    pub scratch: &'a mut B::Buf,
    /// `[T, hidden]`.
    pub out: &'a mut B::Buf,
}

/// A mixture of experts: each token goes through the `top_k` gated networks that its router finds most fitting, and
/// their results are added with the router's weights.
///
/// The router's weights are the softmax over all experts of `x · routerᵀ`, in f32. The largest are chosen, ties to the
/// lower number; that is the rank order, in which results are multiplied by their weights and added to the sum, in f32.
/// Which rows share an expert never shows in a row.
pub struct Moe<'a, B: Backend> {
    /// `[T, hidden]`.
    pub x: &'a B::Buf,
    /// `[num_experts, hidden]`, at most [`MAX_EXPERTS`].
    pub router: &'a B::Weight,
    /// `[num_experts * 2 * intermediate, hidden]`: of each expert, gate's rows, then up's.
    pub up: &'a B::Weight,
    /// `[num_experts * hidden, intermediate]`.
    pub down: &'a B::Weight,
    /// Experts of a token.
    pub top_k: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub renormalise: bool,
    /// Nonlinearity of the gates.
    pub activation: Activation,
    /// To work in.
    pub scratch: MoeScratch<'a, B>,
    /// `[T, hidden]`.
    pub out: &'a mut B::Buf,
}

/// What a mixture of experts works in. But for the router's logits, the content means nothing afterwards.
pub struct MoeScratch<'a, B: Backend> {
    /// `[T, num_experts]`, of role [`crate::BufRole::Logits`]: what the router says of each row.
    pub logits: &'a mut B::Buf,
    /// `[T, top_k * 2 * intermediate]`: a row per token and rank.
    pub hidden: &'a mut B::Buf,
    /// `[T, top_k * hidden]`: a row per token and rank.
    pub expert_out: &'a mut B::Buf,
}

/// The most experts that a router chooses from.
pub const MAX_EXPERTS: usize = 512;

/// Gathers the step's logit rows of `x` and applies the output head.
pub struct Logits<'a, B: Backend> {
    /// `[T, hidden]`, after the final norm.
    pub x: &'a B::Buf,
    /// `[vocab, hidden]`.
    pub head: &'a B::Weight,
    /// `cap * tanh(logit / cap)` in place of every logit. Positive.
    pub soft_cap: Option<f32>,
    /// `[logit_rows, vocab]`.
    pub out: &'a mut B::Buf,
}

/// The sum of `buf` over the ranks of a tensor-parallel group, on every rank and in the order of the ranks where they
/// share memory; of a single rank, what it is. Every rank must come to it in the same place.
pub struct AllReduce<'a, B: Backend> {
    /// `[T, cols]`, updated in place.
    pub buf: &'a mut B::Buf,
}

/// Rows of logits out of the parts of the vocabulary that the ranks have computed, on every rank.
pub struct AllGather<'a, B: Backend> {
    /// `[logit_rows, this rank's part]`: its piece of [`quire_core::Shard::range`].
    pub part: &'a B::Buf,
    /// `[logit_rows, vocab]`: the parts side by side, in the order of the ranks.
    pub out: &'a mut B::Buf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_match_published_values() {
        let cases = [
            (Activation::Silu, 0.731_058_6, -0.268_941_42),
            (Activation::GeluTanh, 0.841_192, -0.158_808),
            (Activation::Gelu, 0.841_344_8, -0.158_655_25),
            (Activation::Relu, 1.0, 0.0),
        ];
        for (activation, at_one, at_minus_one) in cases {
            assert!((activation.apply(1.0) - at_one).abs() < 1e-6, "{activation:?}");
            assert!((activation.apply(-1.0) - at_minus_one).abs() < 1e-6, "{activation:?}");
            assert_eq!(activation.apply(0.0), 0.0);
            assert_eq!(activation.apply(50.0), 50.0);
        }
        assert!((erf(2.0) - 0.995_322_265_018_953).abs() < 1e-14);
        assert!((erf(-5.5) + 1.0).abs() < 1e-13);
    }
}
