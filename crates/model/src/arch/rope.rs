//! `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before) -> [`RopeSpec`].

use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::rope::{RopeScaling, RopeSpec};

const DEFAULT_THETA: f64 = 10_000.0;

/// Reads the rotary settings of a config whose heads are `head_dim` wide.
pub(super) fn read(config: &Config, head_dim: usize, max_position_embeddings: usize) -> Result<RopeSpec> {
    refuse_partial(config)?;
    let field = if config.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let theta = |config: &Config| config.opt_float("rope_theta", 1.001..=1e15);
    let outer_theta = theta(config)?.unwrap_or(DEFAULT_THETA);
    let Some(outer) = config.opt_object(field)? else {
        return Ok(RopeSpec { dim: head_dim, theta: outer_theta, scaling: RopeScaling::Default });
    };
    let per_type = settings_per_layer_type(config, &outer, field)?;
    let settings = per_type.as_ref().unwrap_or(&outer);
    refuse_partial(settings)?;

    let original = config.opt_int("original_max_position_embeddings", 1..=1 << 30)?;
    let context = Context { original, max_position_embeddings };
    Ok(RopeSpec {
        dim: head_dim,
        theta: theta(settings)?.unwrap_or(outer_theta),
        scaling: scaling(settings, &context)?,
    })
}

/// Lengths that stand outside the rotary settings.
struct Context {
    original: Option<usize>,
    max_position_embeddings: usize,
}

impl Context {
    /// The pretraining length, for types that need one.
    fn original(&self, settings: &Config) -> Result<usize> {
        let own = settings.opt_int("original_max_position_embeddings", 1..=1 << 30)?;
        Ok(self.original.or(own).unwrap_or(self.max_position_embeddings))
    }
}

fn scaling(settings: &Config, context: &Context) -> Result<RopeScaling> {
    let field = if settings.get("rope_type").is_some() { "rope_type" } else { "type" };
    let factor = || settings.float("factor", 1.0..=1e6);
    Ok(match settings.opt_str(field)?.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic {
            factor: factor()?,
            original_max_position_embeddings: context.max_position_embeddings,
        },
        "llama3" => llama3(settings, context)?,
        "yarn" => yarn(settings, context)?,
        other => {
            return Err(ModelError::Unsupported(format!(
                "config.json: rope type `{other}` is not supported; supported are default, linear, dynamic, llama3, yarn"
            )));
        }
    })
}

fn llama3(settings: &Config, context: &Context) -> Result<RopeScaling> {
    let low_freq_factor = settings.float("low_freq_factor", 1e-3..=1e6)?;
    let high_freq_factor = settings.float("high_freq_factor", 1e-3..=1e6)?;
    if high_freq_factor <= low_freq_factor {
        let rule = format!("must be greater than low_freq_factor = {low_freq_factor}");
        return Err(settings.error("high_freq_factor", rule));
    }
    Ok(RopeScaling::Llama3 {
        factor: settings.float("factor", 1.0..=1e6)?,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: context.original(settings)?,
    })
}

fn yarn(settings: &Config, context: &Context) -> Result<RopeScaling> {
    let original = context.original(settings)?;
    let implied = context.max_position_embeddings as f64 / original as f64;
    let factor = settings.opt_float("factor", 1.0..=1e6)?.unwrap_or(implied);
    // The temperature of the paper's section 3.4, and DeepSeek's generalisation of it by two multipliers.
    let temperature = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let multiplier =
        |field| settings.opt_float(field, 0.0..=1e3).map(|value| value.filter(|&value| value != 0.0));
    let inferred = match (multiplier("mscale")?, multiplier("mscale_all_dim")?) {
        (Some(mscale), Some(all_dim)) => temperature(mscale) / temperature(all_dim),
        _ => temperature(1.0),
    };
    let beta_fast = settings.opt_float("beta_fast", 1e-3..=1e6)?.unwrap_or(32.0);
    let beta_slow = settings.opt_float("beta_slow", 1e-3..=1e6)?.unwrap_or(1.0);
    if beta_fast < beta_slow {
        return Err(settings.error("beta_fast", format!("must be at least beta_slow = {beta_slow}")));
    }
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        beta_fast,
        beta_slow,
        attention_factor: settings.opt_float("attention_factor", 1e-3..=1e3)?.unwrap_or(inferred) as f32,
        truncate: settings.bool_or("truncate", true)?,
    })
}

/// transformers 5 may nest the settings by layer type. All types must agree, as a layer's own base is not supported.
fn settings_per_layer_type<'a>(
    config: &Config,
    outer: &'a Config<'a>,
    field: &str,
) -> Result<Option<Config<'a>>> {
    let types: Vec<&str> = outer.fields().filter(|name| name.ends_with("_attention")).collect();
    let Some(first) = types.first() else { return Ok(None) };
    if types.iter().any(|name| outer.get(name) != outer.get(first)) {
        return Err(ModelError::Unsupported(format!(
            "config.json: `{field}`: rotary settings that differ by layer type are not supported"
        )));
    }
    outer
        .opt_object(first)?
        .map_or_else(|| Err(config.error(field, "has no settings for any layer type")), |s| Ok(Some(s)))
}

fn refuse_partial(config: &Config) -> Result<()> {
    match config.opt_float("partial_rotary_factor", 0.0..=1.0)? {
        None | Some(1.0) => Ok(()),
        Some(part) => Err(ModelError::Unsupported(format!(
            "config.json: `partial_rotary_factor` {part}: rotating a part of the head is not supported"
        ))),
    }
}
