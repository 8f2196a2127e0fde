//! tiktoken files: `base64(token bytes) rank`, one a line.
//!
//! Such a file holds neither the regular expression that cuts the text nor the special tokens; both belong to the
//! model family, which is known from `config.json` and the number of ranks.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::{added_token, merges_by_rank, template_processing};
use crate::error::{Result, TokenizerError};
use crate::pieces::byte_to_char;

/// What a family adds to its rank file.
struct Family {
    /// `model_type` in `config.json`.
    model_type: &'static str,
    num_ranks: usize,
    /// The regular expression whose matches are encoded one by one.
    pattern: &'static str,
    /// Special tokens in id order, starting at `num_ranks`.
    special_tokens: fn() -> Vec<String>,
    /// Put in front of every text.
    bos: &'static str,
}

/// Llama 3, 3.1, 3.2, 3.3 (the names of 3.1; the ids are the same in all).
const LLAMA3: Family = Family {
    model_type: "llama",
    num_ranks: 128_000,
    pattern: concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    special_tokens: llama3_special_tokens,
    bos: "<|begin_of_text|>",
};

const FAMILIES: &[&Family] = &[&LLAMA3];

fn llama3_special_tokens() -> Vec<String> {
    const NUM_SPECIAL: usize = 256;
    let named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ];
    let reserved = (3..NUM_SPECIAL - named.len() + 3).map(|i| format!("<|reserved_special_token_{i}|>"));
    named.iter().map(ToString::to_string).chain(reserved).collect()
}

/// Whether this is a tiktoken file rather than SentencePiece protobuf: its first line is base64, a space, a number.
pub(super) fn looks_like(bytes: &[u8]) -> bool {
    let line = bytes.split(|&b| b == b'\n').next().unwrap_or_default();
    parse_line(line).is_some()
}

fn parse_line(line: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (token, rank) = std::str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
    Some((STANDARD.decode(token).ok()?, rank.parse().ok()?))
}

/// The `tokenizer.json` document for this rank file; `config` is the model's `config.json` or `Null`.
pub(super) fn document(bytes: &[u8], config: &Value, file: &str) -> Result<Value> {
    let ranks = parse_ranks(bytes, file)?;
    let family = family_of(ranks.len(), config, file)?;
    let mut vocab = Map::with_capacity(ranks.len());
    for (rank, text) in ranks.iter().enumerate() {
        vocab.insert(text.clone(), rank.into());
    }
    let id_of = |text: &str| vocab.get(text).and_then(Value::as_u64).map(|id| id as usize);
    let merges = merges_by_rank(ranks.iter().enumerate().map(|(rank, text)| (text.as_str(), rank)), id_of);
    let special = (family.special_tokens)();
    let added: Vec<Value> =
        special.iter().enumerate().map(|(i, token)| added_token(ranks.len() + i, token, true)).collect();
    let bos_id = ranks.len() + special.iter().position(|t| t == family.bos).unwrap_or_default();
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": family.pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": template_processing(&[(family.bos, bos_id)], &[]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": true},
    }))
}

/// Token texts by rank, in the byte-level alphabet.
fn parse_ranks(bytes: &[u8], file: &str) -> Result<Vec<String>> {
    let mut ranks = Vec::new();
    for (number, line) in bytes.split(|&b| b == b'\n').enumerate().filter(|(_, line)| !line.is_empty()) {
        let entry = parse_line(line).filter(|&(_, rank)| rank == ranks.len());
        let (token, _) = entry.ok_or_else(|| {
            let expected = format!("line {}: expected `<base64> {}`", number + 1, ranks.len());
            TokenizerError::invalid(file, &expected)
        })?;
        ranks.push(token.into_iter().map(byte_to_char).collect());
    }
    Ok(ranks)
}

fn family_of(num_ranks: usize, config: &Value, file: &str) -> Result<&'static Family> {
    let model_type = config.get("model_type").and_then(Value::as_str);
    let family = FAMILIES
        .iter()
        .find(|family| family.num_ranks == num_ranks && model_type.is_none_or(|t| t == family.model_type));
    family.copied().ok_or_else(|| {
        TokenizerError::unsupported(
            file,
            format!(
                "a tiktoken file holds no split pattern and no special tokens, and those of model_type {} with \
                 {num_ranks} ranks are not known (known: llama with 128000)",
                model_type.unwrap_or("(none)"),
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_special_tokens_have_their_published_ids() {
        let special = llama3_special_tokens();
        assert_eq!(special.len(), 256);
        for (id, token) in [
            (128_000, "<|begin_of_text|>"),
            (128_004, "<|finetune_right_pad_id|>"),
            (128_009, "<|eot_id|>"),
            (128_011, "<|reserved_special_token_3|>"),
            (128_255, "<|reserved_special_token_247|>"),
        ] {
            assert_eq!(special[id - 128_000], token);
        }
    }

    #[test]
    fn an_unknown_family_is_named_in_the_error() {
        let config = json!({"model_type": "kimi_k2"});
        let err = document(b"IQ== 0\nIg== 1\n", &config, "tokenizer.model").unwrap_err().to_string();
        assert!(
            err.contains("kimi_k2") && err.contains("2 ranks") && err.contains("tokenizer.json"),
            "{err}"
        );
    }

    #[test]
    fn a_broken_line_is_named_by_number() {
        let err = document(b"IQ== 0\n\x00\n", &Value::Null, "tokenizer.model").unwrap_err().to_string();
        assert!(err.contains("line 2"), "{err}");
        assert!(looks_like(b"IQ== 0\n") && !looks_like(b"\x0a\x0e\x0a\x05<unk>\x15"));
    }
}
