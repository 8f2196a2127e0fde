//! Tenants with limits, as their clients meet them: statuses, headers, hidden models, settlement.

use std::time::Duration;

use quire_tenancy::{Keys, SharedStore, Tenancy, TenantsFile};
use serde_json::{Value, json};

use crate::harness::{Answer, MODEL, Server, Setup, eventually};
use crate::redis::RedisServer;

/// Digests by `printf %s KEY | sha256sum`.
const TENANTS: &str = r#"
[[tenants]]
id = "small"
models = ["org/*"]
limits = { rpm = 60, output_tpm = 600, input_tpm = 60000, max_tokens = 50, max_input_tokens = 20, n = 2, concurrency = 2 }
[[tenants.keys]]
id = "k1"          # sk-small
sha256 = "0e1e7070976c78df9c4611e515b270eaa83c91125567d008c7e4aa38c76efafc"
[[tenants.keys]]
id = "tokens"      # sk-tokens
sha256 = "7411f7d09ba991bdffff5a38d21777b41b6b3a62303607d9004ce348658d7fdb"
scopes = ["tokenize"]

[[tenants]]
id = "big"
[[tenants.keys]]
id = "k1"          # sk-big
sha256 = "d576850bbaa59e4127fdc754de93864c920e79380ee2cdbc7188d2dff86d556e"
[[tenants.keys]]
id = "watch"       # sk-metrics
sha256 = "ac92e120614c9bcebedbadf70a931f9b5e1a1169153241c9efcd0cae10caa651"
scopes = ["metrics"]
"#;

fn tenancy(text: &str) -> Tenancy {
    Tenancy::new(Keys::default(), TenantsFile::parse(text, "tenants.toml").unwrap(), None).unwrap()
}

fn server(step: Duration) -> Server {
    Server::with(&Setup { step, ..Setup::default() }, tenancy(TENANTS))
}

async fn complete(server: &Server, key: &str, body: Value) -> Answer {
    server.post_with("/v1/completions", &[("authorization", &format!("Bearer {key}"))], &body).await
}

async fn get(server: &Server, key: &str, path: &str) -> Answer {
    let authorization = format!("Bearer {key}");
    crate::harness::ask(&server.app, http::Method::GET, path, &[("authorization", &authorization)], "").await
}

fn body(max_tokens: u32) -> Value {
    json!({ "model": "org/alias", "prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": true })
}

fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    answer.headers.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", answer.headers)).to_str().unwrap()
}

fn code(answer: &Answer) -> (u16, String, String) {
    let error = &answer.json()["error"];
    let word = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    (answer.status.as_u16(), word("code"), word("param"))
}

#[tokio::test]
async fn success_says_what_is_left() {
    let server = server(Duration::ZERO);
    for stream in [false, true] {
        let mut request = body(5);
        request["stream"] = json!(stream);
        let answer = complete(&server, "sk-small", request).await;
        assert_eq!(answer.status.as_u16(), 200, "{}", answer.body);
        assert_eq!(header(&answer, "x-ratelimit-limit-requests"), "60");
        assert!(header(&answer, "x-ratelimit-remaining-requests").parse::<u32>().unwrap() < 10);
        assert!(header(&answer, "x-ratelimit-reset-requests").ends_with('s'));
        assert_eq!(header(&answer, "x-ratelimit-limit-tokens"), "600", "output is scarcer than input");
        assert!(header(&answer, "x-ratelimit-remaining-tokens").parse::<u32>().unwrap() <= 95);
    }
    let free = complete(&server, "sk-big", body(5)).await;
    assert_eq!(free.status.as_u16(), 200, "{}", free.body);
    assert!(free.headers.keys().all(|name| !name.as_str().starts_with("x-ratelimit")), "{:?}", free.headers);
}

#[tokio::test]
async fn every_refusal_has_its_status() {
    let server = server(Duration::ZERO);
    for (key, request, expected) in [
        ("sk-none", body(5), (401, "invalid_api_key", "")),
        ("sk-tokens", body(5), (403, "insufficient_scope", "")),
        ("sk-metrics", body(5), (403, "insufficient_scope", "")),
        ("sk-small", json!({ "model": MODEL, "prompt": "x" }), (404, "model_not_found", "model")),
        ("sk-small", body(51), (413, "limit_exceeded", "max_tokens")),
        ("sk-small", json!({ "prompt": vec![1; 21], "max_tokens": 1 }), (413, "limit_exceeded", "prompt")),
        ("sk-small", json!({ "prompt": "x", "max_tokens": 1, "n": 3 }), (413, "limit_exceeded", "n")),
        (
            "sk-small",
            json!({ "prompt": ["x", "y"], "max_tokens": 1, "n": 2 }),
            (413, "limit_exceeded", "n"), // four answers at once
        ),
    ] {
        let (status, kind, param) = expected;
        let answer = complete(&server, key, request.clone()).await;
        assert_eq!(
            code(&answer),
            (status, kind.to_owned(), param.to_owned()),
            "{key} {request}: {}",
            answer.body
        );
    }
    let chat = json!({ "messages": [{ "role": "user", "content": "word ".repeat(40) }], "max_tokens": 1 });
    let authorization = [("authorization", "Bearer sk-small")];
    let answer = server.post_with("/v1/chat/completions", &authorization, &chat).await;
    assert_eq!(code(&answer), (413, "limit_exceeded".into(), "messages".into()));
    assert_eq!(get(&server, "sk-small", "/metrics").await.status.as_u16(), 403);
    assert_eq!(get(&server, "sk-metrics", "/metrics").await.status.as_u16(), 200);
    let tokenize = json!({ "prompt": "some text" });
    for (key, status) in [("sk-tokens", 200), ("sk-small", 200), ("sk-metrics", 403)] {
        let answer =
            server.post_with("/tokenize", &[("authorization", &format!("Bearer {key}"))], &tokenize).await;
        assert_eq!(answer.status.as_u16(), status, "{key}: {}", answer.body);
    }
}

#[tokio::test]
async fn a_hidden_model_is_as_one_that_is_not_there() {
    let server = server(Duration::ZERO);
    let hidden = complete(&server, "sk-small", json!({ "model": MODEL, "prompt": "x" })).await;
    let absent = complete(&server, "sk-small", json!({ "model": "quire-demi", "prompt": "x" })).await;
    assert_eq!(hidden.body.replace(MODEL, "quire-demi"), absent.body);
    assert!(!absent.body.contains(MODEL), "{}", absent.body);
    let list = get(&server, "sk-small", "/v1/models").await;
    assert!(!list.body.contains(MODEL), "{}", list.body);
    assert_eq!(list.json()["data"].as_array().unwrap().len(), 1);
    assert_eq!(get(&server, "sk-small", "/v1/models/quire-demo").await.status.as_u16(), 404);
    assert_eq!(get(&server, "sk-small", "/v1/models/org/alias").await.status.as_u16(), 200);
    assert_eq!(get(&server, "sk-big", "/v1/models/quire-demo").await.status.as_u16(), 200);
    let unnamed = complete(&server, "sk-small", json!({ "prompt": [1], "max_tokens": 1 })).await;
    assert_eq!(unnamed.ok()["model"], "org/alias", "the first that exists for this tenant");
}

#[tokio::test]
async fn limits_refuse_with_a_time_to_come_again() {
    let server = server(Duration::ZERO);
    // Ten requests fit at once.
    let mut refused = None;
    for _ in 0..200 {
        let answer = complete(&server, "sk-small", body(1)).await;
        if answer.status.as_u16() != 200 {
            refused = Some(answer);
            break;
        }
    }
    let refused = refused.expect("60 a minute are fewer than 200 at once");
    assert_eq!(code(&refused), (429, "rate_limit_exceeded".into(), "rpm".into()));
    assert_eq!(header(&refused, "retry-after"), "1");
    assert_eq!(header(&refused, "x-ratelimit-remaining-requests"), "0");
    assert_eq!(header(&refused, "x-ratelimit-limit-tokens"), "600");
    assert_eq!(complete(&server, "sk-big", body(1)).await.status.as_u16(), 200, "only this tenant");
}

#[tokio::test]
async fn a_budget_refuses_until_the_period_ends() {
    let text = "[defaults]\nbudget = { tokens = 40, period = 'month' }";
    let server = Server::with(&Setup::default(), tenancy(text));
    // 3 + 20, and 3 + 14.
    for max_tokens in [20, 14] {
        assert_eq!(server.complete(body(max_tokens)).await.status.as_u16(), 200);
    }
    let answer = server.complete(body(1)).await;
    assert_eq!(code(&answer), (429, "rate_limit_exceeded".into(), "budget".into()));
    let seconds: u64 = header(&answer, "retry-after").parse().unwrap();
    assert!(seconds > 0 && seconds <= 31 * 86_400, "{seconds}");
    let tokenize = server.post("/tokenize", &json!({ "prompt": "free" })).await;
    assert_eq!(tokenize.status.as_u16(), 200, "what generates nothing costs no budget");
}

#[tokio::test]
async fn beyond_a_budget_others_go_first() {
    let text = with_digests(
        r#"
        [[tenants]]
        id = "spent"
        priority = 2
        budget = { tokens = 1, period = "month", action = "deprioritize" }
        [[tenants.keys]]
        id = "1"
        sha256 = "DIGEST(spent)"
        [[tenants]]
        id = "fresh"
        [[tenants.keys]]
        id = "1"
        sha256 = "DIGEST(fresh)""#,
    );
    let setup =
        Setup { step: Duration::from_millis(5), max_num_seqs: 1, max_queued_requests: 1, ..Setup::default() };
    let server = Server::with(&setup, tenancy(&text));
    let open = |key: &'static str, max_tokens| {
        let app = server.app.clone();
        let request = body(max_tokens).to_string();
        tokio::spawn(async move {
            let authorization = format!("Bearer {key}");
            let headers = [("authorization", &*authorization), ("content-type", "application/json")];
            crate::harness::ask(&app, http::Method::POST, "/v1/completions", &headers, &request).await
        })
    };
    let engine = server.llm.engine().clone();
    let running = open("fresh", 400);
    eventually("it runs", || engine.snapshot().num_running == 1).await;
    // Below priority 0 half of a queue of one is nothing.
    let refused = open("spent", 5).await.unwrap();
    assert_eq!(code(&refused), (429, "rate_limit_exceeded".into(), String::new()), "{}", refused.body);
    let waits = open("fresh", 1);
    eventually("it waits", || engine.snapshot().num_waiting == 1).await;
    running.abort();
    assert_eq!(waits.await.unwrap().status.as_u16(), 200);
}

#[tokio::test]
async fn answers_in_flight_are_bounded_and_a_client_that_leaves_gives_its_place_back() {
    let server = server(Duration::from_millis(20));
    let mut request = body(50);
    request["stream"] = json!(true);
    let open = || {
        let app = server.app.clone();
        let request = request.to_string();
        tokio::spawn(async move {
            let headers = [("authorization", "Bearer sk-small"), ("content-type", "application/json")];
            crate::harness::ask(&app, http::Method::POST, "/v1/completions", &headers, &request).await
        })
    };
    let streams = [open(), open()];
    let engine = server.llm.engine().clone();
    eventually("both run", || engine.snapshot().num_running == 2).await;
    let refused = complete(&server, "sk-small", body(1)).await;
    assert_eq!(code(&refused), (429, "rate_limit_exceeded".into(), "concurrency".into()));
    streams.iter().for_each(tokio::task::JoinHandle::abort);
    server.wait_idle().await;
    // Two times 50 tokens were reserved, all there are; what was not generated is there again.
    let answer = complete(&server, "sk-small", body(40)).await;
    assert_eq!(answer.status.as_u16(), 200, "{}", answer.body);
}

/// Nobody gets tokens for nothing by not reading them.
#[tokio::test]
async fn a_client_that_does_not_read_pays_for_what_was_made() {
    let tenancy = tenancy("[defaults.limits]\noutput_tpm = 60");
    let server = Server::with(&Setup::default(), tenancy);
    let request = json!({ "prompt": [1], "max_tokens": 60, "ignore_eos": true, "stream": true });
    let request = http::Request::post("/v1/completions")
        .header("content-type", "application/json")
        .body(axum::body::Body::from(request.to_string()))
        .unwrap();
    let response = tower::ServiceExt::oneshot(server.app.clone(), request).await.unwrap();
    assert_eq!(response.status().as_u16(), 200);
    server.wait_idle().await;
    drop(response);
    let answer = server.complete(json!({ "prompt": [1], "max_tokens": 1 })).await;
    assert_eq!(code(&answer), (429, "rate_limit_exceeded".into(), "output_tpm".into()));
    let seconds: u64 = header(&answer, "retry-after").parse().unwrap();
    assert!((20..=51).contains(&seconds), "60 tokens are owed, less what a slow test refilled: {seconds}");
}

#[tokio::test]
async fn an_answer_without_max_tokens_is_bounded_by_the_limits() {
    let server = server(Duration::ZERO);
    let answer = complete(&server, "sk-small", json!({ "prompt": [1, 2], "ignore_eos": true })).await;
    assert_eq!(answer.ok()["usage"]["completion_tokens"], 50);
}

#[tokio::test]
async fn cached_prefixes_are_shared_within_a_tenant_alone() {
    let text = r#"
        [[tenants]]
        id = "a"
        [[tenants.keys]]
        id = "1"
        sha256 = "DIGEST(a1)"
        [[tenants.keys]]
        id = "2"
        sha256 = "DIGEST(a2)"
        [[tenants]]
        id = "b"
        [[tenants.keys]]
        id = "1"
        sha256 = "DIGEST(b1)"
        [[tenants]]
        id = "c"
        cache.isolation = "key"
        [[tenants.keys]]
        id = "1"
        sha256 = "DIGEST(c1)"
        [[tenants.keys]]
        id = "2"
        sha256 = "DIGEST(c2)"
        [[tenants]]
        id = "d"
        cache.isolation = "shared:group"
        [[tenants.keys]]
        id = "1"
        sha256 = "DIGEST(d1)"
        [[tenants]]
        id = "e"
        cache.isolation = "shared:group"
        [[tenants.keys]]
        id = "1"
        sha256 = "DIGEST(e1)""#;
    let server = Server::with(&Setup::default(), tenancy(&with_digests(text)));
    let prompt: Vec<u32> = (1..100).collect();
    let cached = async |key: &str, salt: Option<&str>| {
        let request = json!({ "prompt": prompt, "max_tokens": 1, "cache_salt": salt });
        let usage = complete(&server, key, request).await.ok()["usage"].clone();
        usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0
    };
    for (key, salt, hit) in [
        ("a1", None, false),
        ("a1", None, true),
        ("a2", None, true),
        ("a1", Some("x"), false),
        ("a2", Some("x"), true),
        ("b1", None, false),
        ("c1", None, false),
        ("c2", None, false),
        ("c1", None, true),
        ("d1", None, false),
        ("e1", None, true),
        ("e1", Some("x"), false),
    ] {
        assert_eq!(cached(key, salt).await, hit, "{key} {salt:?}");
    }
}

/// `DIGEST(x)` becomes the SHA-256 of `x`.
fn with_digests(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some(at) = text.find("DIGEST(") {
        let end = at + text[at..].find(')').unwrap();
        let hex = digest(&text[at + 7..end]);
        text.replace_range(at..=end, &hex);
    }
    text
}

/// The SHA-256 of a plain word, by the system's own tool.
pub fn digest(word: &str) -> String {
    let script = format!("printf %s {word} | sha256sum");
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    let hex = String::from_utf8(output.stdout).unwrap();
    hex.split(' ').next().unwrap().to_owned()
}

#[tokio::test]
async fn two_servers_keep_a_common_limit_through_redis() {
    let Some(redis) = RedisServer::start() else { return };
    let start = async || {
        let store = SharedStore::start(&redis.url()).await.unwrap();
        let file = TenantsFile::parse(TENANTS, "tenants.toml").unwrap();
        let tenancy = Tenancy::new(Keys::default(), file, Some(store)).unwrap();
        Server::with(&Setup::default(), tenancy)
    };
    let servers = [start().await, start().await];
    let begin = std::time::Instant::now();
    let (mut admitted, mut refused) = (0, 0);
    for round in 0..30 {
        let answer = complete(&servers[round % 2], "sk-small", body(1)).await;
        match answer.status.as_u16() {
            200 => admitted += 1,
            429 => {
                assert_eq!(code(&answer).2, "rpm");
                assert!(answer.headers.contains_key("retry-after"));
                refused += 1;
            }
            other => panic!("{other}: {}", answer.body),
        }
    }
    let refilled = begin.elapsed().as_secs() + 1;
    assert!((10..=10 + refilled).contains(&admitted), "{admitted} admitted, {refused} refused");
}
