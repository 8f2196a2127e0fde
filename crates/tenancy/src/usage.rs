//! What tenants used: told to whoever asks, and published every second.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::budget::{Budget, Window};
use crate::metrics::MAX_LABELLED;
use crate::tenancy::Tenancy;
use crate::tenant::TenantState;
use crate::usage_history::{Counts, MAX_WINDOW, MINUTE};

/// What one tenant used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub tenant: String,
    /// From when, and until now, in seconds since 1970.
    pub from: i64,
    /// Now.
    pub to: i64,
    /// In this time.
    pub counts: Counts,
    /// Answers that wait or run.
    pub in_flight: u32,
    /// Those of them that wait.
    pub waiting: u32,
    /// The budget, its period that runs, and what is used or reserved of it.
    pub budget: Option<(Budget, Window, u64)>,
}

impl Tenancy {
    /// What a tenant of the table used, on this replica but for the budget: in the last `window`, which begins a little
    /// earlier where that is when sums were noted, or since the start.
    pub fn usage(&self, name: &str, window: Option<Duration>) -> Option<Usage> {
        let table = self.table();
        let tenant = table.tenants.iter().find(|tenant| tenant.name() == name)?;
        let ledger = *tenant.state.ledger.lock();
        let unix = self.now().unix;
        let (from, counts) = self.counts(&tenant.state, window, unix);
        let budget = tenant.budget().map(|budget| {
            let window = budget.period.window(unix);
            (*budget, window, ledger.spending.used_in(window))
        });
        Some(Usage {
            tenant: name.to_owned(),
            from,
            to: unix,
            counts,
            in_flight: ledger.in_flight().0,
            waiting: ledger.queued().0,
            budget,
        })
    }

    fn counts(&self, state: &TenantState, window: Option<Duration>, unix: i64) -> (i64, Counts) {
        let (started, now) = (self.started(), state.totals.counts());
        let Some(window) = window else { return (started, now) };
        let window = window.as_secs().min(MAX_WINDOW).cast_signed();
        let (from, then) = state.history.lock().at(unix - window, unix);
        (from.max(started), now.since(then))
    }

    /// Notes at every full minute, for ever, what everybody has used.
    pub async fn keep_history(self) {
        loop {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let minute = Duration::from_secs(MINUTE.unsigned_abs());
            let into = Duration::from_millis((now.as_millis() % minute.as_millis()) as u64);
            tokio::time::sleep(minute - into).await;
            self.note_usage((self.now().unix + MINUTE / 2).div_euclid(MINUTE) * MINUTE);
        }
    }

    pub(crate) fn note_usage(&self, minute: i64) {
        for state in self.states().iter() {
            state.history.lock().note(minute, state.totals.counts());
        }
    }

    /// Publishes, once a `period` and for ever, how it stands with the budgets, and each tenant's part of the tokens over
    /// about the last `window`.
    pub async fn publish_shares(self, period: Duration, window: Duration) {
        let keep = 1.0 - (period.as_secs_f64() / window.as_secs_f64()).clamp(0.0, 1.0);
        let mut recent: Vec<(u64, f64)> = Vec::new();
        let mut ticks = tokio::time::interval(period);
        loop {
            ticks.tick().await;
            let states = self.states();
            recent.resize(states.len(), (0, 0.0));
            for (state, (seen, sum)) in states.iter().zip(&mut recent) {
                let total = state.totals.tokens();
                *sum = *sum * keep + (total - std::mem::replace(seen, total)) as f64;
            }
            self.publish_budgets();
            let all: f64 = recent.iter().map(|(_, sum)| sum).sum();
            for (state, (_, sum)) in states.iter().zip(&recent).take(MAX_LABELLED) {
                state.metrics.share.set(if all > 0.0 { sum / all } else { 0.0 });
            }
        }
    }

    pub(crate) fn publish_budgets(&self) {
        let now = self.now();
        let table = self.table();
        for state in self.states().iter().take(MAX_LABELLED) {
            let used = |budget: &Budget| {
                let used = state.ledger.lock().spending.used_in(budget.period.window(now.unix));
                (used, budget.tokens.saturating_sub(used))
            };
            // Whoever left the file has none.
            let tenant = table.tenants.iter().find(|tenant| tenant.id() == state.id);
            state.metrics.set_budget(tenant.and_then(|tenant| tenant.budget()).map(used));
        }
    }
}
