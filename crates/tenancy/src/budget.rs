//! Tokens of a calendar period in UTC: a day, a week that begins on Monday (ISO 8601), a month.

use std::time::Duration;

use quire_core::calendar::{DAY, civil_from_days, days_from_civil};

use crate::limits::words;

/// The lowest priority that a tenant may have.
pub const LOWEST_PRIORITY: i8 = -2;

/// What a tenant may use in a period, and what happens beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Prompt and generated tokens together.
    pub tokens: u64,
    /// Of what time.
    pub period: Period,
    /// What becomes of a request beyond.
    pub action: OverBudget,
}

words! {
    /// How long a budget lasts.
    Period {
        /// From midnight.
        Day = "day",
        /// From Monday's midnight.
        Week = "week",
        /// From the first of a month.
        Month = "month",
    }
}

words! {
    /// What becomes of a request beyond the budget.
    OverBudget {
        /// 429 until the period ends.
        Reject = "reject",
        /// It runs with the lowest priority.
        Deprioritize = "deprioritize",
    }
}

/// One period, in seconds since 1970; the end is outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Its first second.
    pub start: i64,
    /// The next period's first second.
    pub end: i64,
}

impl Period {
    /// The period that a time lies in.
    pub fn window(self, unix_seconds: i64) -> Window {
        let day = unix_seconds.div_euclid(DAY);
        let (first, after) = match self {
            Self::Day => (day, day + 1),
            Self::Week => {
                // 1970-01-01 was a Thursday.
                let monday = (day + 3).div_euclid(7) * 7 - 3;
                (monday, monday + 7)
            }
            Self::Month => {
                let (year, month, _) = civil_from_days(day);
                let (next_year, next) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
                (days_from_civil(year, month, 1), days_from_civil(next_year, next, 1))
            }
        };
        Window { start: first * DAY, end: after * DAY }
    }
}

impl Window {
    /// How long it still lasts.
    pub fn left(&self, unix_seconds: i64) -> Duration {
        Duration::from_secs(u64::try_from(self.end.saturating_sub(unix_seconds)).unwrap_or(0))
    }
}

impl Budget {
    /// Whether a request of `cost` tokens goes beyond, when so many are used or reserved. A full budget refuses all.
    pub(crate) fn is_exceeded(&self, used: u64, cost: u64) -> bool {
        used.saturating_add(cost.max(1)) > self.tokens
    }
}

/// What a request reserved of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spent {
    pub(crate) period: Period,
    pub(crate) window: Window,
    pub(crate) tokens: u64,
    /// Whether it went beyond the budget.
    pub(crate) is_over: bool,
}

/// What one tenant used in the period it was last charged in, reservations included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spending {
    window: Window,
    used: u64,
}

impl Spending {
    /// What was used in this period: nothing, if it has only begun.
    pub(crate) fn used_in(&self, window: Window) -> u64 {
        if self.window == window { self.used } else { 0 }
    }

    pub(crate) fn take(&mut self, spent: &Spent) {
        self.set(spent.window, self.used_in(spent.window).saturating_add(spent.tokens));
    }

    /// Gives back what was reserved and not used, unless its period is over.
    pub(crate) fn give_back(&mut self, window: Window, unused: u64) {
        if self.window == window {
            self.used = self.used.saturating_sub(unused);
        }
    }

    /// Takes the word of the store that replicas share.
    pub(crate) fn set(&mut self, window: Window, used: u64) {
        *self = Self { window, used };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_those_of_the_calendar() {
        // Values of `date -u -d … +%s`.
        for (period, at, start, end) in [
            // 2026-11-29 16:39:16, a Sunday.
            (Period::Day, 1_795_970_356, 1_795_910_400, 1_795_996_800),
            (Period::Week, 1_795_970_356, 1_795_392_000, 1_795_996_800),
            (Period::Month, 1_795_970_356, 1_793_491_200, 1_796_083_200),
            // The first second of a Monday, and of a year.
            (Period::Week, 1_795_996_800, 1_795_996_800, 1_796_601_600),
            (Period::Month, 1_798_761_600, 1_798_761_600, 1_801_440_000),
            // The last of a leap February, of a December.
            (Period::Month, 1_709_251_199, 1_706_745_600, 1_709_251_200),
            (Period::Month, 1_798_761_599, 1_796_083_200, 1_798_761_600),
            (Period::Week, 0, -259_200, 345_600),
            (Period::Day, -1, -86_400, 0),
        ] {
            assert_eq!(period.window(at), Window { start, end }, "{period} at {at}");
        }
        assert_eq!(Period::Day.window(1).left(1), Duration::from_secs(86_399));
    }

    #[test]
    fn what_is_given_back_late_is_not_the_next_periods() {
        let [first, second] = [Period::Day.window(5), Period::Day.window(DAY)];
        let spent = |window| Spent { period: Period::Day, window, tokens: 10, is_over: false };
        let mut spending = Spending::default();
        spending.take(&spent(first));
        assert_eq!((spending.used_in(first), spending.used_in(second)), (10, 0));
        spending.take(&spent(second));
        spending.give_back(first, 10);
        assert_eq!(spending.used_in(second), 10);
        spending.give_back(second, 4);
        assert_eq!(spending.used_in(second), 6);
    }
}
