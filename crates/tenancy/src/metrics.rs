//! One tenant's series, looked up once. Labels are configured ids, the first hundred of them; the rest share `other`.

use std::sync::OnceLock;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use quire_core::FinishReason;
use quire_core::metric_names::{
    AUDIT_RECORDS, QUOTA_STORE_ERRORS, TENANT_BUDGET_TOKENS, TENANT_QUEUE, TENANT_REQUESTS, TENANT_RUNNING,
    TENANT_SHARE_RATIO, TENANT_THROTTLED, TENANT_TOKENS, TENANT_WAITING, TENANTS_RELOADS,
};

use crate::limits::Quota;

/// Tenants with series of their own.
pub(crate) const MAX_LABELLED: usize = 100;

/// How admitted and refused requests end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Outcome {
    /// Never came to run.
    Rejected,
    Completed,
    Cancelled,
    Deadline,
    Error,
    /// Refused by a limit.
    Throttled,
}

impl Outcome {
    pub(crate) const ALL: [Self; 6] =
        [Self::Rejected, Self::Completed, Self::Cancelled, Self::Deadline, Self::Error, Self::Throttled];

    const fn name(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
            Self::Error => "error",
            Self::Throttled => "throttled",
        }
    }

    pub(crate) const fn of(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop | FinishReason::Length => Self::Completed,
            FinishReason::Abort => Self::Cancelled,
            FinishReason::Deadline => Self::Deadline,
            FinishReason::Error => Self::Error,
            FinishReason::Rejected => Self::Rejected,
        }
    }
}

/// The series of one tenant.
pub(crate) struct TenantMetrics {
    requests: [Counter; Outcome::ALL.len()],
    throttled: Vec<Counter>,
    pub(crate) input: Counter,
    pub(crate) cached: Counter,
    pub(crate) output: Counter,
    pub(crate) queue_seconds: Histogram,
    pub(crate) running: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) share: Gauge,
    label: String,
    /// Used and left; there once there is a budget.
    budget: OnceLock<[Gauge; 2]>,
}

impl TenantMetrics {
    pub(crate) fn new(label: &str) -> Self {
        let label = label.to_owned();
        let tokens =
            |kind: &'static str| counter!(TENANT_TOKENS.name, "tenant" => label.clone(), "kind" => kind);
        let requests = |outcome: Outcome| counter!(TENANT_REQUESTS.name, "tenant" => label.clone(), "outcome" => outcome.name());
        let throttled = |quota: &Quota| counter!(TENANT_THROTTLED.name, "tenant" => label.clone(), "limit" => quota.name());
        Self {
            requests: Outcome::ALL.map(requests),
            throttled: Quota::ALL.iter().map(throttled).collect(),
            input: tokens("input"),
            cached: tokens("cached"),
            output: tokens("output"),
            queue_seconds: histogram!(TENANT_QUEUE.name, "tenant" => label.clone()),
            running: gauge!(TENANT_RUNNING.name, "tenant" => label.clone()),
            waiting: gauge!(TENANT_WAITING.name, "tenant" => label.clone()),
            share: gauge!(TENANT_SHARE_RATIO.name, "tenant" => label.clone()),
            label,
            budget: OnceLock::new(),
        }
        .zeroed()
    }

    /// A board can then tell "zero" from "not there".
    fn zeroed(self) -> Self {
        for counter in self.requests.iter().chain(&self.throttled) {
            counter.increment(0);
        }
        [&self.input, &self.cached, &self.output].into_iter().for_each(|counter| counter.increment(0));
        [&self.running, &self.waiting, &self.share].into_iter().for_each(|gauge| gauge.increment(0.0));
        self
    }

    /// Tokens used and left. Without a budget there is no series, or zeros where there was one.
    pub(crate) fn set_budget(&self, budget: Option<(u64, u64)>) {
        if budget.is_none() && self.budget.get().is_none() {
            return;
        }
        let gauge = |state: &'static str| gauge!(TENANT_BUDGET_TOKENS.name, "tenant" => self.label.clone(), "state" => state);
        let [used_gauge, left_gauge] = self.budget.get_or_init(|| ["used", "left"].map(gauge));
        let (used, left) = budget.unwrap_or_default();
        used_gauge.set(used as f64);
        left_gauge.set(left as f64);
    }

    pub(crate) fn ended(&self, outcome: Outcome) {
        self.requests[outcome as usize].increment(1);
    }

    pub(crate) fn throttled(&self, quota: Quota) {
        self.throttled[quota as usize].increment(1);
        self.ended(Outcome::Throttled);
    }
}

/// A changed file was read.
pub(crate) fn count_reload(usable: bool) {
    let result = if usable { "ok" } else { "error" };
    counter!(TENANTS_RELOADS.name, "result" => result).increment(1);
}

/// So many records of the audit log were `written` or `lost`.
pub(crate) fn count_audit(result: &'static str, num: u64) {
    counter!(AUDIT_RECORDS.name, "result" => result).increment(num);
}

/// The shared store did not answer.
pub(crate) fn count_store_error() {
    counter!(QUOTA_STORE_ERRORS.name).increment(1);
}

/// Creates the series that are there from the start.
pub(crate) fn create_series() {
    for result in ["ok", "error"] {
        counter!(TENANTS_RELOADS.name, "result" => result).increment(0);
    }
    counter!(QUOTA_STORE_ERRORS.name).increment(0);
}
