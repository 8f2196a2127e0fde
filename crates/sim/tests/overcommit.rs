//! What preemption wastes when more KV is wanted than fits, with and without a host tier.

use std::path::PathBuf;

use quire_scheduler::{Calibration, Policy};
use quire_sim::serve_trace::BLOCK_SIZE;
use quire_sim::{
    GeneratedWorkload, ServeConfig, ServeReport, TraceRequest, generate, read_trace, serve_trace,
};

/// Serves more than the device takes, in order of arrival, by a batch whose sequences hold `overcommit` times as many
/// tokens as there is room for: all of their prompt, and half of their answer on average.
fn serve(trace: &[TraceRequest], max_num_seqs: u32, overcommit: f64, host_bytes: f64) -> ServeReport {
    let held =
        |request: &TraceRequest| f64::from(request.input_tokens) + f64::from(request.output_tokens) / 2.0;
    let mean = trace.iter().map(held).sum::<f64>() / trace.len() as f64;
    let mut h200 = Calibration::H200_LLAMA_3_1_8B;
    h200.kv_capacity_tokens = (f64::from(max_num_seqs) * mean / overcommit) as u32;
    let config = ServeConfig {
        max_num_seqs,
        rate_scale: 20.0,
        policy: Policy::Fcfs,
        host_tier: (host_bytes > 0.0).then(|| h200.host_tier(host_bytes, 50e9, BLOCK_SIZE)),
        ..ServeConfig::new(h200)
    };
    serve_trace(trace, &config).expect("the engine does not fail")
}

fn recomputed(trace: &[TraceRequest], max_num_seqs: u32, overcommit: f64) -> [f64; 2] {
    [0.0, 64e9].map(|host| serve(trace, max_num_seqs, overcommit, host).kv.recomputed_percent())
}

#[test]
fn a_host_tier_saves_what_preemption_wastes() {
    // Short prompts with long answers, which is what fills a pool behind the scheduler's back.
    let mut trace = generate(GeneratedWorkload::Chat, 3, 600);
    for (at, request) in trace.iter_mut().enumerate() {
        request.input_tokens = 100 + at as u32 * 37 % 300;
        request.output_tokens = 100 + at as u32 * 101 % 1500;
        request.blocks.clear();
    }
    let [alone, with_tier] = recomputed(&trace, 64, 1.2);
    println!("recomputed: {alone:.3} % alone, {with_tier:.3} % with a host tier");
    assert!(alone > 1.0, "{alone} % of the tokens were computed again without a host tier");
    assert!(with_tier < 0.1, "{with_tier} % of the tokens were computed again");
}

#[test]
fn azure_conversations_at_more_than_the_pool() {
    let root = std::env::var_os("QUIRE_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"));
    let path = root.join("traces/azure_llm_2023_conv.csv.gz");
    if !path.exists() {
        eprintln!("skipped: {} is not here (set QUIRE_SHARED)", path.display());
        return;
    }
    let trace = read_trace(&path).expect("the shared trace is well formed");
    let [alone, with_tier] = recomputed(&trace[..2000], 64, 1.2);
    println!("recomputed: {alone:.3} % alone, {with_tier:.3} % with a host tier");
    assert!(alone > 1.0 && with_tier < 0.1, "{alone} % and {with_tier} %");
}
