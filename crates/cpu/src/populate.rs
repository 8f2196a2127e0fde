//! Pages of memory under the KV cache before anybody waits for them.
//!
//! Memory that was never touched costs its first user a page fault and a page of zeros, and a guest of a hypervisor a
//! second fault below: as much as a tenth of a step of prompts. So a server has its cache populated while it has nothing
//! else to do: in the order in which blocks are handed out, a large page at a time, and not at all while steps run.
//!
//! `MADV_POPULATE_WRITE` (Linux 5.14) makes pages present without changing what is in them, so it may run beside writes.
//! Elsewhere the first touch comes with the first use, as ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between two looks at a backend that is busy; no step's own gap is so long.
const PAUSE: Duration = Duration::from_millis(5);
/// Populated at once: what a step that comes meanwhile may have to wait for.
const PIECE: usize = 2 << 20;

/// When the memory of keys and values becomes present.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvMemory {
    /// As it is written: little is held by who needs little.
    #[default]
    OnUse,
    /// All of it, in the time between steps.
    WhenIdle,
}

/// Whether a step is at work. Written by the thread that runs steps alone.
#[derive(Default)]
pub(crate) struct Activity {
    is_busy: AtomicBool,
    /// Steps that began.
    steps: AtomicU64,
}

impl Activity {
    pub(crate) fn begin(&self) {
        self.is_busy.store(true, Ordering::Relaxed);
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.is_busy.store(false, Ordering::Relaxed);
    }

    /// Whether nothing runs, nor has since `steps` was what it is given as; which it then is again.
    fn is_idle_since(&self, steps: &mut u64) -> bool {
        let now = self.steps.load(Ordering::Relaxed);
        std::mem::replace(steps, now) == now && !self.is_busy.load(Ordering::Relaxed)
    }
}

/// Memory by address, so that a thread may have it.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub start: usize,
    pub len: usize,
}

impl Range {
    pub(crate) fn of<T>(array: &[T]) -> Self {
        Self { start: array.as_ptr() as usize, len: size_of_val(array) }
    }
}

/// The thread that does it. Dropping it stops it, before the memory may go.
pub(crate) struct Populating {
    is_wanted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Populating {
    /// Begins with the first piece of every range, which must stay allocated as long as this lives. Where no thread is to
    /// be had, pages come with their use.
    pub(crate) fn start(ranges: Vec<Range>, activity: Arc<Activity>) -> Self {
        let is_wanted = Arc::new(AtomicBool::new(true));
        let wanted = Arc::clone(&is_wanted);
        let thread = std::thread::Builder::new()
            .name("quire-populate".into())
            .spawn(move || populate(&ranges, &activity, &wanted))
            .ok();
        Self { is_wanted, thread }
    }
}

impl Drop for Populating {
    fn drop(&mut self) {
        self.is_wanted.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It holds nothing that a panic could break.
            drop(thread.join());
        }
    }
}

fn populate(ranges: &[Range], activity: &Activity, is_wanted: &AtomicBool) {
    let longest = ranges.iter().map(|range| range.len).max().unwrap_or(0);
    let mut steps = 0;
    for offset in (0..longest).step_by(PIECE) {
        for range in ranges.iter().filter(|range| offset < range.len) {
            while !activity.is_idle_since(&mut steps) {
                if !is_wanted.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(PAUSE);
            }
            let piece = Range { start: range.start + offset, len: PIECE.min(range.len - offset) };
            if !is_wanted.load(Ordering::Relaxed) || !make_present(piece) {
                return;
            }
        }
    }
}

/// False where the system cannot.
#[cfg(target_os = "linux")]
fn make_present(piece: Range) -> bool {
    const PAGE: usize = 4096;
    let start = piece.start / PAGE * PAGE;
    let len = (piece.start + piece.len).next_multiple_of(PAGE) - start;
    // SAFETY: the first and the last page hold a part of the range at least, so all of them are mapped as long as it is
    // allocated, which it is (`Populating::start`); no content changes.
    unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_POPULATE_WRITE) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn make_present(_piece: Range) -> bool {
    false
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::buffer::Aligned;

    /// Bytes of `array` that have a page.
    fn present(array: &[u32]) -> usize {
        let range = Range::of(array);
        let first = range.start.next_multiple_of(4096);
        let pages = (range.start + range.len - first) / 4096;
        let mut resident = vec![0u8; pages];
        // SAFETY: whole pages within the array; `resident` has a byte for each.
        let status =
            unsafe { libc::mincore(first as *mut libc::c_void, pages * 4096, resident.as_mut_ptr()) };
        assert_eq!(status, 0);
        resident.iter().filter(|page| **page & 1 == 1).count() * 4096
    }

    fn wait_for(condition: impl Fn() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(begin.elapsed() < Duration::from_secs(10), "it never happened");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn memory_is_there_once_nothing_runs_and_keeps_what_is_in_it() {
        let mut memory = Aligned::<u32>::zeroed(9 << 18, "test").unwrap();
        memory[5 << 18] = 7;
        let before = present(&memory);
        let activity = Arc::new(Activity::default());
        activity.begin();
        let populating = Populating::start(vec![Range::of(&memory)], Arc::clone(&activity));
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(present(&memory), before, "a step runs");
        activity.end();
        wait_for(|| present(&memory) >= (9 << 20) - 8192);
        drop(populating);
        assert!(memory.iter().enumerate().all(|(i, word)| *word == if i == 5 << 18 { 7 } else { 0 }));
    }

    #[test]
    fn it_ends_in_the_middle_of_a_step() {
        let memory = Aligned::<u32>::zeroed(8 << 18, "test").unwrap();
        let activity = Arc::new(Activity::default());
        activity.begin();
        drop(Populating::start(vec![Range::of(&memory)], activity));
    }
}
