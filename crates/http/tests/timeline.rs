//! Why a request took so long, as its client, another tenant's and an administrator read it.

use std::time::Duration;

use http::Method;
use quire_llm::{GenerateRequest, Prompt};
use quire_tenancy::{Keys, Tenancy, TenantsFile};
use serde_json::{Value, json};

use crate::harness::{Answer, Server, Setup, ask, eventually};

/// Keys `sk-one`, `sk-two`, and `sk-admin` and `sk-tokens` of the first tenant; digests by `printf %s KEY | sha256sum`.
const TENANTS: &str = r#"
[[tenants]]
id = "one"
[[tenants.keys]]
id = "k"
sha256 = "@ONE"
[[tenants.keys]]
id = "admin"
sha256 = "@ADMIN"
scopes = ["admin"]
[[tenants.keys]]
id = "tokens"
sha256 = "@TOKENS"
scopes = ["tokenize"]

[[tenants]]
id = "two"
[[tenants.keys]]
id = "k"
sha256 = "@TWO"
"#;

async fn timeline(server: &Server, id: &str) -> Answer {
    server.get(&format!("/v1/requests/{id}/timeline")).await
}

/// The one request of that id.
async fn one(server: &Server, id: &str) -> Value {
    let answer = timeline(server, id).await.ok();
    let requests = answer["requests"].as_array().unwrap();
    assert_eq!((requests.len(), &answer["id"]), (1, &json!(id)), "{answer}");
    requests[0].clone()
}

async fn complete(server: &Server, id: &str, body: Value) -> Answer {
    server.post_with("/v1/completions", &[("x-request-id", id)], &body).await
}

fn names(timeline: &Value) -> Vec<&str> {
    timeline["events"].as_array().unwrap().iter().map(|event| event["event"].as_str().unwrap()).collect()
}

fn waited(timeline: &Value, cause: &str) -> f64 {
    timeline["waited_ms"][cause].as_f64().unwrap_or(0.0)
}

#[tokio::test]
async fn a_request_tells_its_story_from_arrival_to_end() {
    let server = Server::start(&Setup { step: Duration::from_millis(2), ..Setup::default() });
    let prompt: Vec<u32> = (1..=300).collect();
    let answer =
        complete(&server, "story-1", json!({ "prompt": prompt, "max_tokens": 8, "ignore_eos": true })).await;
    assert_eq!(answer.ok()["id"], "cmpl-story-1");
    let story = one(&server, "story-1").await;
    // Steps hold 256 tokens.
    let expected =
        ["received", "prepared", "admitted", "queued", "scheduled", "chunk", "chunk", "first_token", "ended"];
    assert_eq!(names(&story), expected, "{story}");
    let chunks = |story: &Value| {
        let events = story["events"].as_array().unwrap().clone();
        events.iter().filter_map(|event| event["tokens"].as_u64()).collect::<Vec<_>>()
    };
    assert_eq!(chunks(&story), [256, 44, 8], "two chunks, and the tokens of the answer");
    let times: Vec<f64> =
        story["events"].as_array().unwrap().iter().map(|e| e["at_ms"].as_f64().unwrap()).collect();
    assert!(times.is_sorted() && times[0] == 0.0, "{times:?}");
    assert!(times[7] - times[6] >= 1.9, "the first token comes a step after its chunk: {times:?}");
    assert_eq!(story["ended_ms"], story["events"][8]["at_ms"]);
    assert_eq!((&story["state"], &story["finish_reason"]), (&json!("ended"), &json!("length")));
    assert_eq!((&story["prompt_tokens"], &story["completion_tokens"]), (&json!(300), &json!(8)));
    let unix = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!((story["received"].as_f64().unwrap() - unix).abs() < 60.0, "{story}");
    // The same again finds its prompt, and the id of the answer is as good as that of the request.
    complete(&server, "story-2", json!({ "prompt": prompt, "max_tokens": 1 })).await.ok();
    let answer = timeline(&server, "cmpl-story-2").await.ok();
    let story = &answer["requests"][0];
    assert_eq!((&answer["id"], &story["cached_tokens"]), (&json!("story-2"), &json!(288)));
    assert_eq!(story["events"][4]["cached_tokens"], 288);
    assert_eq!(chunks(story)[0], 12);
}

#[tokio::test]
async fn a_wait_names_its_cause_while_it_lasts_and_afterwards() {
    let server =
        Server::start(&Setup { step: Duration::from_millis(10), max_num_seqs: 1, ..Setup::default() });
    let app = server.app.clone();
    let send = |id: &'static str, max_tokens: u32| {
        let (app, body) =
            (app.clone(), json!({ "prompt": [1], "max_tokens": max_tokens, "ignore_eos": true }));
        tokio::spawn(async move {
            let headers = [("x-request-id", id), ("content-type", "application/json")];
            ask(&app, Method::POST, "/v1/completions", &headers, &body.to_string()).await
        })
    };
    let engine = server.llm.engine().clone();
    let long = send("long", 40);
    eventually("the first runs", || engine.snapshot().num_running == 1).await;
    let next = send("next", 2);
    eventually("the second waits", || engine.snapshot().num_waiting == 1).await;
    let last = send("last", 2);
    eventually("both wait", || engine.snapshot().num_waiting == 2).await;
    let next_now = one(&server, "next").await;
    assert_eq!(
        (&next_now["state"], &next_now["started_ms"]),
        (&json!("waiting"), &Value::Null),
        "{next_now}"
    );
    assert_eq!(next_now["events"][4]["for"], "batch_full", "{next_now}");
    assert_eq!(one(&server, "long").await["state"], "running");
    for request in [long, next, last] {
        request.await.unwrap().ok();
    }
    let next = one(&server, "next").await;
    assert!(waited(&next, "batch_full") > 50.0, "{next}");
    let started = next["started_ms"].as_f64().unwrap();
    let all: f64 = next["waited_ms"].as_object().unwrap().values().map(|ms| ms.as_f64().unwrap()).sum();
    assert!((all - started).abs() < 0.01, "the causes add up to the time until its start: {next}");
    let last = one(&server, "last").await;
    assert!(waited(&last, "queue") > 50.0 && waited(&last, "batch_full") > 5.0, "{last}");
}

#[tokio::test]
async fn a_preemption_is_told_with_what_it_cost() {
    let setup = Setup { num_blocks: 32, step: Duration::from_millis(1), ..Setup::default() };
    let server = Server::start(&setup);
    let body = |at: u32| json!({ "prompt": (at..at + 100).collect::<Vec<_>>(), "max_tokens": 200, "ignore_eos": true });
    let [first, second] = [("first", body(0)), ("second", body(500))].map(|(id, body)| {
        let app = server.app.clone();
        tokio::spawn(async move {
            let headers = [("x-request-id", id), ("content-type", "application/json")];
            ask(&app, Method::POST, "/v1/completions", &headers, &body.to_string()).await
        })
    });
    first.await.unwrap().ok();
    second.await.unwrap().ok();
    let mut stories = [one(&server, "first").await, one(&server, "second").await];
    stories.sort_by_key(|story| story["preemptions"].as_u64());
    let [kept, lost] = &stories;
    assert_eq!(kept["preemptions"], 0, "600 tokens do not fit 512, one of the two goes back: {kept}");
    assert!(lost["preemptions"].as_u64().unwrap() >= 1, "{lost}");
    let names = names(lost);
    let at = names.iter().position(|&name| name == "preempted").unwrap_or_else(|| panic!("{lost}"));
    assert_eq!(lost["events"][at]["for"], "kv_pressure");
    let back = &names[at + 1..];
    assert_eq!(back.iter().filter(|&&name| name == "scheduled").count(), 1, "{lost}");
    assert!(back.iter().filter(|&&name| name == "chunk").count() >= 1, "computed again: {lost}");
    assert!(waited(lost, "kv_pressure") > 20.0, "{lost}");
}

#[tokio::test]
async fn only_its_tenant_and_administrators_see_a_request() {
    let mut text = TENANTS.to_owned();
    for name in ["one", "admin", "tokens", "two"] {
        text = text
            .replace(&format!("@{}", name.to_uppercase()), &crate::tenants::digest(&format!("sk-{name}")));
    }
    let file = TenantsFile::parse(&text, "tenants.toml").unwrap();
    let server = Server::with(&Setup::default(), Tenancy::new(Keys::default(), file, None).unwrap());
    let get = async |key: &str, id: &str| {
        let authorization = format!("Bearer {key}");
        let headers = [("authorization", authorization.as_str())];
        ask(&server.app, Method::GET, &format!("/v1/requests/{id}/timeline"), &headers, "").await
    };
    for (key, prompt) in [("sk-one", 1), ("sk-two", 2), ("sk-two", 3)] {
        let authorization = format!("Bearer {key}");
        let headers = [("authorization", authorization.as_str()), ("x-request-id", "same")];
        let body = json!({ "prompt": vec![9; prompt], "max_tokens": 1 });
        server.post_with("/v1/completions", &headers, &body).await.ok();
    }
    let prompts = |answer: &Answer| -> Vec<u64> {
        let answer = answer.ok();
        answer["requests"].as_array().unwrap().iter().map(|r| r["prompt_tokens"].as_u64().unwrap()).collect()
    };
    assert_eq!(prompts(&get("sk-one", "same").await), [1]);
    assert_eq!(prompts(&get("sk-two", "same").await), [2, 3], "all that go by the id");
    assert_eq!(prompts(&get("sk-admin", "same").await), [1, 2, 3]);
    let authorization = [("authorization", "Bearer sk-one"), ("x-request-id", "of-one")];
    server
        .post_with("/v1/completions", &authorization, &json!({ "prompt": [1], "max_tokens": 1 }))
        .await
        .ok();
    let (hidden, unknown) = (get("sk-two", "of-one").await, get("sk-two", "of-ten").await);
    assert_eq!((hidden.status.as_u16(), unknown.status.as_u16()), (404, 404));
    assert_eq!(hidden.body.replace("of-one", "of-ten"), unknown.body, "nothing tells the two apart");
    assert_eq!(hidden.json()["error"]["code"], "request_not_found");
    assert_eq!(get("sk-tokens", "of-one").await.status.as_u16(), 403);
    assert_eq!(timeline(&server, "of-one").await.status.as_u16(), 401);
}

#[tokio::test]
async fn a_refusal_is_remembered_with_its_reason() {
    let text = format!(
        "[[tenants]]\nid = \"one\"\nlimits = {{ rpm = 6, max_tokens = 9 }}\n[[tenants.keys]]\nid = \"k\"\nsha256 = \"{}\"\n\
         [[tenants]]\nid = \"two\"\n[[tenants.keys]]\nid = \"k\"\nsha256 = \"{}\"\n",
        crate::tenants::digest("sk-one"),
        crate::tenants::digest("sk-two"),
    );
    let file = TenantsFile::parse(&text, "tenants.toml").unwrap();
    let server = Server::with(&Setup::default(), Tenancy::new(Keys::default(), file, None).unwrap());
    let send = async |route: &str, id: &str, body: Value| {
        let headers = [("authorization", "Bearer sk-one"), ("x-request-id", id)];
        server.post_with(route, &headers, &body).await
    };
    let get = async |key: &str, id: &str| {
        let authorization = format!("Bearer {key}");
        let headers = [("authorization", authorization.as_str())];
        ask(&server.app, Method::GET, &format!("/v1/requests/{id}/timeline"), &headers, "").await
    };
    let body = json!({ "prompt": [1], "max_tokens": 1 });
    // What is wrong with a request itself is told to its client alone.
    assert_eq!(send("/v1/completions", "wrong", json!({ "prompt": "" })).await.status.as_u16(), 400);
    assert_eq!(get("sk-one", "wrong").await.status.as_u16(), 404);
    let large = send("/v1/completions", "large", json!({ "prompt": [1], "max_tokens": 10 })).await;
    let mut refused = Vec::new();
    for at in 0..20 {
        let answer = send("/v1/completions", &format!("r{at}"), body.clone()).await;
        if answer.status.as_u16() != 200 {
            refused.push((format!("r{at}"), answer));
        }
    }
    let chat = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 1 });
    refused.push(("chat".into(), send("/v1/chat/completions", "chat", chat).await));
    assert!(refused.len() > 5, "six a minute are fewer than twenty");
    refused.push(("large".into(), large));
    for (id, answer) in &refused {
        let story = &get("sk-one", id).await.ok()["requests"][0];
        let error = &answer.json()["error"];
        assert_eq!(
            (&story["state"], &story["message"]),
            (&json!("refused"), &error["message"]),
            "{id}: {story}"
        );
        assert_eq!(story["code"], error["code"], "{id}");
        let retry_after =
            answer.headers.get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
        assert_eq!(story["retry_after_s"].as_f64(), retry_after, "{id}");
        assert!(story["refused_ms"].as_f64().unwrap() >= 0.0, "{id}");
        assert_eq!(get("sk-two", id).await.status.as_u16(), 404, "{id}");
    }
}

#[tokio::test]
async fn a_wait_for_the_limits_is_told_from_the_queue() {
    let server = Server::start(&Setup::default());
    let request = GenerateRequest {
        request_id: Some("slow-door".into()),
        ..GenerateRequest::new(Prompt::Tokens(vec![1]))
    };
    let prepared = server.llm.prepare(request).await.unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await;
    let mut generation = server.llm.start(prepared, None).await.unwrap();
    generation.collect().await.unwrap();
    let story = one(&server, "slow-door").await;
    assert!(waited(&story, "quota") >= 30.0 && waited(&story, "queue") == 0.0, "{story}");
}

#[tokio::test]
async fn every_prompt_and_choice_of_a_request_is_in_it() {
    let server = Server::start(&Setup::default());
    complete(
        &server,
        "many",
        json!({ "prompt": [[1, 2], [3]], "max_tokens": 3, "n": 2, "ignore_eos": true }),
    )
    .await
    .ok();
    let answer = timeline(&server, "many").await.ok();
    let requests = answer["requests"].as_array().unwrap();
    let prompts: Vec<_> = requests.iter().map(|request| request["prompt_tokens"].as_u64().unwrap()).collect();
    assert_eq!(prompts, [2, 1]);
    for request in requests {
        assert_eq!(request["completion_tokens"], 6, "{request}");
        let ends: Vec<_> =
            request["events"].as_array().unwrap().iter().filter(|event| event["event"] == "ended").collect();
        assert_eq!(ends.len(), 2, "{request}");
        assert!(ends.iter().any(|end| end["choice"] == 1), "{request}");
    }
}

#[tokio::test]
async fn what_ended_long_ago_is_forgotten() {
    let server = Server::start(&Setup { max_queued_requests: 300, ..Setup::default() });
    complete(&server, "old", json!({ "prompt": [1], "max_tokens": 1 })).await.ok();
    assert_eq!(one(&server, "old").await["state"], "ended");
    let prompts = vec![[1]; 64];
    for round in 0..64 {
        complete(&server, &format!("newer-{round}"), json!({ "prompt": prompts, "max_tokens": 1 }))
            .await
            .ok();
    }
    let answer = timeline(&server, "old").await;
    assert_eq!(
        (answer.status.as_u16(), answer.json()["error"]["code"].as_str()),
        (404, Some("request_not_found"))
    );
    assert_eq!(
        timeline(&server, "newer-0").await.ok()["requests"].as_array().unwrap().len(),
        64,
        "not too many at once"
    );
}
