//! What can be wrong with a checkpoint, said so that the reader can fix it.

use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The file system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file of the checkpoint is not JSON, or one of its fields has a value that makes no sense.
    #[error("{file}: {detail}")]
    Config {
        /// `config.json`, `generation_config.json`, `model.safetensors.index.json` or `adapter_config.json`.
        file: &'static str,
        /// The field, its value and the values allowed.
        detail: String,
    },
    /// The checkpoint is well-formed but needs something that is not implemented.
    #[error("{0}")]
    Unsupported(String),
    /// There is no usable checkpoint at this path.
    #[error("{path}: {detail}", path = path.display())]
    NotACheckpoint {
        /// What was opened.
        path: PathBuf,
        /// What is there instead, and what to do.
        detail: String,
    },
    /// A safetensors file breaks its own format.
    #[error("{file}: {detail}")]
    Format {
        /// The file's name.
        file: String,
        /// The tensor, the offsets, and the rule they break.
        detail: String,
    },
    /// A LoRA adapter cannot be used.
    #[error("{path}: {source}", path = path.display())]
    Adapter {
        /// Its directory.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<ModelError>,
    },
    /// The tensors in the files are not those that `config.json` describes.
    #[error("{0}")]
    Mismatch(String),
}

/// Results of this crate.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn format(file: &str, detail: impl Into<String>) -> Self {
        Self::Format { file: file.to_owned(), detail: detail.into() }
    }
}
