//! `quire sim --trace`: a recorded trace, served in virtual time under the cost model.

use std::io::Write;
use std::path::Path;

use quire_scheduler::{Calibration, Policy};
use quire_sim::{ServeConfig, capacity, read_trace, serve_trace};

use crate::cli::{SimArgs, SimEviction, SimPolicy};
use crate::{Failure, Result};

/// Serves the trace once, or looks for the rate that one device takes, and prints what clients saw.
pub(crate) fn sim_trace(args: &SimArgs, path: &Path, out: &mut impl Write) -> Result<()> {
    let config = config(args)?;
    let trace = read_trace(path).map_err(|error| Failure(error.to_string()))?;
    let failed = |error: quire_core::ExecError| Failure(error.to_string());
    let report = if args.capacity {
        let Some((scale, report)) = capacity(&trace, &config).map_err(failed)? else {
            return Err(Failure("fewer than 90 % of the requests are good at any rate".into()));
        };
        let rate = report.request_rate;
        writeln!(out, "capacity    {scale:.3} times the trace's rate: {rate:.2} requests/s with 90 % good")
            .map_err(Failure::output)?;
        report
    } else {
        serve_trace(&trace, &config).map_err(failed)?
    };
    writeln!(out, "{report}").map_err(Failure::output)
}

fn config(args: &SimArgs) -> Result<ServeConfig> {
    let calibration = Calibration::find(&args.gpu, &args.model).ok_or_else(|| {
        let known = Calibration::ALL.map(|known| format!("--gpu {} --model {}", known.gpu, known.model));
        Failure(format!(
            "nothing is known of `{}` on `{}`; there is: {}",
            args.model,
            args.gpu,
            known.join(", ")
        ))
    })?;
    let mut config = ServeConfig::new(calibration);
    if args.policy == SimPolicy::Fcfs {
        config.policy = Policy::Fcfs;
    }
    config.eviction = match args.eviction {
        SimEviction::Lru => quire_scheduler::EvictionPolicy::Lru,
        SimEviction::Learned => quire_scheduler::EvictionPolicy::Learned,
    };
    if let Some(tokens) = args.max_num_batched_tokens {
        config.max_num_batched_tokens = tokens;
    }
    config.rate_scale = args.rate_scale;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn run(more: &[&str], trace: &Path) -> Result<String> {
        let trace = trace.to_str().unwrap();
        let cli = Cli::try_parse_from(["quire", "sim", "--trace", trace].iter().chain(more)).unwrap();
        let Command::Sim(args) = cli.command else { panic!("not sim") };
        let mut out = Vec::new();
        crate::sim_cmd::sim(&args, &mut out).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn serves_a_trace() {
        let path = std::env::temp_dir().join(format!("quire-trace-{}.csv", std::process::id()));
        let line = |second: u32| format!("2023-11-16 18:15:{second:02}.5,{},40\n", 500 + 10 * second);
        let lines: String = (0..50).map(line).collect();
        std::fs::write(&path, format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{lines}")).unwrap();
        let text = run(&["--policy", "fcfs", "--rate-scale", "2"], &path).unwrap();
        assert!(text.starts_with("requests    50 at 2.04/s"), "{text}");
        assert!(text.contains("goodput     100.0 %"), "{text}");
        let text = run(&["--capacity"], &path).unwrap();
        assert!(text.starts_with("capacity  "), "{text}");
        let error = run(&["--gpu", "abacus"], &path).unwrap_err().to_string();
        assert!(error.contains("--gpu h200 --model llama-3.1-8b"), "{error}");
        std::fs::remove_file(&path).unwrap();
        let error = run(&[], &path).unwrap_err().to_string();
        assert!(error.starts_with("cannot read"), "{error}");
    }
}
