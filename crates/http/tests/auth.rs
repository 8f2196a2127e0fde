//! Every route with every kind of credential.

use http::Method;

use crate::harness::{Answer, Server, Setup, ask};

const KEYED: Setup = Setup {
    keys: &["sk-one", "sk-two"],
    step: std::time::Duration::ZERO,
    max_num_seqs: 4,
    max_queued_requests: 4,
    num_blocks: 1024,
    keep_alive: std::time::Duration::from_secs(10),
    fails_at: None,
    metrics_without_key: false,
    adapters: &[],
};

const OPEN: [(Method, &str); 6] = [
    (Method::GET, "/health"),
    (Method::GET, "/health/live"),
    (Method::GET, "/health/ready"),
    (Method::GET, "/health/started"),
    (Method::GET, "/ping"),
    (Method::POST, "/ping"),
];

/// Also paths that lead nowhere, and other spellings of those that lead somewhere.
const GUARDED: [(Method, &str); 22] = [
    (Method::GET, "/v1/models"),
    (Method::GET, "/v1/models/quire-demo"),
    (Method::POST, "/v1/chat/completions"),
    (Method::POST, "/v1/completions"),
    (Method::POST, "/tokenize"),
    (Method::POST, "/detokenize"),
    (Method::GET, "/version"),
    (Method::GET, "/metrics"),
    (Method::GET, "/"),
    (Method::GET, "/nothing/here"),
    (Method::PUT, "/v1/completions"),
    (Method::OPTIONS, "/v1/completions"),
    (Method::HEAD, "/v1/models"),
    (Method::GET, "//v1/models"),
    (Method::GET, "/v1/models/"),
    (Method::GET, "/health/../v1/models"),
    (Method::GET, "/health/%2e%2e/v1/models"),
    (Method::GET, "/v1/%6dodels"),
    (Method::GET, "/V1/models"),
    (Method::GET, "/health/"),
    (Method::GET, "/v1/models?key=sk-one"),
    (Method::GET, "http://health/v1/models"),
];

async fn with(server: &Server, method: &Method, path: &str, headers: &[(&str, &str)]) -> Answer {
    ask(&server.app, method.clone(), path, headers, "").await
}

#[tokio::test]
async fn only_health_is_open_once_there_is_a_key() {
    let server = Server::start(&KEYED);
    let wrong: [&[(&str, &str)]; 8] = [
        &[],
        &[("authorization", "Bearer sk-three")],
        &[("authorization", "Bearer sk-on")],
        &[("authorization", "Bearer")],
        &[("authorization", "sk-one")],
        &[("authorization", "Basic sk-one")],
        &[("authorization", "Bearer sk-three"), ("authorization", "Bearer sk-one")],
        &[("host", "health"), ("x-original-url", "/health"), ("x-forwarded-for", "127.0.0.1")],
    ];
    for (method, path) in &GUARDED {
        for headers in wrong {
            let answer = with(&server, method, path, headers).await;
            assert_eq!(answer.status.as_u16(), 401, "{method} {path} {headers:?}");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            if *method != Method::HEAD {
                assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
            }
        }
        for key in ["Bearer sk-one", "bearer sk-two"] {
            let answer = with(&server, method, path, &[("authorization", key)]).await;
            assert_ne!(answer.status.as_u16(), 401, "{method} {path}");
        }
    }
    for (method, path) in &OPEN {
        for headers in wrong {
            assert_eq!(with(&server, method, path, headers).await.status.as_u16(), 200, "{method} {path}");
        }
    }
}

#[tokio::test]
async fn metrics_may_be_opened_and_nothing_else_is() {
    let server = Server::start(&Setup { metrics_without_key: true, ..KEYED });
    let page = server.get("/metrics").await;
    assert_eq!((page.status.as_u16(), page.body.as_str()), (200, "quire_up 1\n"));
    assert_eq!(page.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(server.get("/v1/models").await.status.as_u16(), 401);
}

#[tokio::test]
async fn without_keys_nobody_needs_one() {
    let server = Server::start(&Setup::default());
    for path in ["/v1/models", "/version", "/metrics"] {
        assert_eq!(server.get(path).await.status.as_u16(), 200, "{path}");
    }
    assert_eq!(server.get("/version").await.json(), serde_json::json!({ "version": "1.2.3" }));
}
