//! LoRA adapters: the trained ones of the shared folder, and one for a golden checkpoint, damaged in every way that has a
//! message of its own.

use std::fs;
use std::path::{Path, PathBuf};

use quire_core::DType;
use quire_model::{Checkpoint, LayerTensor, LoraAdapter};
use safetensors::tensor::{Dtype, TensorView, serialize};

use crate::{golden_dir, scratch};

const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "rank_pattern": {},
    "modules_to_save": null, "use_dora": false, "use_rslora": RS, "base_model_name_or_path": "../../../etc/passwd"}"#;

fn base() -> Checkpoint {
    Checkpoint::open(&golden_dir("llama2")).unwrap()
}

/// An adapter of zeros with this config and these tensors.
fn write(name: &str, config: &str, tensors: &[(&str, Dtype, &[usize])]) -> PathBuf {
    let dir = scratch(name);
    fs::write(dir.join("adapter_config.json"), config).unwrap();
    let zeros = vec![0; 1 << 16];
    let view = |(name, dtype, shape): &(&str, Dtype, &[usize])| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        ((*name).to_owned(), TensorView::new(*dtype, shape.to_vec(), &zeros[..bytes]).unwrap())
    };
    fs::write(dir.join("adapter_model.safetensors"), serialize(tensors.iter().map(view), None).unwrap())
        .unwrap();
    dir
}

/// `[out_features, in_features]` of layer 0's query projection.
fn q_shape(base: &Checkpoint) -> [usize; 2] {
    let q = base.layer_tensor(0, LayerTensor::Q).unwrap();
    [q.shape[0], q.shape[1]]
}

fn assert_error(dir: &Path, expected: &str) {
    let message = LoraAdapter::open(dir, &base()).unwrap_err().to_string();
    assert!(message.contains(expected), "expected {expected:?} in {message:?}");
    assert!(message.contains(dir.file_name().unwrap().to_str().unwrap()), "which adapter? {message:?}");
}

#[test]
fn factors_come_with_their_scaling() {
    let base = base();
    let [out_features, in_features] = q_shape(&base);
    let tensors: &[(&str, Dtype, &[usize])] =
        &[(A, Dtype::BF16, &[2, in_features]), (B, Dtype::F16, &[out_features, 2])];
    for (rs, scaling) in [("false", 3.0), ("true", (6.0 / 2f64.sqrt()) as f32)] {
        let dir = write(&format!("lora-{rs}"), &CONFIG.replace("RS", rs), tensors);
        let adapter = LoraAdapter::open(&dir, &base).unwrap();
        assert_eq!((adapter.rank(), adapter.scaling()), (2, scaling));
        let pair = adapter.pair(0, LayerTensor::Q).unwrap().unwrap();
        assert_eq!((pair.a.dtype, pair.b.dtype), (DType::BF16, DType::F16));
        assert_eq!((&*pair.a.shape, &*pair.b.shape), (&[2, in_features][..], &[out_features, 2][..]));
        assert!(adapter.pair(0, LayerTensor::K).unwrap().is_none());
        assert!(adapter.pair(1, LayerTensor::Q).unwrap().is_none());
    }
}

#[test]
fn what_does_not_fit_the_base_is_named() {
    let [out_features, in_features] = q_shape(&base());
    let (a, b) = ([2, in_features], [out_features, 2]);
    let case = |name: &str, tensors: &[(&str, Dtype, &[usize])], expected: &str| {
        assert_error(&write(&format!("lora-bad-{name}"), &CONFIG.replace("RS", "false"), tensors), expected);
    };
    let f32 = Dtype::F32;
    case("in", &[(A, f32, &[2, in_features + 1]), (B, f32, &b)], "lora_A.weight` has shape [2, ");
    case("out", &[(A, f32, &a), (B, f32, &[out_features / 2, 2])], "lora_B.weight` has shape");
    case(
        "rank",
        &[(A, f32, &[4, in_features]), (B, f32, &[out_features, 4])],
        "but the base model and `r` ask for [2, ",
    );
    case("half", &[(A, f32, &a)], &format!("lacks tensor `{B}`"));
    case("dtype", &[(A, Dtype::I8, &a), (B, f32, &b)], "has dtype I8; supported are F32, F16, BF16");
    case("empty", &[], "nothing to adapt");
    for stranger in [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
    ] {
        case(
            "stranger",
            &[(A, f32, &a), (B, f32, &b), (stranger, f32, &[2, 2])],
            &format!("tensor `{stranger}`"),
        );
    }
}

#[test]
fn adapters_of_experts_and_routers_are_refused_by_name() {
    let base = Checkpoint::open(&golden_dir("qwen3-moe")).unwrap();
    let attention: [(&str, Dtype, &[usize]); 2] = [(A, Dtype::F32, &[2, 64]), (B, Dtype::F32, &[128, 2])];
    let open = |tensors: &[(&str, Dtype, &[usize])]| {
        LoraAdapter::open(&write("lora-experts", &CONFIG.replace("RS", "false"), tensors), &base)
    };
    assert_eq!(open(&attention).unwrap().rank(), 2, "projections of attention are adapted");
    for (module, what) in [
        ("layers.2.mlp.experts.7.up_proj", "changes an expert"),
        ("layers.0.mlp.experts.0.down_proj", "changes an expert"),
        ("layers.0.mlp.gate", "changes the router of experts"),
        // Layer 1 is dense, and there is no ninth expert.
        ("layers.1.mlp.experts.0.up_proj", "changes nothing that can be adapted"),
        ("layers.0.mlp.experts.8.up_proj", "changes nothing that can be adapted"),
    ] {
        let name = format!("base_model.model.model.{module}.lora_A.weight");
        let message =
            open(&[attention[0], attention[1], (&name, Dtype::F32, &[2, 64])]).unwrap_err().to_string();
        assert!(message.contains(&format!("tensor `{name}` {what}")), "{message}");
    }
}

#[test]
fn options_that_are_not_supported_are_refused_by_name() {
    let plain = CONFIG.replace("RS", "false");
    let case = |from: &str, to: &str, expected: &str| {
        assert!(plain.contains(from));
        assert_error(&write("lora-option", &plain.replace(from, to), &[]), expected);
    };
    case("\"r\": 2", "\"r\": 0", "field `r` is 0: must be an integer between 1 and 512");
    case("\"r\": 2", "\"r\": 1000000", "field `r` is 1000000");
    case("\"r\": 2", "\"r\": \"2\"", "field `r`");
    case("\"lora_alpha\": 6", "\"lora_alpha\": 1e999", "not valid JSON");
    case("LORA", "ADALORA", "only LORA adapters");
    case("\"use_dora\": false", "\"use_dora\": true", "DoRA is not supported");
    case("\"bias\": \"none\"", "\"bias\": \"all\"", "trained biases are not supported");
    case("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]", "field `modules_to_save`");
    case("\"rank_pattern\": {}", "\"rank_pattern\": {\"q_proj\": 4}", "field `rank_pattern`");
    case("\"r\": 2", "\"r\": 2, \"init_lora_weights\": \"pissa_niter_4\"", "changed base weights");
}

#[test]
fn a_directory_without_an_adapter_says_what_one_is() {
    assert_error(&scratch("lora-none"), "holds no adapter_config.json");
    let message = Checkpoint::open(&write("lora-as-model", CONFIG, &[])).unwrap_err().to_string();
    assert!(message.contains("--lora-modules"), "{message}");
}

#[test]
fn trained_adapters_open() {
    let Some(base) = crate::shared::open("stories260k") else { return };
    let adapter =
        |name: &str| LoraAdapter::open(&crate::shared::data().join("lora").join(name), &base).unwrap();
    let (robot, rhyme) = (adapter("stories260k-robot"), adapter("stories260k-rhyme"));
    assert_eq!((robot.rank(), robot.scaling(), rhyme.rank(), rhyme.scaling()), (8, 2.0, 4, 2.0));
    assert!(robot.pair(4, LayerTensor::V).unwrap().is_some());
    assert!(robot.pair(4, LayerTensor::Down).unwrap().is_none());
    let down = rhyme.pair(4, LayerTensor::Down).unwrap().unwrap();
    assert_eq!((&*down.a.shape, &*down.b.shape), (&[4, 172][..], &[64, 4][..]));
}
