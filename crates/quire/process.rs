//! The `process_*` metrics, read from `/proc` when the page is asked for.

use std::fs::{read_dir, read_to_string};
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use quire_core::metric_names::{
    Family, PROCESS_CPU_SECONDS, PROCESS_MAX_FDS, PROCESS_OPEN_FDS, PROCESS_RESIDENT_MEMORY,
    PROCESS_START_TIME, PROCESS_THREADS, PROCESS_VIRTUAL_MEMORY,
};

/// Clock ticks per second in `/proc/self/stat`: 100 on every architecture Linux runs on today.
const TICKS_PER_SECOND: f64 = 100.0;

/// When this process was first asked, which `serve` does at its start.
static START: LazyLock<f64> = LazyLock::new(|| {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since_epoch| since_epoch.as_secs_f64())
});

/// Nothing here changes it.
static MAX_FDS: LazyLock<Option<f64>> =
    LazyLock::new(|| number(&read_to_string("/proc/self/limits").unwrap_or_default(), "Max open files"));

/// Remembers the time of the start.
pub fn mark_start() {
    LazyLock::force(&START);
}

/// Values of the families that the system knows.
pub fn samples() -> Vec<(Family, f64)> {
    let mut samples = vec![(PROCESS_START_TIME, *START)];
    let mut push = |family, value: Option<f64>| samples.extend(value.map(|value| (family, value)));
    // The command's name may hold spaces, so fields count from behind its closing parenthesis.
    let stat = read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    push(
        PROCESS_CPU_SECONDS,
        ticks(11).zip(ticks(12)).map(|(user, system)| (user + system) / TICKS_PER_SECOND),
    );
    let status = read_to_string("/proc/self/status").unwrap_or_default();
    push(PROCESS_RESIDENT_MEMORY, number(&status, "VmRSS:").map(|kib| kib * 1024.0));
    push(PROCESS_VIRTUAL_MEMORY, number(&status, "VmSize:").map(|kib| kib * 1024.0));
    push(PROCESS_THREADS, number(&status, "Threads:"));
    push(PROCESS_OPEN_FDS, read_dir("/proc/self/fd").ok().map(|entries| entries.count() as f64));
    push(PROCESS_MAX_FDS, *MAX_FDS);
    samples
}

/// The first number behind `name`, at the start of a line.
fn number(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_them_are_there_on_linux() {
        if !cfg!(target_os = "linux") {
            println!("skipped: /proc is Linux");
            return;
        }
        let samples = samples();
        assert_eq!(samples.len(), 7, "{samples:?}");
        for (family, value) in samples {
            assert!(value > 0.0 || family == PROCESS_CPU_SECONDS, "{} is {value}", family.name);
        }
    }
}
