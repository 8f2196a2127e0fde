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

fn token_ids(answer: &str) -> Vec<u64> {
    let answer: Value = serde_json::from_str(answer).unwrap();
    let ids = answer["choices"][0]["token_ids"].as_array();
    ids.map_or_else(Vec::new, |ids| ids.iter().map(|id| id.as_u64().unwrap()).collect())
}

/// How many copies the device had made to the host when it failed: some at the start, then one for each step, of its
/// tokens.
fn copies_until(fail: &Path) -> usize {
    let copies = std::fs::read_to_string(fail).unwrap();
    std::fs::remove_file(fail).unwrap();
    copies.trim().parse().expect("the double noted it once")
}

/// What the same request gives alone, `max_tokens` of it, on a device that fails in the step after its last; and the copies
/// until then.
fn undisturbed(max_tokens: u32) -> (Vec<u64>, usize) {
    let fail = trigger("late-device-error");
    let server = start(&fail).expect("there was a compiler before");
    let (head, body) = server.ask("POST", "/v1/completions", &completion(max_tokens));
    assert!(head.starts_with("http/1.1 200"), "{head}");
    std::fs::write(&fail, "").unwrap();
    let (head, _) = server.ask("POST", "/v1/completions", &completion(1));
    assert!(head.starts_with("http/1.1 500"), "{head}");
    assert!(server.wait() > 0);
    (token_ids(&body), copies_until(&fail))
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
    let mut tokens: Vec<u64> = streamed.by_ref().take(3).flat_map(|event| token_ids(&event)).collect();
    assert!(!tokens.is_empty());

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
    tokens.extend(before.iter().flat_map(|event| token_ids(event)));
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

    // The streamed request was in every step since the first: its token `i` is that of step `i`, and the step in which the
    // device failed brought none. What was not sent when the error came is dropped with it.
    let (one, after_one) = undisturbed(1);
    let (undisturbed, after_all) = undisturbed(MANY_TOKENS);
    let lengths = (one.len(), undisturbed.len(), after_all - after_one);
    assert_eq!(lengths, (1, MANY_TOKENS as usize, MANY_TOKENS as usize - 1), "a step for each token");
    let num_steps = copies_until(&fail) + 1 - after_one;
    assert!(tokens.len() <= num_steps, "{} tokens of {num_steps} steps", tokens.len());
    assert_eq!(tokens, undisturbed[..tokens.len()], "each is the one that the step before the failure gave");
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
