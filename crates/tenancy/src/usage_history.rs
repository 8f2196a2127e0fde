//! What a tenant had used by when, so that the use of the last hour or day can be told: what it is now, less what it was
//! then.
//!
//! Sums are noted at full minutes, where they have changed. Of notes older than an hour the last of each quarter of an hour
//! stays, so that a day takes no more than 160 of them.

use std::collections::VecDeque;

/// Sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that ended, those to tokenize included.
    pub requests: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Those of them that were cached.
    pub cached_tokens: u64,
    /// Tokens that were generated.
    pub completion_tokens: u64,
}

impl Counts {
    /// What came after `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            requests: self.requests - earlier.requests,
            prompt_tokens: self.prompt_tokens - earlier.prompt_tokens,
            cached_tokens: self.cached_tokens - earlier.cached_tokens,
            completion_tokens: self.completion_tokens - earlier.completion_tokens,
        }
    }
}

pub(crate) const MINUTE: i64 = 60;
const QUARTER: i64 = 15 * MINUTE;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// The longest window, in seconds.
pub const MAX_WINDOW: u64 = DAY as u64;

/// Notes of sums, by the time in seconds since 1970 at which they held; ascending.
#[derive(Debug, Default)]
pub(crate) struct UsageHistory {
    minutes: VecDeque<(i64, Counts)>,
    quarters: VecDeque<(i64, Counts)>,
}

impl UsageHistory {
    /// The sums at a full minute.
    pub(crate) fn note(&mut self, minute: i64, counts: Counts) {
        let last = self.minutes.back().or(self.quarters.back());
        if last.map_or(Counts::default(), |&(_, last)| last) != counts {
            self.minutes.push_back((minute, counts));
        }
        while let Some(&note) = self.minutes.front()
            && note.0 < minute - HOUR - QUARTER
        {
            self.minutes.pop_front();
            // What holds at the end of a quarter is the last that was noted in it, its end included.
            let quarter = |at: i64| (at + QUARTER - 1).div_euclid(QUARTER);
            if self.quarters.back().is_some_and(|last| quarter(last.0) == quarter(note.0)) {
                self.quarters.pop_back();
            }
            self.quarters.push_back(note);
        }
        // One note is older than the longest window: what held at its beginning.
        while self.quarters.get(1).is_some_and(|&(at, _)| at < minute - DAY - QUARTER) {
            self.quarters.pop_front();
        }
    }

    /// Where a window begins that is to begin at `start`, and what the sums were: at a full minute, or for one longer than
    /// an hour at a quarter of one.
    pub(crate) fn at(&self, start: i64, now: i64) -> (i64, Counts) {
        let step = if now - start > HOUR { QUARTER } else { MINUTE };
        let start = start.div_euclid(step) * step;
        let notes = self.quarters.iter().chain(&self.minutes);
        let counts = notes.take_while(|&&(at, _)| at <= start).last().map(|&(_, counts)| counts);
        (start, counts.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(requests: u64) -> Counts {
        Counts { requests, ..Counts::default() }
    }

    /// Against a list of every minute's sum.
    #[test]
    fn windows_are_those_of_a_full_list() {
        let (mut history, mut all) = (UsageHistory::default(), Vec::new());
        let first = 1_000_000 * MINUTE;
        let mut sum = 0;
        for step in 0..3 * 1440 {
            let minute = first + step * MINUTE;
            // Bursts, with pauses of hours.
            sum += if (step / 200) % 3 == 0 { (step * 7919 % 11) as u64 } else { 0 };
            history.note(minute, counts(sum));
            all.push(sum);
            assert!(history.minutes.len() + history.quarters.len() <= 180);
            if step % 37 != 0 {
                continue;
            }
            let now = minute + step % MINUTE;
            for window in [MINUTE, 90, 17 * MINUTE, HOUR, HOUR + 1, 5 * HOUR, DAY] {
                let (start, then) = history.at(now - window, now);
                assert!((0..QUARTER).contains(&(now - window - start)), "{window}");
                assert!(window > HOUR || now - window - start < MINUTE, "{window}");
                let expected = if start < first { 0 } else { all[((start - first) / MINUTE) as usize] };
                assert_eq!(then.requests, expected, "step {step}, {window} s");
            }
        }
    }
}
