//! Streams: the same answers as whole ones.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Server, Setup, data_of};

/// The joined pieces of each choice: text, token ids, tokens of the log-probabilities, finish and stop reason.
#[derive(Debug, Default, PartialEq)]
struct Joined {
    text: String,
    token_ids: Vec<Value>,
    logprobs: Vec<Value>,
    finish: Option<(Value, Value)>,
}

fn join(events: &[Value], choices: usize, logprobs: fn(&Value) -> &Value) -> Vec<Joined> {
    let mut joined: Vec<Joined> = (0..choices).map(|_| Joined::default()).collect();
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let whole = &mut joined[choice["index"].as_u64().unwrap() as usize];
        assert!(whole.finish.is_none(), "a piece after the last one");
        let text = choice.get("text").or_else(|| choice["delta"].get("content"));
        whole.text.push_str(text.map_or("", |text| text.as_str().unwrap()));
        whole.token_ids.extend(choice["token_ids"].as_array().cloned().unwrap_or_default());
        whole.logprobs.extend(logprobs(choice).as_array().cloned().unwrap_or_default());
        if !choice["finish_reason"].is_null() {
            whole.finish = Some((choice["finish_reason"].clone(), choice["stop_reason"].clone()));
        }
    }
    joined
}

#[tokio::test]
async fn completions_stream_what_they_answer_whole() {
    let server = Server::start(&Setup::default());
    for (at, extra) in [
        json!({}),
        json!({ "n": 3 }),
        json!({ "prompt": ["one", "two and more"], "n": 2 }),
        json!({ "echo": true }),
        json!({ "echo": true, "logprobs": 1, "n": 2 }),
        json!({ "logprobs": 2, "return_token_ids": true }),
        json!({ "stop": ["e", "a"], "return_token_ids": true }),
        json!({ "ignore_eos": false, "max_tokens": 300 }),
    ]
    .iter()
    .enumerate()
    {
        let mut body = json!({ "prompt": "Once", "max_tokens": 30, "seed": 100 + at, "ignore_eos": true });
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        let whole = server.complete(body.clone()).await.ok();
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        let events = server.complete(body).await.events();
        let choices = whole["choices"].as_array().unwrap();
        let joined = join(&events, choices.len(), |choice| &choice["logprobs"]["tokens"]);
        for (choice, joined) in choices.iter().zip(joined) {
            assert_eq!(joined.text, choice["text"], "{extra}");
            assert_eq!(joined.finish, Some((choice["finish_reason"].clone(), choice["stop_reason"].clone())));
            assert_eq!(json!(joined.token_ids), choice.get("token_ids").cloned().unwrap_or(json!([])));
            let tokens = choice["logprobs"].get("tokens").cloned().unwrap_or(json!([]));
            assert_eq!(json!(joined.logprobs), tokens);
        }
        let (last, rest) = events.split_last().unwrap();
        // The second run finds its prompt in the cache.
        assert_eq!(last["usage"]["total_tokens"], whole["usage"]["total_tokens"]);
        assert_eq!(last["choices"], json!([]));
        assert!(rest.iter().all(|event| event["usage"].is_null() && event.get("usage").is_some()));
        assert!(events.iter().all(|event| event["object"] == "text_completion" && event["id"] == last["id"]));
    }
}

#[tokio::test]
async fn chat_streams_a_role_then_text_then_the_end() {
    let server = Server::start(&Setup::default());
    let mut body = json!({ "messages": [{ "role": "user", "content": "Tell \"me\"\n" }], "max_tokens": 40, "seed": 8,
        "ignore_eos": true, "n": 2, "logprobs": true, "return_token_ids": true });
    let whole = server.chat(body.clone()).await.ok();
    body["stream"] = true.into();
    let events = server.chat(body).await.events();
    assert!(
        events.iter().all(|event| event.get("usage").is_none() && event["object"] == "chat.completion.chunk")
    );
    let joined = join(&events, 2, |choice| &choice["logprobs"]["content"]);
    for (index, joined) in joined.iter().enumerate() {
        let choice = &whole["choices"][index];
        assert_eq!(joined.text, choice["message"]["content"]);
        assert_eq!(json!(joined.token_ids), choice["token_ids"]);
        assert_eq!(json!(joined.logprobs), choice["logprobs"]["content"]);
        assert_eq!(joined.finish, Some((json!("length"), Value::Null)));
        let first = events.iter().find(|event| event["choices"][0]["index"] == index).unwrap();
        assert_eq!(first["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
        assert_eq!(first["prompt_token_ids"], whole["prompt_token_ids"]);
    }
    assert_eq!(events.iter().filter(|event| event["choices"][0]["delta"].get("role").is_some()).count(), 2);
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let setup =
        Setup { step: Duration::from_millis(150), keep_alive: Duration::from_millis(20), ..Setup::default() };
    let server = Server::start(&setup);
    let answer =
        server.complete(json!({ "prompt": "x", "max_tokens": 2, "stream": true, "ignore_eos": true })).await;
    let comments = answer.body.split("\n\n").filter(|event| *event == ": keep-alive").count();
    assert!(comments >= 3, "{comments} comments in 300 ms: {:?}", answer.body);
    assert!(!answer.events().is_empty());
}

#[tokio::test]
async fn a_deadline_in_a_stream_is_its_last_event() {
    let server = Server::start(&Setup { step: Duration::from_millis(20), ..Setup::default() });
    let body = json!({ "prompt": "x", "max_tokens": 400, "stream": true, "ignore_eos": true });
    let answer = server.post_with("/v1/completions", &[("x-request-timeout-ms", "1000")], &body).await;
    assert_eq!(answer.status.as_u16(), 200);
    let events = data_of(&answer.body);
    let (last, rest) = events.split_last().unwrap();
    let error: Value = serde_json::from_str(last).unwrap();
    assert_eq!(error["error"]["code"], "deadline_exceeded", "{error}");
    assert!(!rest.is_empty(), "what was there in time was sent");
    server.wait_idle().await;
}

#[tokio::test]
async fn a_failing_engine_ends_streams_with_an_error_and_the_server_is_not_ready() {
    let server =
        Server::start(&Setup { fails_at: Some(5), step: Duration::from_millis(20), ..Setup::default() });
    let body = json!({ "prompt": "x", "max_tokens": 40, "stream": true, "ignore_eos": true });
    let answer = server.complete(body.clone()).await;
    let events = data_of(&answer.body);
    let error: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(error["error"]["type"], "server_error", "{error}");
    assert!(!answer.body.contains("on purpose"), "what the device said is not for clients");
    let next = server.complete(body).await;
    assert_eq!(next.status.as_u16(), 503);
    assert_eq!(server.get("/health/ready").await.status.as_u16(), 503);
    assert_eq!(server.get("/health/live").await.json(), json!({ "status": "dead" }));
}
