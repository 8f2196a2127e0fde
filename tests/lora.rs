//! `quire serve --lora-modules`: a base model and two trained adapters at once, over both front ends, each with the
//! tokens that PEFT gives. Skipped, with a message, where the files are not there.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use quire_grpc::proto::inference_client::InferenceClient;
use quire_grpc::proto::{self, generate_request::Prompt};
use serde_json::{Value, json};

use crate::process::Server;

/// Below this lead of the best token over the next, implementations may differ.
const MIN_MARGIN: f64 = 1e-3;

/// The folder of trained models and adapters, if it is there.
fn data() -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let data = std::env::var_os("QUIRE_SHARED").map_or_else(beside, PathBuf::from).join("data");
    if data.join("lora").is_dir() {
        return Some(data);
    }
    // Past the test harness, which would swallow it.
    let mut stderr = std::io::stderr();
    writeln!(stderr, "skipped: {} has no adapters; QUIRE_SHARED names the folder", data.display()).unwrap();
    None
}

fn start(data: &Path) -> Server {
    let path = |folder: &str| data.join(folder).display().to_string();
    let lora = |name: &str| format!("{name}={}", path(&format!("lora/stories260k-{name}")));
    Server::start(&[
        &path("models/stories260k"),
        "--threads",
        "1",
        "--lora-modules",
        &lora("robot"),
        &lora("rhyme"),
    ])
}

struct Case {
    model: &'static str,
    prompt: Vec<u32>,
    /// As far as every implementation agrees.
    output: Vec<u32>,
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn cases(data: &Path) -> Vec<Case> {
    let mut cases = Vec::new();
    for (model, folder) in [
        ("stories260k", "models/stories260k"),
        ("robot", "lora/stories260k-robot"),
        ("rhyme", "lora/stories260k-rhyme"),
    ] {
        let text = std::fs::read_to_string(data.join(folder).join("reference.json")).unwrap();
        let reference: Value = serde_json::from_str(&text).unwrap();
        for case in reference["cases"].as_array().unwrap().iter().take(2) {
            let (steps, pairs) = (case["steps"].as_array(), case["steps_id_logprob_margin"].as_array());
            let steps = steps.or(pairs).unwrap().iter().take(48).map(|step| match step.as_array() {
                Some(step) => (&step[0], &step[2]),
                None => (&step["id"], &step["margin"]),
            });
            let sure = steps.take_while(|(_, margin)| margin.as_f64().unwrap() > MIN_MARGIN);
            let output: Vec<u32> = sure.map(|(id, _)| id.as_u64().unwrap() as u32).collect();
            assert!(output.len() >= 16, "{model}");
            cases.push(Case { model, prompt: ids(&case["prompt_ids"]), output });
        }
    }
    cases
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_and_their_base_are_served_at_once() {
    let Some(data) = data() else { return };
    let (server, cases) = (start(&data), cases(&data));
    let body = |case: &Case| {
        json!({ "model": case.model, "prompt": case.prompt, "max_tokens": case.output.len(), "temperature": 0,
                "ignore_eos": true, "return_token_ids": true })
    };
    let streams: Vec<_> =
        cases.iter().map(|case| server.open("POST", "/v1/completions", &body(case))).collect();
    for (case, mut stream) in cases.iter().zip(streams) {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(answer["model"], case.model, "{answer}");
        assert_eq!(ids(&answer["choices"][0]["token_ids"]), case.output, "{}", case.model);
    }
    let mut client = InferenceClient::connect(server.grpc_url()).await.unwrap();
    for case in &cases {
        let request = proto::GenerateRequest {
            model: case.model.into(),
            prompt: Some(Prompt::TokenIds(proto::TokenIds { ids: case.prompt.clone() })),
            sampling: Some(proto::Sampling { temperature: Some(0.0), ..Default::default() }),
            stopping: Some(proto::Stopping {
                max_tokens: Some(case.output.len() as u32),
                ignore_eos: true,
                ..Default::default()
            }),
            ..Default::default()
        };
        let answer = client.generate(request).await.unwrap().into_inner();
        assert_eq!(answer.choices[0].token_ids, case.output, "{}", case.model);
    }
    let unknown = proto::GenerateRequest { model: "robots".into(), ..Default::default() };
    assert_eq!(client.generate(unknown).await.unwrap_err().code(), tonic::Code::NotFound);
}

#[test]
fn an_adapter_that_does_not_fit_ends_the_start_with_its_name() {
    let Some(data) = data() else { return };
    let serve = |model: &str, module: String| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quire"));
        let output =
            command.args(["serve", model, "--port", "0", "--grpc-port", "0", "--lora-modules", &module]);
        let output = output.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let robot = data.join("lora/stories260k-robot");
    let text = serve("quire-demo", format!("robot={}", robot.display()));
    assert!(text.contains("--lora-modules robot") && text.contains("lora_A.weight` has shape"), "{text}");
    let text = serve("quire-demo", format!("robot={}", data.join("models").display()));
    assert!(text.contains("--lora-modules robot") && text.contains("holds no adapter_config.json"), "{text}");
}
