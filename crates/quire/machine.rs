//! What the operating system says about this machine, with the limits of a container taken into account.

use std::fs::read_to_string;

use crate::units::Bytes;

/// Cores this process may use: the smaller of CPU affinity and cgroup quota.
pub fn usable_cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32)
}

/// Cores of the machine, whether usable or not.
pub fn all_cores() -> Option<u32> {
    let cpuinfo = read_to_string("/proc/cpuinfo").ok()?;
    let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    (count > 0).then_some(count as u32)
}

/// The processor's name.
pub fn cpu_model() -> Option<String> {
    let cpuinfo = read_to_string("/proc/cpuinfo").ok()?;
    let line = cpuinfo.lines().find(|line| line.starts_with("model name") || line.starts_with("Hardware"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Which cores the scheduler may put this process on, as `0-3,8`.
pub fn affinity() -> Option<String> {
    field("/proc/self/status", "Cpus_allowed_list:")
}

/// Cores' worth of time that the cgroup (v2, else v1) grants, if it limits them.
pub fn cgroup_cpu_quota() -> Option<f64> {
    if let Ok(max) = read_to_string("/sys/fs/cgroup/cpu.max") {
        let (quota, period) = max.trim().split_once(' ')?;
        return Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?);
    }
    let quota: f64 = number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")?;
    let period: f64 = number("/sys/fs/cgroup/cpu/cpu.cfs_period_us")?;
    (quota > 0.0).then_some(quota / period)
}

/// Memory installed.
pub fn total_memory() -> Option<Bytes> {
    meminfo("MemTotal:")
}

/// Memory that can be used without swapping: what the kernel reckons, or what the cgroup has left if that is less.
pub fn available_memory() -> Option<Bytes> {
    let machine = meminfo("MemAvailable:");
    match (machine, cgroup_memory_left()) {
        (Some(machine), Some(cgroup)) => Some(machine.min(cgroup)),
        (machine, cgroup) => machine.or(cgroup),
    }
}

/// The cgroup's memory limit, if it has one below the machine's memory.
pub fn cgroup_memory_limit() -> Option<Bytes> {
    let limit = number("/sys/fs/cgroup/memory.max")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
        .map(|limit: f64| Bytes(limit as u64))?;
    (limit < total_memory()?).then_some(limit)
}

fn cgroup_memory_left() -> Option<Bytes> {
    let limit = cgroup_memory_limit()?;
    let used: f64 = number("/sys/fs/cgroup/memory.current")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.usage_in_bytes"))?;
    Some(Bytes(limit.0.saturating_sub(used as u64)))
}

fn meminfo(name: &str) -> Option<Bytes> {
    let kib: u64 = field("/proc/meminfo", name)?.split_whitespace().next()?.parse().ok()?;
    Some(Bytes(kib * 1024))
}

/// Runnable threads of the whole machine, averaged over the last minute.
pub fn load_average() -> Option<f64> {
    read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// The rest of the line that begins with `name`.
fn field(path: &str, name: &str) -> Option<String> {
    let text = read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
}

fn number(path: &str) -> Option<f64> {
    read_to_string(path).ok()?.trim().parse().ok()
}

/// Instruction sets that matter for inference and that this processor has.
pub fn simd() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($name:tt),*) => { $( if std::arch::is_x86_feature_detected!($name) { found.push($name); } )* };
        }
        probe!(
            "sse4.2",
            "avx",
            "f16c",
            "fma",
            "avx2",
            "avxvnni",
            "avx512f",
            "avx512bw",
            "avx512vl",
            "avx512vnni"
        );
        probe!("avx512bf16", "avx512fp16");
        // Rust cannot detect AMX on its stable channel; the kernel lists it.
        let flags = field("/proc/cpuinfo", "flags").unwrap_or_default();
        let words = ["amx_tile", "amx_bf16", "amx_int8"];
        found.extend(words.iter().filter(|word| flags.split_whitespace().any(|flag| flag == **word)));
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! probe {
            ($($name:tt),*) => { $( if std::arch::is_aarch64_feature_detected!($name) { found.push($name); } )* };
        }
        probe!("neon", "fp16", "dotprod", "bf16", "i8mm", "sve", "sve2");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_linux_machine_has() {
        if !cfg!(target_os = "linux") {
            println!("skipped: /proc is Linux");
            return;
        }
        assert!(usable_cores() >= 1);
        assert!(all_cores().is_some_and(|all| all >= 1));
        let (total, available) = (total_memory().unwrap(), available_memory().unwrap());
        assert!(available.0 > 0 && available <= total, "{available} of {total}");
        assert!(affinity().is_some_and(|list| list.starts_with(|c: char| c.is_ascii_digit())));
    }
}
