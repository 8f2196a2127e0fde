//! What a server does when its port is taken or its device fails. The good path is tested from outside, on the binary.

use clap::Parser;
use quire_core::{
    ExecError, Executor, ExecutorLimits, LateInputs, ModelRunnerOutput, SchedulerOutput, StepId,
};
use quire_llm::ServerState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::args::{LoadFormat, MetricsCompat};
use crate::cli::{Cli, Command};
use crate::config::{Config, Machine};
use crate::model::LocalModel;

#[tokio::test]
async fn a_port_in_use_names_the_flag_to_change() {
    let localhost = IpAddr::from([127, 0, 0, 1]);
    let (_taken, address) = bind(localhost, 0, "port").await.unwrap();
    assert_ne!(address.port(), 0);
    let error = bind(localhost, address.port(), "grpc-port").await.unwrap_err().to_string();
    assert!(error.contains("--grpc-port") && error.contains(&address.to_string()), "{error}");
    let error = bind(IpAddr::from([203, 0, 113, 1]), 0, "port").await.unwrap_err().to_string();
    assert!(error.contains("--host"), "{error}");
}

/// A device that fails at its first result.
struct Broken {
    limits: ExecutorLimits,
}

impl Executor for Broken {
    fn limits(&self) -> ExecutorLimits {
        self.limits.clone()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        Ok(plan.step)
    }

    fn sample(&mut self, _: StepId, _: &LateInputs) -> Result<(), ExecError> {
        Ok(())
    }

    fn collect(&mut self, _: StepId, _: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        Err(ExecError { device: "broken".into(), message: "it is on fire".into() })
    }
}

fn serve_args(flags: &str) -> ServeArgs {
    let line = ["quire", "serve"].into_iter().chain(flags.split_whitespace());
    match Cli::try_parse_from(line).unwrap().command {
        Command::Serve(args) => *args,
        other => panic!("expected serve, got {other:?}"),
    }
}

async fn post(address: SocketAddr, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_error_ends_streams_and_the_server() {
    let args = serve_args("--port 0 --grpc-port 0 --kv-cache-memory 4MiB");
    let (_, page) = metrics::recorder(MetricsCompat::Vllm).unwrap();
    let fronts = Fronts::open(&args.server, &BTreeMap::new(), page).await.unwrap();
    let address = fronts.addresses.http;
    let checkpoint = LocalModel::Demo.open(LoadFormat::Auto).unwrap();
    let config = Config::resolve(&args.engine, checkpoint.spec(), &Machine::detect()).unwrap();
    let text = loading::load_text(&LocalModel::Demo, &args.engine).unwrap();
    let executor = Box::new(Broken { limits: loading::executor_limits(checkpoint.spec(), &config) });
    let served = Served { name: "demo", lora_modules: &[], to: Audience::Clients };
    let loaded =
        loading::assemble(&served, &checkpoint, config, text, executor, "broken".into(), &Handle::current());
    let loaded = loaded.unwrap();
    let signals = Signals::install().unwrap();
    let mut server = Server { args: &args, name: "demo".into(), start: Instant::now(), fronts, signals };

    let body = r#"{"model": "demo", "prompt": "x", "stream": true}"#;
    let mut states = server.fronts.lifecycle.subscribe();
    let request = tokio::spawn(async move {
        states.wait_for(|&state| state == ServerState::Ready).await.unwrap();
        post(address, "/v1/completions", body).await
    });
    let mut out = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), server.run_loaded(&loaded, &mut out)).await;
    let error = ended.expect("a dead server ends within five seconds").unwrap_err().to_string();
    assert!(error.contains("it is on fire"), "{error}");
    let answer = request.await.unwrap();
    assert!(answer.contains("error"), "the stream ends with an error: {answer}");
    assert!(String::from_utf8(out).unwrap().contains(&format!("http://{address}")));
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}
