//! Mistral 7B and its successors of the same shape (Nemo, Small): Llama with one sliding window for all layers.

use crate::config::Config;
use crate::error::Result;
use crate::spec::{GqaSpec, ModelSpec};
use crate::weights::LLAMA_NAMES;

use super::Architecture;
use super::common::Common;

pub(super) const ARCH: Architecture = Architecture {
    name: "MistralForCausalLM",
    model_type: "mistral",
    spec,
    weights: &LLAMA_NAMES,
    reads_experts: false,
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let common = Common::read(config)?;
    // A file that does not mention the window means the 4096 of the first release; later ones say null.
    let window = if config.mentions("sliding_window") { common.window()? } else { Some(4096) };
    let window = common.one_window(window)?;
    let gqa = GqaSpec { window, ..common.attention()? };
    let layers = vec![common.layer(gqa, common.gated_ffn()?); common.num_layers];
    common.model(ARCH.name, layers)
}
