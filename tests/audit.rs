//! The audit log of a whole server: both front ends, rotation by SIGHUP, and nothing lost at the end.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tonic::{Code, Request};

use crate::process::Server;
use crate::tenants::{TenantsFile, connect, generate, with_key};

const TENANTS: &str = r#"
[[tenants]]
id = "acme"
limits = { max_tokens = 50 }
[[tenants.keys]]
id = "k1"
sha256 = "SHA(sk-acme)"
[[tenants.keys]]
id = "reader"
sha256 = "SHA(sk-reader)"
scopes = ["metrics"]
"#;

/// A folder that goes when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("quire-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn records(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(!text.contains("sk-") && !text.contains("Once"), "a key or a prompt: {text}");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn named<'a>(records: &'a [Value], id: &str) -> &'a Value {
    let mut found = records.iter().filter(|record| record["request_id"] == id);
    let record = found.next().unwrap_or_else(|| panic!("no {id} in {records:?}"));
    assert!(found.next().is_none(), "{id} twice");
    record
}

fn with_id<T>(mut request: Request<T>, id: &str) -> Request<T> {
    request.metadata_mut().insert("x-request-id", id.parse().unwrap());
    request
}

// While this thread waits for the server's end, another has to close the client's connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_front_ends_are_recorded_across_rotation_and_shutdown() {
    let (file, folder) = (TenantsFile::with("audit", TENANTS), Folder::new("audit-log"));
    let (log, moved) = (folder.0.join("audit.jsonl"), folder.0.join("audit.jsonl.1"));
    // What every part of the program says of its work is looked at, too.
    let said = folder.0.join("stderr");
    let mut command = Command::new(env!("CARGO_BIN_EXE_quire"));
    command.args(["serve", "--tenants", file.path(), "--audit-log", log.to_str().unwrap()]);
    let server = Server::spawn(command.env("QUIRE_LOG", "trace").stderr(File::create(&said).unwrap()));
    let complete = |id: &str, key: &str, max_tokens: u32| {
        let body =
            json!({ "prompt": "Once", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true });
        let headers = format!("authorization: Bearer {key}\r\nx-request-id: {id}\r\n");
        server.ask_with("POST", "/v1/completions", &headers, &body)
    };
    complete("h-ok", "sk-acme", 5);
    complete("h-wrong", "sk-acme-not", 5);
    let mut client = connect(&server).await;
    client.generate(with_id(with_key(generate(5), "sk-acme", None), "g-ok")).await.unwrap();
    let mut stream = client
        .generate_stream(with_id(with_key(generate(6), "sk-acme", None), "g-stream"))
        .await
        .unwrap()
        .into_inner();
    while stream.message().await.unwrap().is_some() {}
    for (key, max_tokens, code) in [
        ("sk-nobody", 1, Code::Unauthenticated),
        ("sk-reader", 1, Code::PermissionDenied),
        ("sk-acme", 51, Code::ResourceExhausted),
    ] {
        let id = format!("g-{code:?}");
        let status =
            client.generate(with_id(with_key(generate(max_tokens), key, None), &id)).await.unwrap_err();
        assert_eq!(status.code(), code);
    }
    std::fs::rename(&log, &moved).unwrap();
    server.signal("HUP");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !log.exists() {
        assert!(Instant::now() < deadline, "SIGHUP opens the file again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    complete("h-after", "sk-acme", 2);
    // An open connection would be waited for.
    drop((client, stream));
    server.signal("TERM");
    assert_eq!(server.wait(), 0);

    let said = std::fs::read_to_string(said).unwrap();
    assert!(said.contains("TRACE") && !said.contains("sk-"), "a key in the logs");
    let (before, after) = (records(&moved), records(&log));
    assert_eq!(named(&after, "h-after")["completion_tokens"], 2);
    let http = named(&before, "h-ok");
    let grpc = named(&before, "g-ok");
    for field in [
        "tenant",
        "key",
        "ip",
        "model",
        "params_sha256",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
    ] {
        assert_eq!(http[field], grpc[field], "{field}");
        assert_ne!(http[field], Value::Null, "{field}");
    }
    assert_eq!((&http["protocol"], &http["status"]), (&json!("http"), &json!(200)));
    assert_eq!([&grpc["protocol"], &grpc["status"], &grpc["route"]], ["grpc", "OK", "Generate"]);
    assert_eq!(named(&before, "g-stream")["completion_tokens"], 6);
    assert_eq!(named(&before, "h-wrong")["status"], 401);
    // Before a call is let in, its id is the client's as it was sent.
    for (id, status) in [
        ("g-Unauthenticated", "UNAUTHENTICATED"),
        ("g-PermissionDenied", "PERMISSION_DENIED"),
        ("g-ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ] {
        assert_eq!(named(&before, id)["status"], status);
    }
    assert_eq!(named(&before, "g-Unauthenticated")["tenant"], Value::Null);
}
