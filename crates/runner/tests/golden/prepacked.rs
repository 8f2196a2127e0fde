//! Weights that an earlier load packed: the same bits, and nothing read from the checkpoint that is in the file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use quire_core::{DType, QuantFormat};
use quire_cpu::{CpuBackend, CpuConfig, Isa, PackFile, PackKey, Precision, Prepacked};
use quire_model::Checkpoint;
use quire_runner::{ModelRunner, RunnerConfig};
use serde_json::Value;

use crate::checkpoints::{families, workspace};
use crate::driver::{Driver, config, greedy};

/// Logits of a prompt as bits, on a backend that shares `prepacked`.
fn logits(
    checkpoint: &Checkpoint,
    quant: QuantFormat,
    prompt: &[u32],
    prepacked: Option<&Prepacked>,
) -> Vec<u32> {
    let cpu = CpuConfig { threads: 2, max_isa: Isa::detect(), precision: Precision::Bf16 };
    let mut backend = CpuBackend::new(cpu).unwrap();
    if let Some(prepacked) = prepacked {
        backend = backend.with_prepacked(prepacked.clone());
    }
    let config = RunnerConfig { quant, kv_dtype: DType::BF16, ..config(512, 16) };
    let runner = ModelRunner::load(backend, checkpoint, &config, |_| {}).unwrap();
    let mut driver = Driver::on(runner, &config);
    let seq = driver.add(prompt, &greedy());
    let mut all = Vec::new();
    for part in prompt.chunks(config.max_logit_rows() as usize) {
        driver.step(&[(seq, part.len())]);
        all.extend(driver.logits().into_iter().map(f32::to_bits));
    }
    all
}

/// A copy of a family's directory, to be changed.
fn copy_of(family: &str) -> PathBuf {
    let copy = std::env::temp_dir().join(format!("quire-golden-{}-{family}", std::process::id()));
    let _ = fs::remove_dir_all(&copy);
    fs::create_dir_all(&copy).unwrap();
    for entry in workspace().join("tests/data/golden").join(family).read_dir().unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    copy
}

/// Puts zeros in the place of every matrix, and the time of change back to what it was.
fn wipe_matrices(directory: &Path) {
    let files = directory.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let is_shard = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with("model") && name.ends_with(".safetensors")
    };
    for path in files.filter(is_shard) {
        let modified = path.metadata().unwrap().modified().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let data_start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..data_start]).unwrap();
        for (_, tensor) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
            if tensor["shape"].as_array().unwrap().len() == 2 {
                let at = |i: usize| data_start + tensor["data_offsets"][i].as_u64().unwrap() as usize;
                bytes[at(0)..at(1)].fill(0);
            }
        }
        fs::write(&path, bytes).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    }
}

#[test]
fn a_second_load_gives_the_same_bits_without_the_matrices() {
    let mut compared = 0;
    for family in families() {
        let copy = copy_of(&family.name);
        let pack = copy.join("pack");
        let prompt = &family.cases[0].prompts[0].ids;
        let is_bf16 = family.checkpoint.spec().dtype == DType::BF16;
        let mut expected = Vec::new();
        for quant in [QuantFormat::None, QuantFormat::Int8, QuantFormat::Int4] {
            let checkpoint = Checkpoint::open(&copy).unwrap();
            let fingerprint = checkpoint.fingerprint().unwrap();
            let key = PackKey::new(&fingerprint, Precision::Bf16, quant).unwrap();
            let first = Prepacked::default();
            let fresh = logits(&checkpoint, quant, prompt, None);
            assert_eq!(logits(&checkpoint, quant, prompt, Some(&first)), fresh);
            // Matrices of f16 and f32 are packed only if they are quantized.
            let Some(packing) = first.finish() else {
                assert!(!is_bf16 && quant == QuantFormat::None, "{}", family.name);
                continue;
            };
            let path = pack.with_extension(quant.name());
            packing.write(&path, &key).unwrap();
            expected.push((quant, key, path, fresh));
        }
        if is_bf16 {
            wipe_matrices(&copy);
        }
        let checkpoint = Checkpoint::open(&copy).unwrap();
        for (quant, key, path, fresh) in expected {
            let fingerprint = checkpoint.fingerprint().unwrap();
            assert_eq!(
                PackKey::new(&fingerprint, Precision::Bf16, quant),
                Some(key),
                "the change does not show"
            );
            let second = Prepacked::new(Some(PackFile::open(&path, &key).unwrap()));
            assert_eq!(logits(&checkpoint, quant, prompt, Some(&second)), fresh, "{} {quant:?}", family.name);
            assert!(second.finish().is_none(), "{} {quant:?}: something was packed", family.name);
            if is_bf16 {
                assert_ne!(logits(&checkpoint, quant, prompt, None), fresh, "the matrices are gone");
            }
            compared += 1;
        }
        fs::remove_dir_all(copy).unwrap();
    }
    assert!(compared >= 30, "only {compared} files were compared");
}
