//! Rate limits as time: the generic cell rate algorithm (ITU-T I.371, appendix), one number a bucket.
//!
//! A bucket remembers the moment at which it will be full again. A request of `cost` units moves that moment by
//! `cost / rate`, and may do so while it stays within the burst from now. What was reserved and not used moves it back.

use std::time::Duration;

/// A point in time in nanoseconds; the epoch is the caller's.
pub type Nanos = u64;

const MINUTE: u128 = 60_000_000_000;

/// So many units a minute; at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    per_minute: u64,
}

impl Rate {
    /// Units a minute; 0 counts as 1.
    pub const fn per_minute(units: u64) -> Self {
        Self { per_minute: if units == 0 { 1 } else { units } }
    }

    /// Units a minute.
    pub const fn limit(self) -> u64 {
        self.per_minute
    }

    /// Units that may come at once: a sixth of the limit, what ten seconds refill.
    pub const fn burst(self) -> u64 {
        let sixth = self.per_minute / 6;
        if sixth == 0 { 1 } else { sixth }
    }

    /// How long so many units take to refill, rounded up.
    pub fn duration_of(self, units: u64) -> Nanos {
        let nanos = (u128::from(units) * MINUTE).div_ceil(u128::from(self.per_minute));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// Units that so much time refills, rounded down.
    fn units_in(self, nanos: Nanos) -> u64 {
        u64::try_from(u128::from(nanos) * u128::from(self.per_minute) / MINUTE).unwrap_or(u64::MAX)
    }
}

/// What a client is told about one limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Units a minute.
    pub limit: u64,
    /// Units that may be used at once, now.
    pub remaining: u64,
    /// Until the bucket is full again.
    pub reset: Duration,
}

/// One rate limit's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When the bucket is full again; in the past: it is full.
    full_at: Nanos,
}

impl Bucket {
    /// How long to wait until `cost` units can be had; zero: now.
    ///
    /// More than the burst can be had when the bucket is full, and then leaves a debt, so that one long request is slow
    /// to come again but not impossible. Over any time `t` from a full bucket no more than
    /// `rate * t + max(burst, largest request)` units are taken.
    pub fn wait(&self, now: Nanos, rate: Rate, cost: u64) -> Duration {
        let lag = self.full_at.saturating_sub(now);
        let (cost, burst) = (rate.duration_of(cost), rate.duration_of(rate.burst()));
        let wait = match lag {
            0 => 0,
            _ if cost > burst => lag,
            _ => lag.saturating_add(cost).saturating_sub(burst),
        };
        Duration::from_nanos(wait)
    }

    /// Takes `cost` units, whether or not they are there, and returns them as time, for [`Bucket::give_back`].
    pub fn take(&mut self, now: Nanos, rate: Rate, cost: u64) -> Nanos {
        let cost = rate.duration_of(cost);
        self.full_at = self.full_at.max(now).saturating_add(cost);
        cost
    }

    /// Gives back what was taken and not used. A bucket never holds more than its burst, however much comes back.
    pub fn give_back(&mut self, nanos: Nanos) {
        self.full_at = self.full_at.saturating_sub(nanos);
    }

    /// What is left.
    pub fn level(&self, now: Nanos, rate: Rate) -> Level {
        level(self.full_at.saturating_sub(now), rate)
    }
}

/// What is left in a bucket that will be full in `lag`.
pub(crate) fn level(lag: Nanos, rate: Rate) -> Level {
    let free = rate.duration_of(rate.burst()).saturating_sub(lag);
    Level { limit: rate.limit(), remaining: rate.units_in(free), reset: Duration::from_nanos(lag) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    #[test]
    fn a_table_of_requests_in_time() {
        // 60 a minute: one a second, ten at once. (second, cost, wait in seconds)
        let rate = Rate::per_minute(60);
        let mut bucket = Bucket::default();
        for (at, cost, wait) in [
            (0, 10, 0),
            (0, 1, 1),
            (1, 1, 0),
            (1, 2, 2),
            (5, 5, 1),
            (6, 5, 0),
            (6, 11, 10), // more than the burst waits for a full bucket
            (16, 11, 0),
            (16, 1, 2), // and leaves a debt
            (17, 1, 1),
            (18, 1, 0),
            (1000, 10, 0),
        ] {
            let now = at * SECOND;
            assert_eq!(bucket.wait(now, rate, cost), Duration::from_secs(wait), "at {at} for {cost}");
            if wait == 0 {
                assert_eq!(bucket.take(now, rate, cost), cost * SECOND);
            }
        }
    }

    #[test]
    fn waiting_as_told_is_enough_and_less_is_not() {
        for limit in [1, 7, 60, 599, 2_000_000, 1_000_000_000_000] {
            let rate = Rate::per_minute(limit);
            let mut bucket = Bucket::default();
            bucket.take(5, rate, rate.burst());
            for cost in [1, rate.burst(), rate.burst() + 1] {
                let wait = bucket.wait(5, rate, cost);
                assert!(wait > Duration::ZERO, "{limit}");
                let due = 5 + wait.as_nanos() as u64;
                assert_eq!(bucket.wait(due, rate, cost), Duration::ZERO, "{limit}");
                assert_eq!(bucket.wait(due - 1, rate, cost), Duration::from_nanos(1), "{limit}");
            }
        }
    }

    #[test]
    fn what_comes_back_fills_up_to_the_burst_and_no_further() {
        let rate = Rate::per_minute(600);
        let mut bucket = Bucket::default();
        let taken = bucket.take(0, rate, 100);
        assert_eq!(bucket.level(0, rate).remaining, 0);
        bucket.give_back(taken / 2);
        assert_eq!(bucket.level(0, rate).remaining, 50);
        assert_eq!(bucket.level(0, rate).reset, Duration::from_secs(5));
        bucket.give_back(taken);
        let full = Level { limit: 600, remaining: 100, reset: Duration::ZERO };
        assert_eq!(bucket.level(0, rate), full);
        assert_eq!(bucket.wait(SECOND, rate, 100), Duration::ZERO);
        bucket.take(SECOND, rate, 100);
        assert_eq!(bucket.level(SECOND, rate).remaining, 0, "an old refund is not a credit");
    }
}
