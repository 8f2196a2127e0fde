//! Tests of quire-model through its public API.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod config;
mod files;
mod golden;
mod lora;
mod shared;
mod sizes;

use std::path::PathBuf;

/// The root of the repository.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A golden checkpoint's directory.
fn golden_dir(family: &str) -> PathBuf {
    root().join("tests/data/golden").join(family)
}

/// An empty directory for one test.
fn scratch(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    std::fs::create_dir_all(&dir).unwrap();
    dir
}
