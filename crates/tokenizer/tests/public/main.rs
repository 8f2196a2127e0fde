//! Public vocabularies, test vectors and chat templates, from the shared data folder (see `shared`).

// Helpers outside of `#[test]` functions are tests too.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod decoding;
mod shared;
mod templates;
mod vectors;
