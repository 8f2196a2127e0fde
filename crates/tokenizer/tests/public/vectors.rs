//! Token ids against llama.cpp's test vectors and the models' own references.

use std::path::Path;

use quire_core::TokenId;
use quire_tokenizer::Tokenizer;

use crate::shared::{path, tokenizer, vector_texts};

/// Compares all 47 vectors. They were written without BOS, `[CLS]` and `[SEP]`: no special tokens are added.
fn check_vectors(tokenizer: &Tokenizer, vectors: &str) {
    let (Some(texts), Some(file)) =
        (vector_texts(), path(&format!("vocab-gguf/ggml-vocab-{vectors}.gguf.out")))
    else {
        return;
    };
    let output = std::fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = output.split('\n').collect();
    assert_eq!(lines.len(), texts.len(), "{vectors}: one line of ids per text");
    let mut equal = 0;
    for (text, line) in texts.iter().zip(lines) {
        let expected: Vec<TokenId> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let ids = tokenizer.encode(text, false).unwrap();
        if ids == expected {
            equal += 1;
        } else {
            println!("{vectors}: {text:?}\n  want {expected:?}\n  have {ids:?}");
        }
    }
    println!("{vectors}: {equal} of {} vectors equal", texts.len());
    assert_eq!(equal, texts.len(), "{vectors}");
}

macro_rules! vectors {
    ($($name:ident: $tokenizer:literal, $vectors:literal;)*) => {$(
        #[test]
        fn $name() {
            if let Some(tokenizer) = tokenizer($tokenizer) {
                check_vectors(&tokenizer, $vectors);
            }
        }
    )*};
}

vectors! {
    gpt2: "tokenizers/gpt2", "gpt-2";
    falcon: "tokenizers/falcon", "falcon";
    llama2: "tokenizers/llama2", "llama-spm";
    qwen2_5: "tokenizers/qwen2.5", "qwen2";
    llama3: "tokenizers/llama3", "llama-bpe";
    bert: "tokenizers/bert", "bert-bge";
}

/// A copy of one vocabulary file alone in a directory of its own.
fn directory_with(name: &str, from: &Path, as_name: &str) -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("quire-tokenizer-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::copy(from, dir.join(as_name)).unwrap();
    dir
}

#[test]
fn llama2_from_its_sentencepiece_model() {
    let Some(model) = path("tokenizers/llama2/tokenizer.model") else { return };
    let dir = directory_with("llama2", &model, "tokenizer.model");
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    check_vectors(&tokenizer, "llama-spm");
    assert_eq!(tokenizer.encode("Hello", true).unwrap(), [1, 15043]);
    assert_eq!(tokenizer.encode("</s>", false).unwrap(), [2]);
    assert_eq!(tokenizer.token_bytes(13), Some(&b"\n"[..]));
}

/// The expected ids are sentencepiece's own (Python package 0.2, `encode_as_ids`) for these files.
#[test]
fn mistral_sentencepiece_models() {
    const TEXT: &str = "Hello, world!  Ünïcode 世界 🙂\n\tdef f(x): return x**2  # 3.14159";
    for (file, expected) in MISTRAL {
        let Some(model) = path(&format!("tokenizers/mistral/{file}")) else { return };
        let dir = directory_with(file, &model, "tokenizer.model");
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(tokenizer.encode(TEXT, false).unwrap(), *expected, "{file}");
        assert_eq!(tokenizer.decode(expected, true), TEXT, "{file}");
    }
}

const MISTRAL: &[(&str, &[TokenId])] = &[
    (
        "tokenizer.model.v1",
        &[
            22557, 28725, 1526, 28808, 28705, 13156, 28711, 28920, 1409, 28705, 30050, 29822, 28705, 29340,
            13, 12, 1270, 285, 28732, 28744, 1329, 604, 1318, 348, 28750, 28705, 422, 28705, 28770, 28723,
            28740, 28781, 28740, 28782, 28774,
        ],
    ),
    (
        "mistral_instruct_tokenizer_240323.model.v3",
        &[
            23325, 29493, 2294, 29576, 29473, 13924, 29479, 29688, 2177, 29473, 30818, 30590, 29473, 30108,
            781, 780, 2038, 1053, 29500, 29512, 2097, 1372, 2086, 1116, 29518, 29473, 1190, 29473, 29538,
            29491, 29508, 29549, 29508, 29550, 29542,
        ],
    ),
    (
        "mistral_instruct_tokenizer_241114.model.v7",
        &[
            23325, 29493, 2294, 29576, 29473, 13924, 29479, 29688, 2177, 29473, 30818, 30590, 29473, 30108,
            781, 780, 2038, 1053, 29500, 29512, 2097, 1372, 2086, 1116, 29518, 29473, 1190, 29473, 29538,
            29491, 29508, 29549, 29508, 29550, 29542,
        ],
    ),
];

#[test]
fn reference_prompts_of_the_small_models() {
    for model in ["models/stories260k", "models/tinystories-656k"] {
        let (Some(tokenizer), Some(file)) = (tokenizer(model), path(&format!("{model}/reference.json")))
        else {
            return;
        };
        let reference: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let prompts = reference["cases"].as_array().unwrap();
        assert_eq!(prompts.len(), 8);
        for prompt in prompts {
            let text = prompt["prompt"].as_str().unwrap();
            let expected: Vec<TokenId> = prompt["prompt_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|id| id.as_u64().unwrap() as TokenId)
                .collect();
            assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{model}: {text:?}");
            assert_eq!(tokenizer.decode(&expected, true), text, "{model}");
        }
    }
}

#[test]
fn special_tokens_and_their_ids() {
    if let Some(tiny) = tokenizer("models/tinystories-656k") {
        assert_eq!((tiny.bos_token(), tiny.bos_token_id()), (Some("<|start_story|>"), Some(1)));
        assert_eq!((tiny.eos_token(), tiny.eos_token_ids()), (Some("<|end_story|>"), &[2][..]));
        assert_eq!(tiny.vocab_size(), 2048);
        assert!(tiny.is_special(0) && tiny.is_special(2) && !tiny.is_special(3) && !tiny.is_special(99_999));
    }
    if let Some(qwen) = tokenizer("tokenizers/qwen2.5") {
        assert_eq!((qwen.eos_token(), qwen.eos_token_id()), (Some("<|im_end|>"), Some(151_645)));
        assert_eq!((qwen.bos_token(), qwen.bos_token_id()), (None, None));
        assert_eq!(qwen.token_to_id("<|im_start|>"), Some(151_644));
        assert_eq!(qwen.encode("<|im_start|>user", false).unwrap(), [151_644, 872]);
    }
    if let Some(llama3) = tokenizer("tokenizers/llama3") {
        assert_eq!(llama3.vocab_size(), 128_256);
        assert_eq!(llama3.encode("Hi<|eot_id|>", true).unwrap(), [128_000, 13_347, 128_009]);
    }
    if let Some(bert) = tokenizer("tokenizers/bert") {
        assert_eq!(bert.encode("Hello WORLD", true).unwrap(), [101, 7592, 2088, 102]);
        assert_eq!(bert.decode(&[101, 7592, 2088, 999, 102], true), "hello world!");
    }
}
