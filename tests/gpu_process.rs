//! `quire serve --device cuda` as a process, under the double of the driver: it answers, and when the device fails in the
//! middle of answers, all of them end as failures and so does the process.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use quire_grpc::proto::inference_client::InferenceClient;
use serde_json::{Value, json};
use tonic::Code;

use crate::double;
use crate::process::{Server, completion, grpc_request};

/// More than are computed before the device fails: an emulated step takes milliseconds.
const MANY_TOKENS: u32 = 400;
/// Steps before the first request: the largest, the longest, and those of 8, 4, 2 and 1 sequences twice.
const STEPS_AT_START: usize = 10;

/// The embedded model on the double's GPU, which fails once `fail` exists. `None` without a compiler.
fn start(fail: &Path) -> Option<Server> {
    let folder = double::folder()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_quire"));
    command
        .args(["serve", "--device", "cuda", "--max-model-len", "512", "--max-num-seqs", "8"])
        .args(["--max-num-batched-tokens", "64", "--kv-cache-memory", "64MiB"])
        .env("LD_LIBRARY_PATH", &folder)
        .env("QUIRE_MOCK_KERNELS", folder.join("libquire_kernels_host.so"))
        .env("QUIRE_MOCK_FAIL", fail);
    Some(Server::spawn(&mut command))
}

/// A path where nothing is.
fn trigger(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

/// The `data:` lines of an event stream.
fn events(stream: impl Read) -> impl Iterator<Item = String> {
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_owned))
}

fn token_count(event: &str) -> usize {
    let event: Value = serde_json::from_str(event).unwrap();
    event["choices"][0]["token_ids"].as_array().map_or(0, Vec::len)
}

/// gRPC: how a whole answer ends, and how a stream does.
fn grpc_outcomes(url: &str) -> (Code, Code) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = InferenceClient::connect(url.to_owned()).await.unwrap();
        let (mut whole, mut streamed) = (client.clone(), client);
        let stream = async {
            let mut stream = streamed.generate_stream(grpc_request(MANY_TOKENS)).await.unwrap().into_inner();
            loop {
                match stream.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Code::Ok,
                    Err(status) => return status.code(),
                }
            }
        };
        let whole =
            async { whole.generate(grpc_request(MANY_TOKENS)).await.map_or_else(|e| e.code(), |_| Code::Ok) };
        tokio::join!(whole, stream)
    })
}

/// What `/health/ready` says, again and again until nobody listens.
fn watch_readiness(address: String) -> JoinHandle<Vec<(Instant, String)>> {
    std::thread::spawn(move || {
        let mut seen = Vec::new();
        loop {
            let begin = Instant::now();
            match ask_ready(&address) {
                Ok(status) => seen.push((begin, status)),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return seen,
                // Closed in the middle: the next attempt is refused.
                Err(_) => {}
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    })
}

fn ask_ready(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    std::io::Write::write_all(
        &mut stream,
        b"GET /health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    answer.split(' ').nth(1).map(str::to_owned).ok_or_else(|| ErrorKind::UnexpectedEof.into())
}

#[test]
fn a_device_error_ends_every_answer_and_the_process() {
    let fail = trigger("device-error");
    let Some(server) = start(&fail) else { return };
    assert!(server.announced.contains("cuda:0, Mock GPU"), "{}", server.announced);
    let mut body = completion(MANY_TOKENS);
    body["stream"] = json!(true);
    let mut streamed = events(server.open("POST", "/v1/completions", &body));
    let mut num_tokens: usize = streamed.by_ref().take(3).map(|event| token_count(&event)).sum();
    assert!(num_tokens > 0);

    let whole = server.open("POST", "/v1/completions", &completion(MANY_TOKENS));
    let url = server.grpc_url();
    let grpc = std::thread::spawn(move || grpc_outcomes(&url));
    while server.metric("quire_requests_running{") < 4.0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(ask_ready(server.http()).unwrap(), "200");
    let readiness = watch_readiness(server.http().to_owned());
    std::fs::write(&fail, "").unwrap();
    let failed_at = Instant::now();

    let rest: Vec<String> = streamed.collect();
    let ended_at = Instant::now();
    let (last, before) = rest.split_last().expect("a stream has an end");
    let error: Value = serde_json::from_str(last).expect("an error, and not [DONE]");
    assert_eq!(error["error"]["type"], "server_error", "{last}");
    num_tokens += before.iter().map(|event| token_count(event)).sum::<usize>();
    let mut answer = String::new();
    { whole }.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 500") && answer.contains("server_error"), "{answer}");
    assert_eq!(grpc.join().unwrap(), (Code::Internal, Code::Internal));

    assert!(server.wait() > 0, "the process fails");
    assert!(failed_at.elapsed() < Duration::from_secs(5), "{:?}", failed_at.elapsed());
    let seen = readiness.join().unwrap();
    let off = seen.iter().position(|(_, status)| status == "503").expect("readiness goes off");
    assert!(seen[off].0 < ended_at + Duration::from_millis(500), "with the streams, not later");
    assert!(seen[off..].iter().all(|(_, status)| status == "503"), "{seen:?}");

    // Each step copies its tokens back once, and the streamed request was in every step since the first. What was not
    // sent when the error came is dropped with it.
    let copies = std::fs::read_to_string(&fail).unwrap();
    let copies: usize = copies.trim().parse().expect("the double noted it once");
    let num_steps = copies - STEPS_AT_START;
    assert!(num_tokens <= num_steps, "{num_tokens} tokens of {num_steps} steps");
    std::fs::remove_file(fail).unwrap();
}

/// The rows of a benchmark under the double.
fn bench(args: &[&str]) -> Option<Vec<(String, f64)>> {
    let folder = double::folder()?;
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/llama3");
    let output = Command::new(env!("CARGO_BIN_EXE_quire"))
        .arg("bench")
        .args(args)
        .arg(model)
        .args(["--device", "cuda", "--json"])
        .env("LD_LIBRARY_PATH", &folder)
        .env("QUIRE_MOCK_KERNELS", folder.join("libquire_kernels_host.so"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["machine"].to_string().contains("Mock GPU"), "{}", report["machine"]);
    let row = |row: &Value| (row["name"].as_str().unwrap().to_owned(), row["value"].as_f64().unwrap());
    Some(report["rows"].as_array().unwrap().iter().map(row).collect())
}

#[test]
fn benchmarks_run_on_the_device() {
    let Some(latency) = bench(&["latency", "--batch-size", "1,3", "--input-len", "20", "--output-len", "4"])
    else {
        return;
    };
    assert!(latency.iter().any(|(name, value)| name == "decode_tok_s/llama3/3/bf16" && *value > 0.0));
    let throughput = bench(&[
        "throughput",
        "--num-prompts",
        "4",
        "--max-num-seqs",
        "2",
        "--input-len",
        "20",
        "--output-len",
        "4",
    ]);
    assert!(throughput.unwrap().iter().all(|(_, value)| *value > 0.0));
    let kernels = bench(&["kernels", "--batch-size", "2", "--input-len", "20", "--num-iters", "2"]).unwrap();
    for op in ["embed", "norm", "qkv", "rope", "attention", "o", "mlp", "lm_head", "sample"] {
        for step in ["prefill-20", "decode-2"] {
            let name = format!("op_us/{op}/llama3/{step}/bf16");
            assert!(kernels.iter().any(|(row, us)| *row == name && *us > 0.0), "no {name} in {kernels:?}");
        }
    }
    assert!(
        kernels.iter().any(|(name, share)| name == "op_of_limit/mlp/llama3/decode-2/bf16" && *share > 0.0)
    );
}
