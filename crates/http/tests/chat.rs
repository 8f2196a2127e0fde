//! `/v1/chat/completions`, whole.

use serde_json::{Value, json};

use crate::harness::{MODEL, Server, Setup};

fn hello() -> Value {
    json!({ "model": MODEL, "messages": [{ "role": "user", "content": "Hello" }], "max_tokens": 6, "seed": 4, "ignore_eos": true })
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let server = Server::start(&Setup::default());
    let mut json = server.chat(hello()).await.ok();
    let id = json["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("chatcmpl-") && id.len() == "chatcmpl-".len() + 32, "{id}");
    assert!(!json["choices"][0]["message"]["content"].as_str().unwrap().is_empty());
    json["id"] = "".into();
    json["created"] = 0.into();
    json["choices"][0]["message"]["content"] = "".into();
    let prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
    let prompt_tokens = server.llm.tokenizer().encode(prompt, false).unwrap().len();
    let expected = json!({
        "id": "", "object": "chat.completion", "created": 0, "model": MODEL,
        "choices": [{
            "index": 0, "message": { "role": "assistant", "content": "", "refusal": null },
            "logprobs": null, "finish_reason": "length", "stop_reason": null,
        }],
        "usage": {
            "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + 6, "completion_tokens": 6,
            "prompt_tokens_details": { "cached_tokens": 0 },
        },
        "system_fingerprint": "quire-1.2.3",
    });
    assert_eq!(json, expected);
}

#[tokio::test]
async fn logprobs_have_chats_own_shape() {
    let server = Server::start(&Setup::default());
    let mut body = hello();
    body["logprobs"] = true.into();
    body["return_token_ids"] = true.into();
    let none = server.chat(body.clone()).await.ok();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    body["top_logprobs"] = 3.into();
    body["prompt_logprobs"] = 0.into();
    let answer = server.chat(body).await.ok();
    let choice = &answer["choices"][0];
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!((content.len(), choice["token_ids"].as_array().unwrap().len()), (6, 6));
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(String::from_utf8_lossy(&bytes), choice["message"]["content"].as_str().unwrap());
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(answer["prompt_token_ids"].as_array().unwrap().len(), prompt_tokens);
    assert_eq!(answer["prompt_logprobs"].as_array().unwrap().len(), prompt_tokens);
}

#[tokio::test]
async fn the_template_gets_what_the_client_says() {
    let server = Server::start(&Setup::default());
    let prompt = async |body: Value| {
        let tokens = server.post("/tokenize", &body).await.ok();
        let text = server.post("/detokenize", &json!({ "tokens": tokens["tokens"] })).await.ok();
        text["prompt"].as_str().unwrap().to_owned()
    };
    let messages = json!([
        { "role": "developer", "content": "be brief" },
        { "role": "user", "content": [{ "type": "text", "text": "one" }, { "type": "text", "text": "two" }] },
        { "role": "assistant", "content": "The answer" },
    ]);
    let start = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\nThe answer";
    assert_eq!(
        prompt(json!({ "messages": messages })).await,
        format!("{start}<|im_end|>\n<|im_start|>assistant\n")
    );
    assert_eq!(
        prompt(json!({ "messages": messages, "add_generation_prompt": false })).await,
        format!("{start}<|im_end|>\n")
    );
    assert_eq!(prompt(json!({ "messages": messages, "continue_final_message": true })).await, start);
    let both = json!({ "messages": messages, "continue_final_message": true, "add_generation_prompt": true });
    let both = server.post("/tokenize", &both).await;
    assert_eq!(
        (both.status.as_u16(), &both.json()["error"]["param"]),
        (400, &json!("continue_final_message"))
    );
}

#[tokio::test]
async fn what_never_changes_an_answer_is_accepted() {
    let server = Server::start(&Setup::default());
    let plain = server.chat(hello()).await.ok();
    let mut body = hello();
    let extras = json!({
        "user": "u", "metadata": { "a": "b" }, "service_tier": "auto", "store": false, "parallel_tool_calls": true,
        "tools": [], "tool_choice": "none", "response_format": { "type": "text" }, "modalities": ["text"],
        "logit_bias": {}, "stop": null, "n": 1, "top_k": -1, "stream": false, "logprobs": false, "best_of": 1,
        "suffix": null, "audio": null, "priority": 3, "top_logprobs": 0, "safety_identifier": "x",
    });
    for (name, value) in extras.as_object().unwrap() {
        body[name] = value.clone();
    }
    let same = server.chat(body.clone()).await.ok();
    assert_eq!(same["choices"], plain["choices"]);
    body["tools"] = json!([{ "type": "function", "function": { "name": "f" } }]);
    assert_eq!(server.chat(body).await.ok()["choices"], plain["choices"], "tools that may not be called");
}
