//! The admin API: who may come in, tenants changed while the server runs, requests ended, the server paused.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use http::Method;
use quire_http::admin::{self, AdminConfig, LogFilter};
use quire_tenancy::{AuditLog, AuditTarget, KeyDigest, Keys, OnFull, Tenancy, TenantsEditor, TenantsFile};
use serde_json::{Value, json};

use crate::harness::{Answer, Server, Setup, ask, eventually};
use crate::tenants::digest;

const TOKEN: &str = "admin-token-5d1";
const KEY: &str = "sk-tenant-5d1";
/// Of a tenant whose key has every scope.
const CHIEF: &str = "sk-chief-5d1";

struct World {
    server: Server,
    admin: Router,
    tenancy: Tenancy,
    log: AuditLog,
    folder: PathBuf,
}

/// Knows two levels.
#[derive(Default)]
struct Filter(Mutex<String>);

impl LogFilter for Filter {
    fn level(&self) -> String {
        self.0.lock().unwrap().clone()
    }

    fn set_level(&self, level: &str) -> Result<(), String> {
        if !["info", "debug"].contains(&level) {
            return Err(format!("`{level}` is no level"));
        }
        level.clone_into(&mut self.0.lock().unwrap());
        Ok(())
    }
}

impl World {
    fn new(name: &str, setup: &Setup) -> Self {
        let folder = std::env::temp_dir().join(format!("quire-admin-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("tenants.toml");
        let text = format!(
            "[[tenants]]\nid = 'a'\n[[tenants.keys]]\nid = 'k'\nsha256 = '{}'\n\
             [[tenants]]\nid = 'chief'\n[[tenants.keys]]\nid = 'k'\nsha256 = '{}'\nscopes = ['admin']\n",
            digest(KEY),
            digest(CHIEF)
        );
        std::fs::write(&path, text).unwrap();
        let file = TenantsFile::read(&path).unwrap();
        let tenancy = Tenancy::new(Keys::default(), file, None).unwrap();
        let log = AuditLog::open(AuditTarget::File(folder.join("audit.jsonl")), OnFull::Block).unwrap();
        let server = Server::audited(setup, tenancy.clone(), log.clone());
        let config = AdminConfig {
            token: KeyDigest::of(TOKEN),
            lifecycle: server.state.lifecycle().clone(),
            tenancy: tenancy.clone(),
            tenants: Some(TenantsEditor::new(path, tenancy.clone())),
            log_filter: Arc::new(Filter::default()),
            tls: None,
            audit: log.clone(),
            settings: json!({ "port": "8000" }),
            version: "1.2.3".into(),
        };
        Self { server, admin: admin::router(config), tenancy, log, folder }
    }

    async fn call_with(&self, method: Method, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let authorization = format!("Bearer {TOKEN}");
        let mut all = vec![("authorization", &*authorization), ("content-type", "application/json")];
        all.extend_from_slice(headers);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        ask(&self.admin, method, path, &all, &body).await
    }

    async fn call(&self, method: Method, path: &str, body: Value) -> Answer {
        self.call_with(method, path, &[], &body).await
    }

    async fn records(&self) -> Vec<Value> {
        self.log.flush().await;
        let text = std::fs::read_to_string(self.folder.join("audit.jsonl")).unwrap();
        assert!(!text.contains(TOKEN) && !text.contains(KEY), "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// A stream that goes on until it is ended.
    fn open(&self, id: &'static str) -> tokio::task::JoinHandle<Answer> {
        let app = self.server.app.clone();
        let body = json!({ "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": true }).to_string();
        tokio::spawn(async move {
            let authorization = format!("Bearer {KEY}");
            let headers = [
                ("authorization", &*authorization),
                ("content-type", "application/json"),
                ("x-request-id", id),
            ];
            ask(&app, Method::POST, "/v1/completions", &headers, &body).await
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn error(answer: &Answer) -> (u16, String, String) {
    let error = &answer.json()["error"];
    let word = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
    (answer.status.as_u16(), word("code"), word("param"))
}

fn slow() -> Setup {
    Setup { step: Duration::from_millis(5), max_num_seqs: 1, ..Setup::default() }
}

const ROUTES: [(Method, &str); 18] = [
    (Method::GET, "/admin/v1/tenants"),
    (Method::GET, "/admin/v1/tenants/a"),
    (Method::PUT, "/admin/v1/tenants/a"),
    (Method::PATCH, "/admin/v1/tenants/a"),
    (Method::DELETE, "/admin/v1/tenants/a"),
    (Method::POST, "/admin/v1/tenants/a/keys"),
    (Method::DELETE, "/admin/v1/tenants/a/keys/k"),
    (Method::GET, "/admin/v1/tenants/a/usage"),
    (Method::GET, "/admin/v1/tenants/a/usage?window=1h"),
    (Method::GET, "/admin/v1/log-level"),
    (Method::POST, "/admin/v1/log-level"),
    (Method::GET, "/admin/v1/requests"),
    (Method::DELETE, "/admin/v1/requests/x"),
    (Method::POST, "/admin/v1/drain"),
    (Method::POST, "/admin/v1/undrain"),
    (Method::POST, "/admin/v1/cache/reset"),
    (Method::GET, "/admin/v1/config"),
    (Method::GET, "/admin/v1/state"),
];

const NOWHERE: [(Method, &str); 5] = [
    (Method::GET, "/"),
    (Method::GET, "/admin/v1/nothing"),
    (Method::POST, "/admin/v1/state"),
    (Method::GET, "/v1/models"),
    (Method::GET, "/metrics"),
];

#[tokio::test]
async fn every_admin_route_needs_the_admin_token() {
    let world = World::new("roles", &Setup::default());
    let file = || std::fs::read_to_string(world.folder.join("tenants.toml")).unwrap();
    let before = file();
    let bearer = |token: &str| format!("Bearer {token}");
    let (wrong, tenant, chief, right) = (bearer("admin-token"), bearer(KEY), bearer(CHIEF), bearer(TOKEN));
    let refused: [&[(&str, &str)]; 7] = [
        &[],
        &[("authorization", &wrong)],
        &[("authorization", &tenant)],
        &[("authorization", &chief)],
        &[("authorization", TOKEN)],
        &[("authorization", &wrong), ("authorization", &right)],
        &[("x-admin-token", TOKEN)],
    ];
    for (method, path) in ROUTES.iter().chain(&NOWHERE) {
        for headers in refused {
            let answer = ask(&world.admin, method.clone(), path, headers, "{}").await;
            assert_eq!(error(&answer), (401, "invalid_api_key".into(), String::new()), "{method} {path}");
        }
    }
    assert_eq!(file(), before);
    assert_eq!(world.server.state.lifecycle().state().name(), "ready");
    // The token opens every one of them, and nothing that is elsewhere.
    for (method, path) in &ROUTES {
        let answer = world.call(method.clone(), path, json!({})).await;
        assert_ne!(answer.status.as_u16(), 401, "{method} {path}");
        assert_ne!(answer.status.as_u16(), 405, "{method} {path}");
    }
    for (method, path) in &NOWHERE {
        let status = world.call(method.clone(), path, Value::Null).await.status.as_u16();
        assert!([404, 405].contains(&status), "{method} {path}: {status}");
    }
    let records = world.records().await;
    assert!(records.iter().all(|record| record["protocol"] == "admin" && record["status"].is_u64()));
    assert_eq!(
        records.len(),
        (ROUTES.len() + NOWHERE.len()) * (refused.len() + 1),
        "each call, refused or not"
    );
}

#[tokio::test]
async fn the_public_port_knows_neither_the_token_nor_the_routes() {
    let world = World::new("public", &Setup::default());
    let token = format!("Bearer {TOKEN}");
    let headers = [("authorization", &*token), ("content-type", "application/json")];
    for (method, path) in [
        (Method::GET, "/v1/models"),
        (Method::GET, "/v1/models/quire-demo"),
        (Method::POST, "/v1/chat/completions"),
        (Method::POST, "/v1/completions"),
        (Method::GET, "/v1/requests/x/timeline"),
        (Method::POST, "/tokenize"),
        (Method::POST, "/detokenize"),
        (Method::GET, "/version"),
        (Method::GET, "/metrics"),
        (Method::GET, "/nothing"),
    ] {
        let answer = ask(&world.server.app, method.clone(), path, &headers, "{}").await;
        assert_eq!(answer.status.as_u16(), 401, "{method} {path}");
    }
    for (method, path) in &ROUTES {
        let answer = ask(&world.server.app, method.clone(), path, &headers, "{}").await;
        assert_eq!(answer.status.as_u16(), 401, "{method} {path}");
        let chief = format!("Bearer {CHIEF}");
        let answer = ask(&world.server.app, method.clone(), path, &[("authorization", &chief)], "{}").await;
        assert_eq!(error(&answer).1, "unknown_url", "{method} {path}");
    }
}

#[tokio::test]
async fn tenants_are_changed_while_the_server_runs() {
    let world = World::new("tenants", &Setup::default());
    let made =
        world.call(Method::PUT, "/admin/v1/tenants/new", json!({ "limits": { "max_tokens": 3 } })).await;
    assert_eq!((made.status.as_u16(), made.json()["keys"].clone()), (201, json!([])));
    let key = world
        .call(Method::POST, "/admin/v1/tenants/new/keys", json!({ "id": "k1", "scopes": ["infer"] }))
        .await;
    assert_eq!(key.status.as_u16(), 201, "{}", key.body);
    let secret = key.json()["key"].as_str().unwrap().to_owned();
    let complete = async |max_tokens: u32| {
        let body = json!({ "prompt": [1, 2], "max_tokens": max_tokens, "ignore_eos": true });
        let headers = [("authorization", &*format!("Bearer {secret}"))];
        world.server.post_with("/v1/completions", &headers, &body).await
    };
    assert_eq!(complete(3).await.status.as_u16(), 200, "at once");
    assert_eq!(error(&complete(4).await), (413, "limit_exceeded".into(), "max_tokens".into()));
    let usage = world.call(Method::GET, "/admin/v1/tenants/new/usage", Value::Null).await.ok();
    let counts =
        ["requests", "prompt_tokens", "completion_tokens", "in_flight", "waiting"].map(|name| &usage[name]);
    assert_eq!(counts, [1, 2, 3, 0, 0]);
    // All of it was in the last minute; how windows are cut is the ledger's own test.
    for window in ["1m", "15m", "1h", "24h"] {
        let path = format!("/admin/v1/tenants/new/usage?window={window}");
        let usage = world.call(Method::GET, &path, Value::Null).await.ok();
        let counts = ["requests", "prompt_tokens", "completion_tokens"].map(|name| &usage[name]);
        assert_eq!(counts, [1, 2, 3]);
        assert!(usage["from"].as_str() <= usage["to"].as_str() && usage["to"].is_string(), "{usage}");
    }
    for (query, param) in [
        ("window=", "window"),
        ("window=0m", "window"),
        ("window=25h", "window"),
        ("window=1d", "window"),
        ("window=-1h", "window"),
        ("window=99999999999999999999h", "window"),
        ("window=1h&window=2h", "window"),
        ("since=1h", "since"),
    ] {
        let path = format!("/admin/v1/tenants/new/usage?{query}");
        let refused = error(&world.call(Method::GET, &path, Value::Null).await);
        assert_eq!((refused.0, &*refused.2), (400, param), "{query}");
    }

    let shown = world.call(Method::GET, "/admin/v1/tenants/new", Value::Null).await;
    let tag = shown.headers["etag"].to_str().unwrap().to_owned();
    assert_eq!(shown.ok()["keys"], json!([{ "id": "k1", "expires": null, "scopes": ["infer"] }]));
    assert!(!shown.body.contains(&secret) && !shown.body.contains(&digest(&secret)), "{}", shown.body);
    let patch = json!({ "limits": { "max_tokens": 9 }, "budget": { "tokens": 20, "period": "month" } });
    let patched =
        world.call_with(Method::PATCH, "/admin/v1/tenants/new", &[("if-match", &tag)], &patch).await;
    assert_eq!(
        (patched.status.as_u16(), patched.json()["limits"].clone()),
        (200, json!({ "max_tokens": 9 }))
    );
    assert_ne!(patched.headers["etag"].to_str().unwrap(), tag);
    for (method, header, value) in [
        (Method::PATCH, "if-match", &*tag),
        (Method::DELETE, "if-match", &tag),
        (Method::PUT, "if-none-match", "*"),
    ] {
        let stale = world.call_with(method, "/admin/v1/tenants/new", &[(header, value)], &json!({})).await;
        assert_eq!(error(&stale), (412, "precondition_failed".into(), String::new()));
    }
    assert_eq!(complete(4).await.status.as_u16(), 200);
    let usage = world.call(Method::GET, "/admin/v1/tenants/new/usage", Value::Null).await.ok();
    assert_eq!((&usage["budget"]["used"], &usage["budget"]["left"]), (&json!(6), &json!(14)));
    assert_eq!(complete(15).await.status.as_u16(), 413);

    let gone = world.call(Method::DELETE, "/admin/v1/tenants/new/keys/k1", Value::Null).await;
    assert_eq!(gone.status.as_u16(), 200, "{}", gone.body);
    assert_eq!(complete(1).await.status.as_u16(), 401);
    let list = world.call(Method::GET, "/admin/v1/tenants", Value::Null).await.ok();
    assert_eq!(list["data"].as_array().unwrap().len(), 3);
    assert_eq!(world.call(Method::DELETE, "/admin/v1/tenants/new", Value::Null).await.status.as_u16(), 204);
    assert_eq!(
        error(&world.call(Method::GET, "/admin/v1/tenants/new", Value::Null).await).1,
        "tenant_not_found"
    );
    assert!(TenantsFile::read(&world.folder.join("tenants.toml")).is_ok());
    assert!(world.tenancy.authenticate(Some(KEY), None).is_ok(), "others are as they were");

    let records = world.records().await;
    let text = serde_json::to_string(&records).unwrap();
    assert!(!text.contains(&secret) && !text.contains(&digest(&secret)), "{text}");
    let changes: Vec<_> = records.iter().filter_map(|record| record["change"]["action"].as_str()).collect();
    let expected = ["tenant.put", "key.add", "tenant.patch", "key.delete", "tenant.delete"];
    assert_eq!(changes, expected);
    let patch = records.iter().find(|record| record["change"]["action"] == "tenant.patch").unwrap();
    assert_eq!(
        (&patch["protocol"], &patch["route"]),
        (&json!("admin"), &json!("PATCH /admin/v1/tenants/{id}"))
    );
    assert_eq!(patch["change"]["before"]["limits"]["max_tokens"], 3);
    assert_eq!(patch["change"]["after"]["limits"]["max_tokens"], 9);
    assert!(
        records.iter().any(|record| record["status"] == 412 && record["change"].is_null()),
        "refusals, too"
    );
}

#[tokio::test]
async fn wrong_changes_name_their_field() {
    let world = World::new("wrong", &Setup::default());
    let authorization = format!("Bearer {TOKEN}");
    let headers = [("authorization", &*authorization), ("content-type", "application/json")];
    for (method, path, body, param) in [
        ("PATCH", "/admin/v1/tenants/a", r#"{"colour": 1}"#, "colour"),
        ("PATCH", "/admin/v1/tenants/a", r#"{"limits": {"rpm": 0}}"#, "rpm"),
        ("PUT", "/admin/v1/tenants/a", r#"{"weight": 1, "weight": 2}"#, "weight"),
        ("PATCH", "/admin/v1/tenants/a", r#"{"limits": {"n": 1, "n": 2}}"#, "n"),
        ("PUT", "/admin/v1/tenants/a", r#"{"keys": []}"#, "keys"),
        ("PUT", "/admin/v1/tenants/A", "{}", "id"),
        ("POST", "/admin/v1/tenants/a/keys", "{}", "id"),
        ("POST", "/admin/v1/tenants/a/keys", r#"{"id": "k"}"#, "id"),
        ("POST", "/admin/v1/tenants/a/keys", r#"{"id": "l", "key": "mine"}"#, "key"),
        ("POST", "/admin/v1/tenants/a/keys", r#"{"id": "l", "expires": "soon"}"#, "expires"),
    ] {
        let answer = ask(&world.admin, method.parse().unwrap(), path, &headers, body).await;
        let (status, _, got) = error(&answer);
        assert!(status == 400 && got.ends_with(param), "{method} {path} {body}: {}", answer.body);
    }
    let torn = ask(&world.admin, Method::PATCH, "/admin/v1/tenants/a", &headers, "{").await;
    assert_eq!(torn.status.as_u16(), 400);
    let plain = [("authorization", &*authorization), ("content-type", "text/plain")];
    let answer = ask(&world.admin, Method::PATCH, "/admin/v1/tenants/a", &plain, "{}").await;
    assert_eq!(answer.status.as_u16(), 415);
}

#[tokio::test]
async fn requests_are_listed_and_ended() {
    let world = World::new("requests", &slow());
    let engine = world.server.llm.engine().clone();
    let runs = world.open("first");
    eventually("it has tokens", || {
        world.server.llm.live_requests().iter().any(|live| live.completion_tokens > 2)
    })
    .await;
    let waits = world.open("second");
    eventually("one waits", || engine.snapshot().num_waiting == 1).await;
    let list = world.call(Method::GET, "/admin/v1/requests", Value::Null).await.ok();
    let [first, second] = &list["data"].as_array().unwrap()[..] else { panic!("two: {list}") };
    assert_eq!([&first["id"], &first["tenant"], &first["state"]], ["first", "a", "running"], "{list}");
    assert_eq!(
        [&second["id"], &second["state"], &second["waits_for"]],
        ["second", "waiting", "batch_full"],
        "{list}"
    );
    assert_eq!((&first["prompt_tokens"], &second["completion_tokens"]), (&json!(3), &json!(0)));
    assert!(first["completion_tokens"].as_u64() > Some(2), "{list}");
    let ended = world.call(Method::DELETE, "/admin/v1/requests/first", Value::Null).await.ok();
    assert_eq!(ended, json!({ "id": "first", "aborted": 1 }));
    let answer = runs.await.unwrap();
    assert_eq!((answer.status.as_u16(), error(&answer).1), (499, "cancelled".into()), "{}", answer.body);
    eventually("the other one runs", || {
        engine.snapshot().num_running == 1 && engine.snapshot().num_waiting == 0
    })
    .await;
    let absent = world.call(Method::DELETE, "/admin/v1/requests/first", Value::Null).await;
    assert_eq!(error(&absent).1, "request_not_found");
    waits.abort();
    world.server.wait_idle().await;
    assert_eq!(world.call(Method::GET, "/admin/v1/requests", Value::Null).await.ok()["data"], json!([]));
    let records = world.records().await;
    let abort = records.iter().find(|record| record["change"]["action"] == "request.abort").unwrap();
    assert_eq!(
        abort["change"],
        json!({ "action": "request.abort", "request_id": "first", "tenants": ["a"] })
    );
}

#[tokio::test]
async fn a_drain_lets_running_answers_finish_and_can_be_undone() {
    let world = World::new("drain", &Setup { step: Duration::from_millis(1), ..Setup::default() });
    let runs = world.open("runs");
    let engine = world.server.llm.engine().clone();
    eventually("it runs", || engine.snapshot().num_running == 1).await;
    let drained = world.call(Method::POST, "/admin/v1/drain", Value::Null).await.ok();
    assert_eq!((&drained["state"], &drained["running"]), (&json!("draining"), &json!(1)));
    let refused = world.open("refused").await.unwrap();
    assert_eq!((refused.status.as_u16(), &refused.headers["connection"]), (503, &"close".parse().unwrap()));
    assert_eq!(world.server.get("/health/ready").await.status.as_u16(), 503);
    assert_eq!(world.server.get("/health/live").await.status.as_u16(), 200);
    assert_eq!(runs.await.unwrap().status.as_u16(), 200, "to its end");
    for _ in 0..2 {
        let state = world.call(Method::POST, "/admin/v1/undrain", Value::Null).await.ok();
        assert_eq!(state["state"], "ready", "twice is once");
    }
    assert_eq!(world.open("again").await.unwrap().status.as_u16(), 200);
    // A server that is to end does not come back.
    world.server.state.lifecycle().drain();
    let answer = world.call(Method::POST, "/admin/v1/undrain", Value::Null).await;
    assert_eq!(error(&answer), (409, "conflict".into(), String::new()));
    let state = world.call(Method::GET, "/admin/v1/state", Value::Null).await.ok();
    assert_eq!((&state["state"], &state["version"]), (&json!("draining"), &json!("1.2.3")));
    assert_eq!(
        world.call(Method::GET, "/admin/v1/config", Value::Null).await.ok(),
        json!({ "port": "8000" })
    );
}

#[tokio::test]
async fn after_a_reset_nothing_is_found_in_the_cache() {
    let world = World::new("cache", &Setup::default());
    let prompt: Vec<u32> = (1..100).collect();
    let cached = async || {
        let body = json!({ "prompt": prompt, "max_tokens": 1 });
        let headers = [("authorization", &*format!("Bearer {KEY}"))];
        let usage = world.server.post_with("/v1/completions", &headers, &body).await.ok()["usage"].clone();
        usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!((cached().await, cached().await > 0), (0, true));
    assert_eq!(world.call(Method::POST, "/admin/v1/cache/reset", Value::Null).await.status.as_u16(), 204);
    assert_eq!((cached().await, cached().await > 0), (0, true));
}

#[tokio::test]
async fn the_log_level_is_changed_while_the_server_runs() {
    let world = World::new("log-level", &Setup::default());
    let path = "/admin/v1/log-level";
    let set = async |body: Value| world.call(Method::POST, path, body).await;
    assert_eq!(set(json!({ "level": "info" })).await.ok(), json!({ "level": "info" }));
    assert_eq!(set(json!({ "level": "debug" })).await.ok(), json!({ "level": "debug" }));
    for (body, param) in [
        (json!({}), "level"),
        (json!({ "level": 3 }), "level"),
        (json!({ "level": "verbose" }), "level"),
        (json!({ "level": "info", "for": "1h" }), "for"),
    ] {
        let refused = error(&set(body).await);
        assert_eq!((refused.0, &*refused.2), (400, param));
    }
    assert_eq!(world.call(Method::GET, path, Value::Null).await.ok(), json!({ "level": "debug" }));
    let records = world.records().await;
    let changes: Vec<_> =
        records.iter().map(|record| &record["change"]).filter(|change| !change.is_null()).collect();
    assert_eq!(changes.len(), 2, "{changes:?}");
    assert_eq!(*changes[1], json!({ "action": "log.level", "before": "info", "after": "debug" }));
}
