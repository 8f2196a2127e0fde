//! The admin API of a whole server: where it listens, what it hides, and that it and the public ports are two worlds.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tonic::Code;

use crate::process::Server;
use crate::tenants::{TenantsFile, connect, generate, with_key};

const TOKEN: &str = "0123456789-admin-token";
const TENANTS: &str = "[[tenants]]\nid = 'acme'\n[[tenants.keys]]\nid = 'k1'\nsha256 = 'SHA(sk-acme)'\n";

/// Status and JSON body.
fn call(address: &str, method: &str, path: &str, token: &str, body: &Value) -> (String, Value) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().to_owned(), serde_json::from_str(body).unwrap_or_default())
}

#[tokio::test]
async fn it_has_its_own_door_and_the_public_ones_do_not_know_its_token() {
    let file = TenantsFile::with("admin", TENANTS);
    let mut command = Command::new(env!("CARGO_BIN_EXE_quire"));
    command.args([
        "serve",
        "--executor",
        "mock",
        "--mock-step-time",
        "5ms",
        "--tenants",
        file.path(),
        "--admin-addr",
        "127.0.0.1:0",
    ]);
    let said = std::env::temp_dir().join(format!("quire-admin-said-{}", std::process::id()));
    command.args(["--api-key", "s3cret-api-key"]).env("QUIRE_ADMIN_TOKEN", TOKEN).env("QUIRE_LOG", "warn");
    let server = Server::spawn(command.stderr(std::fs::File::create(&said).unwrap()));
    let line = server.announced.lines().find_map(|line| line.strip_prefix("admin    http://"));
    let admin = line.expect("it says where it listens").to_owned();

    let (status, settings) = call(&admin, "GET", "/admin/v1/config", TOKEN, &Value::Null);
    assert_eq!(
        (status.as_str(), &settings["executor"], &settings["port"]),
        ("200", &json!("mock"), &json!("0"))
    );
    let text = settings.to_string();
    assert!(!text.contains("s3cret") && !text.contains(TOKEN), "{text}");
    assert_eq!((&settings["api_key"], &settings["admin_token"]), (&json!("***"), &json!("***")));
    for wrong in ["", "s3cret-api-key", "sk-acme"] {
        assert_eq!(call(&admin, "GET", "/admin/v1/state", wrong, &Value::Null).0, "401", "{wrong:?}");
    }
    assert_eq!(call(server.http(), "GET", "/admin/v1/state", TOKEN, &Value::Null).0, "401");
    assert_eq!(call(server.http(), "GET", "/admin/v1/state", "s3cret-api-key", &Value::Null).0, "404");
    let mut client = connect(&server).await;
    let refused = client.generate(with_key(generate(1), TOKEN, None)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);

    // Nothing is worth a warning so far; then every connection is.
    let lines = || std::fs::read_to_string(&said).unwrap();
    assert!(!lines().contains("INFO"), "{}", lines());
    assert_eq!(call(&admin, "POST", "/admin/v1/log-level", TOKEN, &json!({ "level": "loud" })).0, "400");
    let level = json!({ "level": "warn,quire_http=debug" });
    assert_eq!(call(&admin, "POST", "/admin/v1/log-level", TOKEN, &level), ("200".into(), level.clone()));
    // A client that speaks no HTTP.
    TcpStream::connect(server.http()).unwrap().write_all(b"hello\r\n\r\n").unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !lines().contains("DEBUG") {
        assert!(Instant::now() < deadline, "no line of the new level: {}", lines());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(call(&admin, "GET", "/admin/v1/log-level", TOKEN, &Value::Null).1, level);

    // A key that was made here opens the gRPC front end at once.
    let (status, key) = call(&admin, "POST", "/admin/v1/tenants/acme/keys", TOKEN, &json!({ "id": "k2" }));
    assert_eq!(status, "201", "{key}");
    let key = key["key"].as_str().unwrap();
    client.generate(with_key(generate(3), key, None)).await.unwrap();
    let (_, usage) = call(&admin, "GET", "/admin/v1/tenants/acme/usage", TOKEN, &Value::Null);
    assert_eq!((&usage["requests"], &usage["completion_tokens"]), (&json!(1), &json!(3)));

    // A stream that somebody ends.
    let mut request = with_key(generate(1900), key, None);
    request.metadata_mut().insert("x-request-id", "too-long".parse().unwrap());
    let mut stream = client.generate_stream(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let (status, ended) = call(&admin, "DELETE", "/admin/v1/requests/too-long", TOKEN, &Value::Null);
    assert_eq!((status.as_str(), &ended["aborted"]), ("200", &json!(1)));
    let cancelled = loop {
        match stream.message().await {
            Ok(chunk) => assert!(chunk.is_some(), "it did not come to its end"),
            Err(status) => break status,
        }
    };
    assert_eq!(cancelled.code(), Code::Cancelled, "{cancelled:?}");

    assert_eq!(call(&admin, "POST", "/admin/v1/drain", TOKEN, &Value::Null).1["state"], "draining");
    eventually_in_state(&server, "draining");
    let draining = client.generate(with_key(generate(1), key, None)).await.unwrap_err();
    assert_eq!(draining.code(), Code::Unavailable);
    assert_eq!(call(&admin, "POST", "/admin/v1/undrain", TOKEN, &Value::Null).0, "200");
    client.generate(with_key(generate(1), key, None)).await.unwrap();
    eventually_in_state(&server, "ready");
    std::fs::remove_file(said).unwrap();
}

/// Waits until the metrics page says so.
fn eventually_in_state(server: &Server, state: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (_, page) =
            server.ask_with("GET", "/metrics", "authorization: Bearer s3cret-api-key\r\n", &Value::Null);
        let line = format!("state=\"{state}\"}} 1");
        if page.lines().any(|series| series.starts_with("quire_engine_state{") && series.ends_with(&line)) {
            return;
        }
        assert!(Instant::now() < deadline, "never {state}: {page}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_token_that_is_no_secret_keeps_the_server_from_starting() {
    let file = TenantsFile::with("admin-token", TENANTS);
    for (args, part) in [
        (["--admin-token", "short"], "at least 16"),
        (["--admin-token", "s3cret-api-key-long"], "is --api-key, too"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_quire"))
            .args(["serve", "--port", "0", "--grpc-port", "0", "--admin-addr", "127.0.0.1:0"])
            .args(["--api-key", "s3cret-api-key-long", "--tenants", file.path()])
            .args(args)
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains(part), "{message}");
    }
}
