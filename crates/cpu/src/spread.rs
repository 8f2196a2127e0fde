//! Keeps the threads of a team on different CPUs without pinning them.
//!
//! A thread that is woken beside its waker shares a CPU with it, and while both spin for each other the system may leave
//! them there for a long time: every hand-over then costs the whole spin (about 100 µs instead of 0.1 µs). So each thread
//! says where it runs when a job begins, and one that meets another steps aside, once. Nothing else of the system's
//! placement is changed: the allowed CPUs stay as they were.

use std::sync::atomic::{AtomicU32, Ordering};

/// Where the threads of a team ran last.
pub(crate) struct Spread {
    /// By worker; `NOWHERE` at first.
    cpus: Vec<Place>,
}

/// On a cache line of its own, as every job writes it.
#[repr(align(64))]
struct Place(AtomicU32);

const NOWHERE: u32 = u32::MAX;

impl Spread {
    pub(crate) fn new(threads: usize) -> Self {
        Self { cpus: (0..threads).map(|_| Place(AtomicU32::new(NOWHERE))).collect() }
    }

    /// Worker `worker`, on its own thread, begins a job. Of two on one CPU the later one moves.
    pub(crate) fn arrive(&self, worker: usize) {
        let Some(cpu) = current_cpu() else { return };
        let place = &self.cpus[worker].0;
        if place.load(Ordering::Relaxed) != cpu {
            place.store(cpu, Ordering::Relaxed);
        }
        if self.cpus[..worker].iter().any(|other| other.0.load(Ordering::Relaxed) == cpu) {
            let others = self.cpus.iter().enumerate().filter(|(other, _)| *other != worker);
            step_aside(others.map(|(_, place)| place.0.load(Ordering::Relaxed)));
        }
    }
}

#[cfg(target_os = "linux")]
fn current_cpu() -> Option<u32> {
    // SAFETY: no arguments.
    u32::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// Moves this thread to an allowed CPU that is none of `taken`, if there is one.
#[cfg(target_os = "linux")]
fn step_aside(taken: impl Iterator<Item = u32>) {
    const SIZE: usize = size_of::<libc::cpu_set_t>();
    // SAFETY: a set is plain bits, and the calls read or write one of the size that they are told; a CPU outside of the
    // set is not cleared.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, SIZE, &mut allowed) != 0 {
            return;
        }
        let mut free = allowed;
        taken.filter(|cpu| (*cpu as usize) < 8 * SIZE).for_each(|cpu| libc::CPU_CLR(cpu as usize, &mut free));
        // A set without a CPU is refused, and then the thread stays.
        if libc::sched_setaffinity(0, SIZE, &free) == 0 {
            libc::sched_setaffinity(0, SIZE, &allowed);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn current_cpu() -> Option<u32> {
    None
}

#[cfg(not(target_os = "linux"))]
fn step_aside(_: impl Iterator<Item = u32>) {}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_meets_another_moves_and_may_still_run_everywhere() {
        let allowed = || {
            // SAFETY: as in `step_aside`.
            unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                assert_eq!(libc::sched_getaffinity(0, size_of_val(&set), &mut set), 0);
                libc::CPU_COUNT(&set)
            }
        };
        let before = allowed();
        let spread = Spread::new(2);
        for _ in 0..20 {
            let cpu = current_cpu().unwrap();
            spread.cpus[0].0.store(cpu, Ordering::Relaxed);
            spread.arrive(1);
            let moved = spread.cpus[1].0.load(Ordering::Relaxed) != cpu || current_cpu() != Some(cpu);
            assert!(before < 2 || moved, "still on CPU {cpu} of {before}");
            assert_eq!(allowed(), before);
        }
    }
}
