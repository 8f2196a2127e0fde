//! Server-sent events of a completion, understood only as far as they are counted: a client that parsed each of them
//! would cost more than the server it measures.

use std::sync::LazyLock;

use memchr::{memchr, memmem::Finder};
use serde_json::Value;

/// Events are far smaller; what is larger is not one.
const MAX_EVENT_BYTES: usize = 8 << 20;

/// Cuts a stream of bytes into the data of its events, wherever the bytes are cut.
#[derive(Debug, Default)]
pub(crate) struct EventSplitter {
    /// A line whose end has not come yet.
    line: Vec<u8>,
    /// Data lines of the event so far.
    data: Vec<u8>,
}

impl EventSplitter {
    /// Calls `on_event` with the data of each event that `bytes` complete. Error: an event is too long.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        mut on_event: impl FnMut(&[u8]),
    ) -> Result<(), &'static str> {
        while let Some(end) = memchr(b'\n', bytes) {
            if self.line.is_empty() {
                end_line(&bytes[..end], &mut self.data, &mut on_event);
            } else {
                self.line.extend_from_slice(&bytes[..end]);
                end_line(&self.line, &mut self.data, &mut on_event);
                self.line.clear();
            }
            bytes = &bytes[end + 1..];
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() + self.data.len() > MAX_EVENT_BYTES {
            return Err("an event is longer than 8 MiB");
        }
        Ok(())
    }
}

/// Takes a line without its line feed.
fn end_line(line: &[u8], data: &mut Vec<u8>, on_event: &mut impl FnMut(&[u8])) {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        if !data.is_empty() {
            on_event(data);
            data.clear();
        }
    } else if let Some(value) = line.strip_prefix(b"data:") {
        if !data.is_empty() {
            data.push(b'\n');
        }
        data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
    }
    // Comments, names and ids say nothing about tokens.
}

/// What an event says.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Chunk {
    /// The end of the stream.
    pub(crate) is_done: bool,
    /// It brings at least one token.
    pub(crate) is_token: bool,
    /// It says why the answer ended.
    pub(crate) is_finish: bool,
    pub(crate) usage: Option<Usage>,
    pub(crate) error: Option<String>,
}

/// Tokens as the server counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
}

struct Keys {
    choices: Finder<'static>,
    role: Finder<'static>,
    content: Finder<'static>,
    finish_reason: Finder<'static>,
    usage: Finder<'static>,
    error: Finder<'static>,
}

// Quotes inside of JSON strings are escaped, so none of these can be found in a generated text.
static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    choices: Finder::new("\"choices\":"),
    role: Finder::new("\"role\":"),
    content: Finder::new("\"content\":"),
    finish_reason: Finder::new("\"finish_reason\":"),
    usage: Finder::new("\"usage\":"),
    error: Finder::new("\"error\":"),
});

impl Chunk {
    /// Reads the data of an event.
    pub(crate) fn read(data: &[u8]) -> Self {
        let mut chunk = Self::default();
        if data == b"[DONE]" {
            chunk.is_done = true;
            return chunk;
        }
        let keys = &*KEYS;
        if let Some(choices) = value_of(&keys.choices, data) {
            let has_choice =
                choices.strip_prefix(b"[").is_some_and(|inside| !inside.trim_ascii_start().starts_with(b"]"));
            chunk.is_token = has_choice && !only_opens(keys, choices);
            chunk.is_finish =
                value_of(&keys.finish_reason, choices).is_some_and(|reason| reason.starts_with(b"\""));
        } else if value_of(&keys.error, data).is_some() {
            chunk.error = Some(error_message(data));
        }
        if value_of(&keys.usage, data).is_some_and(|usage| usage.starts_with(b"{")) {
            chunk.usage = usage(data);
        }
        chunk
    }
}

/// Whether the choice is the opening of a chat answer, which names the role and brings no text.
fn only_opens(keys: &Keys, choices: &[u8]) -> bool {
    value_of(&keys.role, choices).is_some()
        && value_of(&keys.content, choices)
            .is_none_or(|content| content.starts_with(b"\"\"") || content.starts_with(b"null"))
}

/// The rest of `data` from the value of a key on.
fn value_of<'a>(key: &Finder<'_>, data: &'a [u8]) -> Option<&'a [u8]> {
    let at = key.find(data)?;
    Some(data[at + key.needle().len()..].trim_ascii_start())
}

fn usage(data: &[u8]) -> Option<Usage> {
    let event: Value = serde_json::from_slice(data).ok()?;
    let count = |name: &str| event["usage"][name].as_u64().and_then(|count| u32::try_from(count).ok());
    Some(Usage { prompt_tokens: count("prompt_tokens")?, completion_tokens: count("completion_tokens")? })
}

/// What went wrong, from an event or a body, in words.
pub(crate) fn error_message(data: &[u8]) -> String {
    let parsed: Option<Value> = serde_json::from_slice(data).ok();
    let message = parsed.as_ref().and_then(|body| match &body["error"] {
        Value::String(message) => Some(message.as_str()),
        error => error["message"].as_str(),
    });
    let text = message.map_or_else(|| String::from_utf8_lossy(data).into_owned(), str::to_owned);
    text.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<String> {
        let (mut splitter, mut events) = (EventSplitter::default(), Vec::new());
        for piece in pieces {
            splitter.feed(piece, |data| events.push(String::from_utf8(data.to_vec()).unwrap())).unwrap();
        }
        events
    }

    const STREAM: &[u8] = b": keep-alive\n\ndata: {\"a\":1}\n\ndata:{\"b\":\"\xc3\xa9\"}\r\n\r\nevent: x\nid: 7\ndata: one\ndata: two\n\n\n\ndata: [DONE]\n\ndata: cut";

    #[test]
    fn events_do_not_depend_on_how_bytes_arrive() {
        let expected = ["{\"a\":1}", "{\"b\":\"é\"}", "one\ntwo", "[DONE]"];
        assert_eq!(events(&[STREAM]), expected);
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(events(&bytes), expected);
        for first in 0..STREAM.len() {
            for second in first..STREAM.len() {
                let pieces = [&STREAM[..first], &STREAM[first..second], &STREAM[second..]];
                assert_eq!(events(&pieces), expected, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn what_never_ends_is_refused() {
        let mut splitter = EventSplitter::default();
        let piece = vec![b'x'; 1 << 20];
        let outcome = (0..9).map(|_| splitter.feed(&piece, |_| panic!("no event"))).find(Result::is_err);
        assert!(outcome.is_some());
    }

    #[test]
    fn tokens_finishes_and_usage_are_found() {
        let read = |text: &str| Chunk::read(text.as_bytes());
        let token = Chunk { is_token: true, ..Chunk::default() };
        assert_eq!(
            read(
                r#"{"choices":[{"index":0,"text":" a","logprobs":null,"finish_reason":null}],"usage":null}"#
            ),
            token
        );
        // As Python writes it.
        assert_eq!(read(r#"{"choices": [ {"text": "", "finish_reason": null}]}"#), token);
        // A text that looks like keys.
        assert_eq!(
            read(r#"{"choices":[{"text":"\"usage\":{\"error\":","finish_reason":null}],"usage":null}"#),
            token
        );
        let finish = Chunk { is_token: true, is_finish: true, ..Chunk::default() };
        assert_eq!(read(r#"{"choices":[{"delta":{"content":"a"},"finish_reason":"length"}]}"#), finish);
        let opening = r#"{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
        assert_eq!(read(opening), Chunk::default());
        let both = r#"{"choices":[{"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}]}"#;
        assert_eq!(read(both), token);
        let usage = Usage { prompt_tokens: 3, completion_tokens: 9 };
        let end = r#"{"choices":[],"usage":{"prompt_tokens":3,"total_tokens":12,"completion_tokens":9}}"#;
        assert_eq!(read(end), Chunk { usage: Some(usage), ..Chunk::default() });
        assert!(read("[DONE]").is_done);
        assert_eq!(read(r#"{"error":{"message":"too late"}}"#).error.as_deref(), Some("too late"));
        assert_eq!(read(r#"{"error":"too late"}"#).error.as_deref(), Some("too late"));
    }
}
