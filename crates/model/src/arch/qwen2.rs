//! Qwen2 and Qwen2.5, dense: Llama with a bias on queries, keys and values, and optional windows in the upper layers.

use crate::config::Config;
use crate::error::Result;
use crate::spec::{GqaSpec, ModelSpec};
use crate::weights::LLAMA_NAMES;

use super::Architecture;
use super::common::Common;

pub(super) const ARCH: Architecture = Architecture {
    name: "Qwen2ForCausalLM",
    model_type: "qwen2",
    spec,
    weights: &LLAMA_NAMES,
    reads_experts: false,
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let common = Common::read(config)?;
    let gqa = GqaSpec { qkv_bias: true, ..common.attention()? };
    let ffn = common.gated_ffn()?;
    let layer = |window| common.layer(GqaSpec { window, ..gqa.clone() }, ffn.clone());
    let layers = common.qwen_windows()?.into_iter().map(layer).collect();
    common.model(ARCH.name, layers)
}
