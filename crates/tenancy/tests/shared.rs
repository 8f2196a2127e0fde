//! Limits that two replicas share through a real redis-server, and what happens when it goes away.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "support/redis.rs"]
mod redis;

use std::time::{Duration, Instant};

use quire_core::FinishReason;
use quire_tenancy::{
    Access, Demand, Denied, Keys, Permit, Quota, SharedStore, StoreError, Tenancy, TenantsFile,
};
use redis::RedisServer;

async fn replica(url: &str, limits: &str) -> (Tenancy, Access) {
    let store = SharedStore::start(url).await.unwrap();
    let file = TenantsFile::parse(&format!("[defaults.limits]\n{limits}"), "t.toml").unwrap();
    let tenancy = Tenancy::new(Keys::default(), file, Some(store)).unwrap();
    let access = tenancy.authenticate(None, None).unwrap();
    (tenancy, access)
}

async fn admit(replica: &(Tenancy, Access), prompt: u32, n: u32, max_tokens: u32) -> Result<Permit, Denied> {
    let mut demand = Demand::default();
    demand.add(prompt, n, max_tokens);
    replica.0.admit(&replica.1, demand).await
}

#[track_caller]
fn limited(outcome: Result<Permit, Denied>) -> (Quota, Duration) {
    match outcome.map(drop) {
        Err(Denied::Limited { quota, retry_after, .. }) => (quota, retry_after),
        other => panic!("expected a limit, got {other:?}"),
    }
}

/// Polls until a request is admitted.
async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it never happened: {what}");
}

#[tokio::test]
async fn two_replicas_share_rates_and_give_back_what_was_not_used() {
    let Some(server) = RedisServer::start() else { return };
    // 6 tokens a second, 60 at once. A larger request leaves a debt, which no slow machine outlasts.
    let limits = "rpm = 60\noutput_tpm = 360";
    let a = replica(&server.url(), limits).await;
    let b = replica(&server.url(), limits).await;
    let first = admit(&a, 5, 1, 300).await.unwrap();
    let tokens = first.standing().tokens.unwrap();
    assert_eq!((tokens.limit, tokens.remaining, tokens.reset.as_secs_f64().round()), (360, 0, 50.0));
    let (quota, wait) = limited(admit(&b, 5, 1, 48).await);
    assert_eq!(quota, Quota::OutputTpm);
    assert!(wait > Duration::from_secs(10) && wait <= Duration::from_secs(48), "{wait:?}");
    let mut meter = first.meter(5, 1);
    meter.started(0);
    meter.ended(6, FinishReason::Stop);
    drop((first, meter));
    // 54 are left once the settlement has arrived.
    eventually("the refund", async || admit(&b, 5, 1, 48).await.is_ok()).await;
    assert!(a.0.shares_limits() && b.0.shares_limits());
}

#[tokio::test]
async fn requests_are_counted_together() {
    let Some(server) = RedisServer::start() else { return };
    let (a, b) = (replica(&server.url(), "rpm = 60").await, replica(&server.url(), "rpm = 60").await);
    let start = Instant::now();
    let mut admitted = 0;
    for _ in 0..20 {
        admitted += u32::from(admit(&a, 1, 1, 1).await.is_ok());
        admitted += u32::from(admit(&b, 1, 1, 1).await.is_ok());
    }
    let refilled = start.elapsed().as_secs() as u32 + 1;
    assert!((10..=10 + refilled).contains(&admitted), "{admitted} in {:?}", start.elapsed());
}

#[tokio::test]
async fn answers_in_flight_are_counted_over_all_replicas() {
    let Some(server) = RedisServer::start() else { return };
    let limits = "concurrency = 3";
    let (a, b) = (replica(&server.url(), limits).await, replica(&server.url(), limits).await);
    let held = admit(&a, 1, 2, 1).await.unwrap();
    let one = admit(&b, 1, 1, 1).await.unwrap();
    assert_eq!(limited(admit(&b, 1, 1, 1).await).0, Quota::Concurrency);
    assert_eq!(limited(admit(&a, 1, 1, 1).await).0, Quota::Concurrency);
    drop(one);
    eventually("the place of the other replica", async || admit(&a, 1, 1, 1).await.is_ok()).await;
    drop(held);
    eventually("all places", async || admit(&b, 1, 3, 1).await.is_ok()).await;
}

#[tokio::test]
async fn a_budget_is_spent_together() {
    let Some(server) = RedisServer::start() else { return };
    let replica = async |action: &str| {
        let store = SharedStore::start(&server.url()).await.unwrap();
        let text = format!("[defaults]\nbudget = {{ tokens = 100, period = 'month', action = '{action}' }}");
        let file = TenantsFile::parse(&text, "t.toml").unwrap();
        let tenancy = Tenancy::new(Keys::default(), file, Some(store)).unwrap();
        let access = tenancy.authenticate(None, None).unwrap();
        (tenancy, access)
    };
    let (a, b) = (replica("reject").await, replica("reject").await);
    let first = admit(&a, 10, 1, 80).await.unwrap();
    let (quota, wait) = limited(admit(&b, 10, 1, 1).await);
    assert_eq!(quota, Quota::Budget);
    assert!(wait > Duration::ZERO && wait <= Duration::from_secs(31 * 86_400), "{wait:?}");
    let mut meter = first.meter(10, 1);
    meter.started(0);
    meter.ended(30, FinishReason::Stop);
    drop((first, meter));
    // 40 are used once the settlement has arrived.
    eventually("the refund", async || admit(&b, 10, 1, 50).await.is_ok()).await;
    let low = replica("deprioritize").await;
    eventually("all is given back but the 40", async || {
        admit(&low, 10, 1, 50).await.unwrap().priority(0) == 0
    })
    .await;
    assert_eq!(admit(&low, 10, 1, 51).await.unwrap().priority(0), -2);
    let hasty = {
        let store = SharedStore::start(&server.hasty_url()).await.unwrap();
        let text = "[defaults]\nbudget = { tokens = 100, period = 'month' }";
        let tenancy =
            Tenancy::new(Keys::default(), TenantsFile::parse(text, "t.toml").unwrap(), Some(store)).unwrap();
        let access = tenancy.authenticate(None, None).unwrap();
        (tenancy, access)
    };
    eventually("only the 40 are used", async || admit(&hasty, 10, 1, 50).await.is_ok()).await;
    let _seen = admit(&hasty, 10, 1, 10).await.unwrap();
    server.signal("STOP");
    assert_eq!(limited(admit(&hasty, 10, 1, 31).await).0, Quota::Budget, "it goes on from what it saw");
    drop(admit(&hasty, 10, 1, 30).await.unwrap());
    server.signal("CONT");
    let keys = server.command("KEYS quire:*budget*");
    assert!(keys.contains("quire:{anonymous}:budget:month:"), "{keys}");
    let key = keys.lines().find(|line| line.starts_with("quire:")).unwrap().trim();
    let ttl: i64 = server.command(&format!("TTL {key}")).lines().next().unwrap()[1..].trim().parse().unwrap();
    assert!(ttl > 0 && ttl <= 32 * 86_400, "it expires: {ttl}");
}

#[tokio::test]
async fn without_an_answer_each_replica_keeps_its_own_limits() {
    let Some(server) = RedisServer::start() else { return };
    let url = server.hasty_url();
    let (a, b) = (replica(&url, "rpm = 60").await, replica(&url, "rpm = 60").await);
    for _ in 0..10 {
        drop(admit(&a, 1, 1, 1).await);
    }
    assert_eq!(limited(admit(&b, 1, 1, 1).await).0, Quota::Rpm);
    // Hanging: one request waits a tenth of a second, those after it do not wait at all.
    server.signal("STOP");
    let start = Instant::now();
    for _ in 0..10 {
        admit(&b, 1, 1, 1).await.unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(10), "not a timeout for each: {:?}", start.elapsed());
    let own =
        async || matches!(admit(&b, 1, 1, 1).await.map(drop), Err(Denied::Limited { quota: Quota::Rpm, .. }));
    eventually("its own limit holds", own).await;
    server.signal("CONT");
    let port = server.port();
    drop(server);
    admit(&a, 1, 1, 1).await.unwrap();
    // Back again, empty: limits are shared again.
    let server = RedisServer::start_on(port).unwrap();
    let other = replica(&server.hasty_url(), "rpm = 60").await;
    for _ in 0..10 {
        drop(admit(&other, 1, 1, 1).await);
    }
    eventually("sharing again", async || {
        matches!(admit(&a, 1, 1, 1).await.map(drop), Err(Denied::Limited { quota: Quota::Rpm, .. }))
            && a.0.shares_limits()
    })
    .await;
}

/// What was reserved in one place is not settled in the other, and falling back leaves nothing held.
#[tokio::test]
async fn the_two_books_are_kept_apart() {
    let Some(server) = RedisServer::start() else { return };
    let limits = "output_tpm = 6\nconcurrency = 3";
    let replica = replica(&server.hasty_url(), limits).await;
    let shared = admit(&replica, 1, 1, 6).await.unwrap();
    assert_eq!(limited(admit(&replica, 1, 1, 1).await).0, Quota::OutputTpm, "a minute's worth is reserved");
    server.signal("STOP");
    for _ in 0..5 {
        drop(admit(&replica, 1, 1, 6).await.expect("not used, given back, nothing else held"));
    }
    let mut local = admit(&replica, 1, 1, 6).await.unwrap().meter(1, 1);
    local.started(0);
    local.ended(6, FinishReason::Stop);
    drop(local);
    drop(shared);
    assert_eq!(
        limited(admit(&replica, 1, 1, 1).await).0,
        Quota::OutputTpm,
        "the shared refund is not for here"
    );
}

#[tokio::test]
async fn addresses_are_checked() {
    for bad in [
        "redis://localhost?timeout_ms=0",
        "redis://localhost?timeout_ms=x",
        "redis:/x",
        "http://localhost",
        "localhost:6379",
        "",
    ] {
        assert!(matches!(SharedStore::start(bad).await.map(drop), Err(StoreError::Address(_))), "{bad}");
    }
    let tls = SharedStore::start("rediss://localhost").await.map(drop);
    assert!(matches!(tls, Err(StoreError::Tls | StoreError::Address(_))), "{tls:?}");
    // Nobody there: each replica by itself, at once.
    let start = Instant::now();
    let alone = replica("redis://127.0.0.1:1", "rpm = 60").await;
    admit(&alone, 1, 1, 1).await.unwrap();
    assert!(!alone.0.shares_limits() && start.elapsed() < Duration::from_secs(5));
}
