//! Text to tokens and back.
//!
//! * [`Tokenizer`] encodes and decodes text with a model's own vocabulary (`tokenizer.json`, a tiktoken or
//!   SentencePiece `tokenizer.model`, or a WordPiece `vocab.txt`).
//! * [`ChatTemplate`] turns chat messages into the prompt text that the model was trained on.
//! * [`Detokenizer`] turns sampled token ids into text as they arrive.
//! * [`StopMatcher`] finds stop strings in that text and holds back what may yet become one.
//!
//! # Invariants
//! * Whatever the way a token sequence is cut, the deltas of a [`Detokenizer`] joined together equal
//!   [`Tokenizer::decode`] of the whole sequence, and no delta ends inside a UTF-8 character.
//! * Whatever the way a text is cut, a [`StopMatcher`] finds the same match and emits the same text.
//! * A template can neither run for ever nor write without bound ([`chat::MAX_FUEL`],
//!   [`chat::MAX_OUTPUT_BYTES`]).
//!
//! # Reading order
//! [`tokenizer`](Tokenizer) is the centre. `load/` finds the files of a checkpoint and brings every format to one
//! `tokenizer.json` document; `pieces` gives each token its bytes; `detokenizer` and `stop` work on the output side;
//! `chat/` is a Jinja environment that behaves as the one of Hugging Face transformers.

#![forbid(unsafe_code)]

pub mod chat;
mod detokenizer;
mod error;
mod load;
mod pieces;
mod special;
mod stop;
mod tokenizer;

pub use chat::{ChatInput, ChatTemplate, TemplateError};
pub use detokenizer::Detokenizer;
pub use error::{Result, TokenizerError};
pub use special::SpecialTokens;
pub use stop::{StopMatch, StopMatcher};
pub use tokenizer::Tokenizer;
