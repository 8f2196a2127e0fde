//! What the prefix cache keeps: the recorded conversation trace, exact, and generated workloads.

use std::path::PathBuf;

use quire_scheduler::Calibration;
use quire_scheduler::EvictionPolicy::{self, Learned, Lru};
use quire_sim::Sharing::{self, AllBlocks, FullBlocks};
use quire_sim::{
    GeneratedWorkload, TraceRequest, generate, read_trace, replay_cache, replay_optimum, replay_tiers,
};

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

/// Percent found with so many blocks in host memory behind 3,500 on the device, and what went over the link: blocks out,
/// blocks in, and milliseconds.
fn with_tier(
    trace: &[TraceRequest],
    policy: EvictionPolicy,
    num_host_blocks: u32,
    bytes_per_second: f64,
) -> (String, u64, u64, u64) {
    let h200 = Calibration::H200_LLAMA_3_1_8B;
    let bytes = f64::from(num_host_blocks) * 512.0 * h200.kv_bytes_per_token;
    let tier = h200.host_tier(bytes, bytes_per_second, 512);
    assert_eq!(tier.num_blocks, num_host_blocks);
    let (rate, stats) = replay_tiers(trace, 3_500, policy, FullBlocks, Some(tier));
    let link_us = (stats.num_copied_out + stats.num_copied_in) as f64 * tier.cost.per_copied_block;
    (format!("{:.2}", rate.percent()), stats.num_copied_out, stats.num_copied_in, (link_us / 1e3) as u64)
}

const PCIE: f64 = 50e9;

#[test]
fn conversation_trace_with_a_host_tier() {
    let Some(trace) = shared_trace("mooncake_conversation_trace.jsonl.gz") else { return };
    let found = |policy, sizes: [u32; 4]| sizes.map(|blocks| with_tier(&trace, policy, blocks, PCIE).0);
    let sizes = [4_500, 12_500, 16_000, 60_500];
    // What one pool of 8,000 and 16,000 blocks finds: 18.88 and 27.33 of full blocks by LRU, 22.61 and 29.55 learned.
    assert_eq!(found(Lru, sizes), ["18.88", "27.33", "29.71", "36.70"]);
    assert_eq!(found(Learned, sizes), LEARNED_TIERS);
    assert_eq!(replay_cache(&trace, 16_000, Lru, FullBlocks).percent(), {
        let tier = Calibration::H200_LLAMA_3_1_8B.host_tier(12_500.0 * 512.0 * 65_536.0, PCIE, 512);
        replay_tiers(&trace, 3_500, Lru, FullBlocks, Some(tier)).0.percent()
    });
}

/// 3,500 blocks on the device, and 4,500, 12,500, 16,000, 60,500 behind them.
const LEARNED_TIERS: [&str; 4] = ["22.53", "29.51", "31.13", "36.56"];

/// 512 tokens take 7 ms to compute and 0.7 ms to copy over PCIe; over a link that takes longer than computing nothing is
/// copied, and in between only what is likely to be wanted.
#[test]
fn what_the_link_costs_decides_what_is_copied() {
    let Some(trace) = shared_trace("mooncake_conversation_trace.jsonl.gz") else { return };
    let [fast, slow, useless] = [PCIE, 8e9, 1e9].map(|link| with_tier(&trace, Learned, 12_500, link));
    assert_eq!(fast, ("29.51".into(), 221_920, 41_049, 176_475));
    assert_eq!(slow, ("20.72".into(), 50_215, 16_205, 278_585));
    assert_eq!(useless, ("14.99".into(), 0, 0, 0));
}

#[test]
fn never_much_worse_than_lru_with_a_host_tier() {
    for workload in GeneratedWorkload::ALL {
        let trace = generate(workload, 1, 4000);
        for (device, host) in [(300, 700), (1_000, 2_000)] {
            let h200 = Calibration::H200_LLAMA_3_1_8B;
            let tier = h200.host_tier(f64::from(host) * 512.0 * h200.kv_bytes_per_token, PCIE, 512);
            let rate = |policy, tier| replay_tiers(&trace, device, policy, FullBlocks, tier).0.percent();
            let [lru, learned] = [Lru, Learned].map(|policy| rate(policy, Some(tier)));
            println!("{workload:?}, {device} + {host} blocks: LRU {lru:.2} %, learned {learned:.2} %");
            assert!(learned > lru - 0.3, "{workload:?}, {device} + {host} blocks: {learned} < {lru}");
            assert!(learned >= rate(Learned, None), "{workload:?}: the tier is of no use");
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
