//! A tenant as requests meet it, and who comes with which key.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use quire_core::{TenantId, TenantShare};

use crate::audit::Trail;
use crate::budget::Budget;
use crate::demand::Denied;
use crate::file::TenantSettings;
use crate::gcra::{Nanos, Rate};
use crate::ledger::Ledger;
use crate::limits::{Limits, Scope, Scopes};
use crate::metrics::TenantMetrics;
use crate::network::Network;
use crate::usage_history::{Counts, UsageHistory};

/// What outlives a reload: the id, and what is in use.
pub(crate) struct TenantState {
    pub(crate) id: TenantId,
    pub(crate) name: Arc<str>,
    pub(crate) ledger: Mutex<Ledger>,
    pub(crate) metrics: TenantMetrics,
    /// The shared store's last word on requests a minute, and until when it holds: of these nothing is given back.
    pub(crate) refused: Mutex<Option<(Nanos, Denied)>>,
    pub(crate) totals: Totals,
    pub(crate) history: Mutex<UsageHistory>,
}

/// What a tenant's ended requests came to since the start.
#[derive(Default)]
pub(crate) struct Totals {
    pub(crate) requests: AtomicU64,
    pub(crate) input: AtomicU64,
    pub(crate) cached: AtomicU64,
    pub(crate) output: AtomicU64,
}

impl Totals {
    /// Adds one request.
    pub(crate) fn add(&self, [input, cached, output]: [u64; 3]) {
        let counts =
            [(&self.requests, 1), (&self.input, input), (&self.cached, cached), (&self.output, output)];
        for (total, count) in counts {
            total.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// As they are now.
    pub(crate) fn counts(&self) -> Counts {
        let total = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            requests: total(&self.requests),
            prompt_tokens: total(&self.input),
            cached_tokens: total(&self.cached),
            completion_tokens: total(&self.output),
        }
    }

    /// Tokens, prompts included.
    pub(crate) fn tokens(&self) -> u64 {
        self.input.load(Ordering::Relaxed) + self.output.load(Ordering::Relaxed)
    }
}

/// A tenant with its settings as of one reading of the file.
pub struct Tenant {
    pub(crate) settings: TenantSettings,
    pub(crate) state: Arc<TenantState>,
    /// Where its requests may come from; empty: from anywhere.
    pub(crate) ip_allow: Vec<Network>,
    /// Whether clients may raise their priority: only where no file says what it is.
    pub(crate) free_priority: bool,
}

impl Tenant {
    /// As the engine knows the tenant.
    pub fn id(&self) -> TenantId {
        self.state.id
    }

    /// As people and metrics know it.
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// What it may do.
    pub fn limits(&self) -> &Limits {
        &self.settings.limits
    }

    /// What it may use in a day, a week or a month.
    pub fn budget(&self) -> Option<&Budget> {
        self.settings.budget.as_ref()
    }

    /// What the scheduler is to give it.
    pub fn share(&self) -> TenantShare {
        TenantShare { weight: self.settings.weight, kv_blocks_share: self.settings.limits.kv_blocks_share }
    }

    /// Whether a model exists for this tenant.
    pub fn may_use(&self, model: &str) -> bool {
        let models = self.settings.models.as_ref();
        models.is_none_or(|globs| globs.iter().any(|glob| glob.matches(model)))
    }

    /// Whether a request may come from there. Where it comes from must be known, if that matters.
    pub(crate) fn may_come_from(&self, peer: Option<IpAddr>) -> bool {
        self.ip_allow.is_empty()
            || peer.is_some_and(|peer| self.ip_allow.iter().any(|network| network.contains(peer)))
    }

    /// The priority of a request whose client asks for `asked`: under a file, it can only step back behind the others.
    pub fn priority(&self, asked: i8) -> i8 {
        if self.free_priority { asked } else { self.settings.priority.saturating_add(asked.min(0)) }
    }

    /// The most tokens that an answer gets whose client names no `max_tokens`, where a request has so many answers:
    /// what the limits allow, and what the bucket can give at once.
    pub fn default_max_tokens(&self, choices: u32) -> Option<u32> {
        let limits = self.limits();
        let burst = |rate: Rate| {
            let each = rate.burst() / u64::from(choices.max(1));
            u32::try_from(each.max(1)).unwrap_or(u32::MAX)
        };
        match (limits.max_tokens, limits.output_tpm.map(burst)) {
            (Some(limit), Some(burst)) => Some(limit.min(burst)),
            (limit, burst) => limit.or(burst),
        }
    }
}

impl fmt::Debug for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tenant({} {})", self.id(), self.name())
    }
}

/// A key without its secret.
#[derive(Clone, Debug)]
pub(crate) struct Key {
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) expires: Option<i64>,
    pub(crate) scopes: Scopes,
}

/// Who asks: a tenant, by one of its keys. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Access {
    pub(crate) tenant: Arc<Tenant>,
    pub(crate) key: Arc<Key>,
    pub(crate) trail: Trail,
}

impl Access {
    /// The tenant.
    pub fn tenant(&self) -> &Tenant {
        &self.tenant
    }

    /// What the audit log is to know of the request.
    pub fn trail(&self) -> &Trail {
        &self.trail
    }

    /// The same, for the request of this trail.
    pub fn with_trail(self, trail: Trail) -> Self {
        Self { trail, ..self }
    }

    /// The key's id in the file, for logs.
    pub fn key_id(&self) -> &str {
        &self.key.id
    }

    /// Whether the key is for this.
    ///
    /// # Errors
    /// [`Denied::Scope`].
    pub fn require(&self, scope: Scope) -> Result<(), Denied> {
        if self.key.scopes.allow(scope) { Ok(()) } else { Err(Denied::Scope(scope)) }
    }

    /// The prefix-cache namespace of this key. Under it a client may have namespaces of its own.
    pub fn cache_namespace(&self) -> Vec<u8> {
        self.tenant.settings.isolation.namespace(self.tenant.name(), &self.key.id)
    }
}
