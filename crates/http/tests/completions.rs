//! `/v1/completions`, whole.

use serde_json::{Value, json};

use crate::harness::{MAX_MODEL_LEN, MODEL, Server, Setup};

fn server() -> Server {
    Server::start(&Setup::default())
}

fn text(answer: &Value, choice: usize) -> &str {
    answer["choices"][choice]["text"].as_str().unwrap()
}

#[tokio::test]
async fn an_answer_has_openais_shape() {
    let server = server();
    let headers = [("x-request-id", "abc.DEF-1_2")];
    let body = json!({ "model": "org/alias", "prompt": "Hello there", "max_tokens": 5, "seed": 1, "ignore_eos": true });
    let answer = server.post_with("/v1/completions", &headers, &body).await;
    assert_eq!(answer.headers["x-request-id"], "abc.DEF-1_2");
    let mut json = answer.ok();
    assert!(json["created"].as_u64().unwrap() > 1_700_000_000);
    assert!(!text(&json, 0).is_empty());
    json["created"] = 0.into();
    json["choices"][0]["text"] = "".into();
    let prompt_tokens = server.llm.tokenizer().encode("Hello there", true).unwrap().len();
    let expected = json!({
        "id": "cmpl-abc.DEF-1_2", "object": "text_completion", "created": 0, "model": "org/alias",
        "choices": [{ "index": 0, "text": "", "logprobs": null, "finish_reason": "length", "stop_reason": null }],
        "usage": {
            "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + 5, "completion_tokens": 5,
            "prompt_tokens_details": { "cached_tokens": 0 },
        },
        "system_fingerprint": "quire-1.2.3",
    });
    assert_eq!(json, expected);
}

#[tokio::test]
async fn prompts_come_in_four_shapes_and_answers_in_their_order() {
    let server = server();
    let ids = |text: &str| server.llm.tokenizer().encode(text, true).unwrap();
    let ask = async |prompt: Value| {
        server
            .complete(json!({ "prompt": prompt, "max_tokens": 8, "seed": 3, "ignore_eos": true }))
            .await
            .ok()
    };
    let one = ask(json!("a story")).await;
    let ids_only = ask(json!(ids("a story"))).await;
    assert_eq!(text(&one, 0), text(&ids_only, 0));
    let two = ask(json!(["a story", "another, longer story"])).await;
    let two_of_ids = ask(json!([ids("a story"), ids("another, longer story")])).await;
    assert_eq!(two["choices"], two_of_ids["choices"]);
    assert_eq!(text(&two, 0), text(&one, 0));
    assert_ne!(text(&two, 1), text(&two, 0));
    assert_eq!(two["choices"][1]["index"], 1);
    let total = ids("a story").len() + ids("another, longer story").len();
    assert_eq!(two["usage"]["prompt_tokens"], total);
    assert_eq!(two["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn the_first_of_n_is_the_answer_of_one() {
    let server = server();
    let ask = async |n: u32| {
        let body = json!({ "prompt": ["x", "yy"], "max_tokens": 6, "seed": 3, "n": n, "ignore_eos": true });
        server.complete(body).await.ok()
    };
    let (one, three) = (ask(1).await, ask(3).await);
    assert_eq!(three["choices"].as_array().unwrap().len(), 6);
    for (index, choice) in three["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["index"], index);
    }
    assert_eq!(text(&three, 0), text(&one, 0));
    assert_eq!(text(&three, 3), text(&one, 1));
    assert_ne!(text(&three, 1), text(&three, 0));
    assert_eq!(three["usage"]["completion_tokens"], 36);
}

#[tokio::test]
async fn echo_puts_the_prompt_in_front_of_text_and_logprobs() {
    let server = server();
    let base = json!({ "prompt": "Once upon a time", "max_tokens": 4, "seed": 5, "ignore_eos": true, "logprobs": 2 });
    let plain = server.complete(base.clone()).await.ok();
    let mut echo = base.clone();
    echo["echo"] = true.into();
    // Twice: the second time the prompt is in the prefix cache.
    for _ in 0..2 {
        let answer = server.complete(echo.clone()).await.ok();
        assert_eq!(text(&answer, 0), format!("Once upon a time{}", text(&plain, 0)));
        let lists = &answer["choices"][0]["logprobs"];
        let prompt_len = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let list = lists[list].as_array().unwrap();
            assert_eq!(list.len(), prompt_len + 4);
        }
        let nulls = lists["token_logprobs"].as_array().unwrap().iter().filter(|value| value.is_null());
        assert_eq!((nulls.count(), &lists["token_logprobs"][0]), (1, &Value::Null));
        assert_eq!(lists["text_offset"][1], lists["tokens"][0].as_str().unwrap().chars().count());
        let generated =
            |lists: &Value| lists["tokens"].as_array().unwrap().iter().rev().take(4).cloned().collect();
        let (with, without): (Vec<Value>, Vec<Value>) =
            (generated(lists), generated(&plain["choices"][0]["logprobs"]));
        assert_eq!(with, without);
    }
    echo["max_tokens"] = 0.into();
    let scored = server.complete(echo).await.ok();
    assert_eq!(text(&scored, 0), "Once upon a time");
    assert_eq!(
        (&scored["usage"]["completion_tokens"], &scored["choices"][0]["finish_reason"]),
        (&json!(0), &json!("length"))
    );
    assert_eq!(
        scored["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len() as u64,
        scored["usage"]["prompt_tokens"]
    );
}

#[tokio::test]
async fn a_stop_string_may_lie_anywhere_across_tokens() {
    let server = server();
    let base =
        json!({ "prompt": "x", "max_tokens": 24, "seed": 11, "ignore_eos": true, "return_token_ids": true });
    let full = server.complete(base.clone()).await.ok();
    let full_text: Vec<char> = text(&full, 0).chars().collect();
    assert!(full_text.len() > 40, "{full_text:?}");
    for start in (1..full_text.len() - 6).step_by(5) {
        let stop: String = full_text[start..start + 6].iter().collect();
        let mut body = base.clone();
        body["stop"] = json!(["not there", stop]);
        let cut = server.complete(body.clone()).await.ok();
        let whole: String = full_text.iter().collect();
        let at = whole.find(&stop).unwrap();
        assert_eq!(text(&cut, 0), &whole[..at]);
        let choice = &cut["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
        // Usage ends with the token that completed the match, and no earlier token does.
        let ids = choice["token_ids"].as_array().unwrap();
        assert_eq!(cut["usage"]["completion_tokens"], ids.len());
        let decode = |ids: &[Value]| {
            let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
            server.llm.tokenizer().decode(&ids, true)
        };
        assert!(decode(ids).contains(&stop) && !decode(&ids[..ids.len() - 1]).contains(&stop));
        body["include_stop_str_in_output"] = true.into();
        let with = server.complete(body).await.ok();
        assert_eq!(text(&with, 0), &whole[..at + stop.len()]);
    }
    server.wait_idle().await;
}

#[tokio::test]
async fn a_stop_token_ends_the_answer_and_is_not_part_of_it() {
    let server = server();
    let base =
        json!({ "prompt": "x", "max_tokens": 10, "seed": 11, "ignore_eos": true, "return_token_ids": true });
    let full = server.complete(base.clone()).await.ok();
    let ids = full["choices"][0]["token_ids"].as_array().unwrap();
    let mut body = base.clone();
    body["stop_token_ids"] = json!([ids[3]]);
    let cut = server.complete(body.clone()).await.ok();
    let choice = &cut["choices"][0];
    assert_eq!(choice["token_ids"].as_array().unwrap()[..], ids[..4]);
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &ids[3]));
    assert!(text(&full, 0).starts_with(text(&cut, 0)) && text(&cut, 0).len() < text(&full, 0).len());
    body["min_tokens"] = 6.into();
    let longer = server.complete(body).await.ok();
    assert!(longer["usage"]["completion_tokens"].as_u64().unwrap() >= 6);
}

#[tokio::test]
async fn the_models_own_end_has_no_stop_reason_and_can_be_ignored() {
    let server = server();
    for seed in 0..64 {
        let mut body = json!({ "prompt": "x", "max_tokens": 400, "seed": seed });
        let answer = server.complete(body.clone()).await.ok();
        if answer["choices"][0]["finish_reason"] == "stop" {
            assert_eq!(answer["choices"][0]["stop_reason"], Value::Null);
            assert!(!text(&answer, 0).contains("<|"), "the end itself is no text");
            body["ignore_eos"] = true.into();
            let longer = server.complete(body).await.ok();
            assert_eq!(longer["usage"]["completion_tokens"], 400);
            assert!(text(&longer, 0).starts_with(text(&answer, 0)));
            return;
        }
    }
    panic!("no seed of 64 ended by itself");
}

#[tokio::test]
async fn max_tokens_defaults_to_the_rest_of_the_context() {
    let server = server();
    let answer = server.complete(json!({ "prompt": [5, 6, 7], "seed": 1, "ignore_eos": true })).await.ok();
    assert_eq!(answer["usage"]["completion_tokens"], MAX_MODEL_LEN - 3);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn a_prefix_is_cached_per_salt() {
    let server = server();
    let prompt: Vec<u32> = (100..164).collect();
    let cached = async |salt: Option<&str>| {
        let body = json!({ "prompt": prompt, "max_tokens": 1, "cache_salt": salt });
        let answer = server.complete(body).await.ok();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(None).await, 0);
    assert_eq!(cached(None).await, 63, "the last token is computed for its logits");
    assert_eq!(cached(Some("mine")).await, 0);
    assert_eq!(cached(Some("mine")).await, 63);
}

#[tokio::test]
async fn logprobs_are_parallel_lists_and_prompt_logprobs_are_keyed_by_id() {
    let server = server();
    let body = json!({ "prompt": [9, 10, 11], "max_tokens": 3, "seed": 2, "ignore_eos": true, "logprobs": 2,
        "prompt_logprobs": 1, "return_token_ids": true });
    let answer = server.complete(body).await.ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().concat_text(), text(&answer, 0));
    assert!(choice["logprobs"]["top_logprobs"][0].as_object().unwrap().len() >= 2);
    let prompt = choice["prompt_logprobs"].as_array().unwrap();
    assert_eq!((prompt.len(), &prompt[0]), (3, &Value::Null));
    assert!(prompt[1]["10"]["logprob"].as_f64().unwrap() <= 0.0);
    assert_eq!(prompt[2]["11"]["rank"], 1);
    assert_eq!(choice["prompt_token_ids"], json!([9, 10, 11]));
    assert_eq!(choice["token_ids"].as_array().unwrap().len(), 3);
}

trait ConcatText {
    fn concat_text(&self) -> String;
}

impl ConcatText for Vec<Value> {
    fn concat_text(&self) -> String {
        self.iter().map(|value| value.as_str().unwrap()).collect()
    }
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let server = server();
    let text = "Grüße, 世界! 🙂 <|im_end|>";
    let tokens = server
        .post("/tokenize", &json!({ "model": MODEL, "prompt": text, "return_token_strs": true }))
        .await
        .ok();
    let ids = tokens["tokens"].as_array().unwrap();
    assert_eq!(
        (tokens["count"].as_u64().unwrap() as usize, &tokens["max_model_len"]),
        (ids.len(), &json!(MAX_MODEL_LEN))
    );
    assert_eq!(tokens["token_strs"].as_array().unwrap().len(), ids.len());
    let back = server.post("/detokenize", &json!({ "tokens": ids })).await.ok();
    assert_eq!(back, json!({ "prompt": text }));
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let tokens = server.post("/tokenize", &chat).await.ok();
    let prompt = server.post("/detokenize", &json!({ "tokens": tokens["tokens"] })).await.ok();
    assert_eq!(prompt["prompt"], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
}

#[tokio::test]
async fn models_are_listed_under_every_name() {
    let server = server();
    let list = server.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    let names: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, [MODEL, "org/alias"]);
    let one = server.get("/v1/models/org/alias").await.ok();
    assert_eq!(
        (&one["id"], &one["object"], &one["max_model_len"]),
        (&json!("org/alias"), &json!("model"), &json!(MAX_MODEL_LEN))
    );
    assert_eq!(server.get("/v1/models/nope").await.json()["error"]["code"], "model_not_found");
}
