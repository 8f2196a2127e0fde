//! Loading, ready, draining, dead; and panics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::Method;
use quire_http::{AppState, HttpConfig, router};
use quire_tenancy::Keys;
use serde_json::json;

use crate::harness::{Server, Setup, ask, loading};

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

#[tokio::test]
async fn health_answers_before_the_model_is_there() {
    let app = router(loading(&Setup::default()));
    for (path, status) in [
        ("/health/live", 200),
        ("/health/ready", 503),
        ("/health/started", 503),
        ("/health", 503),
        ("/ping", 503),
    ] {
        let answer = ask(&app, Method::GET, path, &[], "").await;
        assert_eq!(
            (answer.status.as_u16(), answer.json()),
            (status, json!({ "status": "loading" })),
            "{path}"
        );
    }
    assert_eq!(ask(&app, Method::GET, "/metrics", &[], "").await.status.as_u16(), 200);
    assert_eq!(ask(&app, Method::GET, "/version", &[], "").await.status.as_u16(), 200);
    for (method, path) in
        [(Method::POST, "/v1/completions"), (Method::POST, "/tokenize"), (Method::GET, "/v1/models")]
    {
        let answer = ask(&app, method, path, &JSON, "{}").await;
        assert_eq!(answer.status.as_u16(), 503, "{path}");
        assert_eq!(answer.headers["retry-after"], "1");
        assert!(!answer.headers.contains_key("connection"));
    }
}

#[tokio::test]
async fn a_ready_server_says_so() {
    let server = Server::start(&Setup::default());
    for path in ["/health", "/health/live", "/health/ready", "/health/started", "/ping"] {
        let answer = server.get(path).await;
        assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({ "status": "ready" })), "{path}");
    }
}

#[tokio::test]
async fn draining_refuses_inference_and_answers_probes() {
    let server = Server::start(&Setup::default());
    server.state.lifecycle().drain();
    let answer = server.complete(json!({ "prompt": "x" })).await;
    assert_eq!(answer.status.as_u16(), 503);
    assert_eq!(
        (&answer.headers["retry-after"], &answer.headers["connection"]),
        (&"5".parse().unwrap(), &"close".parse().unwrap())
    );
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("draining"));
    for (path, status) in [("/health/live", 200), ("/health/started", 200), ("/health/ready", 503)] {
        assert_eq!(server.get(path).await.status.as_u16(), status, "{path}");
    }
    server.state.lifecycle().ready(server.llm.clone());
    assert_eq!(server.get("/health").await.status.as_u16(), 503, "there is no way back");
}

#[tokio::test]
async fn a_panic_fails_its_request_only() {
    let broken = Arc::new(AtomicBool::new(true));
    let flag = Arc::clone(&broken);
    let page = Arc::new(move || {
        assert!(!flag.load(Ordering::SeqCst), "the secret words of a panic");
        "fine\n".to_owned()
    });
    let app = router(AppState::new(HttpConfig::new(Keys::default(), page, "0")));
    let answer = ask(&app, Method::GET, "/metrics", &[], "").await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["type"]), (500, &json!("server_error")));
    assert!(!answer.body.contains("secret"));
    broken.store(false, Ordering::SeqCst);
    assert_eq!(ask(&app, Method::GET, "/metrics", &[], "").await.body, "fine\n");
}

#[tokio::test]
async fn request_ids_are_echoed_or_made() {
    let server = Server::start(&Setup::default());
    let id = async |given: &str| {
        let answer = ask(&server.app, Method::GET, "/health", &[("x-request-id", given)], "").await;
        answer.headers["x-request-id"].to_str().unwrap().to_owned()
    };
    assert_eq!(id("trace-1.2_3").await, "trace-1.2_3");
    assert_eq!(id("no spaces please").await.len(), 32);
    assert_eq!(id(&"x".repeat(129)).await.len(), 32);
}
