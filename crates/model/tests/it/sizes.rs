//! Counts of real models, from their published configs, and random weights of such shapes.

use quire_core::DType;
use quire_model::{Checkpoint, GlobalTensor, Head, LayerTensor, Mixer, ModelSpec};

const LLAMA_3_1_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "rope_theta": 500000.0, "rope_scaling":
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}"#;
const MISTRAL_7B: &str = r#"{"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "sliding_window": 4096, "torch_dtype": "bfloat16"}"#;
const QWEN_2_5_0_5B: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "vocab_size": 151936, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "sliding_window": 32768}"#;
const QWEN_3_0_6B: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
    "head_dim": 128, "max_position_embeddings": 40960, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#;
const QWEN_3_30B_A3B: &str = include_str!("../../../../benches/shapes/qwen3-30b-a3b/config.json");
const SMOLLM_135M: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
    "max_position_embeddings": 2048, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "vocab_size": 49152, "tie_word_embeddings": true, "torch_dtype": "bfloat16"}"#;

/// The counts that the model cards state, or that follow from the sizes of the published files.
#[test]
fn parameter_counts_of_real_models() {
    for (config, parameters) in [
        (LLAMA_3_1_8B, 8_030_261_248),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN_2_5_0_5B, 494_032_768),
        (QWEN_3_0_6B, 596_049_920),
        // "30.5B in total", its card says.
        (QWEN_3_30B_A3B, 30_532_122_624),
        (SMOLLM_135M, 134_515_008),
    ] {
        let spec = ModelSpec::from_config_json(config).unwrap();
        assert_eq!(spec.num_parameters(), parameters, "{}", spec.architecture);
        assert_eq!(spec.weight_bytes(DType::BF16), 2 * parameters);
    }
    let llama = ModelSpec::from_config_json(LLAMA_3_1_8B).unwrap();
    assert_eq!(llama.kv_bytes_per_token(DType::BF16), 128 << 10);
    assert_eq!(llama.kv_bytes_per_token(DType::I8), 64 << 10);
    assert_eq!((llama.max_model_len(), llama.eos_token_ids.len()), (131_072, 3));
}

#[test]
fn dummy_weights_have_the_shape_and_scale_asked_for() {
    let spec = ModelSpec::from_config_json(SMOLLM_135M).unwrap();
    let dummy = Checkpoint::dummy(spec, 7);
    assert_eq!(dummy.tensors().len(), 30 * 9 + 2);
    assert_eq!(dummy.tensors().iter().map(|tensor| tensor.bytes).sum::<u64>(), 2 * 134_515_008);

    let down = dummy.layer_tensor(3, LayerTensor::Down).unwrap();
    assert_eq!((down.dtype, &*down.shape), (DType::BF16, &[576, 1536][..]));
    let values: Vec<f64> =
        down.data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
    assert!(mean.abs() < 1e-3 && (variance * 1536.0 - 1.0).abs() < 0.01, "mean {mean}, variance {variance}");

    // Each tensor is its own function of the seed, and is the same whenever it is asked for.
    assert_eq!(down.data, dummy.layer_tensor(3, LayerTensor::Down).unwrap().data);
    assert_ne!(down.data, dummy.layer_tensor(4, LayerTensor::Down).unwrap().data);
    let other = Checkpoint::dummy(dummy.spec().clone(), 8);
    assert_ne!(down.data, other.layer_tensor(3, LayerTensor::Down).unwrap().data);

    assert_eq!(dummy.spec().head, Head::Tied);
    let (embed, head) = (GlobalTensor::Embed, GlobalTensor::LmHead);
    assert_eq!(dummy.global_tensor(embed).unwrap().data, dummy.global_tensor(head).unwrap().data);
    let norm = dummy.global_tensor(GlobalTensor::FinalNorm).unwrap();
    assert!(norm.data.chunks_exact(2).all(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32() == 1.0));
    assert!(dummy.layer_tensor(0, LayerTensor::QBias).is_err());
}

#[test]
fn dummy_weights_need_no_weight_files() {
    let dir = crate::scratch("dummy");
    std::fs::write(dir.join("config.json"), QWEN_2_5_0_5B).unwrap();
    std::fs::write(dir.join("generation_config.json"), r#"{"eos_token_id": [151645, 151643]}"#).unwrap();
    let dummy = Checkpoint::open_dummy(&dir, 0).unwrap();
    assert_eq!(dummy.spec().eos_token_ids, [151_645, 151_643]);
    let Mixer::Gqa(gqa) = &dummy.spec().layers[0].mixer;
    assert_eq!(gqa.head_dim, 64);
    let bias = dummy.layer_tensor(0, LayerTensor::KBias).unwrap();
    assert_eq!((&*bias.shape, bias.data.iter().all(|&byte| byte == 0)), (&[128][..], true));
}
