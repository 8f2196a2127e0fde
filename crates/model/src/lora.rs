//! LoRA adapters (Hu et al. 2021, arXiv:2106.09685) as PEFT saves them: `adapter_config.json` and
//! `adapter_model.safetensors`, checked against the model that they are for.
//!
//! A linear layer with weight `W` becomes `W x + scaling · B (A x)`. What an adapter may ask for beyond that (DoRA, own
//! biases, retrained modules) is refused by name: to leave it out would change the answers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::checkpoint::{Checkpoint, borrow, dtype};
use crate::config::Config;
use crate::error::{ModelError, Result};
use crate::store::{Store, read_json};
use crate::tensor::Tensor;
use crate::weights::LayerTensor;

/// The largest rank accepted: that of vLLM.
pub const MAX_LORA_RANK: usize = 512;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the name of a module of the base model.
const PREFIX: &str = "base_model.model.";

/// Linear layers that an adapter may change.
pub const LORA_TARGETS: [LayerTensor; 7] = [
    LayerTensor::Q,
    LayerTensor::K,
    LayerTensor::V,
    LayerTensor::O,
    LayerTensor::Gate,
    LayerTensor::Up,
    LayerTensor::Down,
];

/// An adapter that fits its base model. Its file is mapped; weights are read when they are asked for.
#[derive(Debug)]
pub struct LoraAdapter {
    store: Store,
    rank: usize,
    scaling: f32,
    /// Names of `A`; `B` has its own.
    targets: BTreeMap<(usize, LayerTensor), PairNames>,
}

#[derive(Debug)]
struct PairNames {
    a: String,
    b: String,
}

/// The two factors of one linear layer's change.
#[derive(Clone, Debug)]
pub struct LoraPair<'a> {
    /// `[rank, in_features]`.
    pub a: Tensor<'a>,
    /// `[out_features, rank]`.
    pub b: Tensor<'a>,
}

impl LoraAdapter {
    /// Opens the directory of an adapter for `base`.
    ///
    /// # Errors
    /// Something is missing or damaged, does not fit the base model, or is not supported; the message names the directory,
    /// the field or tensor, and what would do.
    pub fn open(dir: &Path, base: &Checkpoint) -> Result<Self> {
        Self::read(dir, base).map_err(|source| match source {
            ModelError::Io { .. } | ModelError::NotACheckpoint { .. } => source,
            source => ModelError::Adapter { path: dir.to_owned(), source: Box::new(source) },
        })
    }

    fn read(dir: &Path, base: &Checkpoint) -> Result<Self> {
        for file in [CONFIG, WEIGHTS] {
            if !dir.join(file).is_file() {
                let detail =
                    format!("holds no {file}; an adapter is a directory as PEFT's save_pretrained makes it");
                return Err(ModelError::NotACheckpoint { path: dir.to_owned(), detail });
            }
        }
        let config = Config::parse(CONFIG, &read_json(&dir.join(CONFIG))?)?;
        refuse_unsupported(&config)?;
        let rank = config.int("r", 1..=MAX_LORA_RANK as u64)?;
        let alpha = config.float("lora_alpha", 0.0..=1e6)?;
        let divisor = if config.bool_or("use_rslora", false)? { (rank as f64).sqrt() } else { rank as f64 };
        let store = Store::open_file(dir, WEIGHTS)?;
        let targets = targets(base, &store, rank)?;
        Ok(Self { store, rank, scaling: (alpha / divisor) as f32, targets })
    }

    /// Rows of every `A`, columns of every `B`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Multiplies what the adapter adds: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub fn scaling(&self) -> f32 {
        self.scaling
    }

    /// What the adapter changes in one linear layer of the model, if anything.
    ///
    /// # Errors
    /// None: opening has looked at every tensor.
    pub fn pair(&self, layer: usize, target: LayerTensor) -> Result<Option<LoraPair<'_>>> {
        let Some(names) = self.targets.get(&(layer, target)) else { return Ok(None) };
        let tensor = |name: &str| borrow(self.store.get(name).ok_or_else(|| lacks(name))?);
        Ok(Some(LoraPair { a: tensor(&names.a)?, b: tensor(&names.b)? }))
    }
}

/// The pairs of a file, which must be all that it holds.
fn targets(
    base: &Checkpoint,
    store: &Store,
    rank: usize,
) -> Result<BTreeMap<(usize, LayerTensor), PairNames>> {
    let spec = base.spec();
    let (mut targets, mut known) = (BTreeMap::new(), BTreeSet::new());
    for layer in 0..spec.layers.len() {
        for (role, shape) in spec.layer_tensors(layer) {
            if !LORA_TARGETS.contains(&role) {
                continue;
            }
            let names = pair_names(&base.names().layer_name(layer, role));
            let (has_a, has_b) = (store.get(&names.a).is_some(), store.get(&names.b).is_some());
            if !has_a && !has_b {
                continue;
            }
            let [out_features, in_features] = shape[..] else { continue };
            check_tensor(store, &names.a, [rank, in_features])?;
            check_tensor(store, &names.b, [out_features, rank])?;
            known.extend([names.a.clone(), names.b.clone()]);
            targets.insert((layer, role), names);
        }
    }
    if let Some(stored) = store.iter().find(|stored| !known.contains(stored.name)) {
        return Err(unknown_tensor(stored.name, base));
    }
    match targets.is_empty() {
        true => Err(ModelError::format(WEIGHTS, "holds no tensor: there is nothing to adapt")),
        false => Ok(targets),
    }
}

fn pair_names(weight: &str) -> PairNames {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    let name = |factor: &str| format!("{PREFIX}{module}.lora_{factor}.weight");
    PairNames { a: name("A"), b: name("B") }
}

fn check_tensor(store: &Store, name: &str, shape: [usize; 2]) -> Result<()> {
    let stored = store.get(name).ok_or_else(|| lacks(name))?;
    if stored.shape != shape {
        let detail = format!(
            "tensor `{name}` has shape {:?}, but the base model and `r` ask for {shape:?}; was the adapter trained for \
             another model?",
            stored.shape
        );
        return Err(ModelError::Mismatch(format!("{WEIGHTS}: {detail}")));
    }
    dtype(&stored).map(|_| ())
}

fn lacks(name: &str) -> ModelError {
    ModelError::Mismatch(format!("{WEIGHTS}: lacks tensor `{name}`, the other half of a pair"))
}

fn unknown_tensor(name: &str, base: &Checkpoint) -> ModelError {
    let example = base.names().layer_name(0, LayerTensor::Q);
    let what = expert_part(name, base).unwrap_or("changes nothing that can be adapted");
    ModelError::Unsupported(format!(
        "{WEIGHTS}: tensor `{name}` {what}; supported are the linear layers of attention and of dense feed-forward \
         networks, as in `{}`",
        pair_names(&example).a
    ))
}

/// What a tensor changes of a layer with experts.
fn expert_part(name: &str, base: &Checkpoint) -> Option<&'static str> {
    let layers = 0..base.spec().layers.len();
    let mut tensors = layers
        .flat_map(|layer| base.spec().layer_tensors(layer).into_iter().map(move |(role, _)| (layer, role)));
    tensors.find_map(|(layer, role)| {
        let what = match role {
            LayerTensor::ExpertGate(_) | LayerTensor::ExpertUp(_) | LayerTensor::ExpertDown(_) => {
                "changes an expert, and adapters of experts are not supported"
            }
            LayerTensor::Router => "changes the router of experts, and adapters of routers are not supported",
            _ => return None,
        };
        let names = pair_names(&base.names().layer_name(layer, role));
        (name == names.a || name == names.b).then_some(what)
    })
}

/// Options that change what is computed. Their defaults (absent, null, false, empty) are fine.
fn refuse_unsupported(config: &Config<'_>) -> Result<()> {
    if config.opt_str("peft_type")? != Some("LORA") {
        return Err(config.error("peft_type", "only LORA adapters are supported"));
    }
    if !matches!(config.opt_str("bias")?, None | Some("none")) {
        return Err(config.error("bias", "trained biases are not supported; only \"none\" is"));
    }
    const REFUSED: [(&str, &str); 13] = [
        ("use_dora", "DoRA is not supported"),
        ("use_qalora", "QA-LoRA is not supported"),
        ("use_bdlora", "block-diagonal LoRA is not supported"),
        ("lora_bias", "biases of the adapter are not supported"),
        ("fan_in_fan_out", "transposed weights are not supported"),
        ("modules_to_save", "modules trained as a whole are not supported; merge the adapter into its base"),
        ("layer_replication", "replicated layers are not supported"),
        ("rank_pattern", "ranks that differ between modules are not supported"),
        ("alpha_pattern", "scalings that differ between modules are not supported"),
        ("target_parameters", "adapted parameters (of experts) are not supported"),
        ("trainable_token_indices", "trained token embeddings are not supported"),
        ("alora_invocation_tokens", "activated LoRA is not supported"),
        ("arrow_config", "routed adapters are not supported"),
    ];
    for (field, rule) in REFUSED {
        let is_default = config.get(field).is_none_or(|value| {
            value.as_bool() == Some(false)
                || value.as_array().is_some_and(Vec::is_empty)
                || value.as_object().is_some_and(serde_json::Map::is_empty)
        });
        if !is_default {
            return Err(config.error(field, rule));
        }
    }
    // These change the base model's weights when training begins.
    let changes_base =
        |init: &str| ["pissa", "olora", "corda", "loftq"].iter().any(|name| init.starts_with(name));
    match config.get("init_lora_weights").and_then(|value| value.as_str()) {
        Some(init) if changes_base(init) => Err(config.error(
            "init_lora_weights",
            "the adapter belongs to changed base weights; save it converted (path_initial_model_for_weight_conversion)",
        )),
        _ => Ok(()),
    }
}
