use std::collections::VecDeque;

use quire_core::{FinishReason, Meter};

use super::*;
use crate::gcra::Rate;
use crate::limits::{Quota, Scope};

#[path = "tenancy_budget_tests.rs"]
mod budgets;

const SECOND: Nanos = 1_000_000_000;

fn hex(key: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `KEY(x)` becomes the digest of `x`.
fn file(text: &str) -> TenantsFile {
    let mut text = text.to_owned();
    while let Some(at) = text.find("KEY(") {
        let end = at + text[at..].find(')').unwrap();
        text.replace_range(at..=end, &format!("sha256 = '{}'", hex(&text[at + 4..end])));
    }
    TenantsFile::parse(&text, "t.toml").unwrap()
}

fn tenancy(text: &str) -> Tenancy {
    Tenancy::new(Keys::default(), file(text), None).unwrap()
}

const TWO: &str = "
[[tenants]]
id = 'a'
priority = 1
weight = 4
models = ['llama-*']
limits = { rpm = 60, output_tpm = 600, concurrency = 3, kv_blocks_share = 0.5 }
[[tenants.keys]]
id = 'old'
KEY(sk-old)
expires = 2001-09-09T01:46:40Z
scopes = ['infer']
[[tenants.keys]]
id = 'new'
KEY(sk-new)
[[tenants]]
id = 'b'
[[tenants.keys]]
id = 'k'
KEY(sk-b)
";

fn demand(prompt_tokens: u32, n: u32, max_tokens: u32) -> Demand {
    let mut demand = Demand::default();
    demand.add(prompt_tokens, n, max_tokens);
    demand
}

/// So long after the start, which was on 2026-11-29 at 16:39:16.
fn at(nanos: Nanos) -> Now {
    Now { nanos, unix: 1_795_970_356 + (nanos / SECOND) as i64 }
}

fn limited(outcome: Result<Permit, Denied>) -> (Quota, Duration) {
    match outcome.map(drop) {
        Err(Denied::Limited { quota, retry_after, .. }) => (quota, retry_after),
        other => panic!("expected a limit, got {other:?}"),
    }
}

#[test]
fn without_keys_everybody_is_anonymous_and_may_do_everything() {
    let tenancy = Tenancy::default();
    assert!(!tenancy.requires_key());
    for token in [None, Some("anything")] {
        let access = tenancy.authenticate(token, None).unwrap();
        assert_eq!((access.tenant().name(), access.tenant().id()), ("anonymous", TenantId(0)));
        access.require(Scope::Admin).unwrap();
        assert_eq!(access.tenant().priority(7), 7);
        assert_eq!(access.tenant().default_max_tokens(1), None);
    }
}

#[test]
fn a_key_must_match_whole() {
    let tenancy = Tenancy::from(Keys::new(["sk-first", "sk-second"]).unwrap());
    for key in ["sk-first", "sk-second"] {
        let access = tenancy.authenticate(Some(key), None).unwrap();
        assert_eq!((access.tenant().name(), access.tenant().id()), ("default", TenantId(0)));
        access.require(Scope::Metrics).unwrap();
    }
    assert_eq!(tenancy.authenticate(None, None).unwrap_err(), AuthError::Missing);
    for wrong in ["", "sk", "sk-firs", "sk-first ", "sk-firstx", "SK-FIRST"] {
        assert_eq!(tenancy.authenticate(Some(wrong), None).unwrap_err(), AuthError::Invalid, "{wrong:?}");
    }
    assert_eq!(format!("{tenancy:?}"), "Tenancy(2 keys)");
}

#[test]
fn keys_lead_to_their_tenant_until_they_expire() {
    let tenancy = tenancy(TWO);
    let at = |key, seconds| tenancy.authenticate_at(Some(key), None, seconds);
    let old = at("sk-old", 999_999_999).unwrap();
    assert_eq!((old.tenant().name(), old.key_id()), ("a", "old"));
    assert_eq!(at("sk-old", 1_000_000_000).unwrap_err(), AuthError::Expired);
    let new = at("sk-new", i64::MAX).unwrap();
    assert_eq!(new.tenant().id(), old.tenant().id());
    assert_eq!(new.cache_namespace(), old.cache_namespace());
    let b = at("sk-b", 0).unwrap();
    assert_ne!(b.tenant().id(), new.tenant().id());
    assert_ne!(b.cache_namespace(), new.cache_namespace());
    assert_eq!(tenancy.authenticate_at(None, None, 0).unwrap_err(), AuthError::Missing);
    assert_eq!(at(&hex("sk-b"), 0).unwrap_err(), AuthError::Invalid, "the digest is no key");
    assert_eq!(old.require(Scope::Tokenize), Err(Denied::Scope(Scope::Tokenize)));
    old.require(Scope::Infer).unwrap();
    new.require(Scope::Tokenize).unwrap();
    assert!(new.tenant().may_use("llama-3") && !new.tenant().may_use("qwen"));
    assert_eq!([5, 0, -1].map(|asked| new.tenant().priority(asked)), [1, 1, 0], "down, never up");
    let shares = tenancy.shares();
    let share = |access: &Access| shares[access.tenant().id().0 as usize];
    assert_eq!(share(&new), TenantShare { weight: 4.0, kv_blocks_share: 0.5 });
    assert_eq!(share(&b), TenantShare::default());
}

#[test]
fn a_key_may_be_bound_to_networks() {
    let text =
        "[[tenants]]\nid = 'a'\nip_allow = ['10.0.0.0/8', '::1']\n[[tenants.keys]]\nid = 'k'\nKEY(sk-a)";
    let tenancy = tenancy(text);
    let from =
        |peer: Option<&str>| tenancy.authenticate(Some("sk-a"), peer.map(|peer| peer.parse().unwrap()));
    for inside in ["10.1.2.3", "::ffff:10.1.2.3", "::1"] {
        assert!(from(Some(inside)).is_ok(), "{inside}");
    }
    for outside in [Some("11.0.0.1"), Some("::2"), None] {
        assert_eq!(from(outside).unwrap_err(), AuthError::Address, "{outside:?}");
    }
    let wrong = tenancy.authenticate(Some("sk-b"), Some("11.0.0.1".parse().unwrap()));
    assert_eq!(wrong.unwrap_err(), AuthError::Invalid);
}

#[test]
fn a_table_of_admissions_in_time() {
    let tenancy = tenancy(TWO);
    let access = tenancy.authenticate(Some("sk-new"), None).unwrap();
    let admit =
        |second: u64, n, max_tokens| tenancy.admit_at(at(second * SECOND), &access, demand(5, n, max_tokens));
    // 600 tokens a minute: 10 a second, 100 at once. A permit that is dropped unused gives its tokens back.
    drop(admit(0, 1, 100).unwrap());
    let first = admit(0, 1, 60).unwrap();
    assert_eq!(first.standing().tokens.unwrap().remaining, 40);
    assert_eq!(limited(admit(0, 1, 50)), (Quota::OutputTpm, Duration::from_secs(1)));
    let second = admit(1, 2, 25).unwrap();
    assert_eq!(limited(admit(1, 1, 1)).0, Quota::Concurrency, "three answers are in flight");
    assert!(matches!(
        admit(1, 4, 1).map(drop),
        Err(Denied::TooLarge { field: "n", limit_name: "concurrency", value: 4, limit: 3 })
    ));
    assert!(matches!(
        admit(1, 1, 601).map(drop),
        Err(Denied::TooLarge { field: "max_tokens", limit_name: "output_tpm", .. })
    ));
    let mut meter = first.meter(5, 1);
    meter.started(0);
    meter.ended(60, FinishReason::Length);
    drop((first, meter));
    drop(second);
    // 60 used, 10 + 50 given back: 50 are there after a second.
    assert_eq!(limited(admit(1, 1, 60)), (Quota::OutputTpm, Duration::from_secs(1)));
    drop(admit(1, 1, 50).unwrap());
    // Requests are not given back: four were made, a second refilled one, and ten fit at once.
    for _ in 0..7 {
        drop(admit(1, 1, 1).unwrap());
    }
    assert_eq!(limited(admit(1, 1, 1)), (Quota::Rpm, Duration::from_secs(1)));
    assert!(access.tenant.state.ledger.lock().is_idle());
    assert_eq!(access.tenant().default_max_tokens(1), Some(100), "what the bucket can give at once");
    assert_eq!(access.tenant().default_max_tokens(4), Some(25));
}

#[test]
fn a_request_of_several_prompts_is_one_permit_and_settles_with_the_last() {
    let tenancy =
        tenancy("[defaults.limits]\nqueued = 6\nqueued_tokens = 100\ninput_tpm = 6000\noutput_tpm = 6000");
    let access = tenancy.authenticate(None, None).unwrap();
    let ledger = || *access.tenant.state.ledger.lock();
    let mut both = demand(10, 2, 100);
    both.add(30, 2, 100);
    let permit = tenancy.admit_at(at(0), &access, both).unwrap();
    assert_eq!(ledger().queued(), (4, 40));
    let (mut first, second) = (permit.meter(10, 2), permit.meter(30, 2));
    first.started(4);
    assert_eq!((ledger().queued(), ledger().in_flight().0), ((2, 30), 4));
    first.ended(7, FinishReason::Stop);
    drop((permit, first));
    assert_eq!(ledger().in_flight().0, 4, "the other prompt is still there");
    drop(second);
    assert!(ledger().is_idle());
    let left = ledger().standing(0, access.tenant().limits()).tokens.unwrap();
    assert_eq!(left.remaining, 1000 - 10, "the second prompt never ran: 10 in and 7 out were used");
}

#[test]
fn a_look_ahead_takes_nothing() {
    let tenancy = tenancy(TWO);
    let access = tenancy.authenticate(Some("sk-new"), None).unwrap();
    let before = *access.tenant.state.ledger.lock();
    tenancy.precheck(&access).unwrap();
    assert_eq!(*access.tenant.state.ledger.lock(), before);
    let permits: Vec<_> =
        (0..3).map(|_| tenancy.admit_at(at(0), &access, demand(1, 1, 1)).unwrap()).collect();
    assert!(matches!(tenancy.precheck(&access), Err(Denied::Limited { quota: Quota::Concurrency, .. })));
    drop(permits);
    tenancy.precheck(&access).unwrap();
}

#[test]
fn a_reload_keeps_ids_permits_and_use() {
    let tenancy = tenancy(TWO);
    let changes = tenancy.subscribe();
    let before = tenancy.authenticate(Some("sk-b"), None).unwrap();
    let a = tenancy.authenticate(Some("sk-new"), None).unwrap();
    let permit = tenancy.admit_at(at(0), &a, demand(1, 3, 10)).unwrap();
    // `a` moves behind a new tenant, gets another key and more places; `b` loses its key.
    let text = "
        [[tenants]]
        id = 'c'
        [[tenants]]
        id = 'a'
        limits = { concurrency = 4 }
        [[tenants.keys]]
        id = 'next'
        KEY(sk-next)
        [[tenants]]
        id = 'b'
        weight = 3";
    tenancy.reload(file(text)).unwrap();
    assert!(changes.has_changed().unwrap());
    assert_eq!(tenancy.authenticate(Some("sk-b"), None).unwrap_err(), AuthError::Invalid);
    assert_eq!(tenancy.authenticate(Some("sk-new"), None).unwrap_err(), AuthError::Invalid);
    let next = tenancy.authenticate(Some("sk-next"), None).unwrap();
    assert_eq!(next.tenant().id(), a.tenant().id());
    assert_eq!(tenancy.shares()[before.tenant().id().0 as usize].weight, 3.0);
    let one = tenancy.admit_at(at(0), &next, demand(1, 1, 1)).unwrap();
    assert_eq!(
        limited(tenancy.admit_at(at(0), &next, demand(1, 1, 1))).0,
        Quota::Concurrency,
        "3 + 1 are in flight"
    );
    drop((permit, one));
    assert!(next.tenant.state.ledger.lock().is_idle());
}

#[test]
fn a_closed_server_is_not_opened_by_its_file() {
    let tenancy = tenancy(TWO);
    assert_eq!(tenancy.reload(file("")), Err(TableError::WouldOpen));
    assert!(tenancy.authenticate(Some("sk-b"), None).is_ok(), "all is as it was");
    tenancy.reload(file("[[tenants]]\nid = 'a'")).unwrap();
    assert!(tenancy.authenticate(None, None).is_err(), "no key is left, and still one is needed");
    let keyed = Tenancy::from(Keys::new(["sk-api"]).unwrap());
    keyed.reload(file("")).unwrap();
    assert!(keyed.requires_key());
    let twice = "[[tenants]]\nid = 'a'\n[[tenants.keys]]\nid = 'k'\nKEY(sk-api)";
    let error = keyed.reload(file(twice)).unwrap_err();
    assert_eq!(error, TableError::KeyTwice { tenant: "a".into(), key: "k".into() });
}

#[test]
fn a_reserved_key_is_nobodys() {
    let tenancy = tenancy(TWO);
    let taken = TableError::Reserved { tenant: "b".into(), key: "k".into() };
    assert_eq!(tenancy.reserve(KeyDigest::of("sk-b")), Err(taken));
    tenancy.reserve(KeyDigest::of("sk-admin")).unwrap();
    let text = "[[tenants]]\nid = 'a'\n[[tenants.keys]]\nid = 'k'\nKEY(sk-admin)";
    let error = tenancy.reload(file(text)).unwrap_err();
    assert_eq!(error, TableError::Reserved { tenant: "a".into(), key: "k".into() });
    assert!(tenancy.authenticate(Some("sk-admin"), None).is_err());
    assert!(tenancy.authenticate(Some("sk-b"), None).is_ok(), "all is as it was");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

/// A request that was let in.
struct Running {
    permit: Permit,
    meter: Option<Box<dyn Meter>>,
    prompt: u32,
    n: u32,
    max_tokens: u32,
    started: bool,
}

/// Random requests that run, end, are cancelled in every state, at random times: limits hold at every moment, and in the
/// end nothing is held.
#[test]
fn reservations_never_exceed_the_limits_and_never_leak() {
    for seed in 0..200 {
        let mut random = Random(seed);
        let rate = |random: &mut Random| 60 * (1 + random.below(1000));
        let (rpm, input, output) = (rate(&mut random), rate(&mut random), rate(&mut random));
        let (concurrency, queued, queued_tokens) =
            (1 + random.below(20), 1 + random.below(10), 1 + random.below(2000));
        let text = format!(
            "[defaults.limits]\nrpm = {rpm}\ninput_tpm = {input}\noutput_tpm = {output}\nconcurrency = {concurrency}\n\
             queued = {queued}\nqueued_tokens = {queued_tokens}\n"
        );
        run_random(&tenancy(&text), &mut random, [rpm, input, output], [concurrency, queued, queued_tokens]);
    }
}

fn run_random(tenancy: &Tenancy, random: &mut Random, rates: [u64; 3], places: [u64; 3]) {
    let access = tenancy.authenticate(None, None).unwrap();
    let mut now = 0;
    let mut running: VecDeque<Running> = VecDeque::new();
    // What was used for good since the start, and the largest request.
    let (mut used, mut largest) = ([0_u64; 3], [1_u64; 3]);
    for _ in 0..400 {
        now += random.below(2 * SECOND);
        let (prompt, n, max_tokens) =
            (1 + random.below(300) as u32, 1 + random.below(3) as u32, 1 + random.below(200) as u32);
        if let Ok(permit) = tenancy.admit_at(at(now), &access, demand(prompt, n, max_tokens)) {
            used[0] += 1;
            let size = [1, prompt.into(), u64::from(n * max_tokens)];
            largest.iter_mut().zip(size).for_each(|(largest, size)| *largest = size.max(*largest));
            let meter = (random.below(10) > 0).then(|| permit.meter(prompt, n));
            running.push_back(Running { permit, meter, prompt, n, max_tokens, started: false });
        }
        for request in &mut running {
            let begins = !request.started && random.below(3) == 0;
            if let Some(meter) = request.meter.as_mut().filter(|_| begins) {
                meter.started(0);
                request.started = true;
                used[1] += u64::from(request.prompt);
            }
        }
        if random.below(3) > 0 && !running.is_empty() {
            let at = random.below(running.len() as u64) as usize;
            let mut request = running.remove(at).unwrap();
            if request.started {
                let generated = random.below(u64::from(request.n * request.max_tokens) + 1) as u32;
                request.meter.as_mut().unwrap().ended(generated, FinishReason::Stop);
                used[2] += u64::from(generated);
            }
            drop((request.permit, request.meter));
        }
        let waiting = running.iter().filter(|request| !request.started);
        let held = [
            running.iter().map(|request| u64::from(request.n)).sum(),
            waiting.clone().map(|request| u64::from(request.n)).sum(),
            waiting.map(|request| u64::from(request.prompt)).sum::<u64>(),
        ];
        for at in 0..3 {
            assert!(held[at] <= places[at], "{held:?} of {places:?}");
            let refilled = u128::from(now) * u128::from(rates[at]) / u128::from(60 * SECOND);
            let most = refilled + u128::from((rates[at] / 6).max(largest[at])) + 1;
            assert!(u128::from(used[at]) <= most, "{used:?} at {now} with {rates:?}");
        }
        let ledger = *access.tenant.state.ledger.lock();
        assert_eq!([u64::from(ledger.in_flight().0), u64::from(ledger.queued().0), ledger.queued().1], held);
    }
    running.clear();
    let state = &access.tenant.state;
    assert!(state.ledger.lock().is_idle());
    // A minute after the last debt everything is there again.
    let later = now + 600 * SECOND;
    let standing = state.ledger.lock().standing(later, access.tenant().limits());
    assert_eq!(standing.requests.unwrap().remaining, Rate::per_minute(rates[0]).burst());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_is_followed_and_a_broken_one_is_not() {
    let path = std::env::temp_dir().join(format!("quire-tenants-{}.toml", std::process::id()));
    let write = |text: &str| {
        // As editors and Kubernetes do it.
        let next = path.with_extension("next");
        std::fs::write(&next, text).unwrap();
        std::fs::rename(next, &path).unwrap();
    };
    let one =
        |key: &str| format!("[[tenants]]\nid = 'a'\n[[tenants.keys]]\nid = 'k'\nsha256 = '{}'\n", hex(key));
    write(&one("first"));
    let (watch, file) = crate::Watch::open(path.clone()).unwrap();
    let tenancy = Tenancy::new(Keys::default(), file, None).unwrap();
    let task = tokio::spawn(watch.run(tenancy.clone(), Duration::from_millis(5)));
    let wait_for = async |key: &str| {
        for _ in 0..1000 {
            if tenancy.authenticate(Some(key), None).is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{key} never became valid");
    };
    wait_for("first").await;
    let mut changes = tenancy.subscribe();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!changes.has_changed().unwrap(), "the file is what it was");
    write(&one("second"));
    wait_for("second").await;
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    assert!(tenancy.authenticate(Some("first"), None).is_err());
    for broken in ["[[tenants", "", "[[tenants]]\nid = 'a'\nrpm = 5\n"] {
        write(broken);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(tenancy.authenticate(Some("second"), None).is_ok(), "{broken}");
    }
    std::fs::remove_file(&path).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(tenancy.authenticate(Some("second"), None).is_ok(), "a file that is gone changes nothing");
    write(&one("third"));
    wait_for("third").await;
    task.abort();
    std::fs::remove_file(&path).unwrap();
}
