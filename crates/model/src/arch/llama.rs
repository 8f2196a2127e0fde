//! Llama 1 to 3.3, and the many families that keep its shape: SmolLM and SmolLM2, TinyLlama, Yi, and others.

use crate::config::Config;
use crate::error::Result;
use crate::spec::{DenseFfn, GqaSpec, ModelSpec};
use crate::weights::LLAMA_NAMES;

use super::Architecture;
use super::common::Common;

pub(super) const ARCH: Architecture = Architecture {
    name: "LlamaForCausalLM",
    model_type: "llama",
    spec,
    weights: &LLAMA_NAMES,
    reads_experts: false,
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let common = Common::read(config)?;
    let bias = config.bool_or("attention_bias", false)?;
    let gqa = GqaSpec { qkv_bias: bias, out_bias: bias, ..common.attention()? };
    let ffn = DenseFfn { bias: config.bool_or("mlp_bias", false)?, ..common.gated_ffn()? };
    let layers = vec![common.layer(gqa, ffn); common.num_layers];
    common.model(ARCH.name, layers)
}
