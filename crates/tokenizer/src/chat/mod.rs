//! Chat messages to prompt text, by the template that comes with a model.
//!
//! Templates are written for Python: Jinja2 as Hugging Face transformers sets it up, with Python's methods on values.
//! Here minijinja runs them, with what it lacks added: `python` (methods, generators, tests), `json` (`tojson`),
//! `clock` (`strftime_now`), `markup` (escaping) and `rewrite` (changes to the source before it is compiled).
//!
//! Known to be missing, as no chat template in use needs it: `'%s' % x` (use `|format`), and the filters `center`,
//! `truncate`, `wordcount`, `wordwrap`, `striptags`, `urlize`, `xmlattr`, `filesizeformat`, `random`. A template that
//! uses one fails with an error that names it.

mod clock;
mod files;
mod json;
mod markup;
mod python;
mod rewrite;
mod template;

pub use clock::Clock;
pub use template::{ChatInput, ChatTemplate, TemplateError};

/// What one rendering may cost, in minijinja's fuel: one unit per instruction and per 64 bytes handled.
///
/// Enough for thousands of messages; at most some hundred megabytes and about a second.
pub const MAX_FUEL: u64 = 4_000_000;

/// How much text one rendering may write.
pub const MAX_OUTPUT_BYTES: usize = 4 << 20;

/// How deep includes, macros and loops may nest.
pub const MAX_RECURSION: usize = 128;
