//! Real connections on loopback.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use quire_http::serve;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::harness::{Server, Setup, data_of, eventually};

struct Listening {
    server: Server,
    address: SocketAddr,
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn listen(setup: &Setup) -> Listening {
    let server = Server::start(setup);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (shutdown, signal) = oneshot::channel::<()>();
    let state = server.state.clone();
    let task = tokio::spawn(serve(listener, state, async move {
        let _ = signal.await;
    }));
    Listening { server, address, shutdown, task }
}

fn slow() -> Setup {
    Setup { step: Duration::from_millis(10), ..Setup::default() }
}

fn request(address: SocketAddr, path: &str, body: Option<&Value>) -> Request<Full<Bytes>> {
    let method = if body.is_some() { "POST" } else { "GET" };
    let text = body.map(Value::to_string).unwrap_or_default();
    let builder = Request::builder().method(method).uri(format!("http://{address}{path}"));
    builder
        .header("host", address.to_string())
        .header("content-type", "application/json")
        .body(text.into())
        .unwrap()
}

/// A connection of its own.
async fn send(address: SocketAddr, path: &str, body: Option<&Value>) -> http::Response<Incoming> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender.send_request(request(address, path, body)).await.unwrap()
}

async fn text(response: http::Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().into()).unwrap()
}

fn long_stream() -> Value {
    json!({ "prompt": "x", "max_tokens": 400, "stream": true, "ignore_eos": true, "seed": 1 })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_frees_the_engine() {
    let listening = listen(&slow()).await;
    let engine = listening.server.llm.engine();
    let mut response = send(listening.address, "/v1/completions", Some(&long_stream())).await;
    assert_eq!(response.status(), StatusCode::OK);
    response.body_mut().frame().await.unwrap().unwrap();
    eventually("it shows as running", || engine.snapshot().num_running == 1).await;
    drop(response);
    eventually("the stream is cancelled", || engine.snapshot().num_running == 0).await;
    listening.server.wait_idle().await;

    // The same for an answer that is not streamed, and one that still waits for its turn.
    let mut whole = long_stream();
    whole["stream"] = false.into();
    let waiting = tokio::spawn(async move { send(listening.address, "/v1/completions", Some(&whole)).await });
    eventually("it runs", || engine.snapshot().num_running == 1).await;
    waiting.abort();
    eventually("it is cancelled", || engine.snapshot().num_running == 0).await;
    listening.server.wait_idle().await;
    assert_eq!(engine.snapshot().kv_usage, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_are_interleaved_and_a_slow_reader_gets_all_of_its_text() {
    let listening = listen(&Setup { step: Duration::from_millis(2), ..Setup::default() }).await;
    let mut streams = Vec::new();
    for seed in 0..8 {
        let mut body = long_stream();
        body["max_tokens"] = 60.into();
        body["seed"] = seed.into();
        streams.push((body.clone(), send(listening.address, "/v1/completions", Some(&body)).await));
    }
    // All are open before any has been read.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for (mut body, response) in streams {
        let events = data_of(&text(response).await);
        assert_eq!(events.last().unwrap(), "[DONE]");
        let joined: String = events[..events.len() - 1]
            .iter()
            .map(|event| {
                serde_json::from_str::<Value>(event).unwrap()["choices"][0]["text"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            })
            .collect();
        body["stream"] = false.into();
        let whole = listening.server.complete(body).await.ok();
        assert_eq!(joined, whole["choices"][0]["text"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_works_on_the_same_port() {
    let listening = listen(&Setup::default()).await;
    let stream = TcpStream::connect(listening.address).await.unwrap();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let body = json!({ "prompt": "x", "max_tokens": 3, "stream": true });
    let first = sender.send_request(request(listening.address, "/v1/completions", Some(&body)));
    let second = sender.send_request(request(listening.address, "/health", None));
    let (first, second) = tokio::join!(first, second);
    assert_eq!(second.unwrap().status(), StatusCode::OK);
    assert!(text(first.unwrap()).await.ends_with("data: [DONE]\n\n"));
    listening.server.state.lifecycle().drain();
    let refused = sender.send_request(request(listening.address, "/v1/models", None)).await.unwrap();
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_streams_finish_while_probes_are_answered() {
    let listening = listen(&slow()).await;
    let mut body = long_stream();
    body["max_tokens"] = 50.into();
    let mut response = send(listening.address, "/v1/completions", Some(&body)).await;
    response.body_mut().frame().await.unwrap().unwrap();
    listening.server.state.lifecycle().drain();
    let refused = send(listening.address, "/v1/completions", Some(&body)).await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()["connection"], "close");
    assert_eq!(send(listening.address, "/health/live", None).await.status(), StatusCode::OK);
    assert_eq!(send(listening.address, "/metrics", None).await.status(), StatusCode::OK);
    assert!(text(response).await.ends_with("data: [DONE]\n\n"), "the stream is whole");
    listening.server.wait_idle().await;
    listening.shutdown.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(8), listening.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(listening.address).await.is_err(), "nobody listens any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_takes_too_long_ends_streams_with_an_error() {
    let listening = listen(&slow()).await;
    let mut response = send(listening.address, "/v1/completions", Some(&long_stream())).await;
    response.body_mut().frame().await.unwrap().unwrap();
    listening.server.state.lifecycle().drain();
    listening.server.llm.engine().abort_all(quire_core::FinishReason::Abort);
    let events = data_of(&text(response).await);
    let error: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "unavailable", "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_are_bounded_and_one_connection_serves_many_requests() {
    let listening = listen(&Setup::default()).await;
    let raw = async |head: String| {
        let mut stream = TcpStream::connect(listening.address).await.unwrap();
        let _ = stream.write_all(head.as_bytes()).await;
        let mut answer = vec![0; 64];
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer)).await.unwrap();
        String::from_utf8_lossy(&answer[..read.unwrap_or(0)]).into_owned()
    };
    let many: String = (0..101).map(|i| format!("x-h{i}: 1\r\n")).collect();
    let answer = raw(format!("GET /health HTTP/1.1\r\nhost: x\r\n{many}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let large = "x".repeat(40 << 10);
    let answer = raw(format!("GET /health HTTP/1.1\r\nhost: x\r\nx-large: {large}\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431") || answer.is_empty(), "{answer}");
    assert!(raw("nonsense\r\n\r\n".into()).await.starts_with("HTTP/1.1 400"));

    let stream = TcpStream::connect(listening.address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..20 {
        sender.ready().await.unwrap();
        let response = sender.send_request(request(listening.address, "/health", None)).await.unwrap();
        assert_eq!(text(response).await, r#"{"status":"ready"}"#);
    }
}
