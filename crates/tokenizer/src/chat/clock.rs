//! `strftime_now`: the date that some templates put into the system prompt.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::Environment;
use quire_core::calendar::{civil_from_days, days_from_civil};

/// Seconds since 1970-01-01 00:00 UTC. Templates get UTC, whatever the zone of the host.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// The clock of the host.
pub(super) fn system() -> Clock {
    Arc::new(|| {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX)
    })
}

/// Gives templates `strftime_now(format)` with this clock.
pub(super) fn install(env: &mut Environment<'static>, clock: Clock) {
    env.add_function("strftime_now", move |format: String| strftime(&format, clock()));
}

/// C's `strftime` for the directives that make sense without a locale or zone; others stay as they are.
fn strftime(format: &str, unix_seconds: i64) -> String {
    let (days, seconds) = (unix_seconds.div_euclid(86_400), unix_seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
    // 1970-01-01 was a Thursday.
    let weekday = (days + 3).rem_euclid(7) as usize;
    let day_of_year = days - days_from_civil(year, 1, 1) + 1;

    let mut out = String::with_capacity(format.len() + 16);
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // `%-d` is glibc's form without padding.
        let padded = chars.next_if_eq(&'-').is_none();
        let number = |value: i64, width: usize| {
            let width = if padded { width } else { 0 };
            format!("{value:0width$}")
        };
        let text = match chars.next() {
            Some('Y') => number(year, 4),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('f') => "000000".to_owned(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => MONTHS[month as usize - 1].to_owned(),
            Some('b' | 'h') => MONTHS[month as usize - 1][..3].to_owned(),
            Some('A') => DAYS[weekday].to_owned(),
            Some('a') => DAYS[weekday][..3].to_owned(),
            Some('u') => (weekday + 1).to_string(),
            Some('w') => ((weekday + 1) % 7).to_string(),
            Some('F') => strftime("%Y-%m-%d", unix_seconds),
            Some('T' | 'X') => strftime("%H:%M:%S", unix_seconds),
            Some('R') => strftime("%H:%M", unix_seconds),
            Some('D' | 'x') => strftime("%m/%d/%y", unix_seconds),
            Some('c') => strftime("%a %b %e %H:%M:%S %Y", unix_seconds),
            Some('s') => unix_seconds.to_string(),
            Some('n') => "\n".to_owned(),
            Some('t') => "\t".to_owned(),
            Some('z' | 'Z') => String::new(),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{}{other}", if padded { "" } else { "-" }),
            None => "%".to_owned(),
        };
        out.push_str(&text);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        // 2024-07-26 13:05:09 UTC, a Friday; the values are those of `date -u`.
        let at = 1_721_999_109;
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S", at), "2024-07-26 13:05:09");
        assert_eq!(strftime("%d %b %Y, %A %a %B %j %y", at), "26 Jul 2024, Friday Fri July 208 24");
        assert_eq!(strftime("%-d %I %p %-m %e %u %%x %q %", at), "26 01 PM 7 26 5 %x %q %");
        assert_eq!(strftime("%F %T %w", 0), "1970-01-01 00:00:00 4");
        assert_eq!(strftime("%F", -1), "1969-12-31");
        assert_eq!(strftime("%F %j", 1_709_164_800), "2024-02-29 060");
    }
}
