//! What the scheduler costs, by criterion: `cargo bench --bench scheduler [FILTER]`.
//!
//! Every figure is CPU time of the thread, as in `quire bench scheduler`, whose table (with the p99 over p50, which
//! criterion does not know) follows when nothing is filtered. That a steady step allocates nothing is a test:
//! `cargo test -p quire-sim --test steady_state`.

#![allow(clippy::print_stdout)] // the table

use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter};
use criterion::{BenchmarkId, Criterion, Throughput};
use quire_sim::bench_scheduler::{
    BenchConfig, PROMPT_OPERATIONS, fair_decision, prompt_costs, run, steady_steps, thread_cpu_us,
};

/// Steps of one batch: its pool holds so many more tokens a sequence.
const STEPS: u32 = 250;
/// Prompts that are timed together.
const PROMPTS: u32 = 16;

/// Microseconds of the thread's CPU clock.
struct ThreadCpu;

impl Measurement for ThreadCpu {
    type Intermediate = f64;
    type Value = f64;

    fn start(&self) -> f64 {
        thread_cpu_us()
    }

    fn end(&self, start: f64) -> f64 {
        thread_cpu_us() - start
    }

    fn add(&self, a: &f64, b: &f64) -> f64 {
        a + b
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &Microseconds
    }
}

struct Microseconds;

impl ValueFormatter for Microseconds {
    fn scale_values(&self, _: f64, _: &mut [f64]) -> &'static str {
        "us"
    }

    fn scale_throughputs(&self, _: f64, per: &Throughput, values: &mut [f64]) -> &'static str {
        let Throughput::Elements(count) = *per else { return "us" };
        values.iter_mut().for_each(|us| *us *= 1e3 / count as f64);
        "ns/seq"
    }

    fn scale_for_machines(&self, _: &mut [f64]) -> &'static str {
        "us"
    }
}

/// The sum of `iters` samples, drawn in batches of at most `batch`.
fn total(iters: u64, batch: u32, sample: impl Fn(u32) -> Vec<f64>) -> f64 {
    let (mut left, mut sum) = (iters, 0.0);
    while left > 0 {
        let count = left.min(u64::from(batch)) as u32;
        sum += sample(count).iter().sum::<f64>();
        left -= u64::from(count);
    }
    sum
}

/// S1 and S3: planning a step and taking its results, everything on, while so many sequences decode.
fn steps(criterion: &mut Criterion<ThreadCpu>) {
    let mut group = criterion.benchmark_group("step");
    for &(num_seqs, _) in BenchConfig::default().batches {
        group.throughput(Throughput::Elements(num_seqs.into()));
        group.bench_with_input(BenchmarkId::from_parameter(num_seqs), &num_seqs, |bencher, &num_seqs| {
            bencher.iter_custom(|iters| total(iters, STEPS, |count| steady_steps(num_seqs, count)));
        });
    }
    group.finish();
}

/// S4 and S5: a long prompt from its tokens to its release, and a conversation's next turn.
fn prompts(criterion: &mut Criterion<ThreadCpu>) {
    for len in [16_384, 131_072] {
        let mut group = criterion.benchmark_group(format!("prompt/{len}"));
        for (at, (operation, _)) in PROMPT_OPERATIONS.into_iter().enumerate() {
            let sample = |count| prompt_costs(len, count).into_iter().nth(at).unwrap_or_default();
            group.bench_function(operation, |bencher| {
                bencher.iter_custom(|iters| total(iters, PROMPTS, sample));
            });
        }
        group.finish();
    }
}

/// F3: what ten thousand waiting tenants add to an admission.
fn fairness(criterion: &mut Criterion<ThreadCpu>) {
    criterion.bench_function("fair_decision/10000", |bencher| {
        bencher.iter_custom(|iters| fair_decision(8).max(0.0) * iters as f64);
    });
}

fn main() {
    // Setting a batch up takes longer than its steps.
    let criterion = Criterion::default()
        .with_measurement(ThreadCpu)
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1));
    let mut criterion = criterion.configure_from_args();
    steps(&mut criterion);
    prompts(&mut criterion);
    fairness(&mut criterion);
    criterion.final_summary();
    let is_whole = std::env::args().skip(1).all(|arg| arg == "--bench");
    if is_whole {
        println!("{:28} {:>10} {:>10}", "what", "measured", "target");
        for row in run(&BenchConfig::default()) {
            println!("{:28} {:>10.2} {:>10} {}", row.name, row.value, row.target, row.unit);
        }
    }
}
