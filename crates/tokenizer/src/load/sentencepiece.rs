//! SentencePiece `tokenizer.model` files (protobuf `sentencepiece.ModelProto`), BPE type.
//!
//! The few fields that matter are read by a small protobuf reader; the wire format is at
//! <https://protobuf.dev/programming-guides/encoding/>, the field numbers in SentencePiece's
//! `sentencepiece_model.proto`.

use std::cmp::Reverse;
use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::{added_token, merges_by_rank, template_processing};
use crate::error::{Result, TokenizerError};

/// SentencePiece writes a space as this character (U+2581).
const SPACE: &str = "▁";

/// `ModelProto.SentencePiece.Type`.
mod piece_type {
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const USER_DEFINED: u64 = 4;
    pub const UNUSED: u64 = 5;
    pub const BYTE: u64 = 6;
}

/// `TrainerSpec.ModelType`.
const MODEL_TYPE_BPE: u64 = 2;

struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

struct Proto {
    pieces: Vec<Piece>,
    model_type: u64,
    bos_id: i64,
    charsmap: Vec<u8>,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
}

/// The `tokenizer.json` document for this model; `config` is `tokenizer_config.json` or `Null`.
pub(super) fn document(bytes: &[u8], config: &Value, file: &str) -> Result<Value> {
    let proto = Proto::parse(bytes)
        .ok_or_else(|| TokenizerError::invalid(file, &"neither a tiktoken file nor a SentencePiece model"))?;
    if proto.model_type != MODEL_TYPE_BPE {
        return Err(TokenizerError::unsupported(
            file,
            format!("SentencePiece model type {} (only BPE, type 2, is read)", proto.model_type),
        ));
    }
    let ids: HashMap<&str, usize> =
        proto.pieces.iter().enumerate().map(|(id, piece)| (piece.text.as_str(), id)).collect();
    let unk = proto.pieces.iter().find(|piece| piece.kind == piece_type::UNKNOWN);
    let unk = unk.ok_or_else(|| TokenizerError::invalid(file, &"the model has no unknown piece"))?;
    let flag = |key: &str, default: bool| config.get(key).and_then(Value::as_bool).unwrap_or(default);

    let bos = usize::try_from(proto.bos_id).ok().filter(|_| flag("add_bos_token", true));
    let before: Vec<_> =
        bos.and_then(|id| Some((proto.pieces.get(id)?.text.as_str(), id))).into_iter().collect();
    let added: Vec<Value> = proto
        .pieces
        .iter()
        .enumerate()
        .filter_map(|(id, piece)| match piece.kind {
            piece_type::UNKNOWN | piece_type::CONTROL => Some(added_token(id, &piece.text, true)),
            piece_type::USER_DEFINED => Some(added_token(id, &piece.text, false)),
            _ => None,
        })
        .collect();
    let vocab: Map<String, Value> =
        proto.pieces.iter().enumerate().map(|(id, piece)| (piece.text.clone(), id.into())).collect();
    Ok(json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": proto.normalizer(),
        "post_processor": template_processing(&before, &[]),
        "decoder": proto.decoder(),
        "model": {
            "type": "BPE", "vocab": vocab, "merges": proto.merges(&ids), "unk_token": unk.text, "fuse_unk": true,
            "byte_fallback": proto.pieces.iter().any(|piece| piece.kind == piece_type::BYTE),
        },
    }))
}

impl Proto {
    fn parse(bytes: &[u8]) -> Option<Self> {
        // The defaults are those of the schema.
        let mut proto = Self {
            pieces: Vec::new(),
            model_type: 1,
            bos_id: 1,
            charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
        };
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(piece)) => proto.pieces.push(Piece::parse(piece)?),
                (2, Wire::Bytes(trainer)) => {
                    for field in Fields(trainer) {
                        match field? {
                            (3, Wire::Varint(model_type)) => proto.model_type = model_type,
                            (41, Wire::Varint(id)) => proto.bos_id = id as i64,
                            _ => {}
                        }
                    }
                }
                (3, Wire::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        match field? {
                            (2, Wire::Bytes(map)) => proto.charsmap = map.to_vec(),
                            (3, Wire::Varint(flag)) => proto.add_dummy_prefix = flag != 0,
                            (4, Wire::Varint(flag)) => proto.remove_extra_whitespaces = flag != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        (!proto.pieces.is_empty()).then_some(proto)
    }

    /// A piece's score ranks the merge that makes it: the highest score merges first.
    fn merges(&self, ids: &HashMap<&str, usize>) -> Vec<Value> {
        let mergeable =
            |kind| !matches!(kind, piece_type::UNUSED | piece_type::CONTROL | piece_type::UNKNOWN);
        let ranked = self
            .pieces
            .iter()
            .filter(|piece| mergeable(piece.kind))
            .map(|piece| (piece.text.as_str(), Reverse(TotalOrder(piece.score))));
        merges_by_rank(ranked, |text| ids.get(text).copied())
    }

    fn normalizer(&self) -> Value {
        let mut steps = Vec::new();
        if !self.charsmap.is_empty() {
            steps.push(
                json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode(&self.charsmap)}),
            );
        }
        if self.remove_extra_whitespaces {
            steps.push(json!({"type": "Strip", "strip_left": true, "strip_right": true}));
            steps.push(json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}));
        }
        if self.add_dummy_prefix {
            steps.push(json!({"type": "Prepend", "prepend": SPACE}));
        }
        steps.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}));
        json!({"type": "Sequence", "normalizers": steps})
    }

    fn decoder(&self) -> Value {
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_dummy_prefix {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    }
}

impl Piece {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: 1 };
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(text)) => piece.text = std::str::from_utf8(text).ok()?.to_owned(),
                (2, Wire::Fixed32(bits)) => piece.score = f32::from_bits(bits),
                (3, Wire::Varint(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        Some(piece)
    }
}

/// Scores compared as `f32::total_cmp` does, so that a NaN in a file cannot upset a sort.
#[derive(PartialEq)]
struct TotalOrder(f32);

impl Eq for TotalOrder {}

impl PartialOrd for TotalOrder {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for TotalOrder {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// One protobuf value as it lies on the wire.
enum Wire<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Iterates over the `(field number, value)` pairs of a message; `None` inside marks a malformed message, and ends it.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Wire<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => self.take(8).map(|_| Wire::Fixed64)?,
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(len)?)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, value))
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_messages_are_refused_at_every_length() {
        // One piece "▁a" with score -1 and type NORMAL, and a trainer spec that says BPE.
        let model = b"\x0a\x0d\x0a\x04\xe2\x96\x81a\x15\x00\x00\x80\xbf\x18\x01\x12\x02\x18\x02";
        let proto = Proto::parse(model).unwrap();
        assert_eq!((proto.pieces[0].text.as_str(), proto.pieces[0].score), ("▁a", -1.0));
        assert_eq!(proto.model_type, MODEL_TYPE_BPE);
        for len in (0..model.len()).filter(|&len| len != 15) {
            assert!(Proto::parse(&model[..len]).is_none(), "length {len}");
        }
    }
}
