//! What tenants used: told to whoever asks, and published every second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::budget::{Budget, Window};
use crate::metrics::MAX_LABELLED;
use crate::tenancy::Tenancy;

/// What one tenant used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its name.
    pub tenant: String,
    /// Requests that ended since the start, those to tokenize included.
    pub requests: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: u64,
    /// Tokens that were generated.
    pub completion_tokens: u64,
    /// Answers that wait or run.
    pub in_flight: u32,
    /// Those of them that wait.
    pub waiting: u32,
    /// The budget, its period that runs, and what is used or reserved of it.
    pub budget: Option<(Budget, Window, u64)>,
}

impl Tenancy {
    /// What a tenant of the table used, on this replica but for the budget.
    pub fn usage(&self, name: &str) -> Option<Usage> {
        let table = self.table();
        let tenant = table.tenants.iter().find(|tenant| tenant.name() == name)?;
        let (ledger, totals) = (*tenant.state.ledger.lock(), &tenant.state.totals);
        let unix = self.now().unix;
        let budget = tenant.budget().map(|budget| {
            let window = budget.period.window(unix);
            (*budget, window, ledger.spending.used_in(window))
        });
        let total = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Some(Usage {
            tenant: name.to_owned(),
            requests: total(&totals.requests),
            prompt_tokens: total(&totals.input),
            cached_tokens: total(&totals.cached),
            completion_tokens: total(&totals.output),
            in_flight: ledger.in_flight().0,
            waiting: ledger.queued().0,
            budget,
        })
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
