//! Many seeds, all invariants.

use quire_sim::{run_seed, run_seed_without_host_tier};

const NUM_SEEDS: u64 = 1000;

#[test]
fn every_seed_keeps_every_invariant() {
    // `QUIRE_SIM_SEEDS=1000..2000` runs others.
    let range = std::env::var("QUIRE_SIM_SEEDS").ok();
    let seeds = match &range {
        Some(range) => {
            let (from, to) = range.split_once("..").expect("QUIRE_SIM_SEEDS is A..B");
            from.parse().unwrap()..to.parse().unwrap()
        }
        None => 0..NUM_SEEDS,
    };
    let (mut steps, mut tokens, mut preemptions, mut cached, mut evictions, mut copies) = (0, 0, 0, 0, 0, 0);
    let (mut to_host, mut from_host, mut swaps) = (0, 0, 0);
    let started = std::time::Instant::now();
    for seed in seeds.clone() {
        let report = run_seed(seed).unwrap_or_else(|failure| panic!("{failure}"));
        steps += report.num_steps;
        tokens += report.num_tokens;
        preemptions += report.num_preemptions;
        cached += report.num_cached_tokens;
        evictions += report.num_evictions;
        copies += report.num_copies;
        to_host += report.num_host_copies[0];
        from_host += report.num_host_copies[1];
        swaps += report.num_swaps;
    }
    let elapsed = started.elapsed().as_secs_f64();
    println!(
        "{} seeds in {elapsed:.1} s: {steps} steps ({:.0} steps/s), {tokens} tokens, {preemptions} preemptions, \
         {cached} cached tokens, {evictions} evictions, {copies} block copies, {to_host} to and {from_host} from the host tier, \
         {swaps} swaps",
        seeds.end - seeds.start,
        steps as f64 / elapsed
    );
    // The workloads must reach what they are meant to check.
    if range.is_none() {
        for (what, count) in [
            ("preemptions", preemptions),
            ("cached tokens", cached),
            ("evictions", evictions),
            ("copies", copies),
            ("copies to the host tier", to_host),
            ("copies from the host tier", from_host),
            ("swaps", swaps),
        ] {
            assert!(count > NUM_SEEDS, "only {count} {what} in {NUM_SEEDS} seeds");
        }
    }
}

#[test]
fn regressions_stay_fixed() {
    let seeds =
        include_str!("regressions.txt").lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    for seed in seeds {
        let seed = seed.trim().parse().unwrap();
        run_seed(seed).unwrap_or_else(|failure| panic!("{failure}"));
        // As it was before there was one.
        run_seed_without_host_tier(seed).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn equal_seeds_give_equal_traces() {
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let report = run_seed(seed).unwrap();
        assert_eq!(report, run_seed(seed).unwrap());
        hashes.insert(report.trace_hash);
    }
    assert_eq!(hashes.len(), 20, "different seeds, different traces");
}
