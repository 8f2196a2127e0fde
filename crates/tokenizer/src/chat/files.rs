//! Where a checkpoint keeps its chat templates.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{Result, TokenizerError, read_json, read_optional};

/// The most named templates that are taken from one checkpoint.
const MAX_TEMPLATES: usize = 64;

/// Name to source of all templates in this directory.
pub(super) fn from_dir(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut sources = BTreeMap::new();
    for file in ["tokenizer_config.json", "chat_template.json"] {
        if let Some(config) = read_json(&dir.join(file))? {
            sources.extend(from_config(&config, file)?);
        }
    }
    let additional = dir.join("additional_chat_templates");
    for entry in std::fs::read_dir(&additional).into_iter().flatten().flatten().take(MAX_TEMPLATES) {
        let path = entry.path();
        let stem = path.file_stem().and_then(|name| name.to_str());
        if let (Some(name), Some("jinja")) = (stem, path.extension().and_then(|e| e.to_str())) {
            insert_file(&mut sources, name, &path)?;
        }
    }
    insert_file(&mut sources, super::template::DEFAULT, &dir.join("chat_template.jinja"))?;
    Ok(sources)
}

/// Name to source of the templates in the bytes of a `tokenizer_config.json`.
pub(super) fn from_config_bytes(bytes: &[u8]) -> Result<BTreeMap<String, String>> {
    let file = "tokenizer_config.json";
    let config = serde_json::from_slice(bytes).map_err(|e| TokenizerError::invalid(file, &e))?;
    from_config(&config, file)
}

fn from_config(config: &Value, file: &str) -> Result<BTreeMap<String, String>> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(source)) => {
            Ok(BTreeMap::from([(super::template::DEFAULT.to_owned(), source.clone())]))
        }
        Some(Value::Array(list)) => list.iter().take(MAX_TEMPLATES).map(|entry| named(entry, file)).collect(),
        Some(_) => Err(TokenizerError::invalid(file, &"chat_template is neither a string nor a list")),
    }
}

fn named(entry: &Value, file: &str) -> Result<(String, String)> {
    match (entry["name"].as_str(), entry["template"].as_str()) {
        (Some(name), Some(source)) => Ok((name.to_owned(), source.to_owned())),
        _ => Err(TokenizerError::invalid(file, &"an entry of chat_template lacks `name` or `template`")),
    }
}

fn insert_file(sources: &mut BTreeMap<String, String>, name: &str, path: &Path) -> Result<()> {
    if let Some(bytes) = read_optional(path)? {
        let source =
            String::from_utf8(bytes).map_err(|e| TokenizerError::invalid(path.display().to_string(), &e))?;
        sources.insert(name.to_owned(), source);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_jinja_file_comes_first_and_named_ones_add() {
        let dir = std::env::temp_dir().join(format!("quire-chat-files-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("additional_chat_templates")).unwrap();
        let config = json!({"chat_template": [
            {"name": "default", "template": "old"}, {"name": "rag", "template": "r"}]});
        std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
        assert_eq!(from_dir(&dir).unwrap()["default"], "old");
        std::fs::write(dir.join("chat_template.jinja"), "new").unwrap();
        std::fs::write(dir.join("additional_chat_templates/tool_use.jinja"), "t").unwrap();
        let sources = from_dir(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let sources: Vec<_> = sources.iter().map(|(name, source)| (name.as_str(), source.as_str())).collect();
        assert_eq!(sources, [("default", "new"), ("rag", "r"), ("tool_use", "t")]);
    }

    #[test]
    fn malformed_configurations_are_named() {
        assert!(from_config_bytes(b"{}").unwrap().is_empty());
        for bytes in [&b"{\"chat_template\": 1}"[..], b"{\"chat_template\": [{\"name\": \"x\"}]}", b"{"] {
            let error = from_config_bytes(bytes).unwrap_err().to_string();
            assert!(error.starts_with("tokenizer_config.json"), "{error}");
        }
    }
}
