use super::*;
use crate::Counts;

/// From the Sunday of [`at`] into the next day.
#[test]
fn a_budget_lasts_for_a_period_and_begins_anew() {
    let text = |action: &str| {
        format!("[defaults]\nbudget = {{ tokens = 100, period = 'day', action = '{action}' }}")
    };
    let midnight = 26_444;
    let tenancy = tenancy(&text("reject"));
    let access = tenancy.authenticate(None, None).unwrap();
    let admit = |second: u64, prompt, max_tokens| {
        tenancy.admit_at(at(second * SECOND), &access, demand(prompt, 1, max_tokens))
    };
    let used = |second: u64| {
        let window = crate::Period::Day.window(at(second * SECOND).unix);
        access.tenant.state.ledger.lock().spending.used_in(window)
    };
    let first = admit(0, 20, 50).unwrap();
    assert_eq!(limited(admit(1, 1, 30)), (Quota::Budget, Duration::from_secs(midnight - 1)));
    assert!(matches!(
        admit(1, 1, 100).map(drop),
        Err(Denied::TooLarge { field: "max_tokens", limit_name: "budget", value: 101, limit: 100 })
    ));
    let mut meter = first.meter(20, 1);
    meter.started(10);
    meter.ended(5, FinishReason::Stop);
    drop((first, meter));
    assert_eq!(used(1), 25, "cached tokens count as others do");
    let late = admit(2, 5, 70).unwrap();
    assert_eq!(limited(admit(2, 0, 0)).0, Quota::Budget, "nothing is left");
    drop(tenancy.admit_at(at(2), &access, Demand::default()).expect("what generates nothing is free"));
    let next = admit(midnight, 10, 10).unwrap();
    drop(late);
    assert_eq!(used(midnight), 20, "what was reserved yesterday is not given back today");
    assert_eq!(next.priority(1), 1);
    tenancy.reload(file(&text("deprioritize"))).unwrap();
    let access = tenancy.authenticate(None, None).unwrap();
    let admit =
        |max_tokens| tenancy.admit_at(at(midnight * SECOND), &access, demand(0, 1, max_tokens)).unwrap();
    let (within, beyond) = (admit(80), admit(1000));
    assert_eq!([within.priority(1), beyond.priority(1), beyond.priority(-5)], [1, -2, -5]);
    drop(beyond);
    assert_eq!(admit(1).priority(0), -2, "the budget is full");
}

#[test]
fn budgets_are_published() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let published = || -> Vec<(String, String, f64)> {
        let gauges = snapshotter.snapshot().into_vec().into_iter().filter_map(|(key, _, _, value)| {
            let DebugValue::Gauge(value) = value else { return None };
            let label = |name: &str| {
                let label = key.key().labels().find(|label| label.key() == name);
                label.map(|label| label.value().to_owned()).unwrap_or_default()
            };
            let is_it = key.key().name() == "quire_tenant_budget_tokens";
            is_it.then(|| (label("tenant"), label("state"), value.0))
        });
        let mut gauges: Vec<_> = gauges.collect();
        gauges.sort_by(|a, b| a.1.cmp(&b.1));
        gauges
    };
    let row = |state: &str, tokens: f64| ("a".to_owned(), state.to_owned(), tokens);
    ::metrics::with_local_recorder(&recorder, || {
        let tenancy = tenancy(
            "[[tenants]]\nid = 'a'\nbudget = { tokens = 100, period = 'month' }\n[[tenants.keys]]\nid = 'k'\nKEY(sk-a)",
        );
        let access = tenancy.authenticate(Some("sk-a"), None).unwrap();
        let permit = tenancy.admit_at(tenancy.now(), &access, demand(10, 1, 20)).unwrap();
        tenancy.publish_budgets();
        assert_eq!(published(), [row("left", 70.0), row("used", 30.0)], "one tenant has a budget");
        drop(permit);
        tenancy.publish_budgets();
        assert_eq!(published(), [row("left", 100.0), row("used", 0.0)]);
    });
}

#[test]
fn a_window_holds_what_ended_in_it() {
    let tenancy = tenancy("");
    let access = tenancy.authenticate(None, None).unwrap();
    let name = access.tenant().name().to_owned();
    let complete = |prompt_tokens, output_tokens| {
        let permit = tenancy.admit_at(at(0), &access, demand(prompt_tokens, 1, output_tokens)).unwrap();
        let mut meter = permit.meter(prompt_tokens, 1);
        meter.started(1);
        meter.ended(output_tokens, FinishReason::Stop);
    };
    let now = tenancy.now().unix;
    let minute = now.div_euclid(60) * 60;
    complete(10, 2);
    tenancy.note_usage(minute - 600);
    complete(20, 3);
    tenancy.note_usage(minute - 300);
    complete(40, 5);
    let used = |window: Option<u64>| {
        let usage = tenancy.usage(&name, window.map(Duration::from_secs)).unwrap();
        let Counts { requests, prompt_tokens, cached_tokens, completion_tokens } = usage.counts;
        assert!((now..now + 60).contains(&usage.to) && usage.from <= usage.to);
        [requests, prompt_tokens, cached_tokens, completion_tokens]
    };
    assert_eq!(used(None), [3, 70, 3, 10]);
    assert_eq!(used(Some(24 * 3600)), [3, 70, 3, 10]);
    assert_eq!(used(Some(450)), [2, 60, 2, 8]);
    assert_eq!(used(Some(120)), [1, 40, 1, 5]);
    assert_eq!(tenancy.usage("nobody", None), None);
}
