//! What a model is, as data. Sum types, not flags: a decoder matches on them and cannot forget a case.
//!
//! A `ModelSpec` says everything that the forward pass needs besides the weights, and nothing about where it came
//! from: architecture names mean something only in `arch/`.

use quire_core::{DType, TokenId};

use crate::rope::{RopeScaling, RopeSpec};

/// A decoder-only language model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The name in `config.json`, e.g. `LlamaForCausalLM`. For people; nothing branches on it outside `arch/`.
    pub architecture: String,
    /// Rows of the embedding table. Token ids are `0..vocab_size`.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Positions the checkpoint states for itself; see [`ModelSpec::max_model_len`].
    pub max_position_embeddings: usize,
    /// Epsilon of every RMS norm, QK-norm included.
    pub norm_eps: f32,
    /// Multiplies the embeddings; 1 in most families.
    pub embed_scale: f32,
    /// `Some(c)`: logits become `c * tanh(logit / c)` (Gemma 2, arXiv:2408.00118).
    pub logit_soft_cap: Option<f32>,
    /// The layers, in order. Never empty.
    pub layers: Vec<LayerSpec>,
    /// Where the output projection's weight is.
    pub head: Head,
    /// How the weights are stored: that of the embedding table once it is known, else what `config.json` says.
    pub dtype: DType,
    /// Put before a prompt by the tokenizer, if it wants one.
    pub bos_token_id: Option<TokenId>,
    /// Each of these ends a generation. May be empty.
    pub eos_token_ids: Vec<TokenId>,
}

/// One transformer layer: a token mixer and a feed-forward network, each on the residual stream.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// How tokens see one another.
    pub mixer: Mixer,
    /// What is done to each token by itself.
    pub ffn: Ffn,
    /// Where the RMS norms are.
    pub norms: NormPlacement,
}

/// The part of a layer that looks at other positions.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Softmax attention with grouped keys and values (multi-head when the counts are equal).
    Gqa(GqaSpec),
}

/// Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct GqaSpec {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`. Query head `h` reads KV head `h / (num_heads / num_kv_heads)`.
    pub num_kv_heads: usize,
    /// Width of one head. Not always `hidden_size / num_heads`.
    pub head_dim: usize,
    /// `Some(w)`: the query at position p sees the keys at `p - w + 1 ..= p` only.
    pub window: Option<u32>,
    /// Normalisation of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// Whether the query, key and value projections add a bias.
    pub qkv_bias: bool,
    /// Whether the output projection adds a bias.
    pub out_bias: bool,
    /// Rotary positions, applied to the whole head in the half-split layout: element i pairs with
    /// i + head_dim / 2.
    pub rope: RopeSpec,
    /// Factor of the scores before the softmax, usually `head_dim^-0.5`.
    pub softmax_scale: f32,
    /// `Some(c)`: scores, scaled, become `c * tanh(score / c)` before the mask (Gemma 2, arXiv:2408.00118).
    pub soft_cap: Option<f32>,
}

/// Normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// RMS norm over each head's `head_dim` elements, one weight vector shared by all heads (Qwen3).
    PerHead,
}

/// The part of a layer that works on each position by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Ffn {
    /// One network for every token.
    Dense(DenseFfn),
    /// A few of many networks, chosen token by token.
    Moe(MoeFfn),
}

/// A two-layer network.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseFfn {
    /// Width between the projections.
    pub intermediate_size: usize,
    /// The non-linearity.
    pub activation: Activation,
    /// With or without a gate.
    pub shape: FfnShape,
    /// Whether the projections add a bias.
    pub bias: bool,
}

/// A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538), each a gated network without bias. The router's softmax
/// over all experts says which are used, and with what weight.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeFfn {
    /// Networks.
    pub num_experts: usize,
    /// How many of them a token goes through, those of the largest weights; `1..=num_experts`.
    pub num_experts_per_tok: usize,
    /// Width between the projections of one expert.
    pub intermediate_size: usize,
    /// The non-linearity.
    pub activation: Activation,
    /// Whether the weights of a token's experts are divided by their sum.
    pub norm_topk_prob: bool,
}

/// How the projections of a feed-forward network are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnShape {
    /// `down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202).
    Gated,
    /// `down(act(up(x)))`.
    Plain,
}

/// Non-linearity of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`, by the error function.
    Gelu,
    /// The tanh approximation of `Gelu`.
    GeluTanh,
}

/// Where a layer normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// `x += mixer(norm(x)); x += ffn(norm(x))`.
    Pre,
    /// `x += norm(mixer(norm(x))); x += norm(ffn(norm(x)))`, each norm with a weight of its own (Gemma 2).
    PreAndPost,
}

/// Where the output projection's weight is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// It is the embedding table.
    Tied,
    /// It is a tensor of its own.
    Own,
}

/// Layers whose KV blocks are managed together: one block table per sequence and group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvGroupSpec {
    /// Which layers, ascending.
    pub layers: Vec<usize>,
    /// Key and value heads of each layer.
    pub num_kv_heads: usize,
    /// Width of one head, the same for keys and values.
    pub head_dim: usize,
    /// `Some(w)`: no layer of the group looks back further than w tokens, so older blocks may be freed.
    pub window: Option<u32>,
}

impl ModelSpec {
    /// The longest context this model is meant for, and so the default of `--max-model-len`:
    /// `max_position_embeddings`, or more where the rotary scaling extends it at no cost to short prompts.
    /// (`Dynamic` can be extended too, but that changes every frequency: only on request.)
    pub fn max_model_len(&self) -> usize {
        let Mixer::Gqa(gqa) = &self.layers[0].mixer;
        let stated = self.max_position_embeddings;
        let extended = match gqa.rope.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } | RopeScaling::Llama3 { .. } => return stated,
            RopeScaling::Linear { factor } => stated as f64 * factor,
            RopeScaling::Yarn { factor, original_max_position_embeddings: original, .. } => {
                original as f64 * factor
            }
        };
        stated.max(extended as usize)
    }

    /// The KV groups: one today. Its window is set only when every layer slides by the same window; else all
    /// tokens are kept, and a layer's own window only masks.
    pub fn kv_groups(&self) -> Vec<KvGroupSpec> {
        let Mixer::Gqa(first) = &self.layers[0].mixer;
        let same_window = self.layers.iter().all(|layer| {
            let Mixer::Gqa(gqa) = &layer.mixer;
            assert_eq!(
                (gqa.num_kv_heads, gqa.head_dim),
                (first.num_kv_heads, first.head_dim),
                "one KV group needs one KV shape; arch/ makes only such specs"
            );
            gqa.window == first.window
        });
        vec![KvGroupSpec {
            layers: (0..self.layers.len()).collect(),
            num_kv_heads: first.num_kv_heads,
            head_dim: first.head_dim,
            window: first.window.filter(|_| same_window),
        }]
    }
}
