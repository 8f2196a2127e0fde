//! Public vocabularies, test vectors and chat templates, from the shared data folder (see `shared`).

mod decoding;
mod shared;
mod templates;
mod vectors;
