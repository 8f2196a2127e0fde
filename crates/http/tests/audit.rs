//! The audit log as requests fill it: every one of them is in it, and nothing that must not be.

use std::path::PathBuf;
use std::time::Duration;

use http::Method;
use quire_tenancy::{AuditLog, AuditTarget, Keys, OnFull, Tenancy, TenantsFile};
use serde_json::{Value, json};

use crate::harness::{Server, Setup, ask, eventually};
use crate::tenants::digest;

/// In every key and every text of these tests.
const CANARY: &str = "canary7f3a";

struct Audited {
    server: Server,
    log: AuditLog,
    path: PathBuf,
}

impl Audited {
    fn new(name: &str, setup: &Setup) -> Self {
        let path = std::env::temp_dir().join(format!("quire-http-audit-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let log = AuditLog::open(AuditTarget::File(path.clone()), OnFull::Block).unwrap();
        let text = format!(
            "[[tenants]]\nid = 'a'\nlimits = {{ max_tokens = 200, concurrency = 2 }}\n\
             [[tenants.keys]]\nid = 'k'\nsha256 = '{}'\n\
             [[tenants.keys]]\nid = 'tokens'\nsha256 = '{}'\nscopes = ['tokenize']",
            digest(&format!("sk-{CANARY}")),
            digest(&format!("sk-tok-{CANARY}"))
        );
        let file = TenantsFile::parse(&text, "t.toml").unwrap();
        let tenancy = Tenancy::new(Keys::default(), file, None).unwrap();
        Self { server: Server::audited(setup, tenancy, log.clone()), log, path }
    }

    async fn send(&self, method: Method, path: &str, key: &str, id: &str, body: &str) -> u16 {
        let authorization = format!("Bearer {key}");
        let headers =
            [("authorization", &*authorization), ("content-type", "application/json"), ("x-request-id", id)];
        ask(&self.server.app, method, path, &headers, body).await.status.as_u16()
    }

    async fn text(&self) -> String {
        self.log.flush().await;
        std::fs::read_to_string(&self.path).unwrap()
    }

    /// The record of a request, of which there must be one.
    async fn record(&self, id: &str) -> Value {
        let text = self.text().await;
        let mut found = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let record =
            found.find(|record| record["request_id"] == id).unwrap_or_else(|| panic!("no {id} in {text}"));
        assert!(found.all(|record| record["request_id"] != id), "{id} twice in {text}");
        record
    }
}

impl Drop for Audited {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[tokio::test]
async fn everything_is_recorded_and_no_key_and_no_word_of_a_client_is() {
    let audited = Audited::new("canary", &Setup::default());
    let (key, tok) = (format!("sk-{CANARY}"), format!("sk-tok-{CANARY}"));
    let complete = |more: Value| {
        let mut body = json!({ "prompt": format!("Once {CANARY}"), "max_tokens": 5, "ignore_eos": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let chat = json!({ "messages": [{ "role": "user", "content": CANARY }], "max_tokens": 3 }).to_string();
    let completions = "/v1/completions";
    let nowhere = format!("/{CANARY}?key={key}");
    for (id, method, path, key, body, status, code, route) in [
        (
            "ok",
            "POST",
            completions,
            &*key,
            complete(json!({ "stop": [CANARY] })),
            200,
            "",
            "POST /v1/completions",
        ),
        (
            "stream",
            "POST",
            completions,
            &key,
            complete(json!({ "stream": true })),
            200,
            "",
            "POST /v1/completions",
        ),
        ("chat", "POST", "/v1/chat/completions", &key, chat, 200, "", "POST /v1/chat/completions"),
        (
            "tokenize",
            "POST",
            "/tokenize",
            &tok,
            json!({ "prompt": CANARY }).to_string(),
            200,
            "",
            "POST /tokenize",
        ),
        ("list", "GET", "/v1/models", &key, String::new(), 200, "", "GET /v1/models"),
        (
            "wrong",
            "POST",
            completions,
            &format!("{key}x"),
            complete(json!({})),
            401,
            "invalid_api_key",
            "POST /v1/completions",
        ),
        (
            "scope",
            "POST",
            completions,
            &tok,
            complete(json!({})),
            403,
            "insufficient_scope",
            "POST /v1/completions",
        ),
        (
            "model",
            "POST",
            completions,
            &key,
            complete(json!({ "model": CANARY })),
            404,
            "model_not_found",
            "POST /v1/completions",
        ),
        (
            "large",
            "POST",
            completions,
            &key,
            complete(json!({ "max_tokens": 201 })),
            413,
            "limit_exceeded",
            "POST /v1/completions",
        ),
        (
            "many",
            "POST",
            completions,
            &key,
            complete(json!({ "n": 3 })),
            413,
            "limit_exceeded",
            "POST /v1/completions",
        ),
        (
            "field",
            "POST",
            completions,
            &key,
            complete(json!({ CANARY: 1 })),
            400,
            "unknown_parameter",
            "POST /v1/completions",
        ),
        (
            "torn",
            "POST",
            completions,
            &key,
            format!("{{\"prompt\": \"{CANARY}"),
            400,
            "",
            "POST /v1/completions",
        ),
        ("nowhere", "GET", &nowhere, &key, String::new(), 404, "unknown_url", "GET other"),
        (
            "story",
            "GET",
            &format!("/v1/requests/{CANARY}/timeline"),
            &key,
            String::new(),
            404,
            "request_not_found",
            "GET /v1/requests/{id}/timeline",
        ),
    ] {
        let got = audited.send(method.parse().unwrap(), path, key, id, &body).await;
        assert_eq!(got, status, "{id}");
        let record = audited.record(id).await;
        assert_eq!((&record["status"], &record["route"]), (&json!(status), &json!(route)), "{record}");
        assert_eq!(record["error"].as_str().unwrap_or_default(), code, "{record}");
        let (tenant, key_id) = match id {
            "wrong" => (Value::Null, Value::Null),
            "tokenize" | "scope" => (json!("a"), json!("tokens")),
            _ => (json!("a"), json!("k")),
        };
        assert_eq!((&record["tenant"], &record["key"]), (&tenant, &key_id), "{record}");
        let tokens = ["ok", "stream"].contains(&id).then_some(5);
        if tokens.is_some() {
            assert_eq!(record["completion_tokens"].as_u64(), tokens, "{record}");
            assert_eq!(
                (&record["finish_reason"], &record["model"]),
                (&json!("length"), &json!("quire-demo"))
            );
        }
    }
    let params = async |id| audited.record(id).await["params_sha256"].clone();
    assert!(
        params("ok").await.is_string() && params("ok").await != params("stream").await,
        "one has a stop string"
    );
    assert_eq!(params("model").await, Value::Null);
    let text = audited.text().await;
    assert!(!text.contains(CANARY), "{text}");
}

#[tokio::test]
async fn limits_and_clients_that_leave_are_recorded() {
    let setup = Setup { step: Duration::from_millis(10), ..Setup::default() };
    let audited = Audited::new("leave", &setup);
    let key = format!("sk-{CANARY}");
    let request = json!({ "prompt": CANARY, "max_tokens": 150, "ignore_eos": true, "n": 2 }).to_string();
    let app = audited.server.app.clone();
    let (authorization, held) = (format!("Bearer {key}"), request.clone());
    let leaves = tokio::spawn(async move {
        let headers = [
            ("authorization", &*authorization),
            ("content-type", "application/json"),
            ("x-request-id", "leaves"),
        ];
        ask(&app, Method::POST, "/v1/completions", &headers, &held).await
    });
    let engine = audited.server.llm.engine().clone();
    eventually("both run", || engine.snapshot().num_running == 2).await;
    assert_eq!(audited.send(Method::POST, "/v1/completions", &key, "limited", &request).await, 429);
    let record = audited.record("limited").await;
    assert_eq!((&record["status"], &record["error"]), (&json!(429), &json!("rate_limit_exceeded")));
    leaves.abort();
    audited.server.wait_idle().await;
    let record = audited.record("leaves").await;
    assert_eq!((&record["status"], &record["finish_reason"]), (&Value::Null, &json!("abort")));
    assert!(record["prompt_tokens"].as_u64() > Some(0), "{record}");
}
