//! The default model `quire-demo`, compiled into the program: `quire serve` without arguments serves it.
//!
//! It is a demo of 3.7 million parameters in the shape of Qwen3, trained on text that `recipe/` generates. Its card is
//! `model/README.md`. The statics below are the files of `model/`, byte for byte, in the layout of a Hugging Face
//! checkpoint.
//!
//! Invariant: [`WEIGHTS`] starts at a multiple of [`ALIGNMENT`] bytes, and so does each tensor's data inside it, so that
//! tensors can be viewed in place.
#![forbid(unsafe_code)]

/// The name under which the model is served.
pub const NAME: &str = "quire-demo";

/// `config.json`: architecture and sizes.
pub const CONFIG_JSON: &str = include_str!("../model/config.json");

/// `generation_config.json`: end-of-sequence ids and sampling defaults.
pub const GENERATION_CONFIG_JSON: &str = include_str!("../model/generation_config.json");

/// `tokenizer.json`: byte-level BPE with 2048 tokens.
pub const TOKENIZER_JSON: &str = include_str!("../model/tokenizer.json");

/// `tokenizer_config.json`: special tokens and the chat template.
pub const TOKENIZER_CONFIG_JSON: &str = include_str!("../model/tokenizer_config.json");

/// `model.safetensors`: the weights in bf16.
pub static WEIGHTS: &[u8] = &FILE.0;

/// What an independent implementation (transformers, float32 arithmetic) computes with this model: prompts with their
/// token ids, greedy continuations with the margin of each step, and the log probability of a held-out text.
/// Meant for tests; `recipe/reference.py` describes the fields.
pub const REFERENCE_JSON: &str = include_str!("../reference.json");

/// Alignment in bytes of the start of [`WEIGHTS`] and of every tensor in it.
pub const ALIGNMENT: usize = 64;

/// `include_bytes!` promises no alignment; a wrapper with its own alignment does.
#[repr(align(64))]
struct Aligned<T: ?Sized>(T);

static FILE: Aligned<[u8; include_bytes!("../model/model.safetensors").len()]> =
    Aligned(*include_bytes!("../model/model.safetensors"));

#[cfg(test)]
mod tests {
    use super::*;

    /// (header length in bytes, header text)
    fn header() -> (usize, &'static str) {
        let length = u64::from_le_bytes(WEIGHTS[..8].try_into().unwrap()) as usize;
        (length, std::str::from_utf8(&WEIGHTS[8..8 + length]).unwrap())
    }

    /// Every `"data_offsets":[begin,end]` of the header, in order of appearance.
    fn offsets(header: &str) -> Vec<(usize, usize)> {
        let found = header.split("\"data_offsets\":[").skip(1);
        let numbers = found.map(|rest| rest.split_once(']').unwrap().0.split_once(',').unwrap());
        numbers.map(|(begin, end)| (begin.parse().unwrap(), end.parse().unwrap())).collect()
    }

    #[test]
    fn weights_are_a_complete_safetensors_file() {
        let (length, text) = header();
        assert!(text.starts_with('{') && text.trim_end().ends_with('}'), "header is not a JSON object");
        assert!(text.contains("\"model.embed_tokens.weight\""));
        assert!(text.contains("\"model.layers.3.mlp.down_proj.weight\""));
        assert!(!text.contains("\"F32\""), "all weights are bf16");
        let mut spans = offsets(text);
        spans.sort_unstable();
        let mut expected = 0;
        for &(begin, end) in &spans {
            assert_eq!(begin, expected, "tensors leave no gap");
            expected = end;
        }
        assert_eq!(8 + length + expected, WEIGHTS.len());
    }

    #[test]
    fn tensors_are_aligned() {
        assert_eq!(WEIGHTS.as_ptr() as usize % ALIGNMENT, 0);
        let (length, text) = header();
        assert_eq!((8 + length) % ALIGNMENT, 0, "data starts at {}", 8 + length);
        assert!(offsets(text).iter().all(|(begin, _)| begin % ALIGNMENT == 0));
    }

    #[test]
    fn everything_together_is_small() {
        let text = CONFIG_JSON.len()
            + GENERATION_CONFIG_JSON.len()
            + TOKENIZER_JSON.len()
            + TOKENIZER_CONFIG_JSON.len();
        let total = text + WEIGHTS.len() + REFERENCE_JSON.len();
        assert!(total <= 12 * 1024 * 1024, "{total} bytes");
    }
}
