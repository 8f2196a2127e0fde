//! Log-probabilities with the tokens as text.

use quire_core::{TokenId, TokenLogprobs};
use quire_tokenizer::Tokenizer;

/// The log-probability of one token, from the raw logits (natural logarithm).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// Its text, with U+FFFD where its bytes are not whole characters.
    pub text: String,
    /// Its bytes, exactly.
    pub bytes: Vec<u8>,
    /// Its log-probability.
    pub logprob: f32,
    /// 1 for the most likely token.
    pub rank: u32,
    /// The most likely tokens at this place, best first.
    pub top: Vec<TopLogprob>,
}

/// One of the most likely tokens at a place.
#[derive(Clone, Debug, PartialEq)]
pub struct TopLogprob {
    /// The token.
    pub id: TokenId,
    /// Its text, with U+FFFD where its bytes are not whole characters.
    pub text: String,
    /// Its bytes, exactly.
    pub bytes: Vec<u8>,
    /// Its log-probability.
    pub logprob: f32,
}

impl TokenLogprob {
    /// Adds the text to what the engine reports about `id`.
    pub(crate) fn new(tokenizer: &Tokenizer, id: TokenId, engine: &TokenLogprobs) -> Self {
        let top = engine.top.iter().map(|&(id, logprob)| {
            let (text, bytes) = spell(tokenizer, id);
            TopLogprob { id, text, bytes, logprob }
        });
        let (text, bytes) = spell(tokenizer, id);
        Self { id, text, bytes, logprob: engine.logprob, rank: engine.rank, top: top.collect() }
    }
}

/// Text and bytes; both empty for an id of the padded vocabulary, which has no token.
fn spell(tokenizer: &Tokenizer, id: TokenId) -> (String, Vec<u8>) {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    (String::from_utf8_lossy(bytes).into_owned(), bytes.to_vec())
}
