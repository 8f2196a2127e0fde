//! `quire doctor`: what this machine offers to inference, measured where a number on paper would not do.

use std::fs::read_to_string;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use crate::machine;
use crate::units::Bytes;

/// Time for one measurement of bandwidth.
const MEASURE_FOR: Duration = Duration::from_millis(500);
/// Memory each thread reads: well beyond any private cache.
const BYTES_PER_THREAD: u64 = 128 << 20;

/// Prints the report. Takes about a second.
///
/// # Errors
/// The output cannot be written.
pub fn doctor(out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "quire {} on {} {}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        std::env::consts::ARCH
    )?;
    writeln!(out)?;
    processor(out)?;
    memory(out)?;
    writeln!(out, "GPU         {}", gpu())?;
    Ok(())
}

fn processor(out: &mut impl Write) -> io::Result<()> {
    let usable = machine::usable_cores();
    writeln!(out, "processor   {}", machine::cpu_model().unwrap_or_else(|| "unknown".into()))?;
    let all = machine::all_cores().map_or_else(String::new, |all| format!(" of {all}"));
    let affinity = machine::affinity().map_or_else(String::new, |list| format!("; affinity {list}"));
    let quota =
        machine::cgroup_cpu_quota().map_or_else(|| "none".into(), |cores| format!("{cores:.2} cores"));
    writeln!(out, "cores       {usable} usable{all}{affinity}; cgroup quota {quota}")?;
    writeln!(out, "SIMD        {}", machine::simd().join(" "))
}

fn memory(out: &mut impl Write) -> io::Result<()> {
    let show = |bytes: Option<Bytes>| bytes.map_or_else(|| "unknown".into(), |bytes| bytes.to_string());
    let limit = machine::cgroup_memory_limit().map_or_else(|| "none".into(), |limit| limit.to_string());
    let (total, available) = (machine::total_memory(), machine::available_memory());
    writeln!(out, "memory      {} free of {}; cgroup limit {limit}", show(available), show(total))?;
    let threads = machine::usable_cores();
    if available.is_some_and(|free| free.0 < (u64::from(threads) + 1) * BYTES_PER_THREAD) {
        return writeln!(out, "bandwidth   not measured: too little memory is free");
    }
    let one = read_bandwidth(1);
    write!(out, "bandwidth   {:.1} GB/s reading with 1 thread", one / 1e9)?;
    if threads > 1 {
        write!(out, ", {:.1} GB/s with {threads}", read_bandwidth(threads) / 1e9)?;
    }
    writeln!(out)
}

/// Bytes per second that `threads` threads read together, each from memory of its own.
pub(crate) fn read_bandwidth(threads: u32) -> f64 {
    let barrier = Barrier::new(threads as usize);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| read_for_a_while(&barrier))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or(0.0)).sum()
    })
}

/// Bytes per second of one thread. The memory is written first, so that every page is its own.
fn read_for_a_while(barrier: &Barrier) -> f64 {
    let data: Vec<u64> = (0..BYTES_PER_THREAD / 8).collect();
    barrier.wait();
    let start = Instant::now();
    let (mut bytes, mut sum) = (0u64, 0u64);
    while start.elapsed() < MEASURE_FOR {
        sum = sum.wrapping_add(sum_of(&data));
        bytes += BYTES_PER_THREAD;
    }
    std::hint::black_box(sum);
    bytes as f64 / start.elapsed().as_secs_f64()
}

/// Sums in 32 independent lanes, so that memory is the limit and not the chain of additions.
fn sum_of(data: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in data.chunks_exact(32) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
}

/// One line about NVIDIA GPUs: what there is, or the first thing missing.
fn gpu() -> String {
    let Ok(version) = read_to_string("/proc/driver/nvidia/version") else {
        return "none: no NVIDIA driver is loaded (/proc/driver/nvidia/version does not exist)".into();
    };
    let driver = driver_version(&version).unwrap_or("of unknown version");
    let Some(library) = find_libcuda() else {
        return format!("unusable: driver {driver} is loaded, but libcuda.so.1 is in no library directory");
    };
    let query = ["--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"];
    let devices = match Command::new("nvidia-smi").args(query).output() {
        Ok(output) if output.status.success() => {
            let list = String::from_utf8_lossy(&output.stdout);
            list.lines().map(str::trim).collect::<Vec<_>>().join("; ")
        }
        _ => "nvidia-smi cannot list the devices".into(),
    };
    format!("{devices} (driver {driver}, {library}); {}", use_of_gpus())
}

const fn use_of_gpus() -> &'static str {
    if crate::gpu::Gpu::IS_BUILT_IN {
        "this build computes on the first one"
    } else {
        "this build computes on the processor only"
    }
}

/// The version in a line like `NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  …`.
fn driver_version(text: &str) -> Option<&str> {
    let is_version =
        |word: &&str| word.contains('.') && word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text.lines().next()?.split_whitespace().find(is_version)
}

fn find_libcuda() -> Option<String> {
    let path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/nvidia/lib64",
        "/usr/lib/wsl/lib",
    ];
    let directories = path.split(':').filter(|directory| !directory.is_empty()).chain(usual);
    directories.map(|directory| format!("{directory}/libcuda.so.1")).find(|file| Path::new(file).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_of_both_drivers() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 02:23:43 UTC 2025\nGCC version: 12.2.0";
        assert_eq!(driver_version(closed), Some("570.86.15"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build";
        assert_eq!(driver_version(open), Some("580.95.05"));
        assert_eq!(driver_version(""), None);
    }

    #[test]
    fn sums_everything() {
        let data: Vec<u64> = (0..64).collect();
        assert_eq!(sum_of(&data), 63 * 64 / 2);
    }
}
