//! Qwen3 with a mixture of experts (30B-A3B, 235B-A22B, Coder): Qwen3's attention with one window for all layers, and in
//! most layers experts in place of the dense network.

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::spec::{Ffn, GqaSpec, LayerSpec, Mixer, ModelSpec, MoeFfn, NormPlacement, QkNorm};
use crate::weights::LLAMA_NAMES;

use super::Architecture;
use super::common::Common;

pub(super) const ARCH: Architecture = Architecture {
    name: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    spec,
    weights: &LLAMA_NAMES,
    reads_experts: true,
};

/// Ways to choose or add experts that other families have and transformers' Qwen3-MoE does not know.
const FOREIGN: [&str; 7] = [
    "scoring_func",
    "topk_method",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "n_shared_experts",
    "shared_expert_intermediate_size",
];

fn spec(config: &Config) -> Result<ModelSpec> {
    if let Some(field) = FOREIGN.into_iter().find(|field| config.get(field).is_some()) {
        return Err(ModelError::Unsupported(format!(
            "config.json: `{field}`: only a softmax over all experts is supported in {}",
            ARCH.name
        )));
    }
    let common = Common::read(config)?;
    let bias = config.bool_or("attention_bias", false)?;
    let window = if config.bool_or("use_sliding_window", false)? { common.window()? } else { None };
    let gqa = GqaSpec {
        window: common.one_window(window)?,
        qk_norm: QkNorm::PerHead,
        qkv_bias: bias,
        out_bias: bias,
        ..common.attention()?
    };
    let moe = experts(config, &common)?;
    let step = config.opt_int("decoder_sparse_step", 1..=1 << 20)?.unwrap_or(1);
    let dense = config.ints("mlp_only_layers", 0..=1 << 20)?;
    let layer = |index: usize| {
        let has_experts = !dense.contains(&index) && (index + 1).is_multiple_of(step);
        let ffn = if has_experts { Ffn::Moe(moe.clone()) } else { Ffn::Dense(common.gated_ffn()?) };
        Ok(LayerSpec { mixer: Mixer::Gqa(gqa.clone()), ffn, norms: NormPlacement::Pre })
    };
    let layers = (0..common.num_layers).map(layer).collect::<Result<_>>()?;
    common.model(ARCH.name, layers)
}

fn experts(config: &Config, common: &Common) -> Result<MoeFfn> {
    // transformers 5 writes the second name.
    let field = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let num_experts = config.int(field, 1..=MAX_EXPERTS)?;
    Ok(MoeFfn {
        num_experts,
        num_experts_per_tok: config.int("num_experts_per_tok", 1..=num_experts as u64)?,
        intermediate_size: config.int("moe_intermediate_size", 1..=1 << 22)?,
        activation: common.activation()?,
        norm_topk_prob: config.bool_or("norm_topk_prob", false)?,
    })
}

/// What the routers of all backends take.
const MAX_EXPERTS: u64 = 512;
