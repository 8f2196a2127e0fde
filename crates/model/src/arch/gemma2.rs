//! Gemma 2 (arXiv:2408.00118): every other layer slides, norms on both sides of each half of a layer, scaled embeddings,
//! and soft caps on scores and logits.

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::spec::{Activation, DenseFfn, Ffn, GqaSpec, LayerSpec, Mixer, ModelSpec, NormPlacement};
use crate::weights::{LLAMA_NAMES, LayerTensor, NormStorage, WeightNames};

use super::Architecture;
use super::common::Common;

pub(super) const ARCH: Architecture = Architecture {
    name: "Gemma2ForCausalLM",
    model_type: "gemma2",
    spec,
    weights: &NAMES,
    reads_experts: false,
};

static NAMES: WeightNames = WeightNames {
    norms: NormStorage::LessOne,
    layer: |tensor| match tensor {
        LayerTensor::PostMixerNorm => "post_attention_layernorm.weight",
        LayerTensor::FfnNorm => "pre_feedforward_layernorm.weight",
        other => (LLAMA_NAMES.layer)(other),
    },
    ..LLAMA_NAMES
};

fn spec(config: &Config) -> Result<ModelSpec> {
    if config.bool_or("use_bidirectional_attention", false)? {
        return Err(ModelError::Unsupported(
            "config.json: `use_bidirectional_attention`: only causal attention is supported".into(),
        ));
    }
    let common = Common { is_tied_by_default: true, ..Common::read(config)? };
    // transformers' default is 256, whatever the other widths: a file without it is one of another model.
    config.int("head_dim", 2..=1 << 12)?;
    let query_scalar = config.opt_float("query_pre_attn_scalar", 1e-3..=1e9)?.unwrap_or(256.0);
    let bias = config.bool_or("attention_bias", false)?;
    let gqa = GqaSpec {
        softmax_scale: query_scalar.powf(-0.5) as f32,
        soft_cap: soft_cap(config, "attn_logit_softcapping", 50.0)?,
        qkv_bias: bias,
        out_bias: bias,
        ..common.attention()?
    };
    let activation = common.activation_named("hidden_activation")?.unwrap_or(Activation::GeluTanh);
    let ffn = DenseFfn { activation, ..common.gated_ffn()? };
    let layer = |window| LayerSpec {
        mixer: Mixer::Gqa(GqaSpec { window, ..gqa.clone() }),
        ffn: Ffn::Dense(ffn.clone()),
        norms: NormPlacement::PreAndPost,
    };
    let layers = windows(config, &common)?.into_iter().map(layer).collect();
    let spec = common.model(ARCH.name, layers)?;
    Ok(ModelSpec {
        embed_scale: (spec.hidden_size as f64).sqrt() as f32,
        logit_soft_cap: soft_cap(config, "final_logit_softcapping", 30.0)?,
        ..spec
    })
}

/// A cap; `default` in a file that does not mention it, none where it says null.
fn soft_cap(config: &Config, field: &str, default: f32) -> Result<Option<f32>> {
    match config.opt_float(field, 1e-3..=1e9)? {
        None if !config.mentions(field) => Ok(Some(default)),
        cap => Ok(cap.map(|cap| cap as f32)),
    }
}

/// `layer_types`, or every other layer from the first on.
fn windows(config: &Config, common: &Common) -> Result<Vec<Option<u32>>> {
    let window = if config.mentions("sliding_window") { common.window()? } else { Some(4096) };
    let alternating = || (0..common.num_layers).map(|layer| window.filter(|_| layer % 2 == 0)).collect();
    Ok(common.layer_windows(window)?.unwrap_or_else(alternating))
}
