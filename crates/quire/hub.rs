//! A hub id -> a local directory: downloads what inference needs into the cache that other tools share.
//!
//! Environment: `HF_ENDPOINT` (another hub), `HF_HOME` (where the cache is), `HF_TOKEN` (for gated models; else the
//! token that `hf auth login` stored), `HF_HUB_OFFLINE=1` (the cache alone). A file that is complete is not loaded again;
//! one that was interrupted goes on where it stopped.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

/// Times a broken download is taken up again.
const RETRIES: usize = 5;

/// Files read if they exist, besides the weights and `*.tiktoken`.
const SMALL_FILES: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.txt",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No such repository or revision, or no permission: the hub does not tell which.
    #[error(
        "{id}: the hub at {endpoint} answered {status}; check the id, and for a private or gated model accept its terms \
         and set HF_TOKEN"
    )]
    Refused {
        /// The repository.
        id: String,
        /// The hub.
        endpoint: String,
        /// HTTP status.
        status: u16,
    },
    /// The repository has nothing that can be served.
    #[error("{id}: {message}")]
    Content {
        /// The repository.
        id: String,
        /// What is missing.
        message: String,
    },
    /// Offline, and the cache does not have it.
    #[error("{id}: not in the cache {cache}, and HF_HUB_OFFLINE is set")]
    Offline {
        /// The repository.
        id: String,
        /// The directory.
        cache: String,
    },
    /// The transfer failed.
    #[error("{id}: downloading {file} from {endpoint} failed: {source}")]
    Transfer {
        /// The repository.
        id: String,
        /// The file, or `the list of files`.
        file: String,
        /// The hub.
        endpoint: String,
        /// What went wrong.
        source: Box<ApiError>,
    },
}

/// Which hub, and where its files are kept.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Base URL.
    pub endpoint: String,
    /// Directory of the cache (`$HF_HOME/hub`).
    pub cache: PathBuf,
    /// Sent as bearer token.
    pub token: Option<String>,
    /// Use the cache alone.
    pub offline: bool,
    /// Draw progress bars on standard error.
    pub progress: bool,
}

impl HubConfig {
    /// From the hub's own environment variables.
    pub fn from_env() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let cache = Cache::from_env();
        Self {
            endpoint: variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            token: variable("HF_TOKEN").or_else(|| cache.token()),
            cache: cache.path().clone(),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
            progress: true,
        }
    }

    /// The directory with the files of `id` (`org/name` or `org/name@revision`). Without `weights`, the configuration and
    /// tokenizer files alone.
    ///
    /// # Errors
    /// No such repository, nothing usable in it, or the transfer failed.
    pub fn fetch(&self, id: &str, weights: bool) -> Result<PathBuf, HubError> {
        let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
        let repo = |revision: &str| Repo::with_revision(name.into(), RepoType::Model, revision.into());
        let cached = || {
            let config = Cache::new(self.cache.clone()).repo(repo(revision)).get("config.json")?;
            config.parent().map(Path::to_owned)
        };
        if self.offline {
            let cache = self.cache.display().to_string();
            return cached().ok_or_else(|| HubError::Offline { id: id.into(), cache });
        }
        let api = self.api().map_err(|error| self.error(id, "anything", error))?;
        let info = match api.repo(repo(revision)).info() {
            Ok(info) => info,
            Err(error) => {
                let error = self.error(id, "the list of files", error);
                // A hub out of reach should not stop a model that is here.
                let fallback = cached().filter(|_| matches!(error, HubError::Transfer { .. }));
                let Some(directory) = fallback else { return Err(error) };
                tracing::warn!(%error, "using the copy in the cache");
                return Ok(directory);
            }
        };
        // Files come from the commit, not the branch: it may move meanwhile, and the files must fit one another.
        let commit = api.repo(repo(&info.sha));
        let cache_of_commit = Cache::new(self.cache.clone()).repo(repo(&info.sha));
        let downloaded = Cell::new(false);
        let get = |file: &str| {
            if cache_of_commit.get(file).is_none() {
                tracing::info!(file, "downloading");
                downloaded.set(true);
            }
            commit.get(file).map_err(|error| self.error(id, file, error))
        };
        let listing = Listing::new(id, info.siblings.into_iter().map(|sibling| sibling.rfilename))?;
        let config = get("config.json")?;
        listing.small_files().try_for_each(|file| get(file).map(drop))?;
        if weights {
            let index = listing.has(INDEX).then(|| get(INDEX)).transpose()?;
            listing.weight_files(index.as_deref())?.iter().try_for_each(|file| get(file).map(drop))?;
        }
        if self.progress && downloaded.get() && std::io::stderr().is_terminal() {
            // The last bar leaves the cursor behind it.
            let _ = writeln!(std::io::stderr());
        }
        // Only now does the cache say that this revision is here.
        let reference = Cache::new(self.cache.clone()).repo(repo(revision)).create_ref(&info.sha);
        reference.map_err(|error| self.error(id, "the reference", error.into()))?;
        Ok(config.parent().map(Path::to_owned).unwrap_or_default())
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::new()
            .with_endpoint(self.endpoint.trim_end_matches('/').to_owned())
            .with_cache_dir(self.cache.clone())
            .with_token(self.token.clone())
            .with_retries(RETRIES)
            .with_progress(self.progress)
            .with_user_agent("quire", env!("CARGO_PKG_VERSION"))
            .build()
    }

    fn error(&self, id: &str, file: &str, source: ApiError) -> HubError {
        let (id, endpoint) = (id.to_owned(), self.endpoint.clone());
        match status_of(&source) {
            Some(status @ (401 | 403 | 404)) => HubError::Refused { id, endpoint, status },
            _ => HubError::Transfer { id, file: file.into(), endpoint, source: Box::new(source) },
        }
    }
}

fn status_of(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(last) => status_of(last),
        _ => None,
    }
}

/// Whether `text` has the form `org/name`, with an optional `@revision`.
pub fn is_repo_id(text: &str) -> bool {
    let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.contains("..")
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    let revision_ok = !revision.is_empty() && revision.split('/').all(part);
    revision_ok && name.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// The files of a repository, without those in directories: nothing is ever written elsewhere.
struct Listing<'a> {
    id: &'a str,
    files: Vec<String>,
}

impl<'a> Listing<'a> {
    /// Refuses what is no model.
    fn new(id: &'a str, files: impl Iterator<Item = String>) -> Result<Self, HubError> {
        let listing = Self { id, files: files.filter(|file| !file.contains(['/', '\\'])).collect() };
        match listing.has("config.json") {
            true => Ok(listing),
            false if listing.has_suffix(".gguf") => listing.fail(GGUF_ONLY),
            false => listing.fail("holds no config.json, so it is not a model in Hugging Face layout"),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file == name)
    }

    fn has_suffix(&self, suffix: &str) -> bool {
        self.files.iter().any(|file| file.to_ascii_lowercase().ends_with(suffix))
    }

    /// Configuration and tokenizer.
    fn small_files(&self) -> impl Iterator<Item = &str> {
        let is_small = |file: &&str| SMALL_FILES.contains(file) || file.ends_with(".tiktoken");
        self.files.iter().map(String::as_str).filter(is_small)
    }

    /// The shards that the index names, or the one file. (Some repositories hold the weights once more under other names.)
    fn weight_files(&self, index: Option<&Path>) -> Result<Vec<String>, HubError> {
        let Some(index) = index else {
            return match self.has(SINGLE) {
                true => Ok(vec![SINGLE.into()]),
                false if self.has_suffix(".gguf") => self.fail(GGUF_ONLY),
                false => self.fail("holds no model.safetensors; PyTorch pickles (.bin, .pt) are refused"),
            };
        };
        let text = std::fs::read(index).unwrap_or_default();
        let index: Index = match serde_json::from_slice(&text) {
            Ok(index) => index,
            Err(error) => return self.fail(&format!("{INDEX} cannot be read: {error}")),
        };
        let shards: BTreeSet<String> = index.weight_map.into_values().collect();
        match shards.iter().find(|shard| !self.has(shard)) {
            Some(missing) => {
                self.fail(&format!("{INDEX} names the file `{missing}`, which is not in the repository"))
            }
            None => Ok(shards.into_iter().collect()),
        }
    }

    fn fail<T>(&self, message: &str) -> Result<T, HubError> {
        Err(HubError::Content { id: self.id.into(), message: message.into() })
    }
}

const GGUF_ONLY: &str =
    "holds GGUF files only, which are not supported yet; use the model's safetensors repository";

/// `model.safetensors.index.json`, as far as needed here.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
