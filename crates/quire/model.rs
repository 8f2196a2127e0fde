//! What the MODEL argument means.

use std::path::{Path, PathBuf};

use quire_model::{Checkpoint, ModelError};

use crate::args::{EngineArgs, LoadFormat};
use crate::hub::{self, HubError};

/// Seed of `--load-format dummy`: the same weights every time.
const DUMMY_SEED: u64 = 0;

/// Where a model's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// Compiled into the program.
    Demo,
    /// A directory, given by the user.
    Directory(PathBuf),
    /// A repository of the hub: `org/name` or `org/name@revision`.
    Hub(String),
}

/// Why there is no model to run.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The argument names nothing that can be served.
    #[error("{argument}: {message}")]
    Argument {
        /// As given.
        argument: String,
        /// What it is and what would do.
        message: String,
    },
    /// The download failed.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The files are no usable checkpoint.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl ModelSource {
    /// Decides what `argument` means. An existing path is always local, whatever it looks like.
    ///
    /// # Errors
    /// The argument is a file, or neither a path that exists nor a hub id.
    pub fn resolve(argument: Option<&str>) -> Result<Self, SourceError> {
        let Some(argument) = argument else { return Ok(Self::Demo) };
        let fail =
            |message: &str| Err(SourceError::Argument { argument: argument.into(), message: message.into() });
        let path = Path::new(argument);
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if extension.eq_ignore_ascii_case("gguf") {
            return fail("GGUF files are not supported yet; use the safetensors checkpoint of this model");
        }
        if path.exists() {
            // A file is refused where its content is looked at, with what to pass instead.
            return Ok(Self::Directory(path.to_owned()));
        }
        if argument == quire_demo_model::NAME {
            return Ok(Self::Demo);
        }
        let looks_local = argument.starts_with(['.', '/', '~']) || argument.ends_with('/');
        if !looks_local && hub::is_repo_id(argument) {
            return Ok(Self::Hub(argument.to_owned()));
        }
        fail(
            "no such directory, and not a hub id of the form org/name; leave it out to get the built-in demo model",
        )
    }

    /// The name under which it is served unless the user chooses another.
    pub fn default_name(&self) -> String {
        match self {
            Self::Demo => quire_demo_model::NAME.to_owned(),
            Self::Directory(path) => {
                let absolute = path.canonicalize().unwrap_or_else(|_| path.clone());
                absolute
                    .file_name()
                    .map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
            }
            Self::Hub(id) => id.split('@').next().unwrap_or(id).to_owned(),
        }
    }

    /// Downloads what is not local yet.
    ///
    /// # Errors
    /// The download failed.
    pub fn fetch(self, load_format: LoadFormat) -> Result<LocalModel, SourceError> {
        match self {
            Self::Demo => Ok(LocalModel::Demo),
            Self::Directory(path) => Ok(LocalModel::Directory(path)),
            Self::Hub(id) => {
                let weights = load_format == LoadFormat::Auto;
                Ok(LocalModel::Directory(hub::HubConfig::from_env().fetch(&id, weights)?))
            }
        }
    }
}

/// A model whose files are on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalModel {
    /// Compiled into the program.
    Demo,
    /// A directory in Hugging Face layout.
    Directory(PathBuf),
}

impl LocalModel {
    /// What `args` name, downloaded if need be.
    ///
    /// # Errors
    /// The argument or the download.
    pub fn from_args(args: &EngineArgs) -> Result<Self, SourceError> {
        ModelSource::resolve(args.model.as_deref())?.fetch(args.load_format)
    }

    /// Opens the checkpoint; weights are mapped, not read.
    ///
    /// # Errors
    /// It is damaged or not supported.
    pub fn open(&self, load_format: LoadFormat) -> Result<Checkpoint, SourceError> {
        let checkpoint = match (self, load_format) {
            (Self::Demo, LoadFormat::Auto) => Checkpoint::from_static(
                quire_demo_model::CONFIG_JSON,
                Some(quire_demo_model::GENERATION_CONFIG_JSON),
                quire_demo_model::WEIGHTS,
            )?,
            (Self::Demo, LoadFormat::Dummy) => Checkpoint::dummy(
                quire_model::ModelSpec::from_config_json(quire_demo_model::CONFIG_JSON)?,
                DUMMY_SEED,
            ),
            (Self::Directory(path), LoadFormat::Auto) => Checkpoint::open(path)?,
            (Self::Directory(path), LoadFormat::Dummy) => Checkpoint::open_dummy(path, DUMMY_SEED)?,
        };
        Ok(checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_argument_means() {
        let resolve = |argument| ModelSource::resolve(Some(argument)).unwrap();
        assert_eq!(ModelSource::resolve(None).unwrap(), ModelSource::Demo);
        assert_eq!(resolve("quire-demo"), ModelSource::Demo);
        assert_eq!(resolve("Qwen/Qwen3-0.6B"), ModelSource::Hub("Qwen/Qwen3-0.6B".into()));
        assert_eq!(resolve("Qwen/Qwen3-0.6B@v1").default_name(), "Qwen/Qwen3-0.6B");
        let temp = std::env::temp_dir();
        assert_eq!(resolve(temp.to_str().unwrap()), ModelSource::Directory(temp));
        for (argument, part) in [
            ("model.gguf", "GGUF"),
            ("./nothing/here", "no such directory"),
            ("nothing", "no such directory"),
            ("/a/b", "no such directory"),
            ("a/b/c", "no such directory"),
            ("org/na me", "no such directory"),
        ] {
            let error = ModelSource::resolve(Some(argument)).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(argument), "{error}");
        }
    }

    #[test]
    fn an_existing_path_is_local_even_if_it_looks_like_an_id() {
        let root = std::env::temp_dir().join(format!("quire-model-{}", std::process::id()));
        std::fs::create_dir_all(root.join("org/name")).unwrap();
        let path = root.join("org/name");
        let source = ModelSource::resolve(path.to_str()).unwrap();
        assert_eq!(source, ModelSource::Directory(path));
        assert_eq!(source.default_name(), "name");
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn the_demo_opens() {
        let checkpoint = LocalModel::Demo.open(LoadFormat::Auto).unwrap();
        assert_eq!(checkpoint.spec().architecture, "Qwen3ForCausalLM");
        LocalModel::Demo.open(LoadFormat::Dummy).unwrap();
    }
}
