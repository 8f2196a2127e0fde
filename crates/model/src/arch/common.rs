//! What the config files of Llama-like families have in common.

use quire_core::{DType, TokenId};

use crate::config::{Config, MAX_VOCAB};
use crate::error::{ModelError, Result};
use crate::spec::{
    Activation, DenseFfn, Ffn, FfnShape, GqaSpec, Head, LayerSpec, Mixer, ModelSpec, NormPlacement, QkNorm,
};

use super::rope;

/// Bounds far above any real model and far below overflow: products of two fit in 2^44.
const MAX_DIM: u64 = 1 << 22;
const MAX_LAYERS: u64 = 1024;
const MAX_POSITIONS: u64 = 1 << 30;

/// The fields every family has, by the same names.
pub(super) struct Common<'a> {
    pub config: &'a Config<'a>,
    pub hidden_size: usize,
    pub max_position_embeddings: usize,
    pub num_layers: usize,
    /// Whether the head is the embedding table in a file that does not say.
    pub is_tied_by_default: bool,
}

impl<'a> Common<'a> {
    pub fn read(config: &'a Config<'a>) -> Result<Self> {
        Ok(Self {
            config,
            hidden_size: config.int("hidden_size", 1..=MAX_DIM)?,
            max_position_embeddings: config.int("max_position_embeddings", 1..=MAX_POSITIONS)?,
            num_layers: config.int("num_hidden_layers", 1..=MAX_LAYERS)?,
            is_tied_by_default: false,
        })
    }

    /// Attention without bias, window or QK-norm.
    pub fn attention(&self) -> Result<GqaSpec> {
        let config = self.config;
        let num_heads = config.int("num_attention_heads", 1..=1 << 14)?;
        let num_kv_heads = config.opt_int("num_key_value_heads", 1..=1 << 14)?.unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            let rule = format!("must divide num_attention_heads = {num_heads}");
            return Err(config.error("num_key_value_heads", rule));
        }
        let head_dim = match config.opt_int("head_dim", 2..=1 << 12)? {
            Some(head_dim) => head_dim,
            None if self.hidden_size.is_multiple_of(num_heads) => self.hidden_size / num_heads,
            None => {
                let rule = format!("without `head_dim` it must divide hidden_size = {}", self.hidden_size);
                return Err(config.error("num_attention_heads", rule));
            }
        };
        if head_dim % 2 == 1 {
            let rule = format!("rotary positions need an even head width, but it is {head_dim}");
            return Err(config.error("head_dim", rule));
        }
        Ok(GqaSpec {
            num_heads,
            num_kv_heads,
            head_dim,
            window: None,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            out_bias: false,
            rope: rope::read(config, head_dim, self.max_position_embeddings)?,
            softmax_scale: (head_dim as f64).powf(-0.5) as f32,
            soft_cap: None,
        })
    }

    /// A gated network without bias.
    pub fn gated_ffn(&self) -> Result<DenseFfn> {
        Ok(DenseFfn {
            intermediate_size: self.config.int("intermediate_size", 1..=MAX_DIM)?,
            activation: self.activation()?,
            shape: FfnShape::Gated,
            bias: false,
        })
    }

    /// `hidden_act`.
    pub fn activation(&self) -> Result<Activation> {
        Ok(self.activation_named("hidden_act")?.unwrap_or(Activation::Silu))
    }

    /// The activation in a field of this name, if the file has it.
    pub fn activation_named(&self, field: &str) -> Result<Option<Activation>> {
        let Some(name) = self.config.opt_str(field)? else { return Ok(None) };
        match name {
            "silu" | "swish" => Ok(Some(Activation::Silu)),
            "gelu" => Ok(Some(Activation::Gelu)),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Some(Activation::GeluTanh)),
            _ => Err(self.config.error(field, "supported are silu, gelu, gelu_pytorch_tanh")),
        }
    }

    /// The layer that pre-norm families repeat.
    pub fn layer(&self, gqa: GqaSpec, ffn: DenseFfn) -> LayerSpec {
        LayerSpec { mixer: Mixer::Gqa(gqa), ffn: Ffn::Dense(ffn), norms: NormPlacement::Pre }
    }

    /// The window of each layer as Qwen states it: `use_sliding_window`, then either `layer_types` or "all layers
    /// from `max_window_layers` on".
    pub fn qwen_windows(&self) -> Result<Vec<Option<u32>>> {
        let window = match self.config.bool_or("use_sliding_window", false)? {
            true => self.window()?,
            false => None,
        };
        let first = self.config.opt_int("max_window_layers", 0..=1 << 20)?.unwrap_or(28);
        let default = || (0..self.num_layers).map(|layer| window.filter(|_| layer >= first)).collect();
        Ok(self.layer_windows(window)?.unwrap_or_else(default))
    }

    /// `sliding_window` as it stands.
    pub fn window(&self) -> Result<Option<u32>> {
        Ok(self.config.opt_int("sliding_window", 1..=MAX_POSITIONS)?.map(|window| window as u32))
    }

    /// `window` for all layers, which `layer_types` must agree with if the file has it.
    pub fn one_window(&self, window: Option<u32>) -> Result<Option<u32>> {
        match self.layer_windows(window)? {
            Some(windows) if windows.iter().any(|&layer| layer != window) => Err(ModelError::Unsupported(
                "config.json: `layer_types`: a window in some layers only is not supported in this family"
                    .into(),
            )),
            _ => Ok(window),
        }
    }

    /// The windows by `layer_types`, if the file has it.
    pub fn layer_windows(&self, window: Option<u32>) -> Result<Option<Vec<Option<u32>>>> {
        let Some(types) = self.config.opt_strings("layer_types")? else { return Ok(None) };
        if types.len() != self.num_layers {
            let rule = format!("must name all {} layers, but names {}", self.num_layers, types.len());
            return Err(self.config.error("layer_types", rule));
        }
        let window_of = |kind: &&str| match (*kind, window) {
            ("full_attention", _) => Ok(None),
            ("sliding_attention", Some(window)) => Ok(Some(window)),
            ("sliding_attention", None) => {
                Err(self.config.error("layer_types", "names sliding layers, but no sliding_window is in use"))
            }
            (other, _) => Err(ModelError::Unsupported(format!(
                "config.json: `layer_types`: layers of type `{other}` are not supported; \
                 supported are full_attention, sliding_attention"
            ))),
        };
        types.iter().map(window_of).collect::<Result<_>>().map(Some)
    }

    /// Puts the model together.
    pub fn model(self, architecture: &str, layers: Vec<LayerSpec>) -> Result<ModelSpec> {
        let config = self.config;
        let tied = config.bool_or("tie_word_embeddings", self.is_tied_by_default)?;
        let vocab_size = config.int("vocab_size", 1..=MAX_VOCAB)?;
        // Ids outside the vocabulary cannot be generated, and must not reach code that indexes logits by them.
        let in_vocab = |id: &TokenId| (*id as usize) < vocab_size;
        Ok(ModelSpec {
            architecture: architecture.to_owned(),
            vocab_size,
            hidden_size: self.hidden_size,
            max_position_embeddings: self.max_position_embeddings,
            norm_eps: config.opt_float("rms_norm_eps", 1e-12..=1.0)?.unwrap_or(1e-6) as f32,
            embed_scale: 1.0,
            logit_soft_cap: None,
            layers,
            head: if tied { Head::Tied } else { Head::Own },
            dtype: dtype(config)?,
            bos_token_id: config.token_ids("bos_token_id")?.first().copied().filter(in_vocab),
            eos_token_ids: config.token_ids("eos_token_id")?.into_iter().filter(in_vocab).collect(),
        })
    }
}

/// `dtype` (transformers 5) or `torch_dtype`; f32 if neither is there.
fn dtype(config: &Config) -> Result<DType> {
    let field = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match config.opt_str(field)? {
        None | Some("float32" | "torch.float32") => Ok(DType::F32),
        Some("bfloat16" | "torch.bfloat16") => Ok(DType::BF16),
        Some("float16" | "torch.float16") => Ok(DType::F16),
        Some(_) => Err(config.error(field, "supported are bfloat16, float16, float32")),
    }
}
