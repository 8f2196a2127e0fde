//! `tenants.toml`: its fields, and what each may hold. An unknown field is an error, and so is a known one that this
//! build does not enforce; every error names file, line and field.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Deserializer};
use toml::Spanned;

use crate::budget::{Budget, OverBudget};
use crate::credential::KeyDigest;
use crate::gcra::Rate;
use crate::limits::{Glob, Isolation, Limits, Scopes};
use crate::network::Network;
use crate::values::{
    BudgetTokens, Count, Expiry, Id, NotYet, PerMinute, RawAction, RawDigest, RawGlob, RawIsolation,
    RawNetwork, RawPeriod, RawPriority, RawScope, Share, Weight,
};

/// Bytes of a file.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Tenants of a file.
pub(crate) const MAX_TENANTS: usize = 1024;
/// Keys of one tenant.
const MAX_KEYS: usize = 256;
/// Ids that mean something else in metrics and logs.
const RESERVED_IDS: [&str; 3] = ["default", "anonymous", "other"];

/// Why a tenants file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{path}: {message}")]
    Read {
        /// As given.
        path: String,
        /// What the system said.
        message: String,
    },
    /// It has a wrong value.
    #[error("{path}:{line}: {field}: {message}")]
    Value {
        /// As given.
        path: String,
        /// Counted from 1.
        line: usize,
        /// The key of the value, or what is there in its place.
        field: String,
        /// What is wrong and what is allowed.
        message: String,
    },
}

/// A file that has been read and checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TenantsFile {
    /// Of everybody who comes with `--api-key`, or without a key where none is needed.
    pub(crate) defaults: TenantSettings,
    /// In the order of the file; defaults filled in.
    pub(crate) tenants: Vec<TenantEntry>,
    /// Whether there is a file at all: without one, clients choose their priority.
    pub(crate) is_file: bool,
}

/// What a tenant is and may do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TenantSettings {
    pub(crate) priority: i8,
    pub(crate) weight: f32,
    pub(crate) limits: Limits,
    /// `None`: every model.
    pub(crate) models: Option<Vec<Glob>>,
    pub(crate) isolation: Isolation,
    pub(crate) budget: Option<Budget>,
}

impl Default for TenantSettings {
    fn default() -> Self {
        Self {
            priority: 0,
            weight: 1.0,
            limits: Limits::default(),
            models: None,
            isolation: Isolation::default(),
            budget: None,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TenantEntry {
    pub(crate) id: String,
    pub(crate) settings: TenantSettings,
    pub(crate) keys: Vec<KeyEntry>,
    /// Where its requests may come from; empty: from anywhere.
    pub(crate) ip_allow: Vec<Network>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KeyEntry {
    pub(crate) id: String,
    pub(crate) digest: KeyDigest,
    /// Seconds since 1970.
    pub(crate) expires: Option<i64>,
    pub(crate) scopes: Scopes,
}

impl TenantsFile {
    /// Reads a file.
    ///
    /// # Errors
    /// It is not there, too large, or wrong.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        Self::parse(&read_text(path)?, &path.display().to_string())
    }

    /// Reads a text; `path` is for errors.
    ///
    /// # Errors
    /// The first value that is wrong.
    pub fn parse(text: &str, path: &str) -> Result<Self, FileError> {
        let fail = |at: Range<usize>, field: Option<&str>, message: &str| FileError::Value {
            path: path.to_owned(),
            line: 1 + text[..at.start].bytes().filter(|&byte| byte == b'\n').count(),
            field: field.map_or_else(|| field_at(text, &at), str::to_owned),
            message: message.to_owned(),
        };
        // The parser's own text would quote the line, and with it perhaps a key that was pasted there.
        let raw: RawFile = toml::from_str(text)
            .map_err(|error| fail(error.span().unwrap_or(0..0), None, error.message()))?;
        if raw.tenants.len() > MAX_TENANTS {
            return Err(fail(0..0, Some("tenants"), &format!("at most {MAX_TENANTS} tenants are allowed")));
        }
        let defaults = raw.defaults.resolve(&TenantSettings::default());
        let (mut ids, mut digests) = (HashSet::new(), HashMap::new());
        let mut tenants = Vec::with_capacity(raw.tenants.len());
        for tenant in raw.tenants {
            let (span, id) = (tenant.id.span(), tenant.id.into_inner().0);
            if RESERVED_IDS.contains(&id.as_str()) {
                return Err(fail(span, Some("id"), &format!("`{id}` is reserved; choose another")));
            }
            if !ids.insert(id.clone()) {
                return Err(fail(span, Some("id"), &format!("`{id}` is there twice")));
            }
            if tenant.keys.len() > MAX_KEYS {
                return Err(fail(span, Some("keys"), &format!("at most {MAX_KEYS} keys are allowed")));
            }
            let mut keys: Vec<KeyEntry> = Vec::with_capacity(tenant.keys.len());
            for key in tenant.keys {
                let (span, key_id) = (key.id.span(), key.id.into_inner().0);
                if keys.iter().any(|other| other.id == key_id) {
                    let message = format!("tenant `{id}` has a key `{key_id}` already");
                    return Err(fail(span, Some("id"), &message));
                }
                if let Some(owner) = digests.insert(key.sha256.get_ref().0, id.clone()) {
                    let message = format!("tenant `{owner}` has the same key");
                    return Err(fail(key.sha256.span(), Some("sha256"), &message));
                }
                keys.push(KeyEntry {
                    id: key_id,
                    digest: key.sha256.into_inner().0,
                    expires: key.expires.map(|Expiry(seconds)| seconds),
                    scopes: key.scopes.map_or_else(Scopes::standard, |scopes| {
                        Scopes::of(&scopes.into_iter().map(|RawScope(scope)| scope).collect::<Vec<_>>())
                    }),
                });
            }
            let ip_allow = tenant.ip_allow.into_iter().map(|RawNetwork(network)| network).collect();
            tenants.push(TenantEntry { ip_allow, settings: tenant.settings.resolve(&defaults), id, keys });
        }
        Ok(Self { defaults, tenants, is_file: true })
    }
}

/// The file's text.
pub(crate) fn read_text(path: &Path) -> Result<String, FileError> {
    use std::io::Read as _;
    let fail = |message: String| FileError::Read { path: path.display().to_string(), message };
    let file = std::fs::File::open(path).map_err(|error| fail(error.to_string()))?;
    let mut text = String::new();
    let read = file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text);
    if read.map_err(|error| fail(error.to_string()))? as u64 > MAX_FILE_BYTES {
        return Err(fail(format!("the file is larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

/// The key of the value at `span`, or the words that stand there.
fn field_at(text: &str, span: &Range<usize>) -> String {
    let word = |text: &str| {
        let word = text.trim_end().rsplit(|c: char| !(c.is_ascii_alphanumeric() || "_-.".contains(c))).next();
        word.filter(|word| !word.is_empty()).map(str::to_owned)
    };
    // `key = value`, also where the value is in the middle of a list.
    let before = &text[..span.start];
    let line = before.rsplit('\n').next().unwrap_or_default();
    let own = text.get(span.clone()).unwrap_or_default().trim_matches(|c: char| "[]\"' ".contains(c));
    match line.rsplit_once('=') {
        Some((key, rest)) if rest.trim().is_empty() || rest.trim_start().starts_with('[') => word(key),
        _ => Some(own.lines().next().unwrap_or_default().to_owned()).filter(|own| !own.is_empty()),
    }
    .unwrap_or_else(|| "file".to_owned())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default)]
    defaults: RawSettings,
    #[serde(default)]
    tenants: Vec<RawTenant>,
}

/// Fields of `[defaults]`.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSettings {
    priority: Option<RawPriority>,
    weight: Option<Weight>,
    #[serde(default)]
    limits: RawLimits,
    models: Option<Vec<RawGlob>>,
    #[serde(default)]
    cache: RawCache,
    budget: Option<RawBudget>,
}

/// Fields of `[[tenants]]`. `flatten` would lose the place of errors, so the settings are here once more.
struct RawTenant {
    id: Spanned<Id>,
    keys: Vec<RawKey>,
    ip_allow: Vec<RawNetwork>,
    settings: RawSettings,
}

impl<'de> Deserialize<'de> for RawTenant {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            id: Spanned<Id>,
            #[serde(default)]
            keys: Vec<RawKey>,
            priority: Option<RawPriority>,
            weight: Option<Weight>,
            #[serde(default)]
            limits: RawLimits,
            models: Option<Vec<RawGlob>>,
            #[serde(default)]
            cache: RawCache,
            #[serde(default)]
            ip_allow: Vec<RawNetwork>,
            budget: Option<RawBudget>,
            #[serde(default, rename = "loras")]
            _loras: NotYet,
            #[serde(default, rename = "logging")]
            _logging: NotYet,
        }
        let Fields { id, keys, priority, weight, limits, models, cache, ip_allow, budget, .. } =
            Fields::deserialize(deserializer)?;
        Ok(Self {
            id,
            keys,
            ip_allow,
            settings: RawSettings { priority, weight, limits, models, cache, budget },
        })
    }
}

impl RawSettings {
    fn resolve(self, defaults: &TenantSettings) -> TenantSettings {
        let globs = |globs: Vec<RawGlob>| globs.into_iter().map(|RawGlob(glob)| glob).collect();
        TenantSettings {
            priority: self.priority.map_or(defaults.priority, |RawPriority(priority)| priority),
            weight: self.weight.map_or(defaults.weight, |Weight(weight)| weight),
            limits: self.limits.resolve(&defaults.limits),
            models: self.models.map(globs).or_else(|| defaults.models.clone()),
            isolation: self.cache.isolation.map_or_else(|| defaults.isolation.clone(), |RawIsolation(i)| i),
            budget: self.budget.map(RawBudget::resolve).or(defaults.budget),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCache {
    isolation: Option<RawIsolation>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBudget {
    tokens: BudgetTokens,
    period: RawPeriod,
    action: Option<RawAction>,
}

impl RawBudget {
    fn resolve(self) -> Budget {
        let Self { tokens: BudgetTokens(tokens), period: RawPeriod(period), action } = self;
        let action = action.map_or(OverBudget::Reject, |RawAction(action)| action);
        Budget { tokens, period, action }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKey {
    id: Spanned<Id>,
    sha256: Spanned<RawDigest>,
    expires: Option<Expiry>,
    scopes: Option<Vec<RawScope>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    rpm: Option<PerMinute>,
    input_tpm: Option<PerMinute>,
    output_tpm: Option<PerMinute>,
    concurrency: Option<Count>,
    queued: Option<Count>,
    queued_tokens: Option<PerMinute>,
    max_tokens: Option<Count>,
    max_input_tokens: Option<Count>,
    n: Option<Count>,
    kv_blocks_share: Option<Share>,
}

impl RawLimits {
    fn resolve(self, defaults: &Limits) -> Limits {
        let rate =
            |own: Option<PerMinute>, default| own.map(|PerMinute(units)| Rate::per_minute(units)).or(default);
        let count = |own: Option<Count>, default| own.map(|Count(count)| count).or(default);
        Limits {
            rpm: rate(self.rpm, defaults.rpm),
            input_tpm: rate(self.input_tpm, defaults.input_tpm),
            output_tpm: rate(self.output_tpm, defaults.output_tpm),
            concurrency: count(self.concurrency, defaults.concurrency),
            queued: count(self.queued, defaults.queued),
            queued_tokens: self.queued_tokens.map(|PerMinute(tokens)| tokens).or(defaults.queued_tokens),
            max_tokens: count(self.max_tokens, defaults.max_tokens),
            max_input_tokens: count(self.max_input_tokens, defaults.max_input_tokens),
            n: count(self.n, defaults.n),
            kv_blocks_share: self.kv_blocks_share.map_or(defaults.kv_blocks_share, |Share(share)| share),
        }
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
