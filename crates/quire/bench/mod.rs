//! `quire bench`: speed of the real engine on any model, in this process, without HTTP and without a tokenizer; and of a
//! whole server, from outside ([`serve`]).
//!
//! Reading order: [`args`] (what can be asked), [`serve`]; `harness` (the engine, stepped), `latency`, `throughput`;
//! `timed` (a backend that keeps time) with `kernels`; `scheduler` (alone); `probe` (what the machine can do); `report`
//! (rows, tables, statistics).

pub mod args;
mod harness;
mod kernels;
mod latency;
mod probe;
pub(crate) mod report;
mod scheduler;
pub mod serve;
mod throughput;
mod timed;

use std::fmt::Display;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use self::args::{BenchArgs, BenchCommand};
pub(crate) use self::probe::Limits;
#[cfg(not(feature = "cuda"))]
pub(crate) use self::timed::HostWatch;
#[cfg(feature = "cuda")]
pub(crate) use self::timed::Watch;
use crate::{Failure, Result};

/// Runs one benchmark and prints its report.
pub(crate) fn bench(args: &BenchArgs, out: &mut impl Write) -> Result<()> {
    let mut progress = Progress::default();
    let (report, json) = match &args.command {
        BenchCommand::Serve(args) => (serve::serve(args, &mut progress)?, args.report.json),
        BenchCommand::Latency(args) => (latency::latency(args, &mut progress)?, args.model.json),
        BenchCommand::Throughput(args) => (throughput::throughput(args, &mut progress)?, args.model.json),
        BenchCommand::Kernels(args) => (kernels::kernels(args, &mut progress)?, args.model.json),
        BenchCommand::Scheduler(args) => (scheduler::scheduler()?, args.json),
    };
    report.print(json, out)
}

/// Errors of the parts, whose texts say everything already.
#[allow(clippy::needless_pass_by_value)] // for `map_err`
fn as_failure(error: impl Display) -> Failure {
    Failure(error.to_string())
}

/// At most one line on standard error in this time.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Tells on standard error that long work goes on.
struct Progress {
    last: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self { last: Instant::now() }
    }
}

impl Progress {
    /// Prints a line, unless the last one is recent.
    fn say(&mut self, line: impl FnOnce() -> String) {
        if self.last.elapsed() >= PROGRESS_EVERY {
            self.last = Instant::now();
            // Nobody to tell is no reason to stop.
            let _ = writeln!(io::stderr(), "bench: {}", line());
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::Value;

    use super::*;
    use crate::cli::{Cli, Command};

    fn parse(line: &str) -> Result<BenchArgs, clap::Error> {
        match Cli::try_parse_from(format!("quire bench {line}").split_whitespace())?.command {
            Command::Bench(args) => Ok(args),
            other => panic!("expected bench, got {other:?}"),
        }
    }

    /// The rows by name, of a run on the embedded model.
    fn rows(line: &str) -> Vec<(String, f64)> {
        let mut out = Vec::new();
        bench(&parse(line).unwrap(), &mut out).unwrap();
        let report: Value = serde_json::from_slice(&out).unwrap();
        assert!(report["machine"]["threads"].as_u64().unwrap() >= 1);
        let row = |row: &Value| (row["name"].as_str().unwrap().to_owned(), row["value"].as_f64().unwrap());
        report["rows"].as_array().unwrap().iter().map(row).collect()
    }

    #[test]
    fn arguments() {
        let BenchCommand::Latency(args) =
            parse("latency some/dir --batch-size 1,8,32 --json").unwrap().command
        else {
            panic!("not latency")
        };
        assert_eq!((args.batch_size, args.input_len, args.output_len), (vec![1, 8, 32], 512, 24));
        assert!(args.model.json && args.model.engine.model.as_deref() == Some("some/dir"));
        let BenchCommand::Kernels(args) = parse("kernels").unwrap().command else { panic!("not kernels") };
        assert_eq!(args.batch_size, [1, 8, 32]);
        for bad in [
            "",
            "latency --batch-size 0",
            "latency --batch-size 1,,2",
            "latency --output-len 1",
            "latency --num-iters 0",
            "throughput --num-prompts 0",
            "kernels --input-len 0",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    /// The figures are those that the models' authors publish.
    #[test]
    fn shapes_have_the_parameters_of_their_models() {
        let shapes = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/shapes");
        let published = [
            ("qwen3-0.6b", 596_049_920),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.1-8b", 8_030_261_248),
            ("qwen3-30b-a3b", 30_532_122_624),
        ];
        for (name, parameters) in published {
            let model = quire_model::Checkpoint::open_dummy(&shapes.join(name), 0).unwrap();
            let bytes: u64 = model.tensors().iter().map(|tensor| tensor.bytes).sum();
            assert_eq!(bytes / 2, parameters, "{name}");
        }
    }

    #[test]
    fn latency_of_the_demo_model() {
        let line = "latency --batch-size 1,3 --input-len 40 --output-len 5 --num-iters 2 --threads 1 --json";
        let rows = rows(line);
        let names: Vec<&str> = rows.iter().map(|(name, _)| name.as_str()).collect();
        let expected = [
            "prefill_tok_s/quire-demo/40/bf16",
            "decode_tok_s/quire-demo/1/bf16",
            "step_us_p50/quire-demo/1/bf16",
            "step_us_p90/quire-demo/1/bf16",
            "latency_ms/quire-demo/1/bf16",
            "decode_tok_s/quire-demo/3/bf16",
            "step_us_p50/quire-demo/3/bf16",
            "step_us_p90/quire-demo/3/bf16",
            "latency_ms/quire-demo/3/bf16",
        ];
        assert_eq!(names, expected);
        assert!(rows.iter().all(|(_, value)| *value > 0.0), "{rows:?}");
    }

    #[test]
    fn throughput_of_the_demo_model() {
        let line = "throughput --num-prompts 6 --input-len 20 --output-len 4 --threads 1 --json";
        let rows = rows(&format!("{line} --served-model-name Org/My-Name"));
        let value = |what: &str| {
            let name = format!("{what}/my-name/20x4/bf16");
            rows.iter().find(|(row, _)| *row == name).unwrap_or_else(|| panic!("no {name} in {rows:?}")).1
        };
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-3;
        assert!(close(value("output_tok_s"), 4.0 * value("requests_s")));
        assert!(close(value("total_tok_s"), 24.0 * value("requests_s")));
    }

    #[test]
    fn the_smallest_loads_fit() {
        assert_eq!(rows("latency --input-len 1 --output-len 2 --num-iters 1 --threads 1 --json").len(), 5);
        let line = "throughput --num-prompts 1 --input-len 1 --output-len 1 --threads 1 --json";
        assert_eq!(rows(line).len(), 3);
    }

    #[test]
    fn kernels_of_the_demo_model() {
        let rows = rows("kernels --batch-size 2 --input-len 33 --num-iters 2 --threads 1 --json");
        for step in ["prefill-33", "decode-2"] {
            let share: f64 = rows
                .iter()
                .filter(|(name, _)| name.starts_with("op_share/") && name.contains(&format!("/{step}/")))
                .map(|(_, share)| share)
                .sum();
            assert!((share - 100.0).abs() < 0.1, "{step}: the shares add up to {share} %");
            for op in ["qkv", "attention", "mlp", "lm_head", "norm", "rope", "sample"] {
                let name = format!("op_us/{op}/quire-demo/{step}/bf16");
                assert!(
                    rows.iter().any(|(row, value)| *row == name && *value > 0.0),
                    "no {name} in {rows:?}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_measured_is_said() {
        let fail = |line: &str| bench(&parse(line).unwrap(), &mut Vec::new()).unwrap_err().to_string();
        assert!(fail("latency --input-len 5000").contains("--input-len"));
        assert!(fail("latency --executor mock").contains("--executor"));
        assert!(fail("latency --batch-size 8 --max-num-seqs 4").contains("--max-num-seqs"));
        assert!(fail("latency --batch-size 8 --kv-cache-memory 4MiB").contains("--kv-cache-memory"));
    }
}
