//! `quire sim`: seeds of the simulator, on all cores; traces are in [`crate::sim_trace`].

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use quire_sim::{Failure as Broken, Report, run_seed};

use crate::cli::SimArgs;
use crate::machine;
use crate::sim_trace::sim_trace;
use crate::units::grouped;
use crate::{Failure, Result};

/// Seeds of a run that names none.
const DEFAULT_SEEDS: std::ops::Range<u64> = 0..100;

/// Runs one seed, a range or a trace, and prints what happened.
pub(crate) fn sim(args: &SimArgs, out: &mut impl Write) -> Result<()> {
    match (&args.trace, args.seed) {
        (Some(trace), _) => sim_trace(args, trace, out),
        (None, Some(seed)) => one(seed, out),
        (None, None) => many(args.seeds.clone().unwrap_or(DEFAULT_SEEDS), out),
    }
}

fn one(seed: u64, out: &mut impl Write) -> Result<()> {
    let report = run_seed(seed).map_err(|broken| Failure(broken.to_string()))?;
    writeln!(out, "{report}").map_err(Failure::output)
}

fn many(seeds: std::ops::Range<u64>, out: &mut impl Write) -> Result<()> {
    let start = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Total::default());
    std::thread::scope(|scope| {
        for _ in 0..machine::usable_cores() {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let result = run_seed(seed);
                    stop.fetch_or(result.is_err(), Ordering::Relaxed);
                    total.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).add(result);
                }
            });
        }
    });
    let total = total.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    writeln!(
        out,
        "{} seeds passed in {:.1} s: {} steps, {} requests, {} tokens, {} preemptions, {} tokens from the prefix cache",
        grouped(total.passed),
        start.elapsed().as_secs_f64(),
        grouped(total.steps),
        grouped(total.requests),
        grouped(total.tokens),
        grouped(total.preemptions),
        grouped(total.cached_tokens),
    )
    .map_err(Failure::output)?;
    match total.broken {
        None => Ok(()),
        Some(broken) => {
            Err(Failure(format!("{broken}\nsee it again with: quire sim --seed {}", broken.seed)))
        }
    }
}

/// What all seeds did together.
#[derive(Default)]
struct Total {
    passed: u64,
    steps: u64,
    requests: u64,
    tokens: u64,
    preemptions: u64,
    cached_tokens: u64,
    /// The failure of the smallest seed that failed.
    broken: Option<Broken>,
}

impl Total {
    fn add(&mut self, result: std::result::Result<Report, Broken>) {
        match result {
            Ok(report) => {
                self.passed += 1;
                self.steps += report.num_steps;
                self.requests += report.num_requests;
                self.tokens += report.num_tokens;
                self.preemptions += report.num_preemptions;
                self.cached_tokens += report.num_cached_tokens;
            }
            Err(broken) if self.broken.as_ref().is_none_or(|other| broken.seed < other.seed) => {
                self.broken = Some(broken);
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn prints_the_sum_of_its_seeds() {
        let mut out = Vec::new();
        let cli = Cli::try_parse_from(["quire", "sim", "--seeds", "3..6"]).unwrap();
        let Command::Sim(args) = cli.command else { panic!("not sim") };
        sim(&args, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("3 seeds passed"), "{text}");
        let steps: u64 = (3..6).map(|seed| run_seed(seed).unwrap().num_steps).sum();
        assert!(text.contains(&format!(" {} steps", grouped(steps))), "{text}");
    }
}
