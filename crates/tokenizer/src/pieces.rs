//! The bytes that each token stands for.

use serde_json::Value;

/// How a tokenizer's decoder turns token texts into bytes.
#[derive(Debug, PartialEq)]
pub(crate) enum Scheme {
    /// GPT-2's alphabet: each character of a token stands for one byte.
    ByteLevel,
    /// Text with substitutions (SentencePiece: `▁` is a space), perhaps with tokens `<0xNN>` for single bytes.
    Text {
        /// Literal replacements, made in this order.
        replace: Vec<(String, String)>,
        byte_fallback: bool,
        lead: Lead,
    },
    /// What a token adds depends on its neighbours; the decoder itself has to be asked.
    Contextual,
}

/// What is removed at the very start of a decoded text (SentencePiece adds a space there when it encodes).
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Lead {
    Keep,
    /// Up to `max` leading characters `content`.
    Strip {
        content: char,
        max: usize,
    },
    /// All characters of this kind in the first token.
    FirstToken(char),
}

impl Scheme {
    /// Reads the `decoder` object of a `tokenizer.json`.
    pub fn of_decoder(decoder: &Value) -> Self {
        let steps = match decoder.get("type").and_then(Value::as_str) {
            Some("Sequence") => decoder["decoders"].as_array().cloned().unwrap_or_default(),
            Some(_) => vec![decoder.clone()],
            None => return Self::Contextual,
        };
        Self::of_steps(&steps).unwrap_or(Self::Contextual)
    }

    fn of_steps(steps: &[Value]) -> Option<Self> {
        let (mut replace, mut byte_fallback, mut lead, mut fused) = (Vec::new(), false, Lead::Keep, false);
        for (i, step) in steps.iter().enumerate() {
            let text = |key: &str| step.get(key).and_then(Value::as_str);
            match text("type")? {
                "ByteLevel" if steps.len() == 1 => return Some(Self::ByteLevel),
                "Replace" if !byte_fallback && !fused => {
                    let from = step["pattern"].get("String").and_then(Value::as_str)?;
                    replace.push((from.to_owned(), text("content")?.to_owned()));
                }
                "ByteFallback" if !fused => byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && i + 1 == steps.len() && step["stop"] == 0 => {
                    let max = usize::try_from(step["start"].as_u64()?).ok()?;
                    lead = Lead::Strip { content: text("content")?.chars().next()?, max };
                }
                "Metaspace" if steps.len() == 1 => {
                    let space = text("replacement")?.chars().next()?;
                    replace.push((space.to_string(), " ".to_owned()));
                    if text("prepend_scheme") != Some("never") {
                        lead = Lead::FirstToken(space);
                    }
                }
                _ => return None,
            }
        }
        Some(Self::Text { replace, byte_fallback, lead })
    }

    /// Appends the bytes of one token that is not the first.
    fn push_bytes(&self, token: &str, out: &mut Vec<u8>) {
        let start = out.len();
        match self {
            Self::ByteLevel => {
                for c in token.chars() {
                    let Some(byte) = char_to_byte(c) else {
                        // A token with a character outside of the alphabet stands for itself.
                        out.truncate(start);
                        return out.extend_from_slice(token.as_bytes());
                    };
                    out.push(byte);
                }
            }
            Self::Text { replace, byte_fallback, .. } => {
                let text = replace.iter().fold(token.to_owned(), |text, (from, to)| text.replace(from, to));
                match byte_of(&text).filter(|_| *byte_fallback) {
                    Some(byte) => out.push(byte),
                    None => out.extend_from_slice(text.as_bytes()),
                }
            }
            Self::Contextual => out.extend_from_slice(token.as_bytes()),
        }
    }
}

/// The byte that a token `<0xNN>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on.
pub(crate) fn byte_to_char(byte: u8) -> char {
    let code = match byte {
        0..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte - 0x7f),
        0xad => 0x143,
        _ => u32::from(byte),
    };
    char::from_u32(code).expect("codes up to U+0143 are characters")
}

fn char_to_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Bytes and flags of all tokens, in one buffer.
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// Per id, where its bytes end; they start where those of the id before end.
    ends: Vec<u32>,
    flags: Vec<u8>,
}

/// Ids beyond twice the number of tokens that are still asked for.
const MAX_GAP: usize = 1 << 16;

const EXISTS: u8 = 1;
const SPECIAL: u8 = 2;

impl Pieces {
    /// Builds the table of a vocabulary with `count` tokens. `token` gives the text of an id and whether it is special,
    /// or `None` for an id without a token; ids are asked for from 0 until all tokens are found.
    pub fn new(scheme: &Scheme, count: usize, token: impl Fn(u32) -> Option<(String, bool)>) -> Self {
        let mut pieces = Self { bytes: Vec::new(), ends: Vec::new(), flags: Vec::new() };
        let mut found = 0;
        // Two texts may share an id, so that fewer are found; gaps in real vocabularies are small.
        let last = u32::try_from(2 * count + MAX_GAP).unwrap_or(u32::MAX);
        for id in 0..last {
            if found == count {
                break;
            }
            let mut flags = 0;
            if let Some((text, special)) = token(id) {
                found += 1;
                // A special token is written as it is, whatever the alphabet of the others.
                if special {
                    pieces.bytes.extend_from_slice(text.as_bytes());
                    flags = EXISTS | SPECIAL;
                } else {
                    scheme.push_bytes(&text, &mut pieces.bytes);
                    flags = EXISTS;
                }
            }
            pieces.ends.push(u32::try_from(pieces.bytes.len()).unwrap_or(u32::MAX));
            pieces.flags.push(flags);
        }
        let len = pieces.flags.iter().rposition(|&flags| flags != 0).map_or(0, |last| last + 1);
        pieces.ends.truncate(len);
        pieces.flags.truncate(len);
        pieces
    }

    /// One past the largest id.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        if self.flags.get(id)? & EXISTS == 0 {
            return None;
        }
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        self.bytes.get(start as usize..self.ends[id] as usize)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.flags.get(id as usize).is_some_and(|flags| flags & SPECIAL != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_is_a_bijection_with_gpt2_s_landmarks() {
        let chars: std::collections::BTreeSet<char> = (0..=255).map(byte_to_char).collect();
        assert_eq!(chars.len(), 256);
        assert!((0..=255).all(|byte| char_to_byte(byte_to_char(byte)) == Some(byte)));
        assert_eq!((byte_to_char(b' '), byte_to_char(b'\n'), byte_to_char(0xad)), ('Ġ', 'Ċ', 'Ń'));
        assert_eq!(char_to_byte('世'), None);
    }

    #[test]
    fn decoders_are_recognised_or_left_to_themselves() {
        assert_eq!(Scheme::of_decoder(&json!({"type": "ByteLevel"})), Scheme::ByteLevel);
        assert_eq!(Scheme::of_decoder(&json!({"type": "WordPiece", "prefix": "##"})), Scheme::Contextual);
        assert_eq!(Scheme::of_decoder(&Value::Null), Scheme::Contextual);
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let scheme = Scheme::of_decoder(&llama);
        let lead = Lead::Strip { content: ' ', max: 1 };
        let replace = vec![("▁".to_owned(), " ".to_owned())];
        assert_eq!(scheme, Scheme::Text { replace, byte_fallback: true, lead });
        assert_eq!(bytes_of(&scheme, "▁a▁"), b" a ");
        assert_eq!(bytes_of(&scheme, "<0xE4>"), [0xe4]);
        assert_eq!(bytes_of(&scheme, "<0xE>"), b"<0xE>");
        assert_eq!(bytes_of(&Scheme::ByteLevel, "Ġé"), [b' ', 0xe9]);
        assert_eq!(bytes_of(&Scheme::ByteLevel, "Ġ世"), "Ġ世".as_bytes());
    }

    fn bytes_of(scheme: &Scheme, token: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        scheme.push_bytes(token, &mut bytes);
        bytes
    }

    #[test]
    fn gaps_have_no_bytes() {
        let token = |id| match id {
            0 => Some(("a".to_owned(), false)),
            2 => Some(("é".to_owned(), true)),
            _ => None,
        };
        let pieces = Pieces::new(&Scheme::ByteLevel, 2, token);
        assert_eq!((pieces.len(), pieces.get(0), pieces.get(1)), (3, Some(&b"a"[..]), None));
        assert_eq!((pieces.get(2), pieces.get(3)), (Some("é".as_bytes()), None));
        assert!(pieces.is_special(2) && !pieces.is_special(1) && !pieces.is_special(9));
        // A vocabulary that counts a token it does not have ends all the same.
        assert_eq!(Pieces::new(&Scheme::ByteLevel, 3, token).len(), 3);
    }
}
