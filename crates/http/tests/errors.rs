//! Every way to be wrong, and that the server goes on serving.

use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use crate::harness::{Server, Setup, ask, eventually};

/// `(body, param)`: each a 400.
const BAD_COMPLETIONS: &[(&str, &str)] = &[
    (r#"{"prompt": ""}"#, "prompt"),
    (r#"{"prompt": []}"#, "prompt"),
    (r#"{}"#, "prompt"),
    (r#"{"prompt": [1, 2048]}"#, "prompt"),
    (r#"{"prompt": [1, -1]}"#, "prompt[1]"),
    (r#"{"prompt": [[1], [4294967295]]}"#, "prompt[1]"),
    (r#"{"prompt": {"text": "x"}}"#, "prompt"),
    (r#"{"prompt": "x", "model": 5}"#, "model"),
    (r#"{"prompt": "x", "temperature": "hot"}"#, "temperature"),
    (r#"{"prompt": "x", "temperature": -0.1}"#, "temperature"),
    (r#"{"prompt": "x", "temperature": 1e300}"#, "temperature"),
    (r#"{"prompt": "x", "top_p": 0}"#, "top_p"),
    (r#"{"prompt": "x", "top_p": 1.5}"#, "top_p"),
    (r#"{"prompt": "x", "top_k": -2}"#, "top_k"),
    (r#"{"prompt": "x", "top_k": 5000}"#, "top_k"),
    (r#"{"prompt": "x", "min_p": 2}"#, "min_p"),
    (r#"{"prompt": "x", "seed": 1.5}"#, "seed"),
    (r#"{"prompt": "x", "presence_penalty": 3}"#, "presence_penalty"),
    (r#"{"prompt": "x", "frequency_penalty": -3}"#, "frequency_penalty"),
    (r#"{"prompt": "x", "repetition_penalty": 0}"#, "repetition_penalty"),
    (r#"{"prompt": "x", "stop": 5}"#, "stop"),
    (r#"{"prompt": "x", "stop": [""]}"#, "stop"),
    (
        r#"{"prompt": "x", "stop": ["a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a","a"]}"#,
        "stop",
    ),
    (r#"{"prompt": "x", "stop_token_ids": [2048]}"#, "stop_token_ids"),
    (r#"{"prompt": "x", "stop_token_ids": "x"}"#, "stop_token_ids"),
    (r#"{"prompt": "x", "min_tokens": 9, "max_tokens": 8}"#, "min_tokens"),
    (r#"{"prompt": "x", "max_tokens": 0}"#, "max_tokens"),
    (r#"{"prompt": "x", "max_tokens": -1}"#, "max_tokens"),
    (r#"{"prompt": "x", "max_tokens": 1.5}"#, "max_tokens"),
    (r#"{"prompt": "x", "max_tokens": 4, "max_completion_tokens": 5}"#, "max_completion_tokens"),
    (r#"{"prompt": "x", "n": 0}"#, "n"),
    (r#"{"prompt": "x", "n": 2147483648}"#, "n"),
    (r#"{"prompt": "x", "best_of": 3}"#, "best_of"),
    (r#"{"prompt": "x", "logit_bias": {"2048": 1}}"#, "logit_bias"),
    (r#"{"prompt": "x", "logit_bias": {"5": 101}}"#, "logit_bias"),
    (r#"{"prompt": "x", "logit_bias": {"five": 1}}"#, "logit_bias"),
    (r#"{"prompt": "x", "logprobs": 21}"#, "logprobs"),
    (r#"{"prompt": "x", "logprobs": true}"#, "logprobs"),
    (r#"{"prompt": "x", "prompt_logprobs": -1}"#, "prompt_logprobs"),
    (r#"{"prompt": "x", "prompt_logprobs": 1, "stream": true}"#, "prompt_logprobs"),
    (r#"{"prompt": "x", "priority": 300}"#, "priority"),
    (r#"{"prompt": "x", "stream": "yes"}"#, "stream"),
    (r#"{"prompt": "x", "stream_options": {"include_usage": true}}"#, "stream_options"),
    (r#"{"prompt": "x", "stream": true, "stream_options": {"colour": 1}}"#, "stream_options.colour"),
    (r#"{"prompt": "x", "stream": true, "stream_options": []}"#, "stream_options"),
    (r#"{"prompt": "x", "suffix": "y"}"#, "suffix"),
    (r#"{"prompt": "x", "guided_json": {}}"#, "guided_json"),
    (r#"{"prompt": "x", "use_beam_search": true}"#, "use_beam_search"),
    (r#"{"prompt": "x", "colour": "blue"}"#, "colour"),
];

const BAD_CHATS: &[(&str, &str)] = &[
    (r#"{}"#, "messages"),
    (r#"{"messages": []}"#, "messages"),
    (r#"{"messages": [{"role": "wizard", "content": "x"}]}"#, "messages[0].role"),
    (
        r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}"#,
        "messages[0].content[0].type",
    ),
    (r#"{"messages": M, "tools": [{"type": "function"}]}"#, "tools"),
    (r#"{"messages": M, "tool_choice": "required"}"#, "tool_choice"),
    (r#"{"messages": M, "functions": [{}]}"#, "functions"),
    (r#"{"messages": M, "response_format": {"type": "json_object"}}"#, "response_format"),
    (r#"{"messages": M, "modalities": ["text", "audio"]}"#, "modalities"),
    (r#"{"messages": M, "audio": {"voice": "x"}}"#, "audio"),
    (r#"{"messages": M, "prediction": {"type": "content"}}"#, "prediction"),
    (r#"{"messages": M, "web_search_options": {}}"#, "web_search_options"),
    (r#"{"messages": M, "reasoning_effort": "high"}"#, "reasoning_effort"),
    (r#"{"messages": M, "store": true}"#, "store"),
    (r#"{"messages": M, "logprobs": true, "top_logprobs": 21}"#, "top_logprobs"),
    (r#"{"messages": M, "top_logprobs": 2}"#, "top_logprobs"),
    (r#"{"messages": M, "logprobs": 2}"#, "logprobs"),
    (r#"{"messages": M, "echo": true}"#, "echo"),
    (r#"{"messages": M, "chat_template": "x"}"#, "chat_template"),
    (r#"{"messages": M, "chat_template_kwargs": {"messages": []}}"#, "chat_template_kwargs"),
    (r#"{"messages": M, "chat_template_kwargs": 5}"#, "chat_template_kwargs"),
    (r#"{"messages": M, "lora_path": "x"}"#, "lora_path"),
    (r#"{"messages": M, "prompt": "x"}"#, "prompt"),
];

async fn refused(server: &Server, path: &str, body: &str, status: u16) -> Value {
    let headers = [("content-type", "application/json")];
    let answer = ask(&server.app, Method::POST, path, &headers, body).await;
    assert_eq!(answer.status.as_u16(), status, "{body}: {}", answer.body);
    assert_eq!(answer.headers["content-type"], "application/json");
    assert!(answer.headers.contains_key("x-request-id"));
    let error = answer.json()["error"].clone();
    assert_eq!(error.as_object().unwrap().keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
    error
}

#[tokio::test]
async fn wrong_fields_are_named_and_the_server_goes_on() {
    let server = Server::start(&Setup::default());
    for (body, param) in BAD_COMPLETIONS {
        let error = refused(&server, "/v1/completions", body, 400).await;
        assert_eq!(error["param"], *param, "{body}: {error}");
        assert!(error["message"].as_str().unwrap().contains(param), "{body}: {error}");
    }
    for (body, param) in BAD_CHATS {
        let body = body.replace('M', r#"[{"role": "user", "content": "x"}]"#);
        let error = refused(&server, "/v1/chat/completions", &body, 400).await;
        assert_eq!(error["param"], *param, "{body}: {error}");
    }
    for (path, body, param) in [
        ("/tokenize", "{}", "messages"),
        ("/tokenize", r#"{"prompt": 5}"#, "prompt"),
        ("/tokenize", r#"{"prompt": "x", "colour": 1}"#, "colour"),
        ("/detokenize", "{}", "tokens"),
        ("/detokenize", r#"{"tokens": [2048]}"#, "tokens"),
        ("/detokenize", r#"{"tokens": ["x"]}"#, "tokens[0]"),
    ] {
        assert_eq!(refused(&server, path, body, 400).await["param"], param, "{path} {body}");
    }
    server.complete(json!({ "prompt": "x", "max_tokens": 2 })).await.ok();
    server.wait_idle().await;
}

#[tokio::test]
async fn bodies_that_are_no_requests() {
    let server = Server::start(&Setup::default());
    for body in
        ["", "{", "[]", "5", r#"{"prompt": "x", "temperature": NaN}"#, r#"{"prompt": "x", "n": 1e999}"#]
    {
        let error = refused(&server, "/v1/completions", body, 400).await;
        assert_eq!(error["type"], "invalid_request_error", "{body}");
    }
    let large = format!(r#"{{"prompt": "{}"}}"#, "x".repeat(9 << 20));
    assert_eq!(refused(&server, "/v1/completions", &large, 413).await["code"], "request_too_large");
    for content_type in [None, Some("text/plain"), Some("application/x-www-form-urlencoded")] {
        let headers: Vec<_> = content_type.map(|value| ("content-type", value)).into_iter().collect();
        let answer = ask(&server.app, Method::POST, "/v1/completions", &headers, "{}").await;
        assert_eq!(answer.status.as_u16(), 415);
        assert_eq!(answer.json()["error"]["code"], "unsupported_media_type");
    }
    let headers = [("content-type", "application/json; charset=utf-8")];
    let body = r#"{"prompt": "x", "max_tokens": 1}"#;
    ask(&server.app, Method::POST, "/v1/completions", &headers, body).await.ok();
}

#[tokio::test]
async fn unknown_models_paths_and_methods() {
    let server = Server::start(&Setup::default());
    let error = refused(&server, "/v1/completions", r#"{"model": "gpt-9", "prompt": "x"}"#, 404).await;
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    assert_eq!(refused(&server, "/v1/nothing", "{}", 404).await["code"], "unknown_url");
    for (path, feature) in
        [("/v1/embeddings", "embeddings"), ("/v1/messages", "Anthropic"), ("/api/chat", "Ollama")]
    {
        let error = refused(&server, path, "{}", 404).await;
        assert!(error["message"].as_str().unwrap().contains(feature), "{error}");
    }
    for (method, path) in [
        (Method::GET, "/v1/chat/completions"),
        (Method::DELETE, "/v1/models"),
        (Method::PUT, "/health/live"),
        (Method::POST, "/metrics"),
    ] {
        let answer = ask(&server.app, method.clone(), path, &[], "").await;
        assert_eq!(answer.status.as_u16(), 405, "{method} {path}");
        assert_eq!(answer.json()["error"]["code"], "method_not_allowed");
        assert!(answer.headers.contains_key("allow"));
    }
}

#[tokio::test]
async fn a_prompt_longer_than_the_context() {
    let server = Server::start(&Setup::default());
    let prompt: Vec<u32> = vec![5; 512];
    for body in [
        json!({ "prompt": prompt }),
        json!({ "prompt": [5, 6], "max_tokens": 511 }),
        json!({ "prompt": "word ".repeat(100_000) }),
    ] {
        let error = refused(&server, "/v1/completions", &body.to_string(), 400).await;
        assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("prompt")));
    }
    let chat = json!({ "messages": [{ "role": "user", "content": "word ".repeat(1000) }] });
    let error = refused(&server, "/v1/chat/completions", &chat.to_string(), 400).await;
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("messages")));
}

#[tokio::test]
async fn a_full_queue_is_429_with_a_time_to_come_back() {
    let setup = Setup {
        step: Duration::from_millis(20),
        max_num_seqs: 1,
        max_queued_requests: 1,
        ..Setup::default()
    };
    let server = Server::start(&setup);
    let long = json!({ "prompt": "x", "max_tokens": 500, "ignore_eos": true });
    let held: Vec<_> = (0..2)
        .map(|_| {
            let (app, body) = (server.app.clone(), long.to_string());
            tokio::spawn(async move {
                let headers = [("content-type", "application/json")];
                ask(&app, Method::POST, "/v1/completions", &headers, &body).await
            })
        })
        .collect();
    eventually("both are in", || {
        let snapshot = server.llm.engine().snapshot();
        snapshot.num_running + snapshot.num_waiting == 2
    })
    .await;
    let answer = server.complete(long).await;
    assert_eq!(answer.status.as_u16(), 429, "{}", answer.body);
    assert_eq!(answer.json()["error"]["code"], "rate_limit_exceeded");
    assert!(answer.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    // Without a socket a client goes away by dropping its request.
    held.iter().for_each(tokio::task::JoinHandle::abort);
    server.wait_idle().await;
    server.complete(json!({ "prompt": "x", "max_tokens": 1 })).await.ok();
}

#[tokio::test]
async fn a_deadline_is_504_and_frees_the_engine() {
    let server = Server::start(&Setup { step: Duration::from_millis(20), ..Setup::default() });
    let body = json!({ "prompt": "x", "max_tokens": 400, "ignore_eos": true });
    let answer = server.post_with("/v1/completions", &[("x-request-timeout-ms", "100")], &body).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["code"]), (504, &json!("deadline_exceeded")));
    server.wait_idle().await;
    for bad in ["0", "soon", "-5"] {
        let answer = server.post_with("/v1/completions", &[("x-request-timeout-ms", bad)], &body).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["param"]),
            (400, &json!("x-request-timeout-ms"))
        );
    }
}

#[tokio::test]
async fn a_failing_engine_is_500() {
    // Not so fast that the engine is dead before the request is all in: that would be a 503.
    let setup = Setup { fails_at: Some(3), step: Duration::from_millis(20), ..Setup::default() };
    let server = Server::start(&setup);
    let body = json!({ "prompt": "x", "max_tokens": 40, "ignore_eos": true });
    let answer = server.complete(body).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["type"]), (500, &json!("server_error")));
}
