//! The host tier, step by step.

use quire_core::{HostCopy, SamplingParams};

use crate::tests::{Rig, limits};
use crate::{CostModel, EvictionPolicy, HostTierConfig};

/// A token takes a millisecond to compute, a block so long to copy.
fn tier(num_blocks: u32, per_copied_block: f64) -> HostTierConfig {
    let cost = CostModel {
        fixed: 1.0,
        per_row: 0.0,
        weights: 0.0,
        per_token: 1000.0,
        per_context_token: 0.0,
        per_attention: 0.0,
        per_copied_block,
    };
    HostTierConfig { num_blocks, block_bytes: 10, cost }
}

fn rig(num_blocks: u32, host: HostTierConfig) -> Rig {
    let mut limits = limits();
    limits.num_blocks = num_blocks;
    Rig::with(limits, |config| {
        config.host_tier = Some(host);
        config.eviction = EvictionPolicy::Lru;
    })
}

/// Runs a prompt of three blocks and a token, then another one, in a pool of four; the copies of each step.
fn displace(rig: &mut Rig) -> Vec<(Vec<HostCopy>, Vec<HostCopy>)> {
    let mut copies = Vec::new();
    for (id, first) in [(1, 0), (2, 100), (3, 0)] {
        rig.add(id, first..first + 13, SamplingParams::greedy(1));
        rig.step();
        copies.push((rig.plan().copies_to_host.clone(), rig.plan().copies_to_device.clone()));
    }
    copies
}

#[test]
fn what_is_evicted_comes_back() {
    let mut rig = rig(4, tier(8, 10.0));
    let [(out1, in1), (out2, in2), (out3, in3)] = displace(&mut rig).try_into().unwrap();
    assert!(out1.is_empty() && in1.is_empty());
    assert!(in2.is_empty() && out2.len() == 3, "the second prompt displaces the first: {out2:?}");
    assert_eq!((out3.len(), in3.len()), (3, 3), "the third finds it, and displaces the second");
    let returned: Vec<_> = in3.iter().map(|copy| copy.host).collect();
    assert!(out2.iter().all(|copy| returned.contains(&copy.host)), "{out2:?} {in3:?}");
    let stats = rig.scheduler.stats();
    assert_eq!((stats.host.hit_tokens, stats.prefix_cache_hits), (12, 12));
    assert_eq!((stats.host.bytes_out, stats.host.bytes_in), (60, 30));
    assert_eq!(stats.host.blocks_used, 3, "what came back lies on the device alone");
}

#[test]
fn nothing_moves_over_a_link_that_is_slower_than_computing() {
    // A block takes 4 ms to compute.
    let mut rig = rig(4, tier(8, 5000.0));
    for (to_host, to_device) in displace(&mut rig) {
        assert!(to_host.is_empty() && to_device.is_empty());
    }
    assert_eq!(rig.scheduler.stats().prefix_cache_hits, 0);
}

#[test]
fn what_makes_room_does_not_displace_what_is_copied_in() {
    // Room for the first prompt's blocks and no others.
    let mut rig = rig(4, tier(3, 10.0));
    let [_, (out2, _), (out3, in3)] = displace(&mut rig).try_into().unwrap();
    assert_eq!(out2.len(), 3);
    assert_eq!((out3.len(), in3.len()), (0, 3), "every block is busy, so the second prompt's are lost");
    let stats = rig.scheduler.stats();
    assert_eq!((stats.prefix_cache_hits, stats.host.blocks_used), (12, 0));
}
