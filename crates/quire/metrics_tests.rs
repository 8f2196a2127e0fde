//! The page as a scraper sees it.

use std::collections::HashSet;

use metrics::{counter, histogram, with_local_recorder};
use quire_core::metric_names::{ALL, INTER_TOKEN_LATENCY, REQUESTS_FINISHED, TIME_TO_FIRST_TOKEN};

use super::*;

/// `(name, type)` of every family on a page, checked to be well-formed.
fn families(page: &str) -> Vec<(String, String)> {
    let mut families = Vec::new();
    let mut lines = page.lines().filter(|line| !line.is_empty()).peekable();
    while let Some(line) = lines.next() {
        let help = line.strip_prefix("# HELP ").unwrap_or_else(|| panic!("expected HELP, got {line}"));
        let (name, text) = help.split_once(' ').unwrap();
        assert!(!text.is_empty());
        let declared = lines.next().unwrap().strip_prefix("# TYPE ").unwrap();
        let (same, kind) = declared.split_once(' ').unwrap();
        assert_eq!(name, same);
        while let Some(sample) = lines.next_if(|line| !line.starts_with('#')) {
            assert!(sample.starts_with(name), "{sample} is not of {name}");
            sample.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap();
        }
        families.push((name.to_owned(), kind.to_owned()));
    }
    families
}

fn page_of(compat: MetricsCompat, record: impl FnOnce()) -> String {
    let (recorder, page) = recorder(compat).unwrap();
    with_local_recorder(&recorder, || {
        register_process_wide("cpu");
        record();
    });
    page.run_upkeep();
    page.render()
}

#[test]
fn every_family_is_there_at_second_zero_and_none_is_a_summary() {
    let page = page_of(MetricsCompat::Vllm, || drop(quire_engine::metrics::EngineMetrics::new("a-model")));
    let found = families(&page);
    let names: HashSet<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), found.len(), "no family twice");
    for family in ALL {
        assert!(names.contains(family.name), "{}", family.name);
        for alias in family.aliases {
            assert!(names.contains(alias.name), "{}", alias.name);
        }
    }
    assert!(
        found.iter().all(|(_, kind)| ["counter", "gauge", "histogram"].contains(&kind.as_str())),
        "{found:?}"
    );
}

#[test]
fn engine_series_exist_before_the_first_request() {
    let page = page_of(MetricsCompat::Vllm, || drop(quire_engine::metrics::EngineMetrics::new("a-model")));
    // Known once the cache is planned, or only in this process' front ends.
    let later = ["quire_cache_config_info"];
    for family in ALL.iter().filter(|family| family.per_engine && !later.contains(&family.name)) {
        let suffix = if matches!(family.kind, Kind::Histogram(_)) { "_count" } else { "" };
        for name in [family.name].into_iter().chain(family.aliases.iter().map(|alias| alias.name)) {
            let start = format!("{name}{suffix}{{");
            let line = page.lines().find(|line| line.starts_with(&start));
            let line = line.unwrap_or_else(|| panic!("no series of {name}"));
            assert!(line.contains("model_name=\"a-model\"") && line.contains("engine=\"0\""), "{line}");
            for label in family.labels {
                assert!(line.contains(&format!("{label}=\"")), "{line} lacks {label}");
            }
        }
    }
}

#[test]
fn histograms_without_buckets_would_be_summaries() {
    // Shows that the check above can fail: this is what the exporter does with a name it has no buckets for.
    let (recorder, page) = recorder(MetricsCompat::Vllm).unwrap();
    with_local_recorder(&recorder, || histogram!("unlisted").record(1.0));
    assert!(page.handle.render().contains("# TYPE unlisted summary"));
    assert!(!page.render().contains("unlisted"), "the page shows listed families alone");
}

#[test]
fn aliases_have_the_values_and_their_own_buckets() {
    let labels = [("model_name", "m \"x\"\nle=\"9\""), ("engine", "0")];
    let page = page_of(MetricsCompat::Vllm, || {
        histogram!(INTER_TOKEN_LATENCY.name, &labels).record(0.003);
        histogram!(INTER_TOKEN_LATENCY.name, &labels).record(0.06);
        counter!(REQUESTS_FINISHED.name, "finished_reason" => "stop", "engine" => "0").increment(3);
    });
    let value = |start: &str, le: &str| {
        let line =
            page.lines().find(|line| line.starts_with(start) && line.contains(&format!("le=\"{le}\"}}")));
        line.map(|line| line.rsplit_once(' ').unwrap().1.to_owned())
    };
    let ours = "quire_inter_token_latency_seconds_bucket";
    for theirs in ["vllm:inter_token_latency_seconds_bucket", "vllm:time_per_output_token_seconds_bucket"] {
        assert_eq!(value(ours, "0.005").as_deref(), Some("1"));
        assert_eq!(value(theirs, "0.005"), None, "finer than the original");
        assert_eq!(value(theirs, "0.01").as_deref(), Some("1"), "counts what the dropped buckets held");
        assert_eq!(value(theirs, "0.075").as_deref(), Some("2"));
        assert_eq!(value(theirs, "+Inf").as_deref(), Some("2"));
    }
    assert!(page.contains("vllm:inter_token_latency_seconds_count{"));
    assert!(page.lines().any(|line| line.starts_with("vllm:request_success_total{") && line.ends_with(" 3")));
    families(&page);
}

#[test]
fn buckets_of_aliases_are_exactly_the_original_ones() {
    let page = page_of(MetricsCompat::Vllm, || histogram!(TIME_TO_FIRST_TOKEN.name).record(0.1));
    let bounds: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("vllm:time_to_first_token_seconds_bucket{le=\""))
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    let expected =
        "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560 +Inf";
    assert_eq!(bounds.join(" "), expected);
}

#[test]
fn compat_can_be_switched_off() {
    let page = page_of(MetricsCompat::None, || {});
    assert!(!page.contains("vllm:"));
    families(&page);
}

#[test]
fn upkeep_empties_the_buffers() {
    let (recorder, page) = recorder(MetricsCompat::None).unwrap();
    with_local_recorder(&recorder, || {
        let handle = histogram!(TIME_TO_FIRST_TOKEN.name);
        for _ in 0..100_000 {
            handle.record(0.1);
        }
        page.run_upkeep();
        handle.record(0.1);
    });
    assert!(page.render().contains("quire_time_to_first_token_seconds_count 100001"));
}
