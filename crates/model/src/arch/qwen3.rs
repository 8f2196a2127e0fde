//! Qwen3, dense: Qwen2's windows, a norm on each query and key head, and a bias only if the config asks for it.

use crate::config::Config;
use crate::error::Result;
use crate::spec::{GqaSpec, ModelSpec, QkNorm};
use crate::weights::LLAMA_NAMES;

use super::Architecture;
use super::common::Common;

pub(super) const ARCH: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    model_type: "qwen3",
    spec,
    weights: &LLAMA_NAMES,
    reads_experts: false,
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let common = Common::read(config)?;
    let bias = config.bool_or("attention_bias", false)?;
    let gqa = GqaSpec { qkv_bias: bias, out_bias: bias, qk_norm: QkNorm::PerHead, ..common.attention()? };
    let ffn = common.gated_ffn()?;
    let layer = |window| common.layer(GqaSpec { window, ..gqa.clone() }, ffn.clone());
    let layers = common.qwen_windows()?.into_iter().map(layer).collect();
    common.model(ARCH.name, layers)
}
