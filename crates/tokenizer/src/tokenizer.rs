//! The tokenizer of one model.

use std::path::Path;
use std::sync::Arc;

use quire_core::TokenId;
use serde_json::Value;

use crate::detokenizer::Detokenizer;
use crate::error::{Result, TokenizerError};
use crate::load::{self, Configs};
use crate::pieces::{Pieces, Scheme};
use crate::special::{SpecialTokens, ids_of};

/// Text to token ids and back. Cheap to clone; safe to use from many threads at once.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    hf: tokenizers::Tokenizer,
    scheme: Scheme,
    pieces: Pieces,
    special: SpecialTokens,
    bos_id: Option<TokenId>,
    eos_ids: Vec<TokenId>,
}

impl Tokenizer {
    /// Loads the tokenizer of a checkpoint directory.
    ///
    /// Vocabulary: `tokenizer.json`, else `tokenizer.model` (tiktoken of a known family, or SentencePiece BPE), else
    /// `vocab.txt` (WordPiece). Roles of special tokens: `tokenizer_config.json`, `special_tokens_map.json`, then the
    /// ids in `config.json`; ids that end a text also from `generation_config.json`.
    ///
    /// # Errors
    /// When no vocabulary is there, or a file is malformed, or its family is unknown.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let configs = Configs::from_dir(dir)?;
        Self::new(load::from_dir(dir, &configs)?, &configs)
    }

    /// Builds the tokenizer from the bytes of a `tokenizer.json` and, if at hand, a `tokenizer_config.json`.
    ///
    /// # Errors
    /// When one of them is malformed.
    pub fn from_parts(tokenizer_json: &[u8], tokenizer_config_json: Option<&[u8]>) -> Result<Self> {
        let mut configs = Configs::default();
        if let Some(bytes) = tokenizer_config_json {
            configs.tokenizer = serde_json::from_slice(bytes)
                .map_err(|e| TokenizerError::invalid("tokenizer_config.json", &e))?;
        }
        Self::new(load::parse_document(tokenizer_json, "tokenizer.json")?, &configs)
    }

    fn new(mut hf: tokenizers::Tokenizer, configs: &Configs) -> Result<Self> {
        // Files of embedding models ask for truncation and padding; here both are the caller's to decide.
        hf.with_padding(None);
        hf.with_truncation(None).map_err(|e| TokenizerError::invalid("tokenizer.json", &e))?;

        let decoder = serde_json::to_value(hf.get_decoder()).unwrap_or(Value::Null);
        let scheme = Scheme::of_decoder(&decoder);
        let pieces = Pieces::new(&scheme, hf.get_vocab_size(true), |id| vocabulary_entry(&hf, id));
        let spelling = |id| vocabulary_entry(&hf, id).map(|(text, _)| text);

        let mut special = SpecialTokens::default();
        special.merge_config(&configs.tokenizer);
        special.merge_config(&configs.special_tokens_map);
        for (role, key) in [("bos_token", "bos_token_id"), ("eos_token", "eos_token_id")] {
            let id = ids_of(&configs.model, key).first().copied();
            if let Some(text) = id.and_then(spelling) {
                special.merge_role(role, text);
            }
        }
        let bos_id = special.bos().and_then(|text| hf.token_to_id(text));
        let mut eos_ids: Vec<TokenId> =
            special.eos().and_then(|text| hf.token_to_id(text)).into_iter().collect();
        for config in [&configs.generation, &configs.model] {
            for id in ids_of(config, "eos_token_id") {
                if !eos_ids.contains(&id) {
                    eos_ids.push(id);
                }
            }
        }
        Ok(Self { inner: Arc::new(Inner { hf, scheme, pieces, special, bos_id, eos_ids }) })
    }

    /// Encodes `text`. Special tokens written out in the text become those tokens.
    ///
    /// `add_special_tokens` adds what the model expects around a text (a BOS token, `[CLS]` … `[SEP]`); pass `false`
    /// for the output of a chat template, which writes them itself.
    ///
    /// # Errors
    /// When the tokenizer's own pipeline fails (a pattern that gives up, a vocabulary without an unknown token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>> {
        let encoding = self.inner.hf.encode_fast(text, add_special_tokens);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| TokenizerError::Encode(e.to_string()))
    }

    /// Decodes a whole sequence; ids without a token add nothing.
    ///
    /// The same as Hugging Face's decoder, but for bytes that are not UTF-8: each maximal invalid part becomes one
    /// U+FFFD (as [`String::from_utf8_lossy`] does it), because that can be decided while tokens arrive. Hugging
    /// Face does the same for byte-level vocabularies; for `<0xNN>` byte tokens it replaces every byte of a run in
    /// which anything is invalid, the valid characters too. `clean_up_tokenization_spaces` is not applied: it would
    /// change text that the model wrote.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(self, skip_special);
        for &id in ids {
            detokenizer.push(id, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    /// The exact bytes that this token adds to a text (perhaps part of a character); `None` for an id without one.
    ///
    /// At the start of a text SentencePiece drops one leading space of them. WordPiece tokens are given as they are
    /// in the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.inner.pieces.get(id)
    }

    /// The token as text, for people: its bytes, with U+FFFD where they are not UTF-8.
    pub fn token_text(&self, id: TokenId) -> Option<String> {
        self.token_bytes(id).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn id_to_token(&self, id: TokenId) -> Option<String> {
        vocabulary_entry(&self.inner.hf, id).map(|(text, _)| text)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<TokenId> {
        self.inner.hf.token_to_id(token)
    }

    /// One past the largest id, added tokens included. The model's own vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.pieces.len()
    }

    /// Whether the id is a special token: one that `skip_special` leaves out.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.inner.pieces.is_special(id)
    }

    /// The texts of the tokens with a role, as chat templates want them.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.inner.special
    }

    /// Text of the beginning-of-sequence token.
    pub fn bos_token(&self) -> Option<&str> {
        self.inner.special.bos()
    }

    /// Text of the end-of-sequence token.
    pub fn eos_token(&self) -> Option<&str> {
        self.inner.special.eos()
    }

    /// Id of the beginning-of-sequence token.
    pub fn bos_token_id(&self) -> Option<TokenId> {
        self.inner.bos_id
    }

    /// Id of the end-of-sequence token.
    pub fn eos_token_id(&self) -> Option<TokenId> {
        self.inner.eos_ids.first().copied()
    }

    /// All ids that end a text: the tokenizer's end token, then those of `generation_config.json` and `config.json`.
    pub fn eos_token_ids(&self) -> &[TokenId] {
        &self.inner.eos_ids
    }

    pub(crate) fn scheme(&self) -> &Scheme {
        &self.inner.scheme
    }

    /// Decodes through the vocabulary's own decoder, for those whose tokens cannot be taken one by one.
    pub(crate) fn decode_contextual(&self, ids: &[TokenId], skip_special: bool) -> String {
        // Some of the library's decoders count on a first token.
        if ids.is_empty() {
            String::new()
        } else {
            self.inner.hf.decode(ids, skip_special).unwrap_or_default()
        }
    }
}

/// A token's text and whether it is special.
///
/// The library gives an added token in its normalized form (`▁<s>`), which its decoder then turns back. A special
/// token is no text to be normalized: it is taken as it is written.
fn vocabulary_entry(hf: &tokenizers::Tokenizer, id: TokenId) -> Option<(String, bool)> {
    match hf.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
        Some(token) if token.special => Some((token.content.clone(), true)),
        _ => hf.id_to_token(id).map(|text| (text, false)),
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special", self.special_tokens())
            .finish_non_exhaustive()
    }
}
