//! The folder with public test data: `$QUIRE_SHARED`, else `shared` beside the workspace.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use quire_tokenizer::Tokenizer;

/// A path inside the data folder; prints why and gives `None` when it is not there.
pub fn path(relative: &str) -> Option<PathBuf> {
    let root = match std::env::var_os("QUIRE_SHARED") {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
    };
    let path = root.join("data").join(relative);
    if path.exists() {
        return Some(path);
    }
    println!(
        "skipped: {} does not exist (set QUIRE_SHARED to the folder with the public test data)",
        path.display()
    );
    None
}

/// The tokenizer in this directory of the data folder; loaded once for all tests.
pub fn tokenizer(relative: &str) -> Option<Tokenizer> {
    type Cache = Mutex<BTreeMap<String, Arc<OnceLock<Tokenizer>>>>;
    static CACHE: Cache = Mutex::new(BTreeMap::new());
    let dir = path(relative)?;
    let slot = CACHE.lock().unwrap().entry(relative.to_owned()).or_default().clone();
    let load = || Tokenizer::from_dir(&dir).unwrap_or_else(|e| panic!("{relative}: {e}"));
    Some(slot.get_or_init(load).clone())
}

/// A small xorshift generator: the tests need variety, not quality.
pub struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// The 47 test strings of llama.cpp's vocabulary tests.
pub fn vector_texts() -> Option<Vec<String>> {
    const SEPARATOR: &str = "\n__ggml_vocab_test__\n";
    let input = std::fs::read_to_string(path("vocab-gguf/ggml-vocab-gpt-2.gguf.inp")?).unwrap();
    // The last one is the empty string behind the last separator; its line of ids is empty too.
    let texts: Vec<String> = input.split(SEPARATOR).map(str::to_owned).collect();
    assert_eq!(texts.len(), 47);
    Some(texts)
}
