//! From the files of a checkpoint to one `tokenizer.json` document.
//!
//! Every format is brought to the same document, so that all the rest of the crate knows one kind of tokenizer.

mod sentencepiece;
mod tiktoken;
mod wordpiece;

use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Result, TokenizerError, read_json, read_optional};

/// The small JSON files beside a vocabulary; absent ones are `Null`.
#[derive(Default)]
pub(crate) struct Configs {
    pub tokenizer: Value,
    pub special_tokens_map: Value,
    pub model: Value,
    pub generation: Value,
}

impl Configs {
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let read = |name: &str| Ok(read_json(&dir.join(name))?.unwrap_or_default());
        Ok(Self {
            tokenizer: read("tokenizer_config.json")?,
            special_tokens_map: read("special_tokens_map.json")?,
            model: read("config.json")?,
            generation: read("generation_config.json")?,
        })
    }
}

/// Parses a `tokenizer.json`.
pub(crate) fn parse_document(bytes: &[u8], file: &str) -> Result<tokenizers::Tokenizer> {
    tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| TokenizerError::invalid(file, &e))
}

/// Loads the tokenizer of a checkpoint directory: `tokenizer.json` if there is one, else another vocabulary file.
pub(crate) fn from_dir(dir: &Path, configs: &Configs) -> Result<tokenizers::Tokenizer> {
    let path = dir.join("tokenizer.json");
    if let Some(bytes) = read_optional(&path)? {
        return parse_document(&bytes, &path.display().to_string());
    }
    let (path, document) = if let Some((path, bytes)) = read_named(dir, "tokenizer.model")? {
        let document = if tiktoken::looks_like(&bytes) {
            tiktoken::document(&bytes, &configs.model, &path)?
        } else {
            sentencepiece::document(&bytes, &configs.tokenizer, &path)?
        };
        (path, document)
    } else if let Some((path, bytes)) = read_named(dir, "vocab.txt")? {
        let document = wordpiece::document(&bytes, &configs.tokenizer, &path)?;
        (path, document)
    } else {
        return Err(TokenizerError::Missing { dir: dir.to_path_buf() });
    };
    serde_json::from_value(document).map_err(|e| TokenizerError::invalid(path, &e))
}

fn read_named(dir: &Path, name: &str) -> Result<Option<(String, Vec<u8>)>> {
    let path = dir.join(name);
    Ok(read_optional(&path)?.map(|bytes| (path.display().to_string(), bytes)))
}

/// One entry of `added_tokens`: a token that is matched in the text before anything else.
fn added_token(id: usize, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "special": special,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}

/// A post-processor that puts `before` in front of the text and `after` behind it.
fn template_processing(before: &[(&str, usize)], after: &[(&str, usize)]) -> Value {
    let piece = |&(token, _): &(&str, usize)| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let side = |id: &str| -> Vec<Value> {
        before.iter().map(piece).chain([sequence(id)]).chain(after.iter().map(piece)).collect()
    };
    let tokens: serde_json::Map<String, Value> = before
        .iter()
        .chain(after)
        .map(|&(token, id)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
        .collect();
    json!({
        "type": "TemplateProcessing", "single": side("A"),
        "pair": side("A").into_iter().chain(side("B")).collect::<Vec<_>>(),
        "special_tokens": tokens,
    })
}

/// Merge rules of a vocabulary that ranks whole tokens instead of listing merges.
///
/// Every way to cut a token into two tokens is a rule; rules are applied in the order of the token they make, best
/// `rank` (lowest) first, ties by the ids of the parts. `pieces` pairs a token's text with its rank; `id_of` finds a
/// token by its text. Cuts are made at character boundaries of the text.
fn merges_by_rank<'a, R: Ord>(
    pieces: impl Iterator<Item = (&'a str, R)>,
    id_of: impl Fn(&str) -> Option<usize>,
) -> Vec<Value> {
    let mut rules = Vec::new();
    for (text, rank) in pieces {
        let mut cuts: Vec<_> = text
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = text.split_at(at);
                Some((id_of(left)?, id_of(right)?, left, right))
            })
            .collect();
        cuts.sort_unstable();
        if !cuts.is_empty() {
            rules.push((rank, cuts));
        }
    }
    rules.sort_by(|a, b| a.0.cmp(&b.0));
    rules.into_iter().flat_map(|(_, cuts)| cuts).map(|(_, _, left, right)| json!([left, right])).collect()
}
