//! The registry of architectures, and the only place where their names mean something.
//!
//! A family is one file: a function from `config.json` to a [`ModelSpec`], and its weight names. It computes nothing.
//! To add one, write the file, add it to [`REGISTRY`], and give it a golden checkpoint in `tests/data/golden/`.

mod common;
mod gemma2;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod rope;

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::spec::ModelSpec;
use crate::weights::{LLAMA_NAMES, WeightNames};

/// One family of checkpoints.
pub(crate) struct Architecture {
    /// As in the `architectures` list of `config.json`.
    name: &'static str,
    /// As in `model_type`, for files that lack `architectures`.
    model_type: &'static str,
    spec: fn(&Config) -> Result<ModelSpec>,
    weights: &'static WeightNames,
    /// Whether `spec` reads the fields of a mixture of experts.
    reads_experts: bool,
}

/// All families.
static REGISTRY: &[Architecture] =
    &[llama::ARCH, mistral::ARCH, qwen2::ARCH, qwen3::ARCH, qwen3_moe::ARCH, gemma2::ARCH];

impl ModelSpec {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// The text is not JSON, a field is missing or out of range, or the model needs something not supported.
    pub fn from_config_json(json: &str) -> Result<Self> {
        let config = Config::parse("config.json", json)?;
        refuse_unsupported_features(&config)?;
        let arch = find(&config);
        if !arch.as_ref().is_ok_and(|arch| arch.reads_experts) {
            refuse_experts(&config)?;
        }
        (arch?.spec)(&config)
    }
}

/// The weight names of a spec's family; Llama's for a spec made by hand.
pub(crate) fn weight_names(architecture: &str) -> &'static WeightNames {
    REGISTRY.iter().find(|arch| arch.name == architecture).map_or(&LLAMA_NAMES, |arch| arch.weights)
}

fn find(config: &Config) -> Result<&'static Architecture> {
    let names = config.opt_strings("architectures")?.unwrap_or_default();
    let model_type = config.opt_str("model_type")?;
    let known = |arch: &&Architecture| match names.as_slice() {
        [] => model_type == Some(arch.model_type),
        names => names.contains(&arch.name),
    };
    if let Some(arch) = REGISTRY.iter().find(known) {
        return Ok(arch);
    }
    let what = match (names.first(), model_type) {
        (Some(name), _) => format!("architecture `{name}`{}", feature_of(name)),
        (None, Some(model_type)) => format!("model type `{model_type}`"),
        (None, None) => "a config.json with neither `architectures` nor `model_type`".to_owned(),
    };
    let supported: Vec<_> = REGISTRY.iter().map(|arch| arch.name).collect();
    Err(ModelError::Unsupported(format!("{what} is not supported; supported are {}", supported.join(", "))))
}

/// Features that any family's config may ask for, which would be ignored silently if nobody looked.
fn refuse_unsupported_features(config: &Config) -> Result<()> {
    let refuse = |what: String| Err(ModelError::Unsupported(what));
    if let Some(quantization) = config.opt_object("quantization_config")? {
        let method = quantization.opt_str("quant_method")?.unwrap_or("unknown method").to_owned();
        return refuse(format!(
            "config.json: `quantization_config` ({method}): pre-quantized checkpoints (GPTQ, AWQ, FP8, bitsandbytes) \
             are not supported; use the bf16, f16 or f32 checkpoint, and --quantize to quantize it at load"
        ));
    }
    if config.get("kv_lora_rank").is_some() {
        return refuse(
            "config.json: `kv_lora_rank`: multi-head latent attention (MLA) is not supported".into(),
        );
    }
    if let Some(auto_map) = config.opt_object("auto_map")? {
        // An own tokenizer class is harmless: tokenizer files are read by themselves.
        if let Some(class) = auto_map.fields().find(|class| class.starts_with("AutoModel")) {
            return refuse(format!(
                "config.json: `auto_map.{class}`: models that bring their own Python code are not supported"
            ));
        }
    }
    Ok(())
}

/// The fields of a mixture of experts, in a family that does not read them.
fn refuse_experts(config: &Config) -> Result<()> {
    let count = |field: &&str| config.get(field).is_some_and(|n| n.as_u64().is_none_or(|count| count > 1));
    let fields = ["num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"];
    match fields.into_iter().find(count) {
        None => Ok(()),
        Some(field) => Err(ModelError::Unsupported(format!(
            "config.json: `{field}`: mixture of experts (MoE) is not supported in this family; it is in \
             Qwen3MoeForCausalLM"
        ))),
    }
}

/// What a well-known but unsupported architecture would need, for the message.
fn feature_of(architecture: &str) -> &'static str {
    const NEEDS: &[(&str, &str)] = &[
        ("Moe", " (mixture of experts)"),
        ("Mixtral", " (mixture of experts)"),
        ("Deepseek", " (multi-head latent attention, mixture of experts)"),
        ("Gemma", " (another Gemma than Gemma2ForCausalLM)"),
        ("Mamba", " (state space layers)"),
        ("Rwkv", " (linear attention)"),
        ("ForSequenceClassification", " (classification head)"),
        ("ForConditionalGeneration", " (encoder or vision inputs)"),
        ("Bert", " (encoder-only)"),
    ];
    NEEDS.iter().find(|(part, _)| architecture.contains(part)).map_or("", |(_, need)| need)
}
