//! Directories and weight files, damaged in every way that has a message of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use quire_model::{Checkpoint, GlobalTensor, LayerTensor};
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::{golden_dir, scratch};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a golden checkpoint, to be changed and written again.
fn tensors(family: &str) -> Tensors {
    let bytes = fs::read(golden_dir(family).join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let owned = |(name, view): (&str, TensorView)| {
        (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.iter().map(owned).collect()
}

/// A checkpoint directory with the config of a family and these tensors.
fn write(name: &str, family: &str, tensors: &Tensors) -> PathBuf {
    let dir = scratch(name);
    fs::copy(golden_dir(family).join("config.json"), dir.join("config.json")).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(dir.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    dir
}

fn error(dir: &Path) -> String {
    Checkpoint::open(dir).unwrap_err().to_string()
}

fn assert_error(dir: &Path, expected: &str) {
    let message = error(dir);
    assert!(message.contains(expected), "expected {expected:?} in {message:?}");
}

#[test]
fn missing_tensors_are_listed() {
    let mut all = tensors("llama2");
    all.remove("model.layers.1.self_attn.k_proj.weight");
    let expected = "the checkpoint lacks tensor `model.layers.1.self_attn.k_proj.weight`";
    assert_error(&write("missing", "llama2", &all), expected);
    all.retain(|name, _| !name.contains("layers.0."));
    let message = error(&write("missing-many", "llama2", &all));
    assert!(
        message.contains("lacks tensors `model.layers.0.") && message.ends_with(" and 4 more"),
        "{message}"
    );
    let mut headless = tensors("llama2");
    headless.remove("lm_head.weight");
    assert_error(&write("headless", "llama2", &headless), "lacks tensor `lm_head.weight`");
}

#[test]
fn wrong_shapes_and_dtypes_are_named() {
    let mut all = tensors("llama2");
    let q = all.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap();
    q.1 = vec![64, 128];
    let expected = "model.safetensors: tensor `model.layers.0.self_attn.q_proj.weight` has shape [64, 128], \
                    but config.json asks for [128, 64]";
    assert_error(&write("shape", "llama2", &all), expected);
    let q = all.get_mut("model.layers.0.self_attn.q_proj.weight").unwrap();
    *q = (Dtype::I8, vec![128, 64], vec![0; 128 * 64]);
    assert_error(&write("dtype", "llama2", &all), "has dtype I8; supported are F32, F16, BF16");
}

#[test]
fn unexplained_tensors_in_a_layer_are_refused_and_others_ignored() {
    let mut all = tensors("llama2");
    let scalar = |count: usize| (Dtype::F32, vec![count], vec![0; 4 * count]);
    all.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), scalar(32));
    all.insert("model.layers.7.mlp.extra.weight".into(), scalar(1));
    all.insert("score.weight".into(), scalar(1));
    let checkpoint = Checkpoint::open(&write("extra", "llama2", &all)).unwrap();
    assert_eq!(checkpoint.ignored_tensors(), ["model.layers.7.mlp.extra.weight", "score.weight"]);

    all.insert("model.layers.1.self_attn.q_proj.bias".into(), scalar(128));
    let expected =
        "config.json (LlamaForCausalLM) does not account for tensor `model.layers.1.self_attn.q_proj.bias`";
    assert_error(&write("unexplained", "llama2", &all), expected);
}

/// Gives a family's experts the form of transformers 5: the tensors of all experts of a layer in one.
fn fused(family: &str) -> Tensors {
    let mut all = tensors(family);
    for layer in [0, 2] {
        let mut stack = |projections: &[&str], name: &str| {
            let (mut data, mut shape) = (Vec::new(), vec![8]);
            for expert in 0..8 {
                for projection in projections {
                    let name = format!("model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight");
                    let (_, part, bytes) = all.remove(&name).unwrap();
                    shape = vec![8, projections.len() * part[0], part[1]];
                    data.extend(bytes);
                }
            }
            all.insert(format!("model.layers.{layer}.mlp.experts.{name}"), (Dtype::BF16, shape, data));
        };
        stack(&["gate", "up"], "gate_up_proj");
        stack(&["down"], "down_proj");
    }
    all
}

#[test]
fn experts_may_be_stored_as_one_tensor() {
    let expected = Checkpoint::open(&golden_dir("qwen3-moe")).unwrap();
    let mut all = fused("qwen3-moe");
    let got = Checkpoint::open(&write("fused", "qwen3-moe", &all)).unwrap();
    assert_eq!(got.tensors().len(), expected.tensors().len());
    for (layer, spec) in expected.spec().layers.iter().enumerate() {
        for (tensor, shape) in spec.tensors(64) {
            let (want, have) =
                (expected.layer_tensor(layer, tensor).unwrap(), got.layer_tensor(layer, tensor).unwrap());
            assert_eq!((&*have.shape, &have.data), (&*shape, &want.data), "{layer} {tensor:?}");
        }
    }
    let last = got.layer_tensor(2, LayerTensor::ExpertUp(7)).unwrap();
    assert_ne!(last.data, got.layer_tensor(2, LayerTensor::ExpertUp(6)).unwrap().data);

    let one = tensors("qwen3-moe").remove("model.layers.2.mlp.experts.3.up_proj.weight").unwrap();
    all.insert("model.layers.2.mlp.experts.3.up_proj.weight".into(), one);
    assert_error(
        &write("fused_twice", "qwen3-moe", &all),
        "is there by itself and in `model.layers.2.mlp.ex",
    );
    all.remove("model.layers.2.mlp.experts.3.up_proj.weight");
    all.get_mut("model.layers.0.mlp.experts.down_proj").unwrap().1 = vec![8, 32, 64];
    let expected = "has shape [8, 32, 64], but config.json asks for [8, 64, 32]";
    assert_error(&write("fused_shape", "qwen3-moe", &all), expected);
}

#[test]
fn a_tied_table_may_be_stored_under_either_name() {
    let mut all = tensors("smollm");
    let table = all.remove("model.embed_tokens.weight").unwrap();
    all.insert("lm_head.weight".into(), table.clone());
    let checkpoint = Checkpoint::open(&write("tied-as-head", "smollm", &all)).unwrap();
    assert_eq!(*checkpoint.global_tensor(GlobalTensor::Embed).unwrap().data, *table.2);
    // Stored twice: the embedding counts, as in transformers.
    all.insert("model.embed_tokens.weight".into(), table.clone());
    all.insert("lm_head.weight".into(), (table.0, table.1.clone(), vec![0; table.2.len()]));
    let checkpoint = Checkpoint::open(&write("tied-twice", "smollm", &all)).unwrap();
    assert_eq!(*checkpoint.global_tensor(GlobalTensor::LmHead).unwrap().data, *table.2);
    all.remove("model.embed_tokens.weight");
    all.remove("lm_head.weight");
    assert_error(&write("tied-none", "smollm", &all), "lacks tensor `lm_head.weight`");
}

#[test]
fn directories_without_usable_weights_say_what_they_hold() {
    let dir = scratch("empty");
    assert_error(&dir, "holds no config.json");
    fs::write(dir.join("adapter_config.json"), "{}").unwrap();
    assert_error(&dir, "serve its base model");
    fs::copy(golden_dir("llama2").join("config.json"), dir.join("config.json")).unwrap();
    assert_error(&dir, "holds no model.safetensors");
    fs::write(dir.join("pytorch_model.bin"), "x").unwrap();
    assert_error(&dir, "holds pytorch_model.bin, a PyTorch pickle");
    assert_error(&dir, "convert it to safetensors");
    fs::write(dir.join("model-q4.gguf"), "x").unwrap();
    assert_error(&dir, "GGUF is not supported yet");
    fs::write(dir.join("model-00001-of-00002.safetensors"), "x").unwrap();
    assert_error(&dir, "neither model.safetensors nor model.safetensors.index.json");
    assert_error(&dir.join("model-q4.gguf"), "GGUF is not supported yet");
    assert_error(&dir.join("pytorch_model.bin"), "PyTorch pickles are refused");
    assert_error(&dir.join("config.json"), "is a file; pass the directory");
    assert_error(&dir.join("nowhere"), "nowhere: No such file");
    fs::write(dir.join("model.safetensors"), "").unwrap();
    assert_error(&dir, "model.safetensors: 0 bytes are too few");
}

#[test]
fn damaged_shards_are_refused() {
    let copy = |name: &str| {
        let dir = scratch(name);
        for entry in fs::read_dir(golden_dir("llama3")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
        dir
    };
    let index = |dir: &Path, change: &dyn Fn(String) -> String| {
        let path = dir.join("model.safetensors.index.json");
        fs::write(&path, change(fs::read_to_string(&path).unwrap())).unwrap();
    };
    let shard = "model-00002-of-00002.safetensors";

    let dir = copy("shard-missing");
    fs::remove_file(dir.join(shard)).unwrap();
    assert_error(&dir, "model-00002-of-00002.safetensors: No such file");

    let dir = copy("shard-truncated");
    let bytes = fs::read(dir.join(shard)).unwrap();
    fs::write(dir.join(shard), &bytes[..bytes.len() - 1]).unwrap();
    assert_error(&dir, "the file is truncated or damaged");

    let dir = copy("shard-twice");
    fs::copy(dir.join("model-00001-of-00002.safetensors"), dir.join(shard)).unwrap();
    assert_error(&dir, "is also in model-00001-of-00002.safetensors");

    let dir = copy("index-wrong-file");
    index(&dir, &|text| text.replacen("00001-of", "00002-of", 1));
    assert_error(&dir, "but that file holds no such tensor");

    let dir = copy("index-escape");
    index(&dir, &|text| text.replacen("\"model-00001-of", "\"../model-00001-of", 1));
    assert_error(&dir, "must be the name of a file in the same directory");

    let dir = copy("index-empty");
    index(&dir, &|_| "{}".to_owned());
    assert_error(&dir, "model.safetensors.index.json: field `weight_map` is missing");
}

#[test]
fn checkpoints_can_be_part_of_the_program() {
    static CONFIG: &str = include_str!("../../../../tests/data/golden/smollm/config.json");
    static WEIGHTS: &[u8] = include_bytes!("../../../../tests/data/golden/smollm/model.safetensors");
    let checkpoint =
        Checkpoint::from_static(CONFIG, Some(r#"{"eos_token_id": [9], "temperature": 0.5}"#), WEIGHTS)
            .unwrap();
    let mapped = Checkpoint::open(&golden_dir("smollm")).unwrap();
    assert_eq!(checkpoint.spec().eos_token_ids, [2, 9]);
    assert_eq!(checkpoint.tensors(), mapped.tensors());
    let norm = GlobalTensor::FinalNorm;
    assert_eq!(checkpoint.global_tensor(norm).unwrap().data, mapped.global_tensor(norm).unwrap().data);
    let error = Checkpoint::from_static(CONFIG, None, &WEIGHTS[..1000]).unwrap_err().to_string();
    assert!(error.contains("reaches past the end of the file (1000 bytes)"), "{error}");
    fn send_and_sync<T: Send + Sync>(_: &T) {}
    send_and_sync(&checkpoint);
}

#[test]
fn the_fingerprint_shows_what_changed() {
    let all = tensors("llama2");
    let dir = write("fingerprint", "llama2", &all);
    let fingerprint = || Checkpoint::open(&dir).unwrap().fingerprint().unwrap();
    let weights = dir.join("model.safetensors");
    let modified = weights.metadata().unwrap().modified().unwrap();
    let set_modified =
        |time| fs::File::options().write(true).open(&weights).unwrap().set_modified(time).unwrap();
    let first = fingerprint();
    assert_eq!(first, fingerprint());

    set_modified(modified + std::time::Duration::from_nanos(1000));
    assert_ne!(first, fingerprint(), "another time");
    set_modified(modified);
    assert_eq!(first, fingerprint());

    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    fs::write(dir.join("config.json"), format!("{config} ")).unwrap();
    assert_ne!(first, fingerprint(), "another config");
    fs::write(dir.join("config.json"), config).unwrap();
    assert_eq!(first, fingerprint());

    // Two tensors of one shape change their names: the same size, and the time is put back.
    let mut swapped = fs::read(&weights).unwrap();
    let [up, gate] =
        ["mlp.up_proj.weight", "mlp.gate_proj.weight"].map(|name| format!("model.layers.0.{name}"));
    assert_eq!(all[&up].1, all[&gate].1);
    let find = |name: &str| swapped.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    let mut offsets = [&up, &gate].map(|name| {
        let start = find(name) + swapped[find(name)..].iter().position(|&byte| byte == b'[').unwrap();
        let end = start + swapped[start..].iter().position(|&byte| byte == b'}').unwrap();
        (start..end, swapped[start..end].to_vec())
    });
    assert_eq!(offsets[0].1.len(), offsets[1].1.len(), "as many digits");
    offsets.reverse();
    let [(first_at, second), (second_at, first_text)] = offsets.clone();
    swapped[second_at].copy_from_slice(&second);
    swapped[first_at].copy_from_slice(&first_text);
    fs::write(&weights, swapped).unwrap();
    set_modified(modified);
    assert_ne!(first, fingerprint(), "another header");
}

#[test]
fn models_without_files_have_no_fingerprint() {
    let dir = golden_dir("llama2");
    assert!(Checkpoint::open(&dir).unwrap().fingerprint().is_some());
    assert_eq!(Checkpoint::open_dummy(&dir, 0).unwrap().fingerprint(), None);
}
