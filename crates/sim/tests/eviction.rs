//! What the prefix cache keeps: the recorded conversation trace, exact, and generated workloads.

use std::path::PathBuf;

use quire_scheduler::EvictionPolicy::{Learned, Lru};
use quire_sim::Sharing::{AllBlocks, FullBlocks};
use quire_sim::{GeneratedWorkload, TraceRequest, generate, read_trace, replay_cache, replay_optimum};

/// A file of the shared folder, which is not part of the repository.
fn shared_trace(name: &str) -> Option<Vec<TraceRequest>> {
    let root = std::env::var_os("QUIRE_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let path = root.join("traces").join(name);
    if !path.exists() {
        println!("skipped: {} is not here (set QUIRE_SHARED)", path.display());
        return None;
    }
    Some(read_trace(&path).expect("the shared trace is well formed"))
}

#[test]
fn explore() {
    let Some(trace) = shared_trace("mooncake_conversation_trace.jsonl.gz") else { return };
    for capacity in [1_000, 1_640, 3_500, 8_000, 16_000, 64_000] {
        let lru = replay_cache(&trace, capacity, Lru, AllBlocks);
        let lruf = replay_cache(&trace, capacity, Lru, FullBlocks);
        let learned = replay_cache(&trace, capacity, Learned, FullBlocks);
        let a = replay_cache(&trace, capacity, Learned, AllBlocks);
        println!(
            "{capacity} lru {:.2} full {:.2} learned {:.2} all {:.2}",
            lru.percent(),
            lruf.percent(),
            learned.percent(),
            a.percent()
        );
    }
    println!("{:.2}", replay_optimum(&trace, 3500).percent());
    for w in GeneratedWorkload::ALL {
        for seed in [1, 2] {
            let trace = generate(w, seed, 6000);
            let u: std::collections::BTreeSet<u64> =
                trace.iter().flat_map(|r| r.blocks.iter().copied()).collect();
            print!(
                "{w:?} {} refs, {} distinct:",
                trace.iter().map(|r| r.blocks.len()).sum::<usize>(),
                u.len()
            );
            for capacity in [300, 1000, 3000, 10_000] {
                let lru = replay_cache(&trace, capacity, Lru, FullBlocks).percent();
                let learned = replay_cache(&trace, capacity, Learned, FullBlocks).percent();
                let min = replay_optimum(&trace, capacity as usize).percent();
                print!(" [{capacity}: {lru:.2} {learned:.2} {min:.2}]");
            }
            println!();
        }
    }
}
