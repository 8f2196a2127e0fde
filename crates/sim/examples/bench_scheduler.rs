//! Prints what the scheduler costs: `cargo run --release -p quire-sim --example bench_scheduler`.

use quire_sim::bench_scheduler::{BenchConfig, run};

#[allow(clippy::print_stdout)]
fn main() {
    for row in run(&BenchConfig::default()) {
        println!("{:24} {:10.2} {:5} target {}", row.name, row.value, row.unit, row.target);
    }
}
