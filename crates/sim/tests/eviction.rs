//! What the prefix cache keeps: the recorded conversation trace, exact, and generated workloads.

use std::path::PathBuf;

use quire_scheduler::EvictionPolicy::{self, Learned, Lru};
use quire_sim::Sharing::{self, AllBlocks, FullBlocks};
use quire_sim::{GeneratedWorkload, TraceRequest, generate, read_trace, replay_cache, replay_optimum};

/// A file of the shared folder, which is not part of the repository.
fn shared_trace(name: &str) -> Option<Vec<TraceRequest>> {
    let root = std::env::var_os("QUIRE_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let path = root.join("traces").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not here (set QUIRE_SHARED)", path.display());
        return None;
    }
    Some(read_trace(&path).expect("the shared trace is well formed"))
}

fn percents(trace: &[TraceRequest], policy: EvictionPolicy, sharing: Sharing) -> Vec<String> {
    let rates = CAPACITIES.map(|capacity| replay_cache(trace, capacity, policy, sharing));
    rates.iter().map(|rate| format!("{:.2}", rate.percent())).collect()
}

const CAPACITIES: [u32; 6] = [1_000, 1_640, 3_500, 8_000, 16_000, 64_000];

#[test]
fn conversation_trace() {
    let Some(trace) = shared_trace("mooncake_conversation_trace.jsonl.gz") else { return };
    assert_eq!(percents(&trace, Lru, AllBlocks), ["4.54", "5.06", "7.65", "18.15", "26.79", "36.63"]);
    for (capacity, percent) in [(1_640, "24.07"), (3_500, "31.62"), (16_000, "37.36")] {
        assert_eq!(format!("{:.2}", replay_optimum(&trace, capacity).percent()), percent);
    }
    assert_eq!(percents(&trace, Learned, FullBlocks), LEARNED);
}

/// LRU gets 4.54, 5.06, 7.65, 18.15, 26.79, 36.63; the optimum 19.44, 24.07, 31.62, 37.31, 37.36, 37.36.
const LEARNED: [&str; 6] = ["7.85", "9.67", "15.27", "22.61", "29.55", "36.56"];

#[test]
fn never_much_worse_than_lru() {
    for workload in GeneratedWorkload::ALL {
        for seed in [1, 2] {
            let trace = generate(workload, seed, 4000);
            for capacity in [300, 1_000, 3_000, 10_000] {
                let [lru, learned] =
                    [Lru, Learned].map(|policy| replay_cache(&trace, capacity, policy, FullBlocks).percent());
                println!(
                    "{workload:?}, seed {seed}, {capacity} blocks: LRU {lru:.2} %, learned {learned:.2} %"
                );
                assert!(
                    learned > lru - 0.3,
                    "{workload:?}, seed {seed}, {capacity} blocks: {learned} < {lru}"
                );
            }
        }
    }
}

#[test]
fn the_same_trace_gives_the_same_evictions() {
    let trace = generate(GeneratedWorkload::Mixed, 3, 2000);
    let once = replay_cache(&trace, 2000, Learned, FullBlocks);
    assert_eq!(once, replay_cache(&trace, 2000, Learned, FullBlocks));
    assert!(once.hit_tokens > 0);
}
