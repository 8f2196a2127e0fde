//! The golden checkpoints: specs, tensors and rotary frequencies against what transformers says.

use quire_core::{DType, TensorView};
use quire_model::{
    Activation, Checkpoint, DenseFfn, Ffn, FfnShape, GlobalTensor, GqaSpec, Head, LayerSpec, LayerTensor,
    Mixer, ModelSpec, MoeFfn, NormPlacement, QkNorm, RopeScaling, RopeSpec,
};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::golden_dir;

const FAMILIES: [&str; 14] = [
    "gemma2",
    "llama2",
    "llama3",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "qwen3-moe",
    "smollm",
    "rope-linear",
    "rope-dynamic",
    "rope-yarn",
    "rope-yarn-factor",
    "llama-bias",
];

/// The shape most families share; each expectation below names its differences.
fn base(theta: f64) -> (ModelSpec, GqaSpec, DenseFfn) {
    let gqa = GqaSpec {
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 64,
        window: None,
        qk_norm: QkNorm::None,
        qkv_bias: false,
        out_bias: false,
        rope: RopeSpec { dim: 64, theta, scaling: RopeScaling::Default },
        softmax_scale: 0.125,
        soft_cap: None,
    };
    let ffn =
        DenseFfn { intermediate_size: 64, activation: Activation::Silu, shape: FfnShape::Gated, bias: false };
    let spec = ModelSpec {
        architecture: "LlamaForCausalLM".to_owned(),
        vocab_size: 256,
        hidden_size: 64,
        max_position_embeddings: 128,
        norm_eps: 1e-5,
        embed_scale: 1.0,
        logit_soft_cap: None,
        layers: Vec::new(),
        head: Head::Own,
        dtype: DType::BF16,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    (spec, gqa, ffn)
}

fn layer(gqa: &GqaSpec, ffn: &DenseFfn) -> LayerSpec {
    LayerSpec { mixer: Mixer::Gqa(gqa.clone()), ffn: Ffn::Dense(ffn.clone()), norms: NormPlacement::Pre }
}

fn expected(family: &str) -> ModelSpec {
    let theta = match family {
        "llama3" => 500_000.0,
        "qwen2" | "qwen2-window" | "qwen3" | "qwen3-moe" | "rope-yarn" => 1_000_000.0,
        _ => 10_000.0,
    };
    let (mut spec, mut gqa, mut ffn) = base(theta);
    let mut num_layers = 2;
    if family.starts_with("qwen2") || family == "rope-yarn" {
        spec.architecture = "Qwen2ForCausalLM".to_owned();
        (spec.hidden_size, spec.head, gqa.qkv_bias) = (128, Head::Tied, true);
    }
    match family {
        "llama2" => (gqa.num_kv_heads, spec.dtype) = (2, DType::F32),
        "llama3" => {
            (gqa.num_heads, gqa.num_kv_heads) = (4, 2);
            gqa.rope.scaling = RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 64,
            };
            spec.eos_token_ids = vec![2, 3, 4];
        }
        "mistral" => {
            spec.architecture = "MistralForCausalLM".to_owned();
            (gqa.num_heads, gqa.window, num_layers) = (3, Some(16), 3);
        }
        "qwen2" => spec.eos_token_ids = vec![2, 5],
        "qwen2-window" => {
            spec.layers.push(layer(&gqa, &ffn));
            (gqa.window, num_layers) = (Some(16), 1);
        }
        "qwen3" => {
            spec.architecture = "Qwen3ForCausalLM".to_owned();
            (gqa.head_dim, gqa.rope.dim, gqa.softmax_scale) = (128, 128, 128f32.powf(-0.5));
            (gqa.qk_norm, spec.head, spec.norm_eps) = (QkNorm::PerHead, Head::Tied, 1e-6);
        }
        // The second of three layers is dense.
        "qwen3-moe" => {
            spec.architecture = "Qwen3MoeForCausalLM".to_owned();
            (gqa.qk_norm, spec.head, spec.norm_eps) = (QkNorm::PerHead, Head::Tied, 1e-6);
            let experts = MoeFfn {
                num_experts: 8,
                num_experts_per_tok: 2,
                intermediate_size: 32,
                activation: Activation::Silu,
                norm_topk_prob: true,
            };
            let moe = LayerSpec { ffn: Ffn::Moe(experts), ..layer(&gqa, &ffn) };
            spec.layers = vec![moe.clone(), layer(&gqa, &ffn), moe];
            num_layers = 0;
        }
        // The first and third of three layers slide.
        "gemma2" => {
            spec.architecture = "Gemma2ForCausalLM".to_owned();
            (spec.hidden_size, spec.head, spec.norm_eps) = (128, Head::Tied, 1e-6);
            (spec.embed_scale, spec.logit_soft_cap) = (11.313_708, Some(0.8));
            (gqa.softmax_scale, gqa.soft_cap, ffn.activation) =
                (24f32.powf(-0.5), Some(3.0), Activation::GeluTanh);
            let sliding = GqaSpec { window: Some(16), ..gqa.clone() };
            let norms = NormPlacement::PreAndPost;
            let [sliding, full] = [&sliding, &gqa].map(|gqa| LayerSpec { norms, ..layer(gqa, &ffn) });
            spec.layers = vec![sliding.clone(), full, sliding];
            num_layers = 0;
        }
        "smollm" => {
            (spec.head, spec.dtype, spec.max_position_embeddings) = (Head::Tied, DType::F16, 256);
        }
        "rope-linear" => gqa.rope.scaling = RopeScaling::Linear { factor: 4.0 },
        "rope-dynamic" => {
            spec.max_position_embeddings = 64;
            gqa.rope.scaling = RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 64 };
        }
        "rope-yarn" => {
            spec.max_position_embeddings = 64;
            gqa.rope.scaling = RopeScaling::Yarn {
                factor: 4.0,
                original_max_position_embeddings: 64,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: (0.1 * 4f64.ln() + 1.0) as f32,
                truncate: true,
            };
        }
        "rope-yarn-factor" => {
            gqa.rope.scaling = RopeScaling::Yarn {
                factor: 2.0,
                original_max_position_embeddings: 64,
                beta_fast: 16.0,
                beta_slow: 2.0,
                attention_factor: 0.9,
                truncate: false,
            };
        }
        "llama-bias" => {
            (gqa.qkv_bias, gqa.out_bias, ffn.bias) = (true, true, true);
            ffn.activation = Activation::GeluTanh;
        }
        other => panic!("no expectation for {other}"),
    }
    spec.layers.extend(vec![layer(&gqa, &ffn); num_layers]);
    spec
}

#[test]
fn every_family_parses_to_its_spec() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::open(&golden_dir(family)).unwrap();
        assert_eq!(*checkpoint.spec(), expected(family), "{family}");
        assert!(checkpoint.ignored_tensors().is_empty(), "{family}");
    }
    let on_disk = std::fs::read_dir(golden_dir("")).unwrap();
    let on_disk = on_disk.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
    assert_eq!(on_disk, FAMILIES.len(), "a golden checkpoint without an expectation");
}

#[test]
fn generation_config_gives_sampling_defaults() {
    let checkpoint = Checkpoint::open(&golden_dir("qwen2")).unwrap();
    let defaults = checkpoint.generation_config();
    assert_eq!(
        (defaults.do_sample, defaults.temperature, defaults.top_p),
        (Some(true), Some(0.7), Some(0.8))
    );
    assert_eq!((defaults.top_k, defaults.min_p, defaults.repetition_penalty), (Some(20), None, Some(1.05)));
    assert_eq!(defaults.eos_token_ids, [5, 2]);
    assert_eq!(*Checkpoint::open(&golden_dir("llama2")).unwrap().generation_config(), Default::default());
}

#[test]
fn kv_groups_keep_a_window_only_if_all_layers_share_it() {
    let group = |family| {
        let mut groups = Checkpoint::open(&golden_dir(family)).unwrap().spec().kv_groups();
        assert_eq!(groups.len(), 1);
        groups.remove(0)
    };
    assert_eq!(group("mistral").window, Some(16));
    assert_eq!(group("mistral").layers, [0, 1, 2]);
    assert_eq!(group("qwen2-window").window, None);
    assert_eq!((group("llama3").num_kv_heads, group("llama3").head_dim), (2, 64));
}

#[test]
fn longest_context_follows_the_scaling() {
    let length = |family| Checkpoint::open(&golden_dir(family)).unwrap().spec().max_model_len();
    assert_eq!(length("llama3"), 128);
    assert_eq!(length("rope-linear"), 512);
    assert_eq!(length("rope-dynamic"), 64);
    assert_eq!(length("rope-yarn"), 256);
    assert_eq!(length("rope-yarn-factor"), 128);
}

#[test]
fn inverse_frequencies_are_those_of_transformers() {
    let mut cases = 0;
    for family in FAMILIES {
        let text = std::fs::read_to_string(golden_dir(family).join("golden.json")).unwrap();
        let golden: Value = serde_json::from_str(&text).unwrap();
        let spec = Checkpoint::open(&golden_dir(family)).unwrap().spec().clone();
        let Mixer::Gqa(gqa) = &spec.layers[0].mixer;
        for case in golden["cases"].as_array().unwrap() {
            let max_model_len = case["max_model_len"].as_u64().unwrap() as usize;
            let ours = gqa.rope.inv_freq(max_model_len);
            let theirs: Vec<f64> =
                case["inv_freq"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            assert_eq!(ours.len(), theirs.len(), "{family}");
            for (i, (&ours, &theirs)) in ours.iter().zip(&theirs).enumerate() {
                let relative = (f64::from(ours) / theirs - 1.0).abs();
                assert!(relative < 1e-6, "{family} at {max_model_len}, pair {i}: {ours:e} but {theirs:e}");
            }
            let factor = case["attention_factor"].as_f64().unwrap();
            assert!((f64::from(gqa.rope.attention_factor()) - factor).abs() < 1e-6, "{family}");
            cases += 1;
        }
    }
    assert_eq!(cases, FAMILIES.len() + 1);
}

/// Every tensor that the model asks for has the bytes that an independent reader finds under its Hugging Face name.
#[test]
fn tensors_hold_the_bytes_of_their_files() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::open(&golden_dir(family)).unwrap();
        let files: Vec<Vec<u8>> = std::fs::read_dir(golden_dir(family))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                let name = path.file_name().unwrap().to_str().unwrap();
                name.starts_with("model") && name.ends_with(".safetensors")
            })
            .map(|path| std::fs::read(path).unwrap())
            .collect();
        let files: Vec<_> = files.iter().map(|bytes| SafeTensors::deserialize(bytes).unwrap()).collect();
        let mut seen = 0;
        let mut compare = |ours: TensorView<'_>, name: &str| {
            let theirs = files.iter().find_map(|file| file.tensor(name).ok()).unwrap();
            seen += 1;
            if family == "gemma2" && name.contains("norm") {
                assert_eq!((ours.shape, ours.dtype), (theirs.shape(), DType::F32), "{name}");
                assert_eq!(ours.data, one_and(theirs.data()), "{name}");
                return;
            }
            assert_eq!((ours.shape, ours.data), (theirs.shape(), theirs.data()), "{family} {name}");
            assert_eq!(format!("{:?}", theirs.dtype()).to_lowercase(), ours.dtype.name(), "{family} {name}");
        };
        let spec = checkpoint.spec();
        for (index, layer) in spec.layers.iter().enumerate() {
            for (tensor, shape) in layer.tensors(spec.hidden_size) {
                let ours = checkpoint.layer_tensor(index, tensor).unwrap();
                assert_eq!(*ours.shape, *shape);
                compare(ours.view(), &format!("model.layers.{index}.{}", hf_name(family, tensor)));
            }
        }
        compare(checkpoint.global_tensor(GlobalTensor::Embed).unwrap().view(), "model.embed_tokens.weight");
        compare(checkpoint.global_tensor(GlobalTensor::FinalNorm).unwrap().view(), "model.norm.weight");
        let head = checkpoint.global_tensor(GlobalTensor::LmHead).unwrap();
        match spec.head {
            Head::Own => compare(head.view(), "lm_head.weight"),
            Head::Tied => assert_eq!(head.data, checkpoint.global_tensor(GlobalTensor::Embed).unwrap().data),
        }
        assert_eq!(seen, files.iter().map(SafeTensors::len).sum::<usize>(), "{family}");
        assert_eq!(seen, checkpoint.tensors().len());
    }
}

/// f32 that are 1 greater than these bf16.
fn one_and(bf16: &[u8]) -> Vec<u8> {
    let values = bf16.chunks(2).map(|bytes| f32::from_le_bytes([0, 0, bytes[0], bytes[1]]));
    values.flat_map(|value| (1.0 + value).to_le_bytes()).collect()
}

fn hf_name(family: &str, tensor: LayerTensor) -> String {
    let name = match tensor {
        LayerTensor::FfnNorm if family == "gemma2" => "pre_feedforward_layernorm.weight",
        LayerTensor::PostMixerNorm => "post_attention_layernorm.weight",
        LayerTensor::PostFfnNorm => "post_feedforward_layernorm.weight",
        LayerTensor::MixerNorm => "input_layernorm.weight",
        LayerTensor::Q => "self_attn.q_proj.weight",
        LayerTensor::K => "self_attn.k_proj.weight",
        LayerTensor::V => "self_attn.v_proj.weight",
        LayerTensor::O => "self_attn.o_proj.weight",
        LayerTensor::QBias => "self_attn.q_proj.bias",
        LayerTensor::KBias => "self_attn.k_proj.bias",
        LayerTensor::VBias => "self_attn.v_proj.bias",
        LayerTensor::OBias => "self_attn.o_proj.bias",
        LayerTensor::QNorm => "self_attn.q_norm.weight",
        LayerTensor::KNorm => "self_attn.k_norm.weight",
        LayerTensor::FfnNorm => "post_attention_layernorm.weight",
        LayerTensor::Gate => "mlp.gate_proj.weight",
        LayerTensor::Up => "mlp.up_proj.weight",
        LayerTensor::Down => "mlp.down_proj.weight",
        LayerTensor::GateBias => "mlp.gate_proj.bias",
        LayerTensor::UpBias => "mlp.up_proj.bias",
        LayerTensor::DownBias => "mlp.down_proj.bias",
        LayerTensor::Router => "mlp.gate.weight",
        LayerTensor::ExpertGate(expert) => return format!("mlp.experts.{expert}.gate_proj.weight"),
        LayerTensor::ExpertUp(expert) => return format!("mlp.experts.{expert}.up_proj.weight"),
        LayerTensor::ExpertDown(expert) => return format!("mlp.experts.{expert}.down_proj.weight"),
    };
    name.to_owned()
}

#[test]
fn sharded_checkpoints_name_the_file_of_each_tensor() {
    let tensors = Checkpoint::open(&golden_dir("llama3")).unwrap().tensors();
    let files: std::collections::BTreeSet<_> = tensors.iter().map(|tensor| tensor.file.as_str()).collect();
    assert_eq!(
        files.into_iter().collect::<Vec<_>>(),
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    );
    let embed = tensors.iter().find(|tensor| tensor.name == "model.embed_tokens.weight").unwrap();
    assert_eq!((embed.dtype.as_str(), embed.shape.as_slice(), embed.bytes), ("BF16", &[256, 64][..], 32768));
}

#[test]
fn a_tensor_the_model_lacks_is_an_error() {
    let checkpoint = Checkpoint::open(&golden_dir("llama2")).unwrap();
    let error = checkpoint.layer_tensor(0, LayerTensor::QNorm).unwrap_err().to_string();
    assert_eq!(error, "the model has no tensor `model.layers.0.self_attn.q_norm.weight`");
}
