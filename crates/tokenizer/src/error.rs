//! What can go wrong while loading or using a tokenizer.

use std::fmt::Display;
use std::path::{Path, PathBuf};

/// The result of tokenizer calls.
pub type Result<T> = std::result::Result<T, TokenizerError>;

/// A tokenizer that cannot be loaded, or text that it cannot encode.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The directory holds none of the files a tokenizer can be made from.
    #[error(
        "no tokenizer in {dir}: need tokenizer.json, tokenizer.model (tiktoken or SentencePiece BPE) or vocab.txt"
    )]
    Missing {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A file exists and cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file was read and is not what its name promises.
    #[error("{file}: {reason}")]
    Invalid {
        /// The file.
        file: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// The file is sound, but this vocabulary needs something that is not in the file or not supported.
    #[error("{file}: {reason}; convert it to tokenizer.json (transformers: AutoTokenizer.save_pretrained)")]
    Unsupported {
        /// The file.
        file: String,
        /// What is missing.
        reason: String,
    },
    /// The text cannot be encoded.
    #[error("cannot encode the text: {0}")]
    Encode(String),
}

impl TokenizerError {
    pub(crate) fn invalid(file: impl Into<String>, reason: &dyn Display) -> Self {
        Self::Invalid { file: file.into(), reason: reason.to_string() }
    }

    pub(crate) fn unsupported(file: impl Into<String>, reason: String) -> Self {
        Self::Unsupported { file: file.into(), reason }
    }
}

/// Reads a file whole; `None` when it does not exist.
pub(crate) fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Io { path: path.to_path_buf(), source }),
    }
}

/// Reads and parses a JSON file; `None` when it does not exist.
pub(crate) fn read_json(path: &Path) -> Result<Option<serde_json::Value>> {
    read_optional(path)?
        .map(|bytes| {
            serde_json::from_slice(&bytes)
                .map_err(|e| TokenizerError::invalid(path.display().to_string(), &e))
        })
        .transpose()
}
