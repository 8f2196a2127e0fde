//! BERT's `vocab.txt`: one WordPiece token a line, the line number is the id.

use serde_json::{Map, Value, json};

use super::{added_token, template_processing};
use crate::error::{Result, TokenizerError};

/// A word longer than this many characters becomes one unknown token, as in BERT's own tokenizer.
const MAX_CHARS_PER_WORD: usize = 100;

/// The `tokenizer.json` document for this vocabulary; `config` is `tokenizer_config.json` or `Null`.
pub(super) fn document(bytes: &[u8], config: &Value, file: &str) -> Result<Value> {
    let text = std::str::from_utf8(bytes).map_err(|e| TokenizerError::invalid(file, &e))?;
    let mut vocab = Map::new();
    for (id, line) in text.lines().enumerate() {
        vocab.insert(line.trim_end_matches('\r').to_owned(), id.into());
    }
    let id_of = |token: &str| {
        let id = vocab.get(token).and_then(Value::as_u64);
        id.map(|id| id as usize).ok_or_else(|| TokenizerError::invalid(file, &format!("no {token} token")))
    };
    let (cls, sep) = (id_of("[CLS]")?, id_of("[SEP]")?);
    id_of("[UNK]")?;
    let added: Vec<Value> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .iter()
        .filter_map(|token| Some(added_token(id_of(token).ok()?, token, true)))
        .collect();
    let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(true);
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true,
            "handle_chinese_chars": flag("tokenize_chinese_chars"),
            "strip_accents": config.get("strip_accents").cloned().unwrap_or_default(),
            "lowercase": flag("do_lower_case"),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template_processing(&[("[CLS]", cls)], &[("[SEP]", sep)]),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": MAX_CHARS_PER_WORD, "vocab": vocab,
        },
    }))
}
