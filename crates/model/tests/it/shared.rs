//! The trained public models, where the shared data folder is present.

use std::path::PathBuf;

use quire_core::DType;
use quire_model::{Checkpoint, GlobalTensor, Head, Mixer};

/// The data of the shared folder: `$QUIRE_SHARED`, or `shared` beside the repository.
pub fn data() -> PathBuf {
    let shared =
        std::env::var_os("QUIRE_SHARED").map_or_else(|| crate::root().join("../shared"), PathBuf::from);
    shared.join("data")
}

/// A model of the shared folder, or why there is none.
pub fn open(name: &str) -> Option<Checkpoint> {
    let dir = data().join("models").join(name);
    if !dir.is_dir() {
        eprintln!("skipped: {} does not exist (set QUIRE_SHARED)", dir.display());
        return None;
    }
    Some(Checkpoint::open(&dir).unwrap())
}

#[test]
fn stories260k_opens() {
    let Some(model) = open("stories260k") else { return };
    let spec = model.spec();
    let Mixer::Gqa(gqa) = &spec.layers[4].mixer;
    assert_eq!((spec.layers.len(), spec.hidden_size, spec.vocab_size), (5, 64, 512));
    assert_eq!((gqa.num_heads, gqa.num_kv_heads, gqa.head_dim), (8, 4, 8));
    assert_eq!((spec.head, spec.dtype), (Head::Tied, DType::F32));
    assert_eq!((spec.bos_token_id, spec.eos_token_ids.as_slice()), (Some(1), &[2][..]));
}

/// Its tied table is stored under the head's name only.
#[test]
fn tinystories_finds_its_embedding_under_the_head() {
    let Some(model) = open("tinystories-656k") else { return };
    assert_eq!(model.spec().head, Head::Tied);
    assert!(model.tensors().iter().all(|tensor| tensor.name != "model.embed_tokens.weight"));
    let embed = model.global_tensor(GlobalTensor::Embed).unwrap();
    assert_eq!((embed.dtype, &*embed.shape), (DType::F32, &[2048, 128][..]));
    assert_eq!(embed.data, model.global_tensor(GlobalTensor::LmHead).unwrap().data);
    assert!(model.ignored_tensors().is_empty());
}
