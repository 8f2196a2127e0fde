//! The golden checkpoints and their expectations.

use std::io::Write;
use std::path::{Path, PathBuf};

use quire_core::TokenId;
use quire_model::Checkpoint;
use safetensors::SafeTensors;
use serde_json::Value;

/// One family.
pub struct Family {
    pub name: String,
    pub checkpoint: Checkpoint,
    pub cases: Vec<Case>,
}

/// Prompts under one `max_model_len`.
pub struct Case {
    pub max_model_len: u32,
    pub prompts: Vec<Prompt>,
}

/// What must come out for one prompt.
pub struct Prompt {
    pub ids: Vec<TokenId>,
    /// `[ids.len(), vocab]`.
    pub logits: Vec<f32>,
    pub greedy: Vec<TokenId>,
    /// Of each greedy token: the lead of its logit over the next.
    pub margins: Vec<f32>,
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All families, by name.
pub fn families() -> Vec<Family> {
    let golden = workspace().join("tests/data/golden");
    let entries = golden.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = entries.filter(|path| path.is_dir()).collect();
    paths.sort();
    assert!(paths.len() >= 5, "golden checkpoints are missing: {paths:?}");
    paths.iter().map(|path| family(path)).collect()
}

/// One family by name.
pub fn family_named(name: &str) -> Family {
    family(&workspace().join("tests/data/golden").join(name))
}

/// What must come out of a checkpoint with the adapter in this folder.
pub fn adapted_prompts(path: &Path) -> Vec<Prompt> {
    let golden = read_json(&path.join("golden.json"));
    let logits = std::fs::read(path.join("golden.safetensors")).unwrap();
    let logits = SafeTensors::deserialize(&logits).unwrap();
    list(&golden["prompts"]).iter().map(|value| prompt(value, &logits)).collect()
}

fn family(path: &Path) -> Family {
    let golden = read_json(&path.join("golden.json"));
    let logits = std::fs::read(path.join("golden.safetensors")).unwrap();
    let logits = SafeTensors::deserialize(&logits).unwrap();
    let case = |case: &Value| Case {
        max_model_len: case["max_model_len"].as_u64().unwrap() as u32,
        prompts: list(&case["prompts"]).iter().map(|value| prompt(value, &logits)).collect(),
    };
    Family {
        name: path.file_name().unwrap().to_str().unwrap().to_owned(),
        checkpoint: Checkpoint::open(path).unwrap(),
        cases: list(&golden["cases"]).iter().map(case).collect(),
    }
}

fn prompt(value: &Value, logits: &SafeTensors<'_>) -> Prompt {
    let tensor = logits.tensor(value["logits"].as_str().unwrap()).unwrap();
    Prompt {
        ids: ids(&value["ids"]),
        logits: tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        greedy: ids(&value["greedy"]),
        margins: floats(&value["margins"]),
    }
}

/// The folder of a small trained model, or `None`, with a message, where it is not there.
pub fn trained_model(name: &str) -> Option<PathBuf> {
    let shared =
        std::env::var_os("QUIRE_SHARED").map_or_else(|| workspace().join("../shared"), PathBuf::from);
    let path = shared.join("data/models").join(name);
    if path.is_dir() {
        return Some(path);
    }
    // Past the test harness, which would swallow it.
    let hint = "QUIRE_SHARED names the folder that holds data/models";
    let mut stderr = std::io::stderr();
    writeln!(stderr, "skipped {name}: {} is not there; {hint}", path.display()).unwrap();
    None
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

pub fn ids(value: &Value) -> Vec<TokenId> {
    list(value).iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
}

pub fn floats(value: &Value) -> Vec<f32> {
    list(value).iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// The largest absolute difference of two equally long lists.
pub fn max_error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    // `f32::max` would drop a NaN.
    got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, |max, e| if e <= max { max } else { e })
}
