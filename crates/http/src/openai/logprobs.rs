//! Log-probabilities in the three shapes clients know: chat, completions, and vLLM's `prompt_logprobs`.

use quire_llm::{TokenLogprob, TopLogprob};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// JSON has no infinity; the value that the field's servers use in its place.
const MIN_LOGPROB: f32 = -9999.0;

fn finite(logprob: f32) -> f64 {
    // A NaN becomes the minimum, too.
    // As f64 everywhere, so that one value is written the same way in every place.
    f64::from(logprob.max(MIN_LOGPROB))
}

/// `logprobs` of a chat choice.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct ChatToken<'a> {
    token: &'a str,
    logprob: f64,
    bytes: &'a [u8],
    top_logprobs: Vec<ChatTop<'a>>,
}

#[derive(Debug, Serialize)]
struct ChatTop<'a> {
    token: &'a str,
    logprob: f64,
    bytes: &'a [u8],
}

impl<'a> ChatLogprobs<'a> {
    pub(crate) fn new(tokens: &'a [TokenLogprob]) -> Self {
        let top = |top: &'a TopLogprob| ChatTop {
            token: &top.text,
            logprob: finite(top.logprob),
            bytes: &top.bytes,
        };
        let content = tokens.iter().map(|token| ChatToken {
            token: &token.text,
            logprob: finite(token.logprob),
            bytes: &token.bytes,
            top_logprobs: token.top.iter().map(top).collect(),
        });
        Self { content: content.collect(), refusal: None }
    }
}

/// `logprobs` of a completions choice: four parallel lists.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token begins in the choice's text, in characters.
    text_offset: Vec<u32>,
    #[serde(skip)]
    offset: u32,
}

impl TextLogprobs {
    /// Lists that go on at a character of the choice's text.
    pub(crate) fn starting_at(offset: u32) -> Self {
        Self { offset, ..Self::default() }
    }

    /// Where the text of the tokens so far ends, in characters.
    pub(crate) fn offset(&self) -> u32 {
        self.offset
    }

    pub(crate) fn push(&mut self, token: &TokenLogprob) {
        let mut top: Map<String, Value> = token
            .top
            .iter()
            // Two tokens may have the same text; the more likely one comes first and stays.
            .rev()
            .map(|top| (top.text.clone(), finite(top.logprob).into()))
            .collect();
        // The chosen token is always in the list.
        top.entry(token.text.clone()).or_insert_with(|| finite(token.logprob).into());
        self.push_text(&token.text, Some(finite(token.logprob)), Some(top));
    }

    /// The first token of a prompt: nothing comes before it, so it has no probability.
    pub(crate) fn push_first(&mut self, text: &str) {
        self.push_text(text, None, None);
    }

    fn push_text(&mut self, text: &str, logprob: Option<f64>, top: Option<Map<String, Value>>) {
        self.tokens.push(text.to_owned());
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
        self.text_offset.push(self.offset);
        self.offset += text.chars().count() as u32;
    }
}

/// `prompt_logprobs`: per token `null` or an object from token id to `{logprob, rank, decoded_token}`.
pub(crate) fn prompt_logprobs(entries: &[Option<TokenLogprob>]) -> Value {
    let entry = |token: &TokenLogprob| {
        let value = |logprob, rank: u32, text: &str| json!({ "logprob": finite(logprob), "rank": rank, "decoded_token": text });
        let mut map = Map::new();
        map.insert(token.id.to_string(), value(token.logprob, token.rank, &token.text));
        for (rank, top) in (1..).zip(&token.top) {
            map.entry(top.id.to_string()).or_insert_with(|| value(top.logprob, rank, &top.text));
        }
        Value::Object(map)
    };
    entries.iter().map(|token| token.as_ref().map_or(Value::Null, entry)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, logprob: f32, top: &[(&str, f32)]) -> TokenLogprob {
        let top = top.iter().map(|&(text, logprob)| TopLogprob {
            id: 9,
            text: text.to_owned(),
            bytes: text.as_bytes().to_vec(),
            logprob,
        });
        TokenLogprob {
            id: 7,
            text: text.into(),
            bytes: text.as_bytes().to_vec(),
            logprob,
            rank: 2,
            top: top.collect(),
        }
    }

    #[test]
    fn chat_tokens_carry_bytes_and_no_infinities() {
        let tokens = [token("é", -0.5, &[("a", f32::NEG_INFINITY)])];
        let json = serde_json::to_value(ChatLogprobs::new(&tokens)).unwrap();
        let expected = json!({ "content": [{
            "token": "é", "logprob": -0.5, "bytes": [0xc3, 0xa9],
            "top_logprobs": [{ "token": "a", "logprob": -9999.0, "bytes": [0x61] }],
        }], "refusal": null });
        assert_eq!(json, expected);
    }

    #[test]
    fn text_lists_are_parallel_and_offsets_count_characters() {
        let mut lists = TextLogprobs::starting_at(3);
        lists.push_first("né");
        lists.push(&token("x", -1.0, &[("y", -0.25), ("y", -2.0)]));
        let json = serde_json::to_value(&lists).unwrap();
        let expected = json!({
            "tokens": ["né", "x"], "token_logprobs": [null, -1.0],
            "top_logprobs": [null, { "y": -0.25, "x": -1.0 }], "text_offset": [3, 5],
        });
        assert_eq!((json, lists.offset()), (expected, 6));
    }

    #[test]
    fn prompt_entries_are_keyed_by_id() {
        let json = prompt_logprobs(&[None, Some(token("x", -1.0, &[("y", -0.5)]))]);
        let expected = json!([null, {
            "7": { "logprob": -1.0, "rank": 2, "decoded_token": "x" },
            "9": { "logprob": -0.5, "rank": 1, "decoded_token": "y" },
        }]);
        assert_eq!(json, expected);
    }
}
