//! What one tenant uses now: places and buckets, changed under one short lock, with time as an argument.

use std::time::Duration;

use crate::budget::{Budget, OverBudget, Spending, Spent};
use crate::demand::Demand;
use crate::gcra::{Bucket, Level, Nanos, Rate};
use crate::limits::{Limits, Quota};

/// How long a client should wait for a place: when one comes free nobody can say.
const RETRY_PLACE: Duration = Duration::from_secs(1);

/// The three rate limits, in this order everywhere.
pub(crate) const RATES: [Quota; 3] = [Quota::Rpm, Quota::InputTpm, Quota::OutputTpm];

/// A limit that has been reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) quota: Quota,
    pub(crate) limit: u64,
    pub(crate) retry_after: Duration,
}

/// What was taken from each bucket, as time.
pub(crate) type Taken = [Nanos; 3];

/// What clients are told of their limits; `None` where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Of requests.
    pub requests: Option<Level>,
    /// Of prompt or of generated tokens, whichever are scarcer.
    pub tokens: Option<Level>,
}

impl Standing {
    /// From the levels of [`RATES`].
    pub(crate) fn of([requests, input, output]: [Option<Level>; 3]) -> Self {
        let scarcer = |a: Level, b: Level| {
            let cross = |level: Level, other: Level| u128::from(level.remaining) * u128::from(other.limit);
            if cross(b, a) < cross(a, b) { b } else { a }
        };
        let tokens = match (input, output) {
            (Some(input), Some(output)) => Some(scarcer(input, output)),
            (input, output) => input.or(output),
        };
        Self { requests, tokens }
    }

    /// Names and values of the headers (in gRPC, of the metadata) that say so.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, String)> {
        const NAMES: [[&str; 3]; 2] = [
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
        ];
        [self.requests, self.tokens].into_iter().zip(NAMES).flat_map(|(level, names)| {
            let values = level.map(|Level { limit, remaining, reset }| {
                [limit.to_string(), remaining.to_string(), duration_text(reset)]
            });
            values.into_iter().flat_map(move |values| names.into_iter().zip(values))
        })
    }
}

/// As OpenAI writes durations: `0s`, `250ms`, `12s`, `6m0s`; rounded up.
fn duration_text(duration: Duration) -> String {
    let ms = duration.as_nanos().div_ceil(1_000_000);
    match ms {
        0 => "0s".to_owned(),
        1..1000 => format!("{ms}ms"),
        _ => match ms.div_ceil(1000) {
            seconds @ ..60 => format!("{seconds}s"),
            seconds => format!("{}m{}s", seconds / 60, seconds % 60),
        },
    }
}

/// The rate limits of [`RATES`].
pub(crate) fn rates(limits: &Limits) -> [Option<Rate>; 3] {
    [limits.rpm, limits.input_tpm, limits.output_tpm]
}

/// One tenant's use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ledger {
    buckets: [Bucket; 3],
    pub(crate) spending: Spending,
    in_flight: u32,
    queued: u32,
    queued_tokens: u64,
    /// Counts changes of `in_flight`, so that late news of it can be told from newer ones.
    version: u64,
}

impl Ledger {
    /// Takes places, or none.
    pub(crate) fn enter(&mut self, limits: &Limits, demand: &Demand) -> Result<(), Refusal> {
        let in_flight = self.in_flight.saturating_add(demand.choices);
        let queued = self.queued.saturating_add(demand.choices);
        let queued_tokens = self.queued_tokens.saturating_add(demand.input_tokens);
        for (quota, after, limit) in [
            (Quota::Concurrency, in_flight.into(), limits.concurrency.map(u64::from)),
            (Quota::Queued, queued.into(), limits.queued.map(u64::from)),
            (Quota::QueuedTokens, queued_tokens, limits.queued_tokens),
        ] {
            if let Some(limit) = limit.filter(|&limit| after > limit) {
                return Err(Refusal { quota, limit, retry_after: RETRY_PLACE });
            }
        }
        (self.in_flight, self.queued, self.queued_tokens) = (in_flight, queued, queued_tokens);
        self.version += 1;
        Ok(())
    }

    /// Gives back places in the queue: what waited runs, or never will.
    pub(crate) fn leave_queue(&mut self, choices: u32, input_tokens: u64) {
        self.queued = self.queued.saturating_sub(choices);
        self.queued_tokens = self.queued_tokens.saturating_sub(input_tokens);
    }

    /// Gives back places in flight.
    pub(crate) fn leave(&mut self, choices: u32) {
        self.in_flight = self.in_flight.saturating_sub(choices);
        self.version += 1;
    }

    /// Takes from all buckets, or from none.
    pub(crate) fn take(&mut self, now: Nanos, limits: &Limits, demand: &Demand) -> Result<Taken, Refusal> {
        let costs = demand.costs();
        let mut refusal: Option<Refusal> = None;
        for (at, rate) in rates(limits).into_iter().enumerate() {
            let Some(rate) = rate else { continue };
            let retry_after = self.buckets[at].wait(now, rate, costs[at]);
            if retry_after > refusal.map_or(Duration::ZERO, |refusal| refusal.retry_after) {
                refusal = Some(Refusal { quota: RATES[at], limit: rate.limit(), retry_after });
            }
        }
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        let mut taken = [0; 3];
        for (at, rate) in rates(limits).into_iter().enumerate() {
            taken[at] = rate.map_or(0, |rate| self.buckets[at].take(now, rate, costs[at]));
        }
        Ok(taken)
    }

    /// What a request would take of the budget; [`Spending::take`] takes it. A request that generates nothing takes none.
    pub(crate) fn budget(
        &self,
        unix_seconds: i64,
        budget: Option<&Budget>,
        demand: &Demand,
    ) -> Result<Option<Spent>, Refusal> {
        let Some(budget) = budget.filter(|_| demand.choices > 0) else { return Ok(None) };
        let (window, tokens) = (budget.period.window(unix_seconds), demand.tokens());
        let is_over = budget.is_exceeded(self.spending.used_in(window), tokens);
        if is_over && budget.action == OverBudget::Reject {
            let retry_after = window.left(unix_seconds);
            return Err(Refusal { quota: Quota::Budget, limit: budget.tokens, retry_after });
        }
        Ok(Some(Spent { period: budget.period, window, tokens, is_over }))
    }

    /// Gives back what was taken and not used.
    pub(crate) fn give_back(&mut self, unused: Taken) {
        for (bucket, unused) in self.buckets.iter_mut().zip(unused) {
            bucket.give_back(unused);
        }
    }

    pub(crate) fn standing(&self, now: Nanos, limits: &Limits) -> Standing {
        let mut levels = [None; 3];
        for (at, rate) in rates(limits).into_iter().enumerate() {
            levels[at] = rate.map(|rate| self.buckets[at].level(now, rate));
        }
        Standing::of(levels)
    }

    /// Answers in flight, and the version of that number.
    pub(crate) fn in_flight(&self) -> (u32, u64) {
        (self.in_flight, self.version)
    }

    /// Whether nothing is held.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        (self.in_flight, self.queued, self.queued_tokens) == (0, 0, 0)
    }

    /// Answers that wait, and their prompt tokens.
    pub(crate) fn queued(&self) -> (u32, u64) {
        (self.queued, self.queued_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_look_like_openais() {
        for (ms, text) in
            [(0, "0s"), (1, "1ms"), (999, "999ms"), (1000, "1s"), (1001, "2s"), (360_000, "6m0s")]
        {
            assert_eq!(duration_text(Duration::from_millis(ms)), text);
        }
        assert_eq!(duration_text(Duration::from_nanos(1)), "1ms");
    }

    #[test]
    fn places_are_taken_together_or_not_at_all() {
        let limits =
            Limits { concurrency: Some(4), queued: Some(3), queued_tokens: Some(100), ..Limits::default() };
        let mut ledger = Ledger::default();
        let demand = |choices, tokens| {
            let mut demand = Demand::default();
            demand.add(tokens, choices, 1);
            demand
        };
        ledger.enter(&limits, &demand(2, 90)).unwrap();
        let before = ledger;
        for (choices, tokens, quota) in
            [(3, 1, Quota::Concurrency), (2, 1, Quota::Queued), (1, 11, Quota::QueuedTokens)]
        {
            assert_eq!(ledger.enter(&limits, &demand(choices, tokens)).unwrap_err().quota, quota);
            assert_eq!(ledger, before);
        }
        ledger.leave_queue(2, 90);
        ledger.enter(&limits, &demand(2, 100)).unwrap();
        ledger.leave_queue(2, 100);
        assert_eq!(ledger.enter(&limits, &demand(1, 1)).unwrap_err().quota, Quota::Concurrency);
        ledger.leave(4);
        assert!(ledger.is_idle());
    }

    #[test]
    fn a_refusal_takes_nothing_and_names_the_longest_wait() {
        let limits = Limits {
            rpm: Some(Rate::per_minute(60)),
            input_tpm: Some(Rate::per_minute(600)),
            output_tpm: Some(Rate::per_minute(6000)),
            ..Limits::default()
        };
        let mut ledger = Ledger::default();
        let demand = |prompt, max_tokens| {
            let mut demand = Demand::default();
            demand.add(prompt, 1, max_tokens);
            demand
        };
        ledger.take(0, &limits, &demand(100, 10)).unwrap();
        let before = ledger;
        let refusal = ledger.take(0, &limits, &demand(50, 1000)).unwrap_err();
        assert_eq!((refusal.quota, refusal.retry_after), (Quota::InputTpm, Duration::from_secs(5)));
        assert_eq!(ledger, before);
        let standing = ledger.standing(0, &limits);
        let requests = standing.requests.unwrap();
        assert_eq!((requests.limit, requests.remaining, requests.reset.as_secs()), (60, 9, 1));
        assert_eq!(
            (standing.tokens.unwrap().limit, standing.tokens.unwrap().remaining),
            (600, 0),
            "the scarcer"
        );
        let headers: Vec<_> = standing.headers().map(|(name, value)| format!("{name}: {value}")).collect();
        let expected = [
            "x-ratelimit-limit-requests: 60",
            "x-ratelimit-remaining-requests: 9",
            "x-ratelimit-reset-requests: 1s",
            "x-ratelimit-limit-tokens: 600",
            "x-ratelimit-remaining-tokens: 0",
            "x-ratelimit-reset-tokens: 10s",
        ];
        assert_eq!(headers, expected);
        assert_eq!(Standing::default().headers().count(), 0);
    }
}
