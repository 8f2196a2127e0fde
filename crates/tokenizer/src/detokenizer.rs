//! Token ids to text, as they arrive.

use std::borrow::Cow;

use quire_core::TokenId;

use crate::pieces::{Lead, Scheme};
use crate::tokenizer::Tokenizer;

/// Tokens of context that decide how a text goes on: more than the bytes of a character.
const CONTEXT_TOKENS: usize = 8;

/// Incremental decoder of one sequence; constant work per token.
///
/// Whole characters only are written: the bytes of an unfinished one wait for the next token. All deltas together
/// equal [`Tokenizer::decode`] of all ids.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Bytes { lead: Lead, carry: Carry },
    Contextual(Window),
}

impl Detokenizer {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let state = match tokenizer.scheme() {
            Scheme::ByteLevel => State::Bytes { lead: Lead::Keep, carry: Carry::default() },
            Scheme::Text { lead, .. } => State::Bytes { lead: lead.clone(), carry: Carry::default() },
            Scheme::Contextual => State::Contextual(Window::default()),
        };
        Self { tokenizer: tokenizer.clone(), skip_special, state }
    }

    /// A decoder that goes on after `prompt`: what it writes is `decode(prompt + ids)` without the prompt's text.
    ///
    /// So a first word keeps its leading space, and a character that the prompt began comes out whole.
    pub fn after_prompt(tokenizer: &Tokenizer, skip_special: bool, prompt: &[TokenId]) -> Self {
        let mut detokenizer = Self::new(tokenizer, skip_special);
        let mut prompt_text = String::new();
        // The state depends on the first tokens, until a text has begun, and on the last few.
        let tail = prompt.len().saturating_sub(CONTEXT_TOKENS);
        let mut at = 0;
        while at < tail && !detokenizer.has_begun() {
            detokenizer.push(prompt[at], &mut prompt_text);
            at += 1;
        }
        for &id in &prompt[at.max(tail)..] {
            detokenizer.push(id, &mut prompt_text);
        }
        detokenizer
    }

    /// Whether the start of the text, which some decoders treat differently, is behind us.
    fn has_begun(&self) -> bool {
        match &self.state {
            State::Bytes { lead, .. } => *lead == Lead::Keep,
            State::Contextual(window) => !window.ids.is_empty(),
        }
    }

    /// Takes the next token and appends the text that is now certain to `out`. An id without a token adds nothing.
    pub fn push(&mut self, id: TokenId, out: &mut String) {
        if self.skip_special && self.tokenizer.is_special(id) {
            return;
        }
        let Some(bytes) = self.tokenizer.token_bytes(id) else { return };
        match &mut self.state {
            State::Bytes { lead, carry } => {
                let bytes = strip_lead(lead, bytes, || self.tokenizer.id_to_token(id));
                carry.push(&bytes, out);
            }
            State::Contextual(window) => window.push(id, &self.tokenizer, self.skip_special, out),
        }
    }

    /// Ends the text: bytes of a character that never came to its end become one U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        match &mut self.state {
            State::Bytes { carry, .. } => carry.finish(out),
            State::Contextual(window) => window.finish(&self.tokenizer, self.skip_special, out),
        }
    }
}

/// The bytes of a token at the start of a text, less what the decoder removes there.
fn strip_lead<'a>(lead: &mut Lead, bytes: &'a [u8], token: impl FnOnce() -> Option<String>) -> Cow<'a, [u8]> {
    match lead {
        Lead::Keep => Cow::Borrowed(bytes),
        Lead::FirstToken(dropped) => {
            let text = token().unwrap_or_default().replace(*dropped, "");
            *lead = Lead::Keep;
            Cow::Owned(text.into_bytes())
        }
        Lead::Strip { content, max } => {
            let mut buffer = [0; 4];
            let content = content.encode_utf8(&mut buffer).as_bytes();
            let mut rest = bytes;
            while let (1.., Some(tail)) = (*max, rest.strip_prefix(content)) {
                rest = tail;
                *max -= 1;
            }
            if *max == 0 || !rest.is_empty() {
                *lead = Lead::Keep;
            }
            Cow::Borrowed(rest)
        }
    }
}

/// Bytes in, whole characters out; the same text as [`String::from_utf8_lossy`] of all bytes.
#[derive(Debug, Default)]
struct Carry {
    /// The bytes of one unfinished character: at most three.
    bytes: Vec<u8>,
}

impl Carry {
    fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.bytes.is_empty() {
            let kept = decode_utf8(bytes, out);
            self.bytes.extend_from_slice(kept);
        } else {
            let mut joined = std::mem::take(&mut self.bytes);
            joined.extend_from_slice(bytes);
            let kept = decode_utf8(&joined, out);
            self.bytes.extend_from_slice(kept);
        }
    }

    fn finish(&mut self, out: &mut String) {
        if !self.bytes.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.bytes.clear();
        }
    }
}

/// Appends the text of `bytes`, invalid parts as U+FFFD, and returns the unfinished character at the end.
fn decode_utf8<'a>(mut bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    loop {
        let error = match std::str::from_utf8(bytes) {
            Ok(text) => {
                out.push_str(text);
                return &[];
            }
            Err(error) => error,
        };
        let (valid, rest) = bytes.split_at(error.valid_up_to());
        out.push_str(std::str::from_utf8(valid).expect("valid up to here, says the error"));
        let Some(invalid) = error.error_len() else { return rest };
        out.push(char::REPLACEMENT_CHARACTER);
        bytes = &rest[invalid..];
    }
}

/// The last few tokens of a text whose decoder has to see neighbours (WordPiece: a space before most tokens).
#[derive(Debug, Default)]
struct Window {
    ids: Vec<TokenId>,
    /// How much of the text of `ids` has been written.
    written: usize,
}

impl Window {
    fn push(&mut self, id: TokenId, tokenizer: &Tokenizer, skip_special: bool, out: &mut String) {
        self.ids.push(id);
        let text = tokenizer.decode_contextual(&self.ids, skip_special);
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() < 2 * CONTEXT_TOKENS {
            return;
        }
        self.write(&text, out);
        if self.ids.len() >= CONTEXT_TOKENS {
            self.ids.drain(..self.ids.len() - CONTEXT_TOKENS / 2);
            self.written = tokenizer.decode_contextual(&self.ids, skip_special).len();
        }
    }

    fn finish(&mut self, tokenizer: &Tokenizer, skip_special: bool, out: &mut String) {
        self.write(&tokenizer.decode_contextual(&self.ids, skip_special), out);
    }

    fn write(&mut self, text: &str, out: &mut String) {
        if let Some(delta) = text.get(self.written..) {
            out.push_str(delta);
            self.written = text.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn carry_equals_from_utf8_lossy_however_the_bytes_are_cut() {
        // Valid, truncated, overlong, surrogate, stray continuation and out-of-range bytes.
        let bytes =
            b"a\xe4\xb8\x96\xe4\xb8b\xc0\x80\xed\xa0\x80\x80\xf0\x9f\x99\x82\xf4\x90\x80\x80\xf0\x9f\x99";
        let expected = String::from_utf8_lossy(bytes);
        for chunk in 1..=bytes.len() {
            let (mut carry, mut text) = (Carry::default(), String::new());
            for part in bytes.chunks(chunk) {
                carry.push(part, &mut text);
                assert!(carry.bytes.len() <= 3);
            }
            carry.finish(&mut text);
            assert_eq!(text, expected, "chunks of {chunk}");
        }
    }

    #[test]
    fn lead_is_stripped_once_and_only_at_the_start() {
        let mut lead = Lead::Strip { content: ' ', max: 1 };
        assert_eq!(&*strip_lead(&mut lead, b"  a", || None), b" a");
        assert_eq!(&*strip_lead(&mut lead, b" b", || None), b" b");
        let mut lead = Lead::FirstToken('▁');
        assert_eq!(&*strip_lead(&mut lead, b"  a", || Some("▁▁a".to_owned())), b"a");
        assert_eq!(&*strip_lead(&mut lead, b" b", || None), b" b");
    }

    /// For every kind of decoder, random sequences decode as the decoder does with the whole sequence at hand.
    #[test]
    fn all_kinds_of_decoders_agree_with_the_library() {
        let space = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let fallback = json!({"type": "ByteFallback"});
        let fuse = json!({"type": "Fuse"});
        let strip = json!({"type": "Strip", "content": " ", "start": 2, "stop": 0});
        let sequence = |steps: &[&serde_json::Value]| json!({"type": "Sequence", "decoders": steps});
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        for decoder in [
            json!(null),
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "BPEDecoder", "suffix": "</w>"}),
            metaspace("always"),
            metaspace("never"),
            sequence(&[&space, &fallback, &fuse]),
            sequence(&[&space, &fallback, &fuse, &strip]),
            sequence(&[&space, &fuse, &strip]),
        ] {
            let texts = ["▁", "▁▁a", "b</w>", "##c", ".", "n't", "Ġd", "é", "<0x41>", "世"];
            let vocab: serde_json::Map<_, _> =
                texts.iter().enumerate().map(|(id, text)| ((*text).to_owned(), json!(id))).collect();
            let model = json!({"type": "BPE", "vocab": vocab, "merges": []});
            let document = json!({"version": "1.0", "added_tokens": [], "decoder": decoder, "model": model});
            let tokenizer = Tokenizer::from_parts(document.to_string().as_bytes(), None).unwrap();
            let mut state = 1u64;
            for round in 0..500u64 {
                let mut next = || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(round);
                    (state >> 40) as usize
                };
                let ids: Vec<TokenId> = (0..next() % 40).map(|_| (next() % texts.len()) as TokenId).collect();
                let whole = tokenizer.decode_contextual(&ids, false);
                assert_eq!(tokenizer.decode(&ids, false), whole, "{decoder}: {ids:?}");
            }
        }
    }
}
