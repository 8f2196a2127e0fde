//! `quire bench serve` against real servers over loopback: every token is counted, and nothing is lost or made up.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use crate::process::Server;

fn bench(args: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quire"));
    command.args(["bench", "serve"]).args(args.split_whitespace()).output().unwrap()
}

/// The rows of a run that succeeds.
struct Rows(Value);

impl Rows {
    fn of(args: &str) -> Self {
        let output = bench(&format!("--json {args}"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args}: {stderr}");
        Self(serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{args}: {error}")))
    }

    fn find(&self, name: &str) -> Option<f64> {
        let rows = self.0["rows"].as_array().unwrap();
        rows.iter().find(|row| row["name"] == name).map(|row| row["value"].as_f64().unwrap())
    }

    fn get(&self, name: &str) -> f64 {
        self.find(name).unwrap_or_else(|| panic!("no {name} in {}", self.0))
    }
}

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("quire-bench-serve-{}-{name}", std::process::id()))
}

#[test]
fn a_server_of_its_own_is_started_loaded_and_stopped() {
    let rows = Rows::of(
        "--num-prompts 40 --random-input-len 20 --random-output-len 30 --goodput e2el:60000 --api-key s3cret \
         -- --executor mock --mock-step-time 2ms --max-num-seqs 64",
    );
    assert_eq!((rows.get("completed_requests"), rows.get("failed_requests")), (40.0, 0.0));
    assert_eq!((rows.get("input_tokens"), rows.get("output_tokens")), (800.0, 1200.0));
    assert_eq!((rows.get("goodput_share"), rows.get("max_concurrent_requests")), (100.0, 40.0));
    assert!(rows.get("stream_events") <= 1200.0 && rows.get("events_per_read") >= 1.0);
    // 29 steps of 2 ms come after the first token.
    assert!(rows.get("tpot_ms_mean") >= 2.0 && rows.get("e2el_ms_p50") >= 58.0);
    assert!(rows.get("ttft_ms_p99") <= rows.get("all_started_ms") + 1e-9);
    assert!(!cfg!(target_os = "linux") || rows.find("sse_cpu_us_per_token").is_some());
}

#[test]
fn a_running_server_is_loaded_over_both_routes() {
    let server = Server::spawn(Command::new(env!("CARGO_BIN_EXE_quire")).arg("serve"));
    let (html, result) = (temporary("page.html"), temporary("result.json"));
    let common = format!(
        "--base-url http://{} --server-pid {} --max-concurrency 4 --num-prompts 10 \
         --random-input-len 24 --random-output-len 12",
        server.http(),
        server.pid()
    );
    let files = format!("--html {} --save-result --result-filename {}", html.display(), result.display());
    let rows =
        Rows::of(&format!("{common} --request-rate 200 --burstiness 0.5 --random-range-ratio 0.5 {files}"));
    assert_eq!((rows.get("completed_requests"), rows.get("failed_requests")), (10.0, 0.0));
    let output = rows.get("output_tokens");
    assert!((60.0..=180.0).contains(&output) && rows.get("max_concurrent_requests") <= 4.0);
    let page = std::fs::read_to_string(&html).unwrap();
    assert_eq!(page.matches("<svg").count(), 4, "{page}");
    let saved: Value = serde_json::from_slice(&std::fs::read(&result).unwrap()).unwrap();
    std::fs::remove_file(html).unwrap();
    std::fs::remove_file(result).unwrap();
    assert_eq!(saved, rows.0);

    let chat = Rows::of(&format!("{common} --endpoint /v1/chat/completions"));
    assert_eq!((chat.get("completed_requests"), chat.get("output_tokens")), (10.0, 120.0));
    // As the server counted them: ten times twelve, the run before, and the first request of either.
    let (_, page) = server.ask("GET", "/metrics", &Value::Null);
    let counted: f64 = page
        .lines()
        .find_map(|line| line.strip_prefix("quire_generation_tokens_total{"))
        .and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("no quire_generation_tokens_total in {page}"));
    assert!(counted >= output + 120.0 + 12.0 && counted <= output + 120.0 + 12.0 + 18.0, "{counted}");
}

#[test]
fn refusals_are_counted_apart() {
    let rows = Rows::of(
        "--num-prompts 12 --random-input-len 8 --random-output-len 10 --num-warmups 0 \
         -- --executor mock --mock-step-time 20ms --max-num-seqs 1 --max-queued-requests 2",
    );
    let (completed, rejected) = (rows.get("completed_requests"), rows.get("rejected_requests"));
    assert_eq!((completed + rejected, rows.get("failed_requests")), (12.0, 0.0));
    assert!(completed >= 3.0 && rejected >= 5.0, "{completed} completed, {rejected} rejected");
    assert_eq!(rows.get("output_tokens"), 10.0 * completed);
}

#[test]
fn a_server_that_is_not_there_is_said() {
    let output = bench("--port 1");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && message.contains("127.0.0.1:1") && message.contains("connect"),
        "{message}"
    );
    let output = bench("-- ./no-such-model");
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && message.contains("ended before it was ready"), "{message}");
}
