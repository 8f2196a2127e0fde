use super::*;
use crate::budget::Period;

const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

fn parse(text: &str) -> Result<TenantsFile, FileError> {
    TenantsFile::parse(&text.replace("HEX", HEX), "t.toml")
}

#[test]
fn every_field_is_read_and_defaults_fill_in() {
    let file = parse(
        r#"
        [defaults]
        weight = 2
        models = ["*"]
        limits = { rpm = 60, n = 3 }
        cache.isolation = "key"
        budget = { tokens = 5, period = "week" }
        [[tenants]]
        id = "acme"
        priority = -2
        weight = 0.5
        budget = { tokens = 50_000_000_000, period = "month", action = "deprioritize" }
        models = ["llama-*", "acme/lora-*"]
        cache = { isolation = "shared:g" }
        [tenants.limits]
        rpm = 600
        input_tpm = 2_000_000
        output_tpm = 200000
        concurrency = 64
        queued = 128
        queued_tokens = 400000
        max_tokens = 8192
        max_input_tokens = 65536
        kv_blocks_share = 0.5
        [[tenants.keys]]
        id = "k1"
        sha256 = "HEX"
        expires = 2027-01-01T00:00:00Z
        scopes = ["infer", "admin"]
        [[tenants]]
        id = "b"
        "#,
    )
    .unwrap();
    let [acme, b] = &file.tenants[..] else { panic!("two tenants") };
    let limits = Limits {
        rpm: Some(Rate::per_minute(600)),
        input_tpm: Some(Rate::per_minute(2_000_000)),
        output_tpm: Some(Rate::per_minute(200_000)),
        concurrency: Some(64),
        queued: Some(128),
        queued_tokens: Some(400_000),
        max_tokens: Some(8192),
        max_input_tokens: Some(65536),
        n: Some(3),
        kv_blocks_share: 0.5,
    };
    assert_eq!(acme.settings.limits, limits);
    let month = Budget { tokens: 50_000_000_000, period: Period::Month, action: OverBudget::Deprioritize };
    let week = Budget { tokens: 5, period: Period::Week, action: OverBudget::Reject };
    assert_eq!((acme.settings.budget, b.settings.budget), (Some(month), Some(week)));
    assert_eq!((acme.settings.priority, acme.settings.weight), (-2, 0.5));
    assert_eq!(acme.settings.isolation, Isolation::Shared("g".into()));
    assert_eq!(acme.settings.models, Some(vec![Glob("llama-*".into()), Glob("acme/lora-*".into())]));
    let key = &acme.keys[0];
    assert_eq!((key.id.as_str(), key.digest, key.expires), ("k1", KeyDigest::of("abc"), Some(1_798_761_600)));
    assert!(key.scopes.allow(crate::limits::Scope::Metrics), "admin may");
    assert_eq!(b.settings, file.defaults);
    assert_eq!((b.settings.weight, b.settings.isolation.clone()), (2.0, Isolation::Key));
    assert_eq!(parse("").unwrap().tenants, []);
}

/// Every error names file, line and field.
#[test]
fn wrong_values_are_named_with_their_place() {
    let in_limits = |limit: &str| format!("[[tenants]]\nid = 'a'\n[tenants.limits]\n{limit}");
    let in_key = |key: &str| format!("[[tenants]]\nid = 'a'\n[[tenants.keys]]\n{key}");
    for (text, place) in [
        ("x = 1".to_owned(), "t.toml:1: x: unknown field `x`"),
        ("[[tenants]]\nid = 'a'\n\nrpm = 1".into(), "t.toml:4: rpm: unknown field `rpm`"),
        ("[[tenants]]\nweight = 1".into(), "t.toml:1: tenants: missing field `id`"),
        ("[[tenants]]\nid = 'Acme'".into(), "t.toml:2: id: must be 1 to 63"),
        (format!("[[tenants]]\nid = '{}'", "a".repeat(64)), "t.toml:2: id: must be 1 to 63"),
        ("[[tenants]]\nid = 'other'".into(), "t.toml:2: id: `other` is reserved"),
        ("[[tenants]]\nid = 'a'\n[[tenants]]\nid = 'a'".into(), "t.toml:4: id: `a` is there twice"),
        ("[[tenants]]\nid = 'a'\npriority = 3".into(), "t.toml:3: priority: must be between -2 and 2, got 3"),
        ("[[tenants]]\nid = 'a'\nweight = 0".into(), "t.toml:3: weight: must be between"),
        ("[[tenants]]\nid = 'a'\nmodels = ['']".into(), "t.toml:3: models: must not be empty"),
        ("[[tenants]]\nid = 'a'\nmodels = 'x'".into(), "t.toml:3: models: invalid type"),
        (
            "[[tenants]]\nid = 'a'\ncache = { isolation = 'all' }".into(),
            "t.toml:3: isolation: must be tenant",
        ),
        ("[[tenants]]\nid = 'a'\ncache.isolation = 'shared:'".into(), "t.toml:3: cache.isolation: must be"),
        (
            "[[tenants]]\nid = 'a'\nip_allow = ['::1', 'x']".into(),
            "t.toml:3: ip_allow: must be an IP address",
        ),
        (
            "[[tenants]]\nid = 'a'\nbudget = { tokens = 0, period = 'day' }".into(),
            "t.toml:3: tokens: must be between 1",
        ),
        ("[[tenants]]\nid = 'a'\nbudget = { tokens = 1 }".into(), "t.toml:3: budget: missing field `period`"),
        ("[defaults.budget]\nperiod = 'year'".into(), "t.toml:2: period: must be day, week or month"),
        ("[defaults.budget]\naction = 'stop'".into(), "t.toml:2: action: must be reject or deprioritize"),
        ("[defaults.budget]\nusd = 5".into(), "t.toml:2: usd: unknown field"),
        ("[defaults]\nid = 'a'".into(), "t.toml:2: id: unknown field"),
        ("[defaults.limits]\nrpm = 'x'".into(), "t.toml:2: rpm: invalid type"),
        ("[defaults]\nlimits = { n = 1, rpm = 0 }".into(), "t.toml:2: rpm: must be between 1 and"),
        (in_limits("tpm = 1"), "t.toml:4: tpm: unknown field `tpm`"),
        (in_limits("input_tpm = -1"), "t.toml:4: input_tpm: must be between 1"),
        (in_limits("output_tpm = 1000000000001"), "t.toml:4: output_tpm: must be between 1"),
        (in_limits("concurrency = 0"), "t.toml:4: concurrency: must be between 1"),
        (in_limits("queued = 4294967296"), "t.toml:4: queued: must be between 1"),
        (in_limits("n = 1.5"), "t.toml:4: n: invalid type"),
        (in_limits("kv_blocks_share = 1.5"), "t.toml:4: kv_blocks_share: must be above 0"),
        (in_limits("kv_blocks_share = nan"), "t.toml:4: kv_blocks_share: must be above 0"),
        (in_key("id = 'k'\nsha256 = 'abc'"), "t.toml:5: sha256: must be the SHA-256"),
        (in_key("id = 'k'"), "t.toml:3: tenants.keys: missing field `sha256`"),
        (in_key("id = 'k'\nsha256 = 'HEX'\nkey = 'x'"), "t.toml:6: key: unknown field `key`"),
        (
            in_key("id = 'k'\nsha256 = 'HEX'\nexpires = 2027-01-01"),
            "t.toml:6: expires: must be a date and time",
        ),
        (in_key("id = 'k'\nsha256 = 'HEX'\nscopes = ['infer', 'root']"), "t.toml:6: scopes: must be infer"),
        (
            in_key("id = 'k'\nsha256 = 'HEX'\n[[tenants.keys]]\nid = 'l'\nsha256 = 'HEX'"),
            "t.toml:8: sha256: tenant `a` has the same key",
        ),
        (
            in_key("id = 'k'\nsha256 = 'HEX'\n[[tenants.keys]]\nid = 'k'\nsha256 = 'HEX'"),
            "t.toml:7: id: tenant `a` has a key `k`",
        ),
        ("[[tenants]]\nid = 'a'\nid = 'b'".into(), "t.toml:3: id: duplicate key"),
        ("[[tenants]]\nid = ".into(), "t.toml:2: id: "),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.starts_with(place), "{text}\nexpected {place}\ngot {error}");
    }
}

#[test]
fn what_is_not_enforced_is_refused_by_name() {
    for field in ["loras.max_loaded = 4", "logging = { content = 'none' }"] {
        let name = field.split(['.', ' ']).next().unwrap();
        let error = parse(&format!("[[tenants]]\nid = 'a'\n{field}")).unwrap_err().to_string();
        assert!(error.starts_with("t.toml:3: ") && error.contains("not enforced"), "{error}");
        assert!(error.contains(name), "{error}");
    }
    let error = parse("[[tenants]]\nid = 'a'\n[tenants.loras]\nmax_loaded = 1").unwrap_err().to_string();
    assert!(error.starts_with("t.toml:3: tenants.loras: is not enforced"), "{error}");
}

#[test]
fn a_key_in_the_wrong_place_is_not_repeated() {
    for text in ["sha256 = 'sk-secret'", "sha256 = ['sk-secret'", "sha256 = sk-secret"] {
        let error = parse(&format!("[[tenants]]\nid='a'\n[[tenants.keys]]\nid='k'\n{text}")).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("sk-secret"), "{error}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = TenantsFile::read(Path::new("/nowhere/tenants.toml")).unwrap_err().to_string();
    assert!(error.starts_with("/nowhere/tenants.toml: "), "{error}");
}

/// The documentation's example, and its table of fields.
#[test]
fn the_example_is_a_valid_file_and_the_manual_names_its_fields() {
    let text = include_str!("../../../docs/tenants.toml");
    let file = TenantsFile::parse(text, "docs/tenants.toml").unwrap();
    let ids: Vec<&str> = file.tenants.iter().map(|tenant| tenant.id.as_str()).collect();
    assert_eq!(ids, ["acme", "nightly-batch", "operations"]);
    let acme = &file.tenants[0];
    assert_eq!(acme.keys[1].digest, KeyDigest::of("sk-acme-2027"));
    assert_eq!(acme.settings.limits.rpm, Some(Rate::per_minute(600)));
    assert_eq!(file.tenants[1].settings.limits, file.defaults.limits);
    let manual = include_str!("../../../docs/tenants.md");
    // What the parser says it knows.
    let error = parse("[[tenants]]\nid = 'a'\nlimits.unknown = 1").unwrap_err().to_string();
    let known = error.split('`').skip(3).step_by(2);
    let limits: Vec<&str> = known.collect();
    assert_eq!(limits.len(), 10, "{error}");
    for limit in limits {
        assert!(manual.contains(&format!("`limits.{limit}`")), "{limit}");
    }
    for quota in crate::limits::Quota::ALL {
        assert!(manual.contains(quota.name()), "{quota}");
    }
}

/// Whatever an operator's editor left half done gives an error with a line, never a panic.
#[test]
fn torn_files_are_errors() {
    let text = include_str!("../../../docs/tenants.toml");
    let lines = text.lines().count();
    let boundaries = (0..text.len()).filter(|&at| text.is_char_boundary(at));
    for at in boundaries {
        let _ = TenantsFile::parse(&text[..at], "t.toml");
        for torn in ["\u{fc}", "\"", "[", "\0", "=", "\n"] {
            let mut text = text.to_owned();
            text.replace_range(at..=at, torn);
            if let Err(FileError::Value { line, field, .. }) = TenantsFile::parse(&text, "t.toml") {
                assert!((1..=lines + 1).contains(&line) && !field.is_empty(), "at {at}: {line} {field}");
            }
        }
    }
}
