//! A model ready to be loaded: its spec, its sampling defaults, and its weights by what they are for.

use std::borrow::Cow;
use std::path::Path;

use quire_core::DType;
use safetensors::Dtype;

use crate::arch;
use crate::check;
use crate::dummy;
use crate::error::{ModelError, Result};
use crate::experts;
use crate::generation::GenerationConfig;
use crate::lora::LoraAdapter;
use crate::spec::{Head, ModelSpec};
use crate::store::{Store, Stored, read_json};
use crate::tensor::Tensor;
use crate::weights::{GlobalTensor, LayerTensor, NormStorage, WeightNames};

/// A checkpoint whose config and tensors are known to fit one another.
///
/// Everything is checked when it is opened; weights are read only when they are asked for.
#[derive(Debug)]
pub struct Checkpoint {
    spec: ModelSpec,
    generation_config: GenerationConfig,
    names: &'static WeightNames,
    weights: Weights,
    ignored: Vec<String>,
    /// Text of `config.json`, if there is a directory that has one.
    config_json: Option<String>,
    /// By [`quire_core::AdapterId`].
    adapters: Vec<LoraAdapter>,
}

#[derive(Debug)]
enum Weights {
    Stored(Store),
    Dummy { seed: u64 },
}

/// A line of the list of tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the checkpoint.
    pub name: String,
    /// Element type as the file names it, e.g. `BF16`.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Size of its data.
    pub bytes: u64,
    /// The file that holds it; `dummy` for random weights.
    pub file: String,
}

impl Checkpoint {
    /// Opens a directory in Hugging Face layout: `config.json`, `model.safetensors` or shards with
    /// `model.safetensors.index.json`, and `generation_config.json` if there is one. Files are mapped, not read.
    ///
    /// # Errors
    /// Something is missing, damaged, inconsistent or not supported; the message says what and where.
    pub fn open(path: &Path) -> Result<Self> {
        let (config_json, spec, generation_config) = read_configs(path)?;
        let checkpoint = Self::assemble(spec, generation_config, Store::open(path)?)?;
        Ok(Self { config_json: Some(config_json), ..checkpoint })
    }

    /// A checkpoint that is part of the program: the texts of its two configs, and a safetensors file.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_static(
        config_json: &str,
        generation_config_json: Option<&str>,
        safetensors: &'static [u8],
    ) -> Result<Self> {
        let spec = ModelSpec::from_config_json(config_json)?;
        let generation_config =
            generation_config_json.map(GenerationConfig::parse).transpose()?.unwrap_or_default();
        Self::assemble(spec, generation_config, Store::from_static(safetensors)?)
    }

    /// Random weights of the shape in a directory's `config.json`; weight files are not looked at.
    ///
    /// # Errors
    /// The config is missing, wrong or not supported.
    pub fn open_dummy(path: &Path, seed: u64) -> Result<Self> {
        let (_, mut spec, generation_config) = read_configs(path)?;
        add_eos(&mut spec, &generation_config);
        Ok(Self { generation_config, ..Self::dummy(spec, seed) })
    }

    /// Random weights of a given shape, stored as `spec.dtype`. Each tensor is made when it is asked for, and is
    /// the same each time.
    ///
    /// # Panics
    /// When a tensor is asked for, if `spec.dtype` is not f32, f16 or bf16.
    pub fn dummy(spec: ModelSpec, seed: u64) -> Self {
        Self {
            names: arch::weight_names(&spec.architecture),
            spec,
            generation_config: GenerationConfig::default(),
            weights: Weights::Dummy { seed },
            ignored: Vec::new(),
            config_json: None,
            adapters: Vec::new(),
        }
    }

    /// The model with these adapters to be put on it, one at a time; their places are their ids.
    pub fn with_adapters(self, adapters: Vec<LoraAdapter>) -> Self {
        Self { adapters, ..self }
    }

    fn assemble(mut spec: ModelSpec, generation_config: GenerationConfig, mut store: Store) -> Result<Self> {
        let names = arch::weight_names(&spec.architecture);
        experts::split_fused(&spec, names, &mut store)?;
        let ignored = check::check(&spec, names, &store)?;
        spec.dtype = dtype(&embedding(&spec, names, &store)?)?;
        add_eos(&mut spec, &generation_config);
        let weights = Weights::Stored(store);
        Ok(Self { spec, generation_config, names, weights, ignored, config_json: None, adapters: Vec::new() })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The adapters of this model, by [`quire_core::AdapterId`].
    pub fn adapters(&self) -> &[LoraAdapter] {
        &self.adapters
    }

    /// What its family calls the tensors.
    pub(crate) fn names(&self) -> &'static WeightNames {
        self.names
    }

    /// The sampling its authors recommend.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// Names of stored tensors that the model does not use. Harmless leftovers of training, but worth a warning.
    pub fn ignored_tensors(&self) -> &[String] {
        &self.ignored
    }

    /// All tensors, ordered by name.
    pub fn tensors(&self) -> Vec<TensorInfo> {
        match &self.weights {
            Weights::Stored(store) => store.iter().map(info).collect(),
            Weights::Dummy { .. } => self.dummy_infos(),
        }
    }

    /// A tensor outside the layers. `LmHead` of a tied head is the embedding table.
    ///
    /// # Errors
    /// None for the tensors of [`ModelSpec::global_tensors`], and `LmHead`.
    pub fn global_tensor(&self, tensor: GlobalTensor) -> Result<Tensor<'_>> {
        let tensor = match (tensor, self.spec.head) {
            (GlobalTensor::LmHead, Head::Tied) => GlobalTensor::Embed,
            (tensor, _) => tensor,
        };
        match &self.weights {
            Weights::Stored(store) if tensor == GlobalTensor::Embed => {
                borrow(embedding(&self.spec, self.names, store)?)
            }
            Weights::Stored(store) => {
                let stored = borrow(find(store, (self.names.global)(tensor))?)?;
                Ok(if tensor == GlobalTensor::FinalNorm { self.as_used(stored) } else { stored })
            }
            Weights::Dummy { seed } => {
                let tensors = self.spec.global_tensors();
                let shape = tensors.into_iter().find(|(kind, _)| *kind == tensor).map(|(_, shape)| shape);
                let shape = shape.ok_or_else(|| missing((self.names.global)(tensor)))?;
                Ok(dummy::tensor(*seed, (self.names.global)(tensor), shape, self.spec.dtype))
            }
        }
    }

    /// A tensor of one layer.
    ///
    /// # Errors
    /// The model has no such tensor: only those of [`ModelSpec::layer_tensors`] exist.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn layer_tensor(&self, layer: usize, tensor: LayerTensor) -> Result<Tensor<'_>> {
        let name = self.names.layer_name(layer, tensor);
        match &self.weights {
            // Opening has made sure that a layer's tensors are those of the spec.
            Weights::Stored(store) => {
                let stored = borrow(find(store, &name)?)?;
                Ok(if tensor.is_norm() { self.as_used(stored) } else { stored })
            }
            Weights::Dummy { seed } => {
                let tensors = self.spec.layer_tensors(layer);
                let shape = tensors.into_iter().find(|(kind, _)| *kind == tensor).map(|(_, shape)| shape);
                let shape = shape.ok_or_else(|| missing(&name))?;
                Ok(dummy::tensor(*seed, &name, shape, self.spec.dtype))
            }
        }
    }

    /// The weight of a norm as it is multiplied with, given as it is stored.
    fn as_used<'a>(&self, norm: Tensor<'a>) -> Tensor<'a> {
        match self.names.norms {
            NormStorage::Plain => norm,
            NormStorage::LessOne => norm.plus_one(),
        }
    }

    /// Says that `tensor` was read for the last time for now, so that memory need not hold both it and what was made of
    /// it.
    pub fn release(&self, tensor: &Tensor<'_>) {
        if let (Weights::Stored(store), Cow::Borrowed(data)) = (&self.weights, &tensor.data) {
            store.release(data);
        }
    }

    /// What tells this checkpoint from any other, for caches of what is made of it: `config.json`, and name, size, time
    /// of change and header of each file of weights. `None` if it is part of the program, or random.
    ///
    /// The weights themselves are left out. To read them takes about as long as what a cache would save, and they do
    /// not change without the time of change, unless someone takes pains.
    pub fn fingerprint(&self) -> Option<Vec<u8>> {
        let (Weights::Stored(store), Some(config_json)) = (&self.weights, &self.config_json) else {
            return None;
        };
        let mut all = format!("config {}\n{config_json}\n", config_json.len()).into_bytes();
        all.extend(store.fingerprint()?);
        Some(all)
    }

    fn dummy_infos(&self) -> Vec<TensorInfo> {
        let global = self.spec.global_tensors().into_iter();
        let mut named: Vec<_> =
            global.map(|(tensor, shape)| ((self.names.global)(tensor).to_owned(), shape)).collect();
        for layer in 0..self.spec.layers.len() {
            let tensors = self.spec.layer_tensors(layer).into_iter();
            named.extend(tensors.map(|(tensor, shape)| (self.names.layer_name(layer, tensor), shape)));
        }
        named.sort();
        let info = |(name, shape): (String, Vec<usize>)| TensorInfo {
            name,
            dtype: self.spec.dtype.name().to_uppercase(),
            bytes: shape.iter().map(|&dim| dim as u64).product::<u64>() * self.spec.dtype.size() as u64,
            shape,
            file: "dummy".to_owned(),
        };
        named.into_iter().map(info).collect()
    }
}

/// Both files list ids that end a generation, and neither list is always the full one.
fn add_eos(spec: &mut ModelSpec, generation_config: &GenerationConfig) {
    for &id in &generation_config.eos_token_ids {
        if (id as usize) < spec.vocab_size && !spec.eos_token_ids.contains(&id) {
            spec.eos_token_ids.push(id);
        }
    }
}

/// `config.json` of a directory as it is, and with `generation_config.json` as understood.
fn read_configs(path: &Path) -> Result<(String, ModelSpec, GenerationConfig)> {
    refuse_files(path)?;
    let config = path.join("config.json");
    if !config.is_file() {
        let detail = match path.join("adapter_config.json").is_file() {
            true => {
                "holds a LoRA adapter; serve its base model, with --lora-modules NAME=PATH for the adapter"
            }
            false => "holds no config.json; a directory in Hugging Face layout is needed",
        };
        return Err(ModelError::NotACheckpoint { path: path.to_owned(), detail: detail.to_owned() });
    }
    let config_json = read_json(&config)?;
    let spec = ModelSpec::from_config_json(&config_json)?;
    let generation = path.join("generation_config.json");
    let generation = match generation.is_file() {
        true => GenerationConfig::parse(&read_json(&generation)?)?,
        false => GenerationConfig::default(),
    };
    Ok((config_json, spec, generation))
}

/// A checkpoint is a directory; says what to do with a file.
fn refuse_files(path: &Path) -> Result<()> {
    let metadata = path.metadata().map_err(|error| ModelError::io(path, error))?;
    if metadata.is_dir() {
        return Ok(());
    }
    let detail = match path.extension().and_then(|extension| extension.to_str()) {
        Some("gguf") => "GGUF is not supported yet; use the safetensors checkpoint of this model",
        Some("bin" | "pt" | "pth") => {
            "PyTorch pickles are refused; convert the model to a safetensors directory"
        }
        _ => "is a file; pass the directory that holds config.json and the safetensors files",
    };
    Err(ModelError::NotACheckpoint { path: path.to_owned(), detail: detail.to_owned() })
}

/// The embedding table. A tied model may store it under the head's name only.
fn embedding<'a>(spec: &ModelSpec, names: &WeightNames, store: &'a Store) -> Result<Stored<'a>> {
    let own = (names.global)(GlobalTensor::Embed);
    match store.get(own) {
        None if spec.head == Head::Tied => {
            store.get((names.global)(GlobalTensor::LmHead)).ok_or_else(|| missing(own))
        }
        stored => stored.ok_or_else(|| missing(own)),
    }
}

fn find<'a>(store: &'a Store, name: &str) -> Result<Stored<'a>> {
    store.get(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> ModelError {
    ModelError::Mismatch(format!("the model has no tensor `{name}`"))
}

pub(crate) fn borrow(stored: Stored<'_>) -> Result<Tensor<'_>> {
    Ok(Tensor { dtype: dtype(&stored)?, shape: stored.shape.into(), data: stored.data.into() })
}

/// The element type, if it is one that weights may have.
pub(crate) fn dtype(stored: &Stored) -> Result<DType> {
    match stored.dtype {
        Dtype::F32 => Ok(DType::F32),
        Dtype::F16 => Ok(DType::F16),
        Dtype::BF16 => Ok(DType::BF16),
        other => Err(ModelError::Unsupported(format!(
            "{}: tensor `{}` has dtype {other:?}; supported are F32, F16, BF16",
            stored.file, stored.name
        ))),
    }
}

fn info(stored: Stored<'_>) -> TensorInfo {
    TensorInfo {
        name: stored.name.to_owned(),
        dtype: format!("{:?}", stored.dtype),
        shape: stored.shape.to_vec(),
        bytes: stored.data.len() as u64,
        file: stored.file.to_owned(),
    }
}
