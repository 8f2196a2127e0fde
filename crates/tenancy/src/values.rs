//! The values of `tenants.toml`, each checked while it is read, so that the parser can say where it stands.

use quire_core::calendar::{DAY, days_from_civil};
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer};
use toml::value::{Date, Datetime, Offset, Time};

use crate::budget::{OverBudget, Period};
use crate::credential::KeyDigest;
use crate::limits::{Glob, Isolation, Scope};
use crate::network::Network;

/// Bytes of an id (as of a DNS label).
const MAX_ID_BYTES: usize = 63;
/// Upper bound of whatever is counted a minute: beyond it a bucket could not tell one unit from none.
const MAX_PER_MINUTE: i64 = 1_000_000_000_000;
/// Upper bound of a budget: scripts of the shared store count in doubles.
const MAX_BUDGET: i64 = 1_000_000_000_000_000;
const MAX_WEIGHT: f64 = 1000.0;
const MIN_WEIGHT: f64 = 0.001;

/// Defines a value as what it is made from and the check that makes it.
macro_rules! checked {
    ($(#[$doc:meta])* $name:ident($inner:ty) from $from:ty, $check:expr) => {
        $(#[$doc])*
        pub(crate) struct $name(pub(crate) $inner);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let check: fn($from) -> Result<$inner, String> = $check;
                check(<$from>::deserialize(deserializer)?).map(Self).map_err(D::Error::custom)
            }
        }
    };
}

checked! {
    /// `[a-z0-9-]{1,63}`.
    Id(String) from String, |id| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(plain) {
            Ok(id)
        } else {
            Err(format!("must be 1 to {MAX_ID_BYTES} characters out of a-z, 0-9 and -, got {id:?}"))
        }
    }
}
checked! {
    /// A lower or upper case hex digest. What stands there instead may be a key, so errors do not repeat it.
    RawDigest(KeyDigest) from String, |hex| {
        KeyDigest::from_hex(&hex).ok_or_else(|| {
            "must be the SHA-256 of a key in 64 hex digits: printf %s KEY | sha256sum".to_owned()
        })
    }
}
checked! {
    /// Seconds since 1970.
    Expiry(i64) from Datetime, |at| {
        seconds_of(&at).ok_or_else(|| {
            "must be a date and time with an offset, such as 2027-01-01T00:00:00Z".to_owned()
        })
    }
}
checked! {
    /// By name.
    RawScope(Scope) from String, |name| {
        let known = Scope::ALL.iter().copied().find(|scope| scope.name() == name);
        known.ok_or_else(|| format!("must be infer, tokenize, metrics or admin, got {name:?}"))
    }
}
checked! {
    /// -2 to 2.
    RawPriority(i8) from i64, |priority| match priority {
        -2..=2 => Ok(priority as i8),
        _ => Err(format!("must be between -2 and 2, got {priority}")),
    }
}
checked! {
    /// Above 0.
    Weight(f32) from f64, |weight| {
        if (MIN_WEIGHT..=MAX_WEIGHT).contains(&weight) {
            Ok(weight as f32)
        } else {
            Err(format!("must be between {MIN_WEIGHT} and {MAX_WEIGHT}, got {weight}"))
        }
    }
}
checked! {
    /// In (0, 1].
    Share(f32) from f64, |share| {
        if share > 0.0 && share <= 1.0 {
            Ok(share as f32)
        } else {
            Err(format!("must be above 0 and at most 1, got {share}"))
        }
    }
}
checked! {
    /// A positive 32-bit number.
    Count(u32) from i64, |count| match u32::try_from(count) {
        Ok(count @ 1..) => Ok(count),
        _ => Err(format!("must be between 1 and {}, got {count}; leave it out for no limit", u32::MAX)),
    }
}
checked! {
    /// A positive number that a bucket can count.
    PerMinute(u64) from i64, |units| match units {
        1..=MAX_PER_MINUTE => Ok(units.unsigned_abs()),
        _ => Err(format!("must be between 1 and {MAX_PER_MINUTE}, got {units}; leave it out for no limit")),
    }
}
checked! {
    /// A positive number of tokens.
    BudgetTokens(u64) from i64, |tokens| match tokens {
        1..=MAX_BUDGET => Ok(tokens.unsigned_abs()),
        _ => Err(format!("must be between 1 and {MAX_BUDGET}, got {tokens}; leave `budget` out for none")),
    }
}
checked! {
    /// By name.
    RawPeriod(Period) from String, |name| {
        let known = Period::ALL.iter().copied().find(|period| period.name() == name);
        known.ok_or_else(|| format!("must be day, week or month, got {name:?}"))
    }
}
checked! {
    /// By name.
    RawAction(OverBudget) from String, |name| {
        let known = OverBudget::ALL.iter().copied().find(|action| action.name() == name);
        known.ok_or_else(|| format!("must be reject or deprioritize, got {name:?}"))
    }
}
checked! {
    /// A model's name with stars.
    RawGlob(Glob) from String, |pattern| {
        if pattern.is_empty() { Err("must not be empty".to_owned()) } else { Ok(Glob(pattern)) }
    }
}
checked! {
    /// `tenant`, `key`, `none` or `shared:GROUP`.
    RawIsolation(Isolation) from String, |text| match text.as_str() {
        "tenant" => Ok(Isolation::Tenant),
        "key" => Ok(Isolation::Key),
        "none" => Ok(Isolation::None),
        other => match other.strip_prefix("shared:") {
            Some(group) if !group.is_empty() && !group.contains('\0') => Ok(Isolation::Shared(group.to_owned())),
            _ => Err(format!("must be tenant, key, none or shared:GROUP, got {other:?}")),
        },
    }
}

checked! {
    /// An address or a network.
    RawNetwork(Network) from String, |text| text.parse()
}

/// A field that is known and not enforced: whoever sets it would rely on it.
#[derive(Default)]
pub(crate) struct NotYet;

impl<'de> Deserialize<'de> for NotYet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer)?;
        Err(D::Error::custom("is not enforced by this version, so it is refused; leave it out"))
    }
}

/// Seconds since 1970 of a date with time and offset.
fn seconds_of(at: &Datetime) -> Option<i64> {
    let (Date { year, month, day }, time) = (at.date?, at.time?);
    let Time { hour, minute, second, .. } = time;
    let offset_minutes = match at.offset? {
        Offset::Z => 0,
        Offset::Custom { minutes } => i64::from(minutes),
    };
    let days = days_from_civil(i64::from(year), i64::from(month), i64::from(day));
    let minutes = i64::from(hour) * 60 + i64::from(minute) - offset_minutes;
    Some(days * DAY + minutes * 60 + i64::from(second.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // Values of `date -u -d … +%s`.
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2027-01-01T00:00:00Z", 1_798_761_600),
            ("2024-02-29T23:59:59Z", 1_709_251_199),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
            ("2000-12-31T12:00:00+02:00", 978_256_800),
            ("1969-12-31T23:59:59Z", -1),
        ] {
            assert_eq!(seconds_of(&text.parse().unwrap()), Some(seconds), "{text}");
        }
        for local in ["2027-01-01", "2027-01-01T00:00:00", "12:00:00"] {
            assert_eq!(seconds_of(&local.parse().unwrap()), None, "{local}");
        }
    }
}
