//! `config.json`, good and bad, old and new style.

use quire_core::DType;
use quire_model::{
    Activation, Ffn, GenerationConfig, GqaSpec, Head, LayerSpec, Mixer, ModelSpec, MoeFfn, RopeScaling,
};
use serde_json::{Value, json};

/// A valid Llama config with fields replaced; `null` removes one.
fn with(changes: &Value) -> String {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    });
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config.to_string()
}

fn spec(changes: &Value) -> ModelSpec {
    ModelSpec::from_config_json(&with(changes)).unwrap()
}

fn gqa(changes: &Value) -> GqaSpec {
    let Mixer::Gqa(gqa) = spec(changes).layers.remove(0).mixer;
    gqa
}

fn error(changes: &Value) -> String {
    ModelSpec::from_config_json(&with(changes)).unwrap_err().to_string()
}

/// What transformers' Gemma2Config takes for granted, and what a file may say instead.
#[test]
fn gemma2_has_defaults_of_its_own() {
    let gemma = |changes: Value| {
        let mut all = json!({"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 3});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let spec = spec(&all);
        let gqas: Vec<_> =
            spec.layers.iter().map(|LayerSpec { mixer: Mixer::Gqa(gqa), .. }| gqa.clone()).collect();
        (spec, gqas)
    };
    let windows = |gqas: &[GqaSpec]| gqas.iter().map(|gqa| gqa.window).collect::<Vec<_>>();
    let (plain, gqas) = gemma(json!({}));
    assert_eq!((plain.head, plain.embed_scale, plain.logit_soft_cap), (Head::Tied, 8.0, Some(30.0)));
    assert_eq!(windows(&gqas), [Some(4096), None, Some(4096)]);
    assert_eq!((gqas[0].softmax_scale, gqas[0].soft_cap), (0.0625, Some(50.0)));
    let Ffn::Dense(ffn) = &plain.layers[0].ffn else { panic!("it is dense") };
    assert_eq!(ffn.activation, Activation::GeluTanh);
    let (other, gqas) = gemma(json!({
        "attn_logit_softcapping": null, "final_logit_softcapping": null, "query_pre_attn_scalar": 144,
        "tie_word_embeddings": false, "sliding_window": 8,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    }));
    assert_eq!((other.head, other.logit_soft_cap), (Head::Own, None));
    assert_eq!(windows(&gqas), [None, None, Some(8)]);
    assert_eq!((gqas[0].softmax_scale, gqas[0].soft_cap), (1.0 / 12.0, None));
    let bidirectional = json!({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": true});
    assert!(error(&bidirectional).contains("only causal attention"));
}

#[test]
fn bad_values_are_refused_by_name() {
    let cases = [
        (
            json!({"num_attention_heads": 0}),
            "field `num_attention_heads` is 0: must be an integer between 1 and",
        ),
        (json!({"num_key_value_heads": 0}), "field `num_key_value_heads` is 0"),
        (
            json!({"num_key_value_heads": 3}),
            "field `num_key_value_heads` is 3: must divide num_attention_heads = 4",
        ),
        (json!({"num_key_value_heads": 8}), "must divide num_attention_heads = 4"),
        (json!({"num_hidden_layers": 0}), "field `num_hidden_layers` is 0"),
        (json!({"num_hidden_layers": 1_000_000_000}), "field `num_hidden_layers` is 1000000000"),
        (json!({"hidden_size": -64}), "field `hidden_size` is -64"),
        (json!({"hidden_size": 64.5}), "field `hidden_size` is 64.5"),
        (json!({"hidden_size": "64"}), "field `hidden_size` is \"64\""),
        (json!({"hidden_size": u64::MAX}), "field `hidden_size` is 18446744073709551615"),
        (json!({"hidden_size": null}), "field `hidden_size` is null: must be an integer"),
        (json!({"hidden_size": 66, "head_dim": null}), "it must divide hidden_size = 66"),
        (json!({"hidden_size": 60, "head_dim": null}), "even head width, but it is 15"),
        (json!({"head_dim": 63}), "field `head_dim` is 63: rotary positions need an even head width"),
        (json!({"vocab_size": 0}), "field `vocab_size` is 0"),
        (json!({"vocab_size": 1_u64 << 40}), "field `vocab_size` is 1099511627776"),
        (json!({"rms_norm_eps": 0}), "field `rms_norm_eps` is 0"),
        (json!({"rms_norm_eps": "1e-5"}), "field `rms_norm_eps` is \"1e-5\": must be a number"),
        (json!({"rope_theta": -1.0}), "field `rope_theta` is -1"),
        (json!({"tie_word_embeddings": 1}), "field `tie_word_embeddings` is 1: must be true or false"),
        (json!({"hidden_act": "relu6"}), "field `hidden_act` is \"relu6\": supported are silu"),
        (json!({"torch_dtype": "float8_e4m3fn"}), "field `torch_dtype` is \"float8_e4m3fn\": supported are"),
        (json!({"eos_token_id": "2"}), "field `eos_token_id` is \"2\": must be a token id"),
        (json!({"eos_token_id": [2, 1.5]}), "field `eos_token_id` is [2,1.5]"),
        (json!({"architectures": "LlamaForCausalLM"}), "field `architectures`"),
        (json!({"rope_scaling": 4}), "field `rope_scaling` is 4: must be an object"),
        (json!({"rope_scaling": {"type": "linear"}}), "field `rope_scaling.factor` is missing"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0.5}}), "field `rope_scaling.factor` is 0.5"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 1e300}}),
            "field `rope_scaling.factor` is 1e+300",
        ),
        (
            json!({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}),
            "field `rope_parameters.high_freq_factor` is 1: must be greater than low_freq_factor = 4",
        ),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}}),
            "field `rope_scaling.beta_fast` is 1: must be at least beta_slow = 2",
        ),
    ];
    for (changes, expected) in cases {
        let message = error(&changes);
        assert!(message.starts_with("config.json: "), "{message}");
        assert!(message.contains(expected), "{changes}: {message}");
    }
}

#[test]
fn text_that_is_no_config_is_refused() {
    for (text, expected) in [
        ("", "not valid JSON"),
        ("{\"hidden_size\": NaN}", "not valid JSON"),
        ("{\"hidden_size\": 1e999}", "not valid JSON"),
        ("[]", "must be a JSON object, but is a list"),
        ("{}", "neither `architectures` nor `model_type`"),
        (&"[".repeat(100_000), "not valid JSON"),
    ] {
        let message = ModelSpec::from_config_json(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
    let missing = ModelSpec::from_config_json(r#"{"model_type": "llama"}"#).unwrap_err().to_string();
    assert_eq!(
        missing,
        "config.json: field `hidden_size` is missing: must be an integer between 1 and 4194304"
    );
}

#[test]
fn unsupported_features_are_named() {
    let cases = [
        (
            json!({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}),
            "`MixtralForCausalLM` (mixture of",
        ),
        (json!({"architectures": ["Gemma3ForCausalLM"]}), "`Gemma3ForCausalLM` (another Gemma"),
        (json!({"architectures": ["Qwen2MoeForCausalLM"]}), "(mixture of experts)"),
        (json!({"architectures": null, "model_type": "gpt2"}), "model type `gpt2`"),
        (json!({"num_local_experts": 8}), "`num_local_experts`: mixture of experts (MoE) is not"),
        (json!({"n_routed_experts": 64}), "mixture of experts (MoE)"),
        (json!({"kv_lora_rank": 512}), "multi-head latent attention (MLA)"),
        (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "`quantization_config` (gptq)"),
        (json!({"quantization_config": {"quant_method": "fp8"}}), "(fp8)"),
        (
            json!({"auto_map": {"AutoModelForCausalLM": "m.M"}}),
            "`auto_map.AutoModelForCausalLM`: models that bring",
        ),
        (json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` 0.5"),
        (
            json!({"rope_scaling": {"rope_type": "longrope", "factor": 4}}),
            "rope type `longrope` is not supported",
        ),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}),
            "rotary settings that differ by layer type",
        ),
    ];
    for (changes, expected) in cases {
        let message = error(&changes);
        assert!(message.contains(expected), "{changes}: {message}");
        assert!(message.contains("not supported"), "{message}");
    }
    let unknown = error(&json!({"architectures": ["FooForCausalLM"]}));
    assert_eq!(
        unknown,
        "architecture `FooForCausalLM` is not supported; supported are LlamaForCausalLM, MistralForCausalLM, \
         Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, Gemma2ForCausalLM"
    );
    spec(&json!({"auto_map": {"AutoTokenizer": ["t.T", null]}, "num_experts": 0}));
}

#[test]
fn old_and_new_style_mean_the_same() {
    let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}, "torch_dtype": "bfloat16"});
    let settings = json!({"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0});
    let new = json!({"rope_parameters": settings, "dtype": "bfloat16"});
    let nested = json!({"rope_parameters": {"full_attention": settings, "sliding_attention": settings}, "dtype": "bfloat16"});
    assert_eq!(spec(&old), spec(&new));
    assert_eq!(spec(&old), spec(&nested));
    assert_eq!(spec(&old).dtype, DType::BF16);
    assert_eq!(gqa(&old).rope.theta, 5e5);
    assert_eq!(gqa(&json!({})).rope.theta, 1e4);
    assert_eq!(gqa(&json!({"rope_scaling": null, "rope_theta": 2e4})).rope.theta, 2e4);
    assert_eq!(spec(&json!({"architectures": null})), spec(&json!({})));
}

#[test]
fn absent_fields_have_the_defaults_of_transformers() {
    let mha = gqa(&json!({"num_key_value_heads": null, "head_dim": null}));
    assert_eq!((mha.num_kv_heads, mha.head_dim), (4, 16));
    assert_eq!(spec(&json!({"rms_norm_eps": null})).norm_eps, 1e-6);
    assert!(spec(&json!({})).eos_token_ids.is_empty());
    // Out of the vocabulary, or -1 for "none": never generated.
    let ids = spec(&json!({"eos_token_id": [3, 256], "bos_token_id": -1}));
    assert_eq!((ids.eos_token_ids, ids.bos_token_id), (vec![3], None));
    // YaRN without an original length or factor derives each from the other fields.
    let yarn = |settings| match gqa(&json!({"rope_scaling": settings})).rope.scaling {
        RopeScaling::Yarn {
            factor, original_max_position_embeddings: original, attention_factor, ..
        } => (factor, original, attention_factor),
        other => panic!("{other:?}"),
    };
    assert_eq!(yarn(json!({"type": "yarn", "factor": 1.0})), (1.0, 128, 1.0));
    assert_eq!(yarn(json!({"type": "yarn", "original_max_position_embeddings": 32})).0, 4.0);
    let deepseek = yarn(json!({"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}));
    assert_eq!(deepseek.2, 1.0);
}

#[test]
fn windows_of_mistral_and_qwen() {
    let windows = |changes: &Value| -> Vec<_> {
        let layers = spec(changes).layers.into_iter();
        layers
            .map(|layer| {
                let Mixer::Gqa(gqa) = layer.mixer;
                gqa.window
            })
            .collect()
    };
    let mistral = |rest: Value| {
        let mut changes = json!({"architectures": ["MistralForCausalLM"]});
        changes.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        changes
    };
    assert_eq!(windows(&mistral(json!({}))), [Some(4096); 2]);
    assert_eq!(windows(&mistral(json!({"sliding_window": null}))), [None; 2]);
    assert_eq!(windows(&mistral(json!({"sliding_window": 7}))), [Some(7); 2]);
    let mixed =
        error(&mistral(json!({"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]})));
    assert!(mixed.contains("a window in some layers only is not supported in this family"), "{mixed}");

    let qwen = |rest: Value| {
        let mut changes =
            json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1});
        changes.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        changes
    };
    assert_eq!(windows(&qwen(json!({}))), [None; 2]);
    assert_eq!(windows(&qwen(json!({"use_sliding_window": true}))), [None, Some(8)]);
    let types = json!({"use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(windows(&qwen(types)), [Some(8), None]);
    for (types, expected) in [
        (json!(["full_attention"]), "must name all 2 layers, but names 1"),
        (json!(["sliding_attention", "full_attention"]), "no sliding_window is in use"),
        (
            json!(["linear_attention", "full_attention"]),
            "layers of type `linear_attention` are not supported",
        ),
    ] {
        let message = error(&qwen(json!({"layer_types": types})));
        assert!(message.contains(expected), "{message}");
    }
    let zero = error(&qwen(json!({"use_sliding_window": true, "sliding_window": 0})));
    assert!(zero.contains("field `sliding_window` is 0"), "{zero}");
}

#[test]
fn layers_with_experts_and_without() {
    let moe = |rest: Value| {
        let mut changes = json!({"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24});
        changes.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        changes
    };
    let which = |rest: Value| -> Vec<bool> {
        spec(&moe(rest)).layers.iter().map(|layer| matches!(layer.ffn, Ffn::Moe(_))).collect()
    };
    assert_eq!(which(json!({})), [true; 4]);
    assert_eq!(which(json!({"decoder_sparse_step": 2})), [false, true, false, true]);
    assert_eq!(which(json!({"mlp_only_layers": [0, 3]})), [false, true, true, false]);
    let plain = MoeFfn {
        num_experts: 8,
        num_experts_per_tok: 2,
        intermediate_size: 24,
        activation: Activation::Silu,
        norm_topk_prob: false,
    };
    assert_eq!(spec(&moe(json!({}))).layers[0].ffn, Ffn::Moe(plain));
    let renamed = json!({"num_experts": null, "num_local_experts": 8});
    assert_eq!(spec(&moe(renamed)).layers, spec(&moe(json!({}))).layers);
    for (rest, expected) in [
        (
            json!({"num_experts_per_tok": 9}),
            "field `num_experts_per_tok` is 9: must be an integer between 1 and 8",
        ),
        (json!({"num_experts": 513}), "field `num_experts` is 513"),
        (json!({"moe_intermediate_size": null}), "field `moe_intermediate_size` is null"),
        (json!({"norm_topk_prob": "yes"}), "field `norm_topk_prob` is \"yes\""),
        (json!({"decoder_sparse_step": 0}), "field `decoder_sparse_step` is 0"),
        (json!({"mlp_only_layers": [0, -1]}), "field `mlp_only_layers` is [0,-1]: must be a list; each"),
        (json!({"scoring_func": "sigmoid"}), "`scoring_func`: only a softmax over all experts"),
        (json!({"shared_expert_intermediate_size": 64}), "`shared_expert_intermediate_size`: only"),
    ] {
        let message = error(&moe(rest));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn generation_config_is_checked_too() {
    let parsed =
        GenerationConfig::parse(r#"{"eos_token_id": 7, "top_k": 0, "max_new_tokens": 9, "min_p": 0.1}"#)
            .unwrap();
    assert_eq!((parsed.eos_token_ids.as_slice(), parsed.top_k), (&[7][..], Some(0)));
    assert_eq!((parsed.max_new_tokens, parsed.min_p), (Some(9), Some(0.1)));
    for (text, expected) in [
        (
            r#"{"top_p": 1.5}"#,
            "generation_config.json: field `top_p` is 1.5: must be a number between 0 and 1",
        ),
        (r#"{"temperature": -1}"#, "field `temperature` is -1"),
        (r#"{"repetition_penalty": 0}"#, "field `repetition_penalty` is 0"),
        (r#"{"do_sample": "yes"}"#, "field `do_sample` is \"yes\""),
        ("nonsense", "generation_config.json: not valid JSON"),
    ] {
        let message = GenerationConfig::parse(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
