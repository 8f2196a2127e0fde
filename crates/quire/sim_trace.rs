//! `quire sim --trace`: a recorded trace, served in virtual time under the cost model.

use std::io::Write;
use std::path::Path;
use std::str::FromStr;

use quire_core::Micros;
use quire_scheduler::{Calibration, Policy};
use quire_sim::serve_trace::BLOCK_SIZE;
use quire_sim::{
    Goal, Latency, ServeConfig, ServeReport, TraceRequest, capacity, plan, read_trace, serve_trace,
};

use crate::bench::report::Report;
use crate::cli::{SimArgs, SimEviction, SimPolicy};
use crate::sim_plots::write_plots;
use crate::units::{Bytes, parse_duration};
use crate::{Failure, Result};

/// Devices tried at most.
const MAX_DEVICES: usize = 4096;

/// What `--plan` promises.
#[derive(Clone, Debug, PartialEq)]
pub struct Goals(Vec<Goal>);

impl FromStr for Goals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(goal).collect::<Result<_, _>>().map(Self)
    }
}

/// `ttft_p99<2s`
fn goal(text: &str) -> Result<Goal, String> {
    let wrong = || format!("`{text}` is not a goal; write for example ttft_p99<2s or itl_p99<50ms");
    let (left, within) = text.trim().split_once('<').ok_or_else(wrong)?;
    let (what, percent) = left.trim().split_once("_p").ok_or_else(wrong)?;
    let what = match what {
        "ttft" => Latency::FirstToken,
        "itl" => Latency::BetweenTokens,
        _ => return Err(wrong()),
    };
    let percent: f64 = percent.parse().map_err(|_| wrong())?;
    if !(percent > 0.0 && percent <= 100.0) {
        return Err(format!("`{text}`: a percentile is above 0 and at most 100"));
    }
    Ok(Goal { what, percent, within: parse_duration(within.trim())? })
}

/// What is printed above the report, for people and for programs.
#[derive(Default)]
struct Head {
    text: String,
    rows: Vec<(String, f64, &'static str)>,
}

/// Serves the trace once, or looks for the rate that one device takes or for the devices that it needs, and prints what
/// clients saw.
pub(crate) fn sim_trace(args: &SimArgs, path: &Path, out: &mut impl Write) -> Result<()> {
    let config = config(args)?;
    let trace = read_trace(path).map_err(|error| Failure(error.to_string()))?;
    let failed = |error: quire_core::ExecError| Failure(error.to_string());
    let mut head = Head::default();
    let report = if let Some(goals) = &args.plan {
        planned(&trace, config, goals, &mut head)?
    } else if args.capacity {
        let Some((scale, report)) = capacity(&trace, &config).map_err(failed)? else {
            return Err(Failure("fewer than 90 % of the requests are good at any rate".into()));
        };
        let rate = report.request_rate;
        head.text =
            format!("capacity    {scale:.3} times the trace's rate: {rate:.2} requests/s with 90 % good\n");
        head.rows.push(("capacity_scale".into(), scale, "ratio"));
        report
    } else {
        serve_trace(&trace, &config).map_err(failed)?
    };
    if args.json {
        print_json(&head, &report, out)?;
    } else {
        writeln!(out, "{}{report}", head.text).map_err(Failure::output)?;
    }
    let Some(dir) = &args.plot else { return Ok(()) };
    let names = write_plots(&report, dir)?;
    if !args.json {
        writeln!(out, "plots       {} in {}", names.join(", "), dir.display()).map_err(Failure::output)?;
    }
    Ok(())
}

/// Rows with stable names. What never happened (a first token that never came) has no row.
fn print_json(head: &Head, report: &ServeReport, out: &mut impl Write) -> Result<()> {
    let mut figures = Report::new(1, "simulated");
    let mut row = |name: String, value: f64, unit| {
        if value.is_finite() {
            figures.row(name, value, unit);
        }
    };
    head.rows.iter().for_each(|(name, value, unit)| row(name.clone(), *value, unit));
    for (name, value, unit) in [
        ("requests", report.num_requests as f64, "requests"),
        ("requests_s", report.request_rate, "requests/s"),
        ("goodput_requests_s", report.request_rate * report.good_percent() / 100.0, "requests/s"),
        ("goodput_percent", report.good_percent(), "%"),
        ("refused_requests", report.num_refused as f64, "requests"),
        ("preemptions", report.num_preemptions as f64, "times"),
        ("hit_percent", report.hit_percent, "%"),
        ("max_wait_s", report.max_wait, "s"),
        ("max_refusal_wait_s", report.max_refusal_wait, "s"),
        ("fairness_gap_tokens", report.fairness.gap, "weighted tokens"),
        ("fairness_gap_requests", report.fairness.ratio(), "dearest requests"),
    ] {
        row(name.into(), value, unit);
    }
    for (name, value) in ["p50", "p90", "p99"].into_iter().zip(report.ttft) {
        row(format!("ttft_ms_{name}"), 1e3 * value, "ms");
    }
    for (name, percent) in [("p50", 50.0), ("p90", 90.0), ("p99", 99.0)] {
        row(format!("itl_ms_{name}"), report.gaps.percentile_ms(percent), "ms");
    }
    for (value, tenth) in report.good_percent_by_length.into_iter().zip(1..) {
        row(format!("goodput_percent_by_length/{tenth}"), value, "%");
    }
    for (at, &tokens) in report.fairness.service.iter().enumerate() {
        row(format!("service_tokens/{at}"), tokens, "weighted tokens");
    }
    figures.print(true, out)
}

/// The scheduler works towards the goals, too.
fn planned(
    trace: &[TraceRequest],
    mut config: ServeConfig,
    goals: &Goals,
    head: &mut Head,
) -> Result<ServeReport> {
    for goal in &goals.0 {
        let within = Micros(goal.within.as_micros() as u64);
        match goal.what {
            Latency::FirstToken => config.targets.ttft = within,
            Latency::BetweenTokens => config.targets.itl = within,
        }
    }
    if let Policy::DeadlineSlack(targets) = &mut config.policy {
        *targets = config.targets;
    }
    let Some((devices, report)) =
        plan(trace, &config, &goals.0, MAX_DEVICES).map_err(|error| Failure(error.to_string()))?
    else {
        return Err(Failure(format!("not even {MAX_DEVICES} devices keep these promises for every request")));
    };
    let noun = if devices == 1 { "device" } else { "devices" };
    head.text = format!("plan        {devices} {noun} at {:.2} requests/s\n", report.request_rate);
    head.rows.push(("devices".into(), devices as f64, "devices"));
    for goal in &goals.0 {
        let what = match goal.what {
            Latency::FirstToken => "TTFT",
            Latency::BetweenTokens => "ITL",
        };
        let (value, within) = (goal.value(&report), goal.within.as_secs_f64());
        head.text += &format!("            {what} p{} {value:.4} s, promised {within} s\n", goal.percent);
    }
    Ok(report)
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
    if let Some(seqs) = args.max_num_seqs {
        config.max_num_seqs = seqs;
    }
    set_memory(args, &mut config)?;
    config.rate_scale = args.rate_scale;
    config.num_tenants = args.tenants;
    Ok(config)
}

/// The KV cache, on the device and in host memory.
fn set_memory(args: &SimArgs, config: &mut ServeConfig) -> Result<()> {
    let calibration = &mut config.calibration;
    if let Some(Bytes(bytes)) = args.kv_cache_memory {
        calibration.kv_capacity_tokens = (bytes as f64 / calibration.kv_bytes_per_token) as u32;
        if calibration.kv_capacity_tokens < BLOCK_SIZE {
            return Err(Failure("--kv-cache-memory: not even one block fits".into()));
        }
    }
    let (Bytes(host), Bytes(bandwidth)) = (args.host_cache_memory, args.host_bandwidth);
    if host > 0 {
        let bandwidth = (bandwidth as f64).max(1.0);
        config.host_tier = Some(calibration.host_tier(host as f64, bandwidth, BLOCK_SIZE));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
    fn goals() {
        let Goals(goals) = "ttft_p99<2s, itl_p99.9<50ms".parse().unwrap();
        let (two, fifty) = (Duration::from_secs(2), Duration::from_millis(50));
        assert_eq!(goals[0], Goal { what: Latency::FirstToken, percent: 99.0, within: two });
        assert_eq!(goals[1], Goal { what: Latency::BetweenTokens, percent: 99.9, within: fifty });
        for bad in ["", "ttft<2s", "ttft_p99", "ttft_p0<2s", "e2e_p99<2s", "itl_p99<soon", "itl_p101<1s"] {
            assert!(bad.parse::<Goals>().is_err(), "{bad}");
        }
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
        let dir = path.with_extension("plots");
        let more = "--rate-scale 150 --max-num-seqs 4 --tenants 3 --policy fcfs --json --plot";
        let more: Vec<&str> = more.split(' ').collect();
        let text = run(&[&more[..], &[dir.to_str().unwrap()]].concat(), &path).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rows = json["rows"].as_array().unwrap();
        let row = |name: &str| {
            rows.iter().find(|row| row["name"] == name).map(|row| row["value"].as_f64().unwrap())
        };
        assert!(row("fairness_gap_requests").unwrap() > 0.0, "{text}");
        let service = [0, 1, 2].map(|tenant| row(&format!("service_tokens/{tenant}")).unwrap());
        assert!(service[0] > service[1].max(service[2]), "the first sends most: {service:?}");
        let all: f64 = service.iter().sum();
        assert_eq!(
            all,
            (0..50).map(|at| f64::from(500 + 10 * at + 2 * 40)).sum::<f64>(),
            "every token is counted once"
        );
        for name in ["ttft_cdf", "itl_cdf", "goodput", "hit_rate", "service"] {
            let svg = std::fs::read_to_string(dir.join(name).with_extension("svg")).unwrap();
            assert!(
                svg.starts_with("<svg xmlns") && svg.contains("<polyline") && svg.ends_with("</svg>\n"),
                "{name}"
            );
        }
        std::fs::remove_dir_all(&dir).unwrap();
        let text = run(&["--capacity"], &path).unwrap();
        assert!(text.starts_with("capacity  "), "{text}");
        let text = run(&["--plan", "ttft_p99<100ms,itl_p99<50ms", "--rate-scale", "200"], &path).unwrap();
        assert!(text.starts_with("plan  ") && text.contains("TTFT p99 0.0"), "{text}");
        let devices: u32 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(devices > 1, "{text}");
        let error = run(&["--plan", "ttft_p99<1ms"], &path).unwrap_err().to_string();
        assert!(error.contains("not even"), "{error}");
        let error = run(&["--gpu", "abacus"], &path).unwrap_err().to_string();
        assert!(error.contains("--gpu h200 --model llama-3.1-8b"), "{error}");
        std::fs::remove_file(&path).unwrap();
        let error = run(&[], &path).unwrap_err().to_string();
        assert!(error.starts_with("cannot read"), "{error}");
    }
}
