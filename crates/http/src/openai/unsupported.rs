//! Parameters that are known and not honoured: refused where they would change an answer, accepted where they never do.

use serde_json::Value;

use crate::fields::Unsupported;

/// Fields that never change an answer.
pub(crate) const IGNORED: &[&str] = &[
    "user",
    "metadata",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_retention",
    "request_id",
];

const fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

fn is_true(value: &Value) -> bool {
    value == &Value::Bool(true)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn is_text_format(value: &Value) -> bool {
    value.get("type").is_some_and(|kind| kind == "text")
        && value.as_object().is_some_and(|map| map.len() == 1)
}

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(|item| item == "text"))
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_none(value: &Value) -> bool {
    value == "none"
}

fn is_automatic(value: &Value) -> bool {
    value == "none" || value == "auto"
}

const fn field(name: &'static str, feature: &'static str, harmless: fn(&Value) -> bool) -> Unsupported {
    Unsupported { name, feature, harmless }
}

/// Fields of either route.
pub(crate) const UNSUPPORTED: &[Unsupported] = &[
    field("tools", "tool calls are", is_empty),
    field("functions", "tool calls are", is_empty),
    field("tool_choice", "tool calls are", is_automatic),
    field("function_call", "tool calls are", is_automatic),
    field("response_format", "structured output is", is_text_format),
    field("structured_outputs", "structured output is", is_empty),
    field("guided_json", "structured output is", never),
    field("guided_regex", "structured output is", never),
    field("guided_choice", "structured output is", never),
    field("guided_grammar", "structured output is", never),
    field("guided_decoding_backend", "structured output is", never),
    field("guided_whitespace_pattern", "structured output is", never),
    field("structural_tag", "structured output is", never),
    field("grammar", "structured output is", never),
    field("json_schema", "structured output is", never),
    field("audio", "audio is", never),
    field("modalities", "output other than text is", is_text_only),
    field("prediction", "predicted output is", never),
    field("web_search_options", "web search is", never),
    field("reasoning_effort", "reasoning effort is", is_none),
    field("reasoning", "reasoning control is", never),
    field("include_reasoning", "separate reasoning output is", is_false),
    field("thinking_token_budget", "a thinking budget is", never),
    field("verbosity", "verbosity is", never),
    field("store", "storing of answers is", is_false),
    field("suffix", "insertion before a suffix is", is_empty),
    field("lora_name", "choosing a LoRA adapter other than by `model` is", never),
    field("lora_path", "choosing a LoRA adapter other than by `model` is", never),
    field("lora_request", "choosing a LoRA adapter other than by `model` is", never),
    field("logits_processors", "logit processors are", is_empty),
    field("custom_logit_processor", "logit processors are", never),
    field("use_beam_search", "beam search is", is_false),
    field("length_penalty", "beam search is", is_one),
    field("early_stopping", "beam search is", is_false),
    field("bad_words", "`bad_words` is", is_empty),
    field("allowed_token_ids", "`allowed_token_ids` is", is_empty),
    field("logprob_token_ids", "`logprob_token_ids` is", is_empty),
    field("stop_regex", "`stop_regex` is", is_empty),
    field("typical_p", "typical sampling is", is_one),
    field("truncate_prompt_tokens", "prompt truncation is", never),
    field("truncation_side", "prompt truncation is", never),
    field("spaces_between_special_tokens", "joining special tokens without spaces is", is_true),
    field("return_tokens_as_token_ids", "`return_tokens_as_token_ids` is", is_false),
    field("repetition_detection", "repetition detection is", never),
    field("watermarking", "watermarking is", never),
    field("prompt_embeds", "prompt embeddings are", never),
    field("documents", "documents in the template are", is_empty),
    field("chat_template", "a template in the request is", never),
    field("mm_processor_kwargs", "multimodal input is", is_empty),
    field("media_io_kwargs", "multimodal input is", is_empty),
    field("kv_transfer_params", "KV transfer is", never),
    field("vllm_xargs", "`vllm_xargs` is", is_empty),
    field("background", "background processing is", is_false),
    field("moderation", "moderation is", never),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_is_in_two_lists() {
        let mut seen = std::collections::HashSet::new();
        for name in UNSUPPORTED.iter().map(|field| field.name).chain(IGNORED.iter().copied()) {
            assert!(seen.insert(name), "{name} twice");
        }
    }
}
