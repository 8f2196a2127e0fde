//! Whole traces through the production engine in virtual time.

use quire_scheduler::{Calibration, EvictionPolicy, Policy};
use quire_sim::serve_trace::BLOCK_SIZE;
use quire_sim::{GeneratedWorkload, ServeConfig, capacity, generate, serve_trace};

fn config() -> ServeConfig {
    ServeConfig::new(Calibration::H200_LLAMA_3_1_8B)
}

#[test]
fn the_same_trace_gives_the_same_report() {
    let trace = generate(GeneratedWorkload::Mixed, 5, 400);
    let report = serve_trace(&trace, &config()).unwrap();
    assert_eq!(report, serve_trace(&trace, &config()).unwrap());
    assert_eq!(report.num_requests, 400);
    assert!(report.hit_percent > 20.0, "{report}");
    assert!(report.duration * 1e6 > trace[399].arrival.0 as f64, "{report}");
}

#[test]
fn nobody_is_lost_under_overload() {
    let trace = generate(GeneratedWorkload::Documents, 6, 300);
    for policy in [Policy::Fcfs, config().policy] {
        let report = serve_trace(&trace, &ServeConfig { policy, rate_scale: 10.0, ..config() }).unwrap();
        assert_eq!(report.num_requests, 300, "{report}");
        assert!(report.good_percent() < 90.0, "{report}");
        let late = report.num_requests - report.num_good - report.num_refused;
        assert!(policy == Policy::Fcfs || late < 30, "served too late: {late}\n{report}");
    }
}

#[test]
fn slack_order_takes_more_than_arrival_order() {
    let trace = generate(GeneratedWorkload::Chat, 7, 500);
    let fcfs = ServeConfig { policy: Policy::Fcfs, ..config() };
    let (_, fcfs) = capacity(&trace, &fcfs).unwrap().unwrap();
    let (_, slack) = capacity(&trace, &config()).unwrap().unwrap();
    assert!(slack.request_rate > 1.1 * fcfs.request_rate, "{slack}\n{fcfs}");
}

#[test]
fn learned_eviction_saves_work() {
    let trace = generate(GeneratedWorkload::SharedPrompts, 8, 1500);
    let mut small = Calibration::H200_LLAMA_3_1_8B;
    small.kv_capacity_tokens = 300_000;
    let rates = [EvictionPolicy::Lru, EvictionPolicy::Learned].map(|eviction| {
        let config = ServeConfig { calibration: small, eviction, policy: Policy::Fcfs, ..config() };
        serve_trace(&trace, &config).unwrap().hit_percent
    });
    assert!(rates[1] > rates[0] + 1.0, "{rates:?}");
}

/// Copies are part of what a step takes: chunks are cut so that tokens come in time all the same.
#[test]
fn a_host_tier_finds_more_and_keeps_the_targets() {
    let trace = generate(GeneratedWorkload::Chat, 9, 1500);
    let mut small = Calibration::H200_LLAMA_3_1_8B;
    small.kv_capacity_tokens = 500_000;
    let [alone, with_tier] = [0.0, 200e9].map(|bytes| {
        let host_tier = (bytes > 0.0).then(|| small.host_tier(bytes, 50e9, BLOCK_SIZE));
        let config = ServeConfig { calibration: small, host_tier, rate_scale: 1.2, ..config() };
        serve_trace(&trace, &config).unwrap()
    });
    println!("{alone}\n{with_tier}");
    assert!(with_tier.kv.bytes_in > 0 && with_tier.hit_percent > alone.hit_percent + 10.0);
    assert!(with_tier.good_percent() > 99.0);
    assert!(with_tier.gaps.percentile_ms(99.0) <= 50.0);
}

/// What other tenants will send is counted before anything is promised.
#[test]
fn promises_are_kept_between_tenants() {
    let trace = generate(GeneratedWorkload::Chat, 9, 1500);
    let report = serve_trace(&trace, &ServeConfig { rate_scale: 2.4, num_tenants: 8, ..config() }).unwrap();
    println!("{report}");
    assert!(report.num_refused > 20, "too little load to tell: {report}");
    let late = report.num_requests - report.num_good - report.num_refused;
    assert!(late <= 15, "let in and late: {late}\n{report}");
    assert!(report.max_refusal_wait <= 0.1, "{report}");
}

#[test]
fn refusals_come_at_once_and_promises_are_kept() {
    for (workload, rate_scale) in [(GeneratedWorkload::Chat, 2.4), (GeneratedWorkload::Documents, 0.25)] {
        let trace = generate(workload, 9, 800);
        let report = serve_trace(&trace, &ServeConfig { rate_scale, ..config() }).unwrap();
        assert!(report.num_refused > 20, "too little load to tell: {report}");
        assert!(report.max_refusal_wait <= 0.1, "{report}");
        assert!(report.max_wait <= 30.0, "{report}");
        let late = report.num_requests - report.num_good - report.num_refused;
        assert!(late <= 8, "let in and late: {late}\n{report}");
    }
}
