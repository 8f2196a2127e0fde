//! `quire bench serve`: a load generator for servers with OpenAI's API, over loopback or a network.
//!
//! It runs on one thread, over plain sockets, and reads of each event only what it counts, so that it takes far less CPU
//! time than the server beside it. Invariants: each request of the run ends as exactly one of completed, rejected and
//! failed; the time of an event is that of the read that brought it; memory does not grow with the number of tokens.
//!
//! Reading order: [`args`]; `dataset` (what is sent) and `arrivals` (when); `client` (one request, over `http` and
//! `sse`) and `grpc`; `run` (all of them); `summary` with `histogram` (the figures); `html` (the page); `server` (the process
//! under load).

pub mod args;
mod arrivals;
mod client;
mod dataset;
mod grpc;
mod histogram;
mod html;
mod http;
mod run;
mod server;
mod sse;
mod summary;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use quire_core::Micros;
use quire_sim::TraceRequest;

use self::args::{Backend, Endpoint, ServeLoadArgs, TargetArgs};
use self::client::{Answer, Failed, OnRead, Target};
use self::dataset::{Builder, Prompt};
use self::grpc::GrpcTarget;
use self::run::Measured;
use self::server::{CpuTime, Server};
use super::Progress;
use super::report::{Report, slug};
use crate::{Failure, Result};

/// Requests of a run, if nothing says how many.
const DEFAULT_NUM_PROMPTS: u32 = 1000;

/// Arrivals are drawn from another stream of numbers than prompts.
const ARRIVALS_SEED: u64 = 0x5EED_0FA2_21FA_15A7;

/// Measures one load.
pub(super) fn serve(args: &ServeLoadArgs, progress: &mut Progress) -> Result<Report> {
    // One thread: it would otherwise take a second core from the server, and reads would wake it for each other.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure(format!("cannot start the I/O thread: {error}")))?;
    let server = match running(&args.target) {
        Some(_) => None,
        None => Some(Server::start(&args.target.serve_args, args.target.api_key.as_deref())?),
    };
    let started = server.as_ref().map(|server| match args.target.backend {
        Backend::Http => server.url.clone(),
        Backend::Grpc => server.grpc_url.clone(),
    });
    let url = running(&args.target).or(started);
    let url = url.expect("a server is running or was started");
    let pid = server.as_ref().map(Server::pid).or(args.target.server_pid);
    if pid.is_some_and(|pid| CpuTime::of(pid).is_none()) && server.is_none() {
        return Err(Failure("--server-pid: there is no such process on this machine".into()));
    }
    let (model, measured) = runtime.block_on(load(args, &url, pid, progress))?;
    drop(server);
    report(args, &url, &model, &measured)
}

/// The URL of the server that runs already, if the user named one.
fn running(args: &TargetArgs) -> Option<String> {
    if args.base_url.is_some() || (args.host.is_none() && args.port.is_none()) {
        return args.base_url.clone();
    }
    let host = args.host.as_deref().unwrap_or("127.0.0.1");
    Some(format!("http://{host}:{}", args.port.unwrap_or(8000)))
}

/// The model that was asked, and what happened.
async fn load(
    args: &ServeLoadArgs,
    url: &str,
    pid: Option<u32>,
    progress: &mut Progress,
) -> Result<(String, Measured)> {
    let wire = Arc::new(Wire::open(&args.target, url).await?);
    let model = match &args.target.model {
        Some(model) => model.clone(),
        None => wire.model().await?,
    };
    let builder = Builder { args: &args.dataset, endpoint: args.target.endpoint, model: &model };
    let Load { warmups, prompts, arrivals } = prepare(args, &wire, &builder).await?;
    for warmup in warmups {
        let warm = wire.stream(&warmup.body(), &()).await;
        warm.map_err(|failed| Failure(format!("the first request to {url} failed: {failed}")))?;
    }
    let measured = run::run(&wire, prompts, &arrivals, &args.load, pid, progress).await?;
    Ok((model, measured))
}

/// The protocol that is spoken.
#[derive(Debug)]
enum Wire {
    Http(Target, Endpoint),
    Grpc(GrpcTarget),
}

impl Wire {
    async fn open(args: &TargetArgs, url: &str) -> Result<Self> {
        let key = args.api_key.as_deref();
        match (args.backend, args.endpoint) {
            (Backend::Http, endpoint) => Ok(Self::Http(Target::new(url, key)?, endpoint)),
            (Backend::Grpc, Endpoint::Completions) => Ok(Self::Grpc(GrpcTarget::connect(url, key).await?)),
            (Backend::Grpc, Endpoint::Chat) => {
                Err(Failure("--backend grpc sends token ids; leave --endpoint out".into()))
            }
        }
    }

    /// The model to ask for, where none is named.
    async fn model(&self) -> Result<String> {
        match self {
            Self::Http(target, _) => first_model(target).await,
            Self::Grpc(target) => target.model().await,
        }
    }

    /// Sends a request, as its body is over HTTP, and reads its stream to the end.
    async fn stream(&self, body: &[u8], on_read: &impl OnRead) -> Result<Answer, Failed> {
        match self {
            Self::Http(target, endpoint) => target.stream(endpoint.path(), body, on_read).await,
            Self::Grpc(target) => target.stream(body, on_read).await,
        }
    }
}

/// What a run sends, and when: seconds since its start.
struct Load {
    warmups: Vec<Prompt>,
    prompts: Vec<Prompt>,
    arrivals: Vec<f64>,
}

async fn prepare(args: &ServeLoadArgs, wire: &Wire, builder: &Builder<'_>) -> Result<Load> {
    let (load, dataset) = (&args.load, &args.dataset);
    if let Some(path) = &dataset.trace {
        let mut trace = quire_sim::read_trace(path).map_err(|error| Failure(format!("--trace: {error}")))?;
        trace.truncate(dataset.num_prompts.map_or(usize::MAX, |count| count as usize));
        let arrivals = trace.iter().map(|request| request.arrival.as_secs_f64() / load.speed).collect();
        // Short ones of names that the trace does not use.
        let warmup = |name| TraceRequest {
            arrival: Micros(0),
            input_tokens: 16,
            output_tokens: 4,
            blocks: vec![u64::MAX / 2 - u64::from(name)],
        };
        let warmups = builder.recorded((0..load.num_warmups).map(warmup));
        return Ok(Load { warmups, prompts: builder.recorded(trace), arrivals });
    }
    let count = dataset.num_prompts.unwrap_or(DEFAULT_NUM_PROMPTS);
    let mut warmups = builder.build(wire, load.num_warmups + count).await?;
    let prompts = warmups.split_off(load.num_warmups as usize);
    let seed = dataset.seed ^ ARRIVALS_SEED;
    let arrivals = arrivals::arrivals(count, load.request_rate, load.burstiness, seed);
    Ok(Load { warmups, prompts, arrivals })
}

async fn first_model(target: &Target) -> Result<String> {
    let models = target.ask("GET", "/v1/models", b"").await?;
    let id = models["data"][0]["id"].as_str();
    id.map(str::to_owned).ok_or_else(|| Failure("/v1/models names no model; choose one with --model".into()))
}

/// The report, also where files of it were asked for.
fn report(args: &ServeLoadArgs, url: &str, model: &str, measured: &Measured) -> Result<Report> {
    let route = match args.target.backend {
        Backend::Http => args.target.endpoint.path(),
        Backend::Grpc => " (gRPC)",
    };
    let what = format!("client of {url}{route}, model {model}");
    let mut report = Report::new(1, &what);
    summary::fill(&mut report, measured, &args.report);
    if args.report.save_result {
        let path = args.report.result_dir.join(result_filename(args, model));
        write(&path, format!("{}\n", report.json()).as_bytes())?;
        report.text(&format!("wrote {}", path.display()));
    }
    if let Some(path) = &args.report.html {
        write(path, html::page(&what, &report, measured).as_bytes())?;
        report.text(&format!("wrote {}", path.display()));
    }
    match measured.failures.values().next() {
        Some(group) if measured.answers.is_empty() => {
            Err(Failure(format!("no request was answered; the first failure: {}", group.example)))
        }
        _ => Ok(report),
    }
}

fn result_filename(args: &ServeLoadArgs, model: &str) -> PathBuf {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let default = || format!("{}-{}qps-{now}.json", slug(model), args.load.request_rate).into();
    args.report.result_filename.clone().unwrap_or_else(default)
}

fn write(path: &std::path::Path, content: &[u8]) -> Result<()> {
    std::fs::write(path, content)
        .map_err(|error| Failure(format!("cannot write {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::args::BenchCommand;
    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(line: &str) -> std::result::Result<ServeLoadArgs, clap::Error> {
        let line = format!("quire bench serve {line}");
        let command = Cli::try_parse_from(line.split_whitespace())?.command;
        let Command::Bench(bench) = command else { panic!("not bench") };
        let BenchCommand::Serve(args) = bench.command else { panic!("not serve") };
        Ok(*args)
    }

    #[test]
    fn arguments() {
        let args = parse(
            "--goodput ttft:2000 tpot:50 --request-rate 2.5 --burstiness 0.5 --metric-percentiles 50,99.9 \
             -- ./model --executor mock",
        );
        let args = args.unwrap();
        assert_eq!(args.target.serve_args, ["./model", "--executor", "mock"]);
        assert_eq!((args.report.goodput.len(), args.load.request_rate), (2, 2.5));
        assert_eq!(running(&args.target), None);
        assert!(parse("").unwrap().load.request_rate.is_infinite());
        let url = |line| running(&parse(line).unwrap().target).unwrap();
        assert_eq!(url("--port 9000"), "http://127.0.0.1:9000");
        assert_eq!(url("--host example.org"), "http://example.org:8000");
        assert_eq!(url("--base-url http://a:1"), "http://a:1");
        for bad in [
            "--port 1 -- --executor mock",
            "--port 1 --spawn",
            "--base-url http://a --port 1",
            "--request-rate 0",
            "--burstiness -1",
            "--random-range-ratio 1",
            "--goodput itl:5",
            "--metric-percentiles 101",
            "--num-prompts 0",
            "--dataset-name sharegpt",
            "--endpoint /v1/embeddings",
            "--result-filename x.json",
            "--speed 2",
            "--trace x --speed inf",
            "--trace x --request-rate 4",
            "--trace x --dataset-name random",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
