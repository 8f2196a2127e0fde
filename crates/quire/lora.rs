//! `--lora-modules`: adapters that are served as models of their own.

use std::path::PathBuf;
use std::str::FromStr;

use quire_model::{Checkpoint, LoraAdapter};

use crate::config::ConfigError;
use crate::{Failure, Result};

const FLAG: &str = "lora-modules";
/// Bytes of a name.
const MAX_NAME: usize = 128;

/// `NAME=PATH`: the adapter in a directory, and what requests call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraModule {
    /// As in the `model` field of a request.
    pub name: String,
    /// A directory as PEFT writes it.
    pub path: PathBuf,
}

impl FromStr for LoraModule {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let Some((name, path)) = text.split_once('=') else {
            return Err("must be NAME=PATH, the path of an adapter's directory".into());
        };
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/:@".contains(&byte);
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_plain) {
            return Err(format!("the name must be 1 to {MAX_NAME} letters, digits and ._-/:@"));
        }
        if path.is_empty() {
            return Err("the path is empty".into());
        }
        Ok(Self { name: name.to_owned(), path: path.into() })
    }
}

/// Refuses names that mean two things; `model` is the model's own.
///
/// # Errors
/// The first of them.
pub(crate) fn check_names(modules: &[LoraModule], model: &str) -> Result<(), ConfigError> {
    for (index, LoraModule { name, .. }) in modules.iter().enumerate() {
        let message = match modules[..index].iter().any(|other| other.name == *name) {
            true => format!("`{name}` is given twice; names must differ"),
            false if name == model => format!("`{name}` is the model's own name; take another"),
            false => continue,
        };
        return Err(ConfigError { flag: FLAG, message });
    }
    Ok(())
}

/// The model with its adapters.
///
/// # Errors
/// One of them does not fit the model, or cannot be read.
pub(crate) fn open(modules: &[LoraModule], base: Checkpoint) -> Result<Checkpoint> {
    let open = |module: &LoraModule| {
        let adapter = LoraAdapter::open(&module.path, &base);
        let adapter = adapter.map_err(|error| Failure(format!("--{FLAG} {}=…: {error}", module.name)))?;
        let (name, rank) = (&module.name, adapter.rank());
        tracing::info!(name, rank, scaling = adapter.scaling(), "adapter");
        Ok(adapter)
    };
    let adapters = modules.iter().map(open).collect::<Result<Vec<_>>>()?;
    Ok(base.with_adapters(adapters))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_mean_one_thing() {
        let module: LoraModule = "org/robot-v1.2=/models/a=b".parse().unwrap();
        assert_eq!((module.name.as_str(), module.path), ("org/robot-v1.2", PathBuf::from("/models/a=b")));
        for (text, part) in [
            ("/models/a", "NAME=PATH"),
            ("=/models/a", "1 to 128"),
            ("a b=/models/a", "letters"),
            ("ä=/models/a", "letters"),
            ("a=", "path is empty"),
        ] {
            let message = text.parse::<LoraModule>().unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
        let modules = |names: &[&str]| -> Vec<LoraModule> {
            names.iter().map(|name| format!("{name}=/x").parse().unwrap()).collect()
        };
        assert!(check_names(&modules(&["a", "b"]), "demo").is_ok());
        for (names, part) in [(["a", "a"], "given twice"), (["a", "demo"], "model's own name")] {
            let message = check_names(&modules(&names), "demo").unwrap_err().to_string();
            assert!(message.starts_with("--lora-modules: ") && message.contains(part), "{message}");
        }
    }
}
