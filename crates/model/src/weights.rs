//! Which tensors a model has, what they are called in a checkpoint, and their shapes.

use crate::spec::{Ffn, FfnShape, Head, LayerSpec, Mixer, ModelSpec, NormPlacement, QkNorm};

/// A tensor of one layer. A linear weight is `[out_features, in_features]`, a bias `[out_features]`, a norm a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerTensor {
    /// RMS norm before the mixer, `[hidden_size]`.
    MixerNorm,
    /// Query projection, `[num_heads * head_dim, hidden_size]`.
    Q,
    /// Key projection, `[num_kv_heads * head_dim, hidden_size]`.
    K,
    /// Value projection, shaped as `K`.
    V,
    /// Attention's output projection, `[hidden_size, num_heads * head_dim]`.
    O,
    /// Bias of `Q`.
    QBias,
    /// Bias of `K`.
    KBias,
    /// Bias of `V`.
    VBias,
    /// Bias of `O`.
    OBias,
    /// RMS norm of what the mixer adds to the residual stream, `[hidden_size]`.
    PostMixerNorm,
    /// RMS norm of what the feed-forward network adds, `[hidden_size]`.
    PostFfnNorm,
    /// Norm of each query head, `[head_dim]`.
    QNorm,
    /// Norm of each key head, `[head_dim]`.
    KNorm,
    /// RMS norm before the feed-forward network, `[hidden_size]`.
    FfnNorm,
    /// Gate projection, `[intermediate_size, hidden_size]`.
    Gate,
    /// Up projection, shaped as `Gate`.
    Up,
    /// Down projection, `[hidden_size, intermediate_size]`.
    Down,
    /// Bias of `Gate`.
    GateBias,
    /// Bias of `Up`.
    UpBias,
    /// Bias of `Down`.
    DownBias,
    /// The router of a mixture of experts, `[num_experts, hidden_size]`.
    Router,
    /// Gate projection of an expert, `[intermediate_size, hidden_size]`.
    ExpertGate(usize),
    /// Up projection of an expert, shaped as its gate.
    ExpertUp(usize),
    /// Down projection of an expert, `[hidden_size, intermediate_size]`.
    ExpertDown(usize),
}

/// A tensor outside the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GlobalTensor {
    /// Token embeddings, `[vocab_size, hidden_size]`.
    Embed,
    /// RMS norm after the last layer, `[hidden_size]`.
    FinalNorm,
    /// Output projection, `[vocab_size, hidden_size]`; the same bytes as `Embed` when the head is tied.
    LmHead,
}

/// How a family stores the weights of its norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NormStorage {
    /// As they are used.
    Plain,
    /// Less 1, so that zeros do nothing.
    LessOne,
}

/// How a family names its tensors in a checkpoint, and stores those that are not stored as they are used.
#[derive(Debug)]
pub(crate) struct WeightNames {
    pub norms: NormStorage,
    pub global: fn(GlobalTensor) -> &'static str,
    /// What precedes the layer's index.
    pub layer_prefix: &'static str,
    /// What follows the layer's index and a dot; `{}` stands for the number of an expert.
    pub layer: fn(LayerTensor) -> &'static str,
    /// Experts' tensors stored as one, see [`crate::experts`].
    pub fused: FusedNames,
}

/// What follows a layer's index and a dot where the experts of a layer are stored together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FusedNames {
    /// `[num_experts, 2 * intermediate_size, hidden_size]`: of each, gate's rows, then up's.
    pub gate_up: &'static str,
    /// `[num_experts, hidden_size, intermediate_size]`.
    pub down: &'static str,
}

impl LayerTensor {
    /// Whether it is the weight of a norm.
    pub fn is_norm(self) -> bool {
        use LayerTensor::{FfnNorm, KNorm, MixerNorm, PostFfnNorm, PostMixerNorm, QNorm};
        matches!(self, MixerNorm | FfnNorm | PostMixerNorm | PostFfnNorm | QNorm | KNorm)
    }
}

impl WeightNames {
    /// The full name of a layer's tensor.
    pub fn layer_name(&self, layer: usize, tensor: LayerTensor) -> String {
        let name = (self.layer)(tensor);
        let prefix = self.layer_prefix;
        match tensor {
            LayerTensor::ExpertGate(expert)
            | LayerTensor::ExpertUp(expert)
            | LayerTensor::ExpertDown(expert) => {
                format!("{prefix}{layer}.{}", name.replacen("{}", &expert.to_string(), 1))
            }
            _ => format!("{prefix}{layer}.{name}"),
        }
    }

    /// The layer a name belongs to, if it has the form of a layer's tensor.
    pub fn layer_of(&self, name: &str) -> Option<usize> {
        name.strip_prefix(self.layer_prefix)?.split_once('.')?.0.parse().ok()
    }
}

/// The names that Llama introduced and most decoder-only families in Hugging Face format share.
pub(crate) static LLAMA_NAMES: WeightNames = WeightNames {
    norms: NormStorage::Plain,
    global: |tensor| match tensor {
        GlobalTensor::Embed => "model.embed_tokens.weight",
        GlobalTensor::FinalNorm => "model.norm.weight",
        GlobalTensor::LmHead => "lm_head.weight",
    },
    layer_prefix: "model.layers.",
    layer: |tensor| match tensor {
        LayerTensor::MixerNorm => "input_layernorm.weight",
        LayerTensor::Q => "self_attn.q_proj.weight",
        LayerTensor::K => "self_attn.k_proj.weight",
        LayerTensor::V => "self_attn.v_proj.weight",
        LayerTensor::O => "self_attn.o_proj.weight",
        LayerTensor::QBias => "self_attn.q_proj.bias",
        LayerTensor::KBias => "self_attn.k_proj.bias",
        LayerTensor::VBias => "self_attn.v_proj.bias",
        LayerTensor::OBias => "self_attn.o_proj.bias",
        LayerTensor::QNorm => "self_attn.q_norm.weight",
        LayerTensor::KNorm => "self_attn.k_norm.weight",
        LayerTensor::FfnNorm => "post_attention_layernorm.weight",
        // No Llama has them; a spec made by hand may.
        LayerTensor::PostMixerNorm => "post_mixer_layernorm.weight",
        LayerTensor::PostFfnNorm => "post_feedforward_layernorm.weight",
        LayerTensor::Gate => "mlp.gate_proj.weight",
        LayerTensor::Up => "mlp.up_proj.weight",
        LayerTensor::Down => "mlp.down_proj.weight",
        LayerTensor::GateBias => "mlp.gate_proj.bias",
        LayerTensor::UpBias => "mlp.up_proj.bias",
        LayerTensor::DownBias => "mlp.down_proj.bias",
        LayerTensor::Router => "mlp.gate.weight",
        LayerTensor::ExpertGate(_) => "mlp.experts.{}.gate_proj.weight",
        LayerTensor::ExpertUp(_) => "mlp.experts.{}.up_proj.weight",
        LayerTensor::ExpertDown(_) => "mlp.experts.{}.down_proj.weight",
    },
    fused: FusedNames { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" },
};

impl ModelSpec {
    /// The tensors outside the layers that a checkpoint stores, with their shapes. No `LmHead` when it is tied.
    pub fn global_tensors(&self) -> Vec<(GlobalTensor, Vec<usize>)> {
        let table = vec![self.vocab_size, self.hidden_size];
        let mut tensors = vec![(GlobalTensor::Embed, table.clone())];
        if self.head == Head::Own {
            tensors.push((GlobalTensor::LmHead, table));
        }
        tensors.push((GlobalTensor::FinalNorm, vec![self.hidden_size]));
        tensors
    }

    /// The tensors of one layer, with their shapes.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer_tensors(&self, layer: usize) -> Vec<(LayerTensor, Vec<usize>)> {
        self.layers[layer].tensors(self.hidden_size)
    }
}

impl LayerSpec {
    /// The tensors of this layer in a model of this width, with their shapes.
    pub fn tensors(&self, hidden_size: usize) -> Vec<(LayerTensor, Vec<usize>)> {
        use LayerTensor::*;
        let mut tensors = Vec::new();
        let mut linear = |weight, bias: Option<LayerTensor>, out_features: usize, in_features: usize| {
            tensors.push((weight, vec![out_features, in_features]));
            tensors.extend(bias.map(|bias| (bias, vec![out_features])));
        };

        let Mixer::Gqa(gqa) = &self.mixer;
        let (q_size, kv_size) = (gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim);
        linear(Q, gqa.qkv_bias.then_some(QBias), q_size, hidden_size);
        linear(K, gqa.qkv_bias.then_some(KBias), kv_size, hidden_size);
        linear(V, gqa.qkv_bias.then_some(VBias), kv_size, hidden_size);
        linear(O, gqa.out_bias.then_some(OBias), hidden_size, q_size);

        match &self.ffn {
            Ffn::Dense(ffn) => {
                if ffn.shape == FfnShape::Gated {
                    linear(Gate, ffn.bias.then_some(GateBias), ffn.intermediate_size, hidden_size);
                }
                linear(Up, ffn.bias.then_some(UpBias), ffn.intermediate_size, hidden_size);
                linear(Down, ffn.bias.then_some(DownBias), hidden_size, ffn.intermediate_size);
            }
            Ffn::Moe(moe) => {
                linear(Router, None, moe.num_experts, hidden_size);
                for expert in 0..moe.num_experts {
                    linear(ExpertGate(expert), None, moe.intermediate_size, hidden_size);
                    linear(ExpertUp(expert), None, moe.intermediate_size, hidden_size);
                    linear(ExpertDown(expert), None, hidden_size, moe.intermediate_size);
                }
            }
        }

        if gqa.qk_norm == QkNorm::PerHead {
            tensors.extend([QNorm, KNorm].map(|norm| (norm, vec![gqa.head_dim])));
        }
        let norms: &[LayerTensor] = match self.norms {
            NormPlacement::Pre => &[MixerNorm, FfnNorm],
            NormPlacement::PreAndPost => &[MixerNorm, PostMixerNorm, FfnNorm, PostFfnNorm],
        };
        tensors.extend(norms.iter().map(|&norm| (norm, vec![hidden_size])));
        tensors
    }
}
