//! Tenants as an operator sets them up and their clients meet them: `quire serve --tenants`, over HTTP and gRPC.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use quire_grpc::proto::inference_client::InferenceClient;
use quire_grpc::proto::{self, generate_request::Prompt};
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use crate::process::Server;
use crate::redis::RedisServer;

/// Keys: sk-acme, sk-reader (scopes tokenize and metrics), sk-elsewhere, sk-other. Digests by `printf %s KEY | sha256sum`.
const TENANTS: &str = r#"
[[tenants]]
id = "acme"
priority = 1
weight = 4
models = ["quire-*"]
[tenants.limits]
rpm = 60
output_tpm = 1200
max_tokens = 150
kv_blocks_share = 0.5
[[tenants.keys]]
id = "k1"
sha256 = "SHA(sk-acme)"
[[tenants.keys]]
id = "reader"
sha256 = "SHA(sk-reader)"
scopes = ["tokenize", "metrics"]

[[tenants]]
id = "elsewhere"
ip_allow = ["192.0.2.0/24"]
[[tenants.keys]]
id = "k1"
sha256 = "SHA(sk-elsewhere)"

[[tenants]]
id = "bystander"
ip_allow = ["127.0.0.1"]
models = ["another"]
[[tenants.keys]]
id = "k1"
sha256 = "SHA(sk-other)"
"#;

/// A tenants file that goes when it is dropped.
pub struct TenantsFile(PathBuf);

impl TenantsFile {
    fn new(name: &str) -> Self {
        Self::with(name, TENANTS)
    }

    /// `SHA(KEY)` becomes the digest of a key that is known here.
    pub fn with(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("quire-{name}-{}.toml", std::process::id()));
        let file = Self(path);
        file.write(text);
        file
    }

    fn write(&self, text: &str) {
        let digests = [
            ("sk-acme", "5f8eee912cd7c0ccb238560e8a22e7f78909e6dac18288188f7f4ea35112700d"),
            ("sk-reader", "8cdaaa8b381cbde70435d50a258849ac07086097c8ea3f38aa4db74a0e3c58ae"),
            ("sk-other", "3dcad332ca200026cb05197382714c13fbe0737dee3d327981a235067882d2d3"),
            ("sk-elsewhere", "9718e764321c503a887c26ba03fbf9de5630a132a5537626687ad7a5ae2ebc45"),
        ];
        let text = digests
            .iter()
            .fold(text.to_owned(), |text, (key, hex)| text.replace(&format!("SHA({key})"), hex));
        std::fs::write(&self.0, text).unwrap();
    }

    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TenantsFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn complete(server: &Server, key: &str, max_tokens: u32) -> (String, String) {
    let body = json!({ "prompt": "Once", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true });
    server.ask_with("POST", "/v1/completions", &format!("authorization: Bearer {key}\r\n"), &body)
}

pub fn status_of((head, _): &(String, String)) -> &str {
    head.split(' ').nth(1).unwrap()
}

/// A gRPC request with a key, and with a deadline if there is one.
pub fn with_key<T>(message: T, key: &str, timeout_ms: Option<u64>) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    if let Some(ms) = timeout_ms {
        request.metadata_mut().insert("grpc-timeout", format!("{ms}m").parse().unwrap());
    }
    request
}

pub fn generate(max_tokens: u32) -> proto::GenerateRequest {
    proto::GenerateRequest {
        prompt: Some(Prompt::Text("Once".into())),
        sampling: Some(proto::Sampling { temperature: Some(0.0), ..Default::default() }),
        stopping: Some(proto::Stopping {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub async fn connect(server: &Server) -> InferenceClient<Channel> {
    InferenceClient::connect(server.grpc_url()).await.unwrap()
}

pub fn metadata<'a>(status: &'a Status, name: &str) -> &'a str {
    status.metadata().get(name).unwrap_or_else(|| panic!("no {name} in {status:?}")).to_str().unwrap()
}

#[tokio::test]
async fn grpc_has_a_status_for_every_refusal() {
    let file = TenantsFile::new("grpc");
    let server = Server::start(&["--tenants", file.path()]);
    let mut client = connect(&server).await;
    let response = client.generate(with_key(generate(5), "sk-acme", None)).await.unwrap();
    assert_eq!(response.metadata().get("x-ratelimit-limit-requests").unwrap(), "60");
    assert_eq!(response.metadata().get("x-ratelimit-limit-tokens").unwrap(), "1200");
    assert_eq!(response.into_inner().usage.unwrap().completion_tokens, 5);
    let stream = client.generate_stream(with_key(generate(5), "sk-acme", None)).await.unwrap();
    assert!(stream.metadata().contains_key("x-ratelimit-remaining-tokens"));
    drop(stream);

    let named = |model: &str| proto::GenerateRequest { model: model.into(), ..generate(1) };
    for (request, code, part) in [
        (Request::new(generate(1)), Code::Unauthenticated, "no API key"),
        (with_key(generate(1), "sk-nobody", None), Code::Unauthenticated, "not valid"),
        (with_key(generate(1), "sk-reader", None), Code::PermissionDenied, "`infer`"),
        (with_key(generate(1), "sk-elsewhere", None), Code::PermissionDenied, "from this address"),
        (with_key(generate(151), "sk-acme", None), Code::ResourceExhausted, "max_tokens = 150"),
        (with_key(generate(1), "sk-other", None), Code::NotFound, "no model for this key"),
        (with_key(named("quire-demo"), "sk-other", None), Code::NotFound, "`quire-demo` does not exist"),
        (with_key(named("absent"), "sk-acme", None), Code::NotFound, "`absent` does not exist"),
    ] {
        let status = client.generate(request).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(part), "{status:?}");
    }
    let over_http = complete(&server, "sk-elsewhere", 1);
    assert!(status_of(&over_http) == "403" && over_http.1.contains("forbidden_address"), "{over_http:?}");
    let info = with_key(proto::GetModelInfoRequest {}, "sk-other", None);
    assert_eq!(client.get_model_info(info).await.unwrap_err().code(), Code::NotFound);
    let text = proto::TokenizeRequest { text: "a b".into(), no_special_tokens: true };
    client.tokenize(with_key(text, "sk-reader", None)).await.unwrap();
}

#[tokio::test]
async fn grpc_limits_tell_when_to_come_again_and_settle_on_deadlines() {
    let file = TenantsFile::new("grpc-limits");
    let server = Server::start(&["--tenants", file.path()]);
    let mut client = connect(&server).await;
    // 200 tokens at once; 150 of them are reserved and the deadline passes long before they are made.
    let late = client.generate(with_key(generate(150), "sk-acme", Some(1))).await.unwrap_err();
    assert!([Code::DeadlineExceeded, Code::Cancelled].contains(&late.code()), "{late:?}");
    let refused = loop {
        match client.generate(with_key(generate(150), "sk-acme", None)).await {
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("output_tpm = 1200"), "{refused:?}");
    let seconds: u64 = metadata(&refused, "retry-after").parse().unwrap();
    let delay = refused.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(delay <= Duration::from_secs(seconds) && seconds <= 10, "{delay:?} {seconds}");
    assert_eq!(metadata(&refused, "x-ratelimit-limit-tokens"), "1200");
    // Both front ends count in the same book.
    let over_http = complete(&server, "sk-acme", 150);
    assert_eq!(status_of(&over_http), "429", "{over_http:?}");
    assert!(
        over_http.0.contains("retry-after: ") && over_http.1.contains("\"param\":\"output_tpm\""),
        "{over_http:?}"
    );
}

#[test]
fn a_changed_file_is_taken_and_a_broken_one_is_not() {
    let file = TenantsFile::new("reload");
    let server = Server::start(&["--tenants", file.path()]);
    assert_eq!(status_of(&complete(&server, "sk-acme", 2)), "200");
    let page = |what: &str| {
        let (head, page) =
            server.ask_with("GET", "/metrics", "authorization: Bearer sk-reader\r\n", &Value::Null);
        assert!(head.contains(" 200 "), "{head}");
        let line = page.lines().find(|line| line.starts_with(what));
        line.unwrap_or_else(|| panic!("no {what}")).rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let eventually = |what: &str, holds: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(Instant::now() < deadline, "it never happened: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    assert_eq!(page("quire_tenant_requests_total{tenant=\"acme\",outcome=\"completed\"}"), 1.0);
    assert_eq!(page("quire_tenant_tokens_total{tenant=\"acme\",kind=\"output\"}"), 2.0);
    assert_eq!(page("quire_tenant_running{tenant=\"acme\"}"), 0.0);
    assert_eq!(page("quire_tenant_waiting{tenant=\"acme\"}"), 0.0);
    assert_eq!(page("quire_tenant_queue_seconds_count{tenant=\"acme\"}"), 1.0);
    file.write("[[tenants]]\nid = 'acme'\ncolour = 1\n");
    eventually("the error is counted", &|| page("quire_tenants_reloads_total{result=\"error\"}") == 1.0);
    assert_eq!(status_of(&complete(&server, "sk-acme", 2)), "200", "the old tenants stay");
    file.write(&TENANTS.replace("max_tokens = 150", "max_tokens = 1"));
    eventually("the change is taken", &|| page("quire_tenants_reloads_total{result=\"ok\"}") == 1.0);
    let (head, body) = complete(&server, "sk-acme", 2);
    assert!(head.contains(" 413 ") && body.contains("\"param\":\"max_tokens\""), "{head}\n{body}");
}

#[test]
fn a_wrong_file_keeps_the_server_from_starting() {
    let file = TenantsFile::new("wrong");
    file.write("[[tenants]]\nid = 'acme'\n[tenants.limits]\nrpm = 0\n");
    for (args, part) in [
        (&[][..], ".toml:4: rpm: must be between 1"),
        (&["--tenants", "/nowhere.toml"], "--tenants: /nowhere.toml: "),
        (&["--quota-store", "memcached://x"][..], "--quota-store: must be `memory` or redis://"),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_quire"))
            .args(["serve", "--port", "0", "--grpc-port", "0"])
            .env("QUIRE_TENANTS", file.path())
            .args(args)
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains(part), "{message}");
    }
}

#[test]
fn servers_with_one_quota_store_keep_one_limit() {
    let Some(redis) = RedisServer::start() else { return };
    let file = TenantsFile::new("shared");
    let start = || Server::start(&["--tenants", file.path(), "--quota-store", &redis.url()]);
    let servers = [start(), start()];
    let begin = Instant::now();
    let answers: Vec<_> = (0..24).map(|at| complete(&servers[at % 2], "sk-acme", 1)).collect();
    let refilled = begin.elapsed().as_secs() as usize + 1;
    let admitted = answers.iter().filter(|answer| status_of(answer) == "200").count();
    assert!((10..=10 + refilled).contains(&admitted), "{admitted} admitted");
    assert!(answers.iter().all(|answer| ["200", "429"].contains(&status_of(answer))), "{answers:?}");
}
