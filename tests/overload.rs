//! A full queue, and what became of a request, as two tenants meet them over both front ends.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use quire_grpc::proto;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::process::Server;
use crate::tenants::{TenantsFile, connect, generate, metadata, status_of, with_key};

const TENANTS: &str = r#"
[[tenants]]
id = "live"
priority = 1
[[tenants.keys]]
id = "k"
sha256 = "SHA(sk-acme)"

[[tenants]]
id = "batch"
priority = -1
[[tenants.keys]]
id = "k"
sha256 = "SHA(sk-other)"

[[tenants]]
id = "operations"
[[tenants.keys]]
id = "all"
sha256 = "SHA(sk-reader)"
scopes = ["admin"]
[[tenants.keys]]
id = "tokens"
sha256 = "SHA(sk-elsewhere)"
scopes = ["tokenize"]
"#;

const LIVE: &str = "sk-acme";
const BATCH: &str = "sk-other";
const ADMIN: &str = "sk-reader";

/// One place in the batch, four in the queue, and steps that take their time.
fn start(file: &TenantsFile) -> Server {
    let slow = [
        "--executor",
        "mock",
        "--mock-step-time",
        "20ms",
        "--max-num-seqs",
        "1",
        "--max-queued-requests",
        "4",
    ];
    let args = [&["--tenants", file.path()], &slow[..]].concat();
    Server::start(&args)
}

/// Sends a request of a thousand tokens and does not wait for its answer.
fn send(server: &Server, key: &str) -> TcpStream {
    let body = json!({ "prompt": "Once", "max_tokens": 1000, "ignore_eos": true });
    server.open_with("POST", "/v1/completions", &format!("authorization: Bearer {key}\r\n"), &body)
}

fn answer(mut stream: TcpStream) -> (String, String) {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

/// Waits until so many wait behind the one that runs.
async fn until_waiting(server: &Server, number: f64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (_, page) =
            server.ask_with("GET", "/metrics", &format!("authorization: Bearer {ADMIN}\r\n"), &Value::Null);
        let value = |series: &str| -> f64 {
            let line = page.lines().find(|line| line.starts_with(series)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        if value("quire_requests_running{") == 1.0 && value("quire_requests_waiting{") == number {
            return;
        }
        assert!(Instant::now() < deadline, "never {number} waiting");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn assert_shed_over_http(answer: &(String, String)) {
    let body: Value = serde_json::from_str(&answer.1).unwrap();
    assert_eq!(
        (status_of(answer), &body["error"]["code"]),
        ("429", &json!("rate_limit_exceeded")),
        "{answer:?}"
    );
    assert_eq!(body["error"]["param"], Value::Null, "no limit of the tenant's is the reason");
    let line = answer.0.lines().find_map(|line| line.strip_prefix("retry-after: "));
    assert!(line.unwrap().parse::<u64>().unwrap() >= 1, "{answer:?}");
}

fn assert_shed_over_grpc(status: &Status) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let seconds: u64 = metadata(status, "retry-after").parse().unwrap();
    let delay = status.get_details_retry_info().expect("RetryInfo").retry_delay.unwrap();
    assert!(delay > Duration::ZERO && delay <= Duration::from_secs(seconds), "{delay:?} {seconds}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_sheds_the_lowest_priority_over_both_front_ends() {
    let file = TenantsFile::with("shed", TENANTS);
    let server = start(&file);
    let client = connect(&server).await;
    let call = |key: &'static str| {
        let mut client = client.clone();
        tokio::spawn(async move { client.generate(with_key(generate(1000), key, None)).await })
    };
    let mut held = vec![send(&server, LIVE)];
    until_waiting(&server, 0.0).await;
    let older = call(BATCH);
    until_waiting(&server, 1.0).await;
    let newer = send(&server, BATCH);
    until_waiting(&server, 2.0).await;
    // Half of the queue is all that they may fill.
    assert_shed_over_http(&answer(send(&server, BATCH)));
    assert_shed_over_grpc(&call(BATCH).await.unwrap().unwrap_err());
    for number in [3.0, 4.0] {
        held.push(send(&server, LIVE));
        until_waiting(&server, number).await;
    }
    // Each newcomer takes the place of the newest that may wait longer.
    held.push(send(&server, LIVE));
    assert_shed_over_http(&answer(newer));
    until_waiting(&server, 4.0).await;
    let fourth = call(LIVE);
    assert_shed_over_grpc(&older.await.unwrap().unwrap_err());
    until_waiting(&server, 4.0).await;
    // Among equals who came first stays.
    assert_shed_over_http(&answer(send(&server, LIVE)));
    assert_shed_over_grpc(&call(LIVE).await.unwrap().unwrap_err());
    fourth.abort();
}

#[tokio::test]
async fn grpc_tells_a_timeline_to_whom_it_belongs() {
    let file = TenantsFile::with("timeline", TENANTS);
    let server = Server::start(&["--tenants", file.path(), "--executor", "mock"]);
    let mut client = connect(&server).await;
    let mut request = with_key(generate(5), LIVE, None);
    request.metadata_mut().insert("x-request-id", "mine-1".parse().unwrap());
    client.generate(request).await.unwrap();
    let ask = |id: &str, key: &str| with_key(proto::GetRequestTimelineRequest { id: id.into() }, key, None);
    for key in [LIVE, ADMIN] {
        let timeline = client.get_request_timeline(ask("mine-1", key)).await.unwrap().into_inner();
        let [accepted] = &timeline.accepted[..] else { panic!("one request: {timeline:?}") };
        assert_eq!((timeline.id.as_str(), timeline.refused.len()), ("mine-1", 0));
        assert_eq!((accepted.state.as_str(), accepted.finish_reason.as_str()), ("ended", "length"));
        assert_eq!(accepted.completion_tokens, 5);
        let events: Vec<_> = accepted.events.iter().map(|event| event.event.as_str()).collect();
        assert_eq!((events.first(), events.last()), (Some(&"received"), Some(&"ended")), "{events:?}");
    }
    let other = client.get_request_timeline(ask("mine-1", BATCH)).await.unwrap_err();
    let nothing = client.get_request_timeline(ask("mine-2", BATCH)).await.unwrap_err();
    assert_eq!((other.code(), nothing.code()), (Code::NotFound, Code::NotFound));
    assert_eq!(other.message().replace("mine-1", "mine-2"), nothing.message(), "nothing tells the two apart");
    let no_scope = client.get_request_timeline(ask("mine-1", "sk-elsewhere")).await.unwrap_err();
    assert_eq!(no_scope.code(), Code::PermissionDenied);
    let no_key = client.get_request_timeline(proto::GetRequestTimelineRequest { id: "mine-1".into() }).await;
    assert_eq!(no_key.unwrap_err().code(), Code::Unauthenticated);
}
