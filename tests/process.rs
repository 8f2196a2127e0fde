//! The binary as a user meets it: it says where it listens, answers over both front ends with the same tokens, refuses
//! what it must, drains on SIGTERM and exits with 0.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use quire_grpc::proto::inference_client::InferenceClient;
use quire_grpc::proto::{self, generate_request::Prompt};
use serde_json::{Value, json};

/// A running `quire serve` of the embedded model on free ports.
pub struct Server {
    child: Child,
    http: String,
    grpc: String,
    /// What it said up to its addresses.
    pub announced: String,
}

impl Server {
    pub fn start(args: &[&str]) -> Self {
        Self::spawn(Command::new(env!("CARGO_BIN_EXE_quire")).arg("serve").args(args))
    }

    /// `command` has no ports yet.
    pub fn spawn(command: &mut Command) -> Self {
        let command = command.args(["--port", "0", "--grpc-port", "0"]).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut http, mut grpc) = (None, None);
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let (mut line, mut announced) = (String::new(), String::new());
        while http.is_none() || grpc.is_none() {
            line.clear();
            assert!(
                lines.read_line(&mut line).unwrap() > 0,
                "the server ended before it said where it listens"
            );
            announced += &line;
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["http", url] => http = url.split_once("://").map(|(_, address)| address.to_owned()),
                ["grpc", address] => grpc = Some(address.to_owned()),
                _ => {}
            }
        }
        Self { child, http: http.unwrap(), grpc: grpc.unwrap(), announced }
    }

    /// Where gRPC is served.
    pub fn grpc_url(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Where HTTP listens.
    pub fn http(&self) -> &str {
        &self.http
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let sent =
            Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Sends a request and returns the connection, from which the answer can be read as it comes.
    pub fn open(&self, method: &str, path: &str, body: &Value) -> TcpStream {
        self.open_with(method, path, "", body)
    }

    /// `headers` are lines, each with its `\r\n`.
    pub fn open_with(&self, method: &str, path: &str, headers: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(&self.http).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             {headers}connection: close\r\n\r\n",
            self.http,
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream
    }

    /// Status line with headers, and body.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> (String, String) {
        self.ask_with(method, path, "", body)
    }

    /// With lines of headers.
    pub fn ask_with(&self, method: &str, path: &str, headers: &str, body: &Value) -> (String, String) {
        let mut answer = String::new();
        self.open_with(method, path, headers, body).read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_lowercase(), body.to_owned())
    }

    fn status(&self, path: &str) -> String {
        let (head, _) = self.ask("GET", path, &Value::Null);
        head.split(' ').nth(1).unwrap().to_owned()
    }

    /// The value of the first series of the metrics page that begins with `series`.
    pub fn metric(&self, series: &str) -> f64 {
        let page = self.metrics();
        values(&page, series).next().unwrap_or_else(|| panic!("no {series}"))
    }

    fn metrics(&self) -> String {
        self.ask("GET", "/metrics", &Value::Null).1
    }

    /// Waits until `num_ended` sequences have ended since the start and none of them holds anything. Their number
    /// counts, as a request that was answered may still be on its way to an engine that is idle so far.
    fn assert_idle_soon(&self, num_ended: u32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let page = self.metrics();
            let sum = |series| values(&page, series).sum::<f64>();
            let state =
                ["quire_requests_finished_total{", "quire_requests_running{", "quire_requests_waiting{"]
                    .map(sum)
                    .into_iter()
                    .chain(values(&page, USED_BLOCKS))
                    .collect::<Vec<_>>();
            if state == [f64::from(num_ended), 0.0, 0.0, 0.0] {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{num_ended} clients are gone; ended, running, waiting, blocks used: {state:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn wait(mut self) -> i32 {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the server did not end within a minute");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const USED_BLOCKS: &str = "quire_kv_blocks{model_name=\"quire-demo\",engine=\"0\",state=\"used\"}";

/// The values of the series of a metrics page that begin with `series`.
fn values(page: &str, series: &str) -> impl Iterator<Item = f64> {
    let lines = page.lines().filter(move |line| line.starts_with(series));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

pub fn completion(max_tokens: u32) -> Value {
    json!({
        "model": "quire-demo", "prompt": "Once upon a time", "max_tokens": max_tokens, "temperature": 0.9, "seed": 5,
        "ignore_eos": true, "return_token_ids": true
    })
}

pub fn grpc_request(max_tokens: u32) -> proto::GenerateRequest {
    proto::GenerateRequest {
        prompt: Some(Prompt::Text("Once upon a time".into())),
        sampling: Some(proto::Sampling { temperature: Some(0.9), seed: Some(5), ..Default::default() }),
        stopping: Some(proto::Stopping {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[test]
fn http_and_grpc_give_the_same_tokens() {
    let server = Server::start(&[]);
    let (head, body) = server.ask("POST", "/v1/completions", &completion(24));
    assert!(head.starts_with("http/1.1 200"), "{head}\n{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    let choice = &answer["choices"][0];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (whole, streamed) = runtime.block_on(async {
        let mut client = InferenceClient::connect(format!("http://{}", server.grpc)).await.unwrap();
        let whole = client.generate(grpc_request(24)).await.unwrap().into_inner();
        let mut stream = client.generate_stream(grpc_request(24)).await.unwrap().into_inner();
        let mut text = String::new();
        let mut usage = None;
        while let Some(chunk) = stream.message().await.unwrap() {
            text += &chunk.choice.unwrap().text;
            usage = chunk.usage;
        }
        assert_eq!(usage.unwrap().completion_tokens, 24);
        (whole, text)
    });
    let over_grpc = &whole.choices[0];
    assert_eq!(choice["text"], over_grpc.text);
    assert_eq!(choice["token_ids"], json!(over_grpc.token_ids));
    assert_eq!(streamed, over_grpc.text);
    assert_eq!(over_grpc.token_ids.len(), 24);
}

#[test]
fn quantized_models_answer() {
    for format in ["int8", "int4"] {
        let server = Server::start(&["--quantize", format]);
        let (head, body) = server.ask("POST", "/v1/completions", &completion(24));
        assert!(head.starts_with("http/1.1 200"), "{format}: {head}\n{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["usage"]["completion_tokens"], 24, "{format}: {body}");
        let announced = server.announced.lines().find(|line| line.starts_with("weights"));
        let announced = announced.expect("the format is announced");
        assert!(
            announced.contains(&format!("{format}: ")) && announced.contains("as they are: norms ("),
            "{announced}"
        );
    }
}

#[test]
fn grpc_honours_deadlines_and_keys() {
    let server = Server::start(&["--api-key", "s3cret"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = InferenceClient::connect(format!("http://{}", server.grpc)).await.unwrap();
        let refused = client.generate(grpc_request(1)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        let with_key = |max_tokens, timeout_ms| {
            let mut request = tonic::Request::new(grpc_request(max_tokens));
            request.metadata_mut().insert("authorization", "Bearer s3cret".parse().unwrap());
            request.metadata_mut().insert("grpc-timeout", format!("{timeout_ms}m").parse().unwrap());
            request
        };
        client.generate(with_key(1, 60_000)).await.unwrap();
        let late = client.generate(with_key(1500, 20)).await.unwrap_err();
        // tonic's client keeps the time as well and then says it gave up.
        let expected = [tonic::Code::DeadlineExceeded, tonic::Code::Cancelled];
        assert!(expected.contains(&late.code()), "{late}");
        let mut request = with_key(1, 60_000);
        request.get_mut().sampling.as_mut().unwrap().temperature = Some(f32::NAN);
        let invalid = client.generate(request).await.unwrap_err();
        assert_eq!(invalid.code(), tonic::Code::InvalidArgument);
        assert!(invalid.message().contains("temperature"), "{invalid}");
    });
    assert_eq!(server.status("/health/ready"), "200");
    assert_eq!(server.status("/v1/models"), "401");
}

#[test]
fn a_dropped_grpc_stream_frees_its_place() {
    let server = Server::start(&[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = InferenceClient::connect(format!("http://{}", server.grpc)).await.unwrap();
        let mut stream = client.generate_stream(grpc_request(1900)).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        assert!(server.metric("quire_requests_running{") > 0.0, "1900 tokens take longer than one message");
    });
    server.assert_idle_soon(1);
}

#[test]
fn clients_that_go_away_leave_nothing_behind() {
    let server = Server::start(&[]);
    let mut body = completion(1500);
    body["stream"] = json!(true);
    let abandon = |times| {
        for _ in 0..times {
            let mut stream = server.open("POST", "/v1/completions", &body);
            assert!(stream.read(&mut [0; 64]).unwrap() > 0);
        }
    };
    let files = || std::fs::read_dir(format!("/proc/{}/fd", server.child.id())).map_or(0, Iterator::count);
    abandon(20);
    server.assert_idle_soon(20);
    let files_before = files();
    abandon(200);
    server.assert_idle_soon(220);
    assert!(files() <= files_before + 2, "{} open files became {}", files_before, files());
    let aborted =
        "quire_requests_finished_total{model_name=\"quire-demo\",engine=\"0\",finished_reason=\"abort\"}";
    assert!(server.metric(aborted) > 200.0, "most sequences ran to their end for nobody");
}

#[test]
fn sigterm_lets_running_streams_finish() {
    let server = Server::start(&[]);
    let mut body = completion(1500);
    body["stream"] = json!(true);
    let mut stream = server.open("POST", "/v1/completions", &body);
    let mut first = [0_u8; 512];
    let n = stream.read(&mut first).unwrap();
    assert!(first.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&first[..n]));
    server.signal("TERM");
    std::thread::sleep(Duration::from_millis(100));
    let (head, _) = server.ask("POST", "/v1/completions", &completion(1));
    assert!(
        head.starts_with("http/1.1 503")
            && head.contains("connection: close")
            && head.contains("retry-after"),
        "{head}"
    );
    assert_eq!((server.status("/health/live"), server.status("/health/ready")), ("200".into(), "503".into()));
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.wait(), 0);
}

#[test]
fn streams_past_the_shutdown_timeout_get_a_final_error() {
    let server = Server::start(&["--shutdown-timeout", "50ms"]);
    let mut body = completion(1800);
    body["stream"] = json!(true);
    let mut stream = server.open("POST", "/v1/completions", &body);
    let mut first = [0_u8; 512];
    assert!(stream.read(&mut first).unwrap() > 0);
    server.signal("TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"error\""), "{rest}");
    assert_eq!(server.wait(), 0);
}

#[test]
fn a_port_in_use_is_said_clearly() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_quire"))
        .args(["serve", "--port", &port, "--grpc-port", "0"])
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && message.contains("in use") && message.contains("--port"),
        "{message}"
    );
}
