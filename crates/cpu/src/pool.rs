//! A fixed team of threads that meet at a barrier.
//!
//! The caller is worker 0. A job is announced by one increment of `generation`; every worker runs it once and counts
//! down `running`. Both sides spin for about 50 µs, since within a step the next job follows at once, then park, so that
//! an idle server costs nothing; `spread` keeps two of them from waiting for each other on one CPU.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use quire_core::ExecError;

use crate::spread::Spread;

/// How long to spin before parking.
const SPIN: Duration = Duration::from_micros(50);

/// Threads to use: what affinity mask and cgroup quota leave to this process.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A team of threads. Jobs are started through `&mut`, so one runs at a time and none from inside another.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    generation: AtomicU64,
    /// Read by workers after they saw `generation` change, until they count down `running`; written only between jobs.
    job: UnsafeCell<Option<Job>>,
    running: AtomicUsize,
    shutdown: AtomicBool,
    /// The first panic of the current job.
    panic: Mutex<Option<String>>,
    spread: Spread,
    start: Gate,
    done: Gate,
}

// SAFETY: `job` is the only part that is not `Sync`. It is written by the caller while `running` is 0, that is while no
// worker reads it, and published by the increment of `generation`. The closure behind it is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is dereferenced only while `Pool::run` keeps the closure alive.
unsafe impl Send for Shared {}

/// Where waiting threads spin, then park.
#[derive(Default)]
struct Gate {
    parked: AtomicUsize,
    lock: Mutex<()>,
    signal: Condvar,
}

impl Gate {
    /// Returns once `ready` holds. `ready` must read with `SeqCst` what the other side wrote before [`Gate::open`].
    fn wait(&self, ready: impl Fn() -> bool) {
        let begin = Instant::now();
        loop {
            for _ in 0..64 {
                if ready() {
                    return;
                }
                std::hint::spin_loop();
            }
            if begin.elapsed() > SPIN {
                break;
            }
        }
        let mut lock = self.lock.lock();
        self.parked.fetch_add(1, Ordering::SeqCst);
        while !ready() {
            self.signal.wait(&mut lock);
        }
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }

    /// Wakes whoever parked. Either this load sees the parked thread, or that thread's `ready` sees the write before
    /// this call (both are `SeqCst`); and the lock keeps the signal from falling between its check and its sleep.
    fn open(&self) {
        if self.parked.load(Ordering::SeqCst) > 0 {
            let _lock = self.lock.lock();
            self.signal.notify_all();
        }
    }
}

impl Pool {
    /// A team of `threads` (at least 1), the caller included.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(threads: usize) -> Result<Self, ExecError> {
        let shared = Arc::new(Shared {
            generation: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            running: AtomicUsize::new(0),
            shutdown: AtomicBool::new(false),
            panic: Mutex::new(None),
            spread: Spread::new(threads),
            start: Gate::default(),
            done: Gate::default(),
        });
        let mut pool = Self { shared, threads: Vec::new() };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("quire-cpu-{worker}"))
                .spawn(move || shared.work(worker))
                .map_err(|error| failed(format!("cannot start worker thread {worker}: {error}")))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Threads in the team, the caller included.
    pub fn num_threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `job(worker)` once on every thread and returns when all are done.
    ///
    /// # Errors
    /// A panic in `job`, with its message. The team stays usable.
    pub fn run(&mut self, job: &(dyn Fn(usize) + Sync)) -> Result<(), ExecError> {
        let shared = &*self.shared;
        if !self.threads.is_empty() {
            let job: *const (dyn Fn(usize) + Sync + '_) = job;
            // SAFETY: only the lifetime changes. This function returns (or unwinds: it does not) only after every
            // worker has finished with the pointer, so the closure outlives all uses.
            let job = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
            // SAFETY: `running` is 0 (the previous `run` waited for it), so no worker reads the cell.
            unsafe { *shared.job.get() = Some(job) };
            shared.spread.arrive(0);
            shared.running.store(self.threads.len(), Ordering::SeqCst);
            shared.generation.fetch_add(1, Ordering::SeqCst);
            shared.start.open();
        }
        shared.guarded(job, 0);
        shared.done.wait(|| shared.running.load(Ordering::SeqCst) == 0);
        match shared.panic.lock().take() {
            Some(message) => Err(failed(message)),
            None => Ok(()),
        }
    }

    /// Splits `0..n` into ranges of `grain` and hands them to whichever thread is free: `job(worker, range)`. Work of no
    /// more than one grain stays on the caller.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn split(
        &mut self,
        n: usize,
        grain: usize,
        job: impl Fn(usize, Range<usize>) + Sync,
    ) -> Result<(), ExecError> {
        self.hand_out(n, grain, |_| grain, job)
    }

    /// As [`Pool::split`], but a thread takes a range before it begins with the one before, and knows where it starts:
    /// `job(worker, range, next)`.
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn split_ahead(
        &mut self,
        n: usize,
        grain: usize,
        job: impl Fn(usize, Range<usize>, Option<usize>) + Sync,
    ) -> Result<(), ExecError> {
        let grain = grain.max(1);
        if n <= grain || self.threads.is_empty() {
            return self.split(n, grain, |worker, range| job(worker, range, None));
        }
        let next = AtomicUsize::new(0);
        let take = || {
            let start = next.fetch_add(grain, Ordering::Relaxed);
            (start < n).then(|| start..(start + grain).min(n))
        };
        self.run(&|worker| {
            let mut at_work = take();
            while let Some(range) = at_work {
                at_work = take();
                job(worker, range, at_work.as_ref().map(|next| next.start));
            }
        })
    }

    /// As [`Pool::split`], in ranges that begin long, at half of each thread's share, and shrink to `grain`: each thread
    /// reads most of its part from end to end, and still none waits for long at the end ("guided self-scheduling",
    /// Polychronopoulos and Kuck, 1987).
    ///
    /// # Errors
    /// As [`Pool::run`].
    pub fn split_guided(
        &mut self,
        n: usize,
        grain: usize,
        job: impl Fn(usize, Range<usize>) + Sync,
    ) -> Result<(), ExecError> {
        let shares = 2 * self.num_threads();
        self.hand_out(n, grain, |left| left / shares, job)
    }

    /// Ranges of `len(left)`, and at least `grain`, of what is left.
    fn hand_out(
        &mut self,
        n: usize,
        grain: usize,
        len: impl Fn(usize) -> usize + Sync,
        job: impl Fn(usize, Range<usize>) + Sync,
    ) -> Result<(), ExecError> {
        if n == 0 {
            return Ok(());
        }
        let grain = grain.max(1);
        if n <= grain || self.threads.is_empty() {
            self.shared.guarded(&|worker| job(worker, 0..n), 0);
            return self.shared.panic.lock().take().map_or(Ok(()), |message| Err(failed(message)));
        }
        let next = AtomicUsize::new(0);
        self.run(&|worker| {
            let end = |start: usize| (start < n).then(|| (start + len(n - start).max(grain)).min(n));
            while let Ok(start) = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, end) {
                if let Some(end) = end(start) {
                    job(worker, start..end);
                }
            }
        })
    }
}

impl Shared {
    fn work(&self, worker: usize) {
        let mut seen = 0;
        loop {
            self.start.wait(|| self.generation.load(Ordering::SeqCst) != seen);
            seen += 1;
            if self.shutdown.load(Ordering::SeqCst) {
                return;
            }
            // SAFETY: the caller wrote the job before it changed `generation`, and waits in `run` until `running` is 0,
            // so the cell is not written and the closure is alive until the countdown below.
            let job = unsafe { (*self.job.get()).map(|job| &*job) };
            self.spread.arrive(worker);
            if let Some(job) = job {
                self.guarded(job, worker);
            }
            if self.running.fetch_sub(1, Ordering::SeqCst) == 1 {
                self.done.open();
            }
        }
    }

    /// Runs the job; a panic is kept as a message.
    fn guarded(&self, job: &(dyn Fn(usize) + Sync), worker: usize) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| job(worker))) {
            let message = format!("a kernel panicked: {}", text(&*payload));
            self.panic.lock().get_or_insert(message);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        self.shared.start.open();
        for thread in self.threads.drain(..) {
            // A worker cannot panic: jobs are caught.
            let _ = thread.join();
        }
    }
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

fn failed(message: String) -> ExecError {
    ExecError { device: "cpu".into(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_every_job_once() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..2000 {
                pool.run(&|worker| {
                    counts[worker].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round + 1));
                if round % 500 == 0 {
                    std::thread::sleep(SPIN * 4); // let them park
                }
            }
        }
    }

    #[test]
    fn split_covers_everything_once() {
        let mut pool = Pool::new(3).unwrap();
        for (n, grain) in [(0, 1), (1, 1), (5, 8), (1000, 1), (1001, 64)] {
            let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            let lengths = Mutex::new(Vec::new());
            let job = |_, range: Range<usize>| {
                lengths.lock().push(range.len());
                for i in range {
                    hits[i].fetch_add(1, Ordering::Relaxed);
                }
            };
            pool.split(n, grain, job).unwrap();
            assert!(lengths.lock().iter().all(|len| *len <= grain), "n {n}, grain {grain}");
            lengths.lock().clear();
            pool.split_guided(n, grain, job).unwrap();
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 2), "n {n}, grain {grain}");
            let promised = Mutex::new([None; 3]);
            let ahead = |worker: usize, range: Range<usize>, next: Option<usize>| {
                let promise = std::mem::replace(&mut promised.lock()[worker], next);
                assert!(promise.is_none_or(|start| start == range.start), "{range:?} instead of {promise:?}");
                job(worker, range);
            };
            pool.split_ahead(n, grain, ahead).unwrap();
            assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 3), "n {n}, grain {grain}");
            assert_eq!(*promised.lock(), [None; 3], "nobody waits for more");
            let longest = grain.max(n / 6);
            assert!(n <= grain || lengths.lock().iter().all(|len| *len <= longest), "n {n}, grain {grain}");
        }
    }

    #[test]
    fn a_panic_becomes_an_error_and_the_team_lives_on() {
        for threads in [1, 3] {
            let mut pool = Pool::new(threads).unwrap();
            for victim in 0..threads {
                let error = pool
                    .run(&|worker| assert_ne!(worker, victim, "planned panic of worker {victim}"))
                    .unwrap_err();
                assert!(error.message.contains(&format!("planned panic of worker {victim}")), "{error}");
                pool.run(&|_| {}).unwrap();
            }
            assert!(pool.split(1, 1, |_, _| panic!("planned")).is_err());
            pool.split(1, 1, |_, _| {}).unwrap();
        }
    }

    #[test]
    fn idle_workers_use_no_time() {
        let mut pool = Pool::new(2).unwrap();
        pool.run(&|_| {}).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(pool.shared.start.parked.load(Ordering::SeqCst), 1, "the worker has parked");
    }
}
