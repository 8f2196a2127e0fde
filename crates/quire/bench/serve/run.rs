//! The run: requests sent when they are due, and what happens meanwhile, sampled.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::Wire;
use super::args::LoadArgs;
use super::client::{Answer, Failed, OnRead};
use super::dataset::Prompt;
use super::histogram::Histogram;
use super::server::CpuTime;
use crate::bench::Progress;
use crate::{Failure, Result};

/// Time between samples at first.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);
/// When there are more, every other one is dropped and the interval doubled.
const MAX_SAMPLES: usize = 4096;

/// The state of a run at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    /// Seconds since its start.
    pub(crate) at: f64,
    /// Events with tokens so far.
    pub(crate) num_events: u64,
    pub(crate) in_flight: u32,
    /// Of the server's process, so far.
    pub(crate) server_cpu: Option<CpuTime>,
}

/// Requests that failed alike.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct FailureGroup {
    pub(crate) count: u64,
    /// The first one's message.
    pub(crate) example: String,
}

/// Everything a run showed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    /// Seconds until the last request ended.
    pub(crate) seconds: f64,
    pub(crate) answers: Vec<Answer>,
    /// Seconds since the start of each answer's request.
    pub(crate) sent_at: Vec<f64>,
    /// By [`Failed::slug`], [`Failed::Rejected`] apart.
    pub(crate) failures: BTreeMap<String, FailureGroup>,
    pub(crate) num_rejected: u64,
    /// Between the events of a request.
    pub(crate) gaps: Histogram,
    pub(crate) max_in_flight: u32,
    pub(crate) samples: Vec<Sample>,
    pub(crate) server_cpu: Option<CpuTime>,
    pub(crate) client_cpu: Option<CpuTime>,
}

/// What the requests of a run write down.
#[derive(Debug, Default)]
struct State {
    in_flight: u32,
    num_events: u64,
    measured: Measured,
}

#[derive(Debug)]
struct Run {
    start: Instant,
    state: Mutex<State>,
}

impl Run {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) {
        let mut state = self.state();
        state.in_flight += 1;
        state.measured.max_in_flight = state.measured.max_in_flight.max(state.in_flight);
    }

    fn end(&self, outcome: Result<Answer, Failed>) {
        let mut state = self.state();
        state.in_flight -= 1;
        let measured = &mut state.measured;
        match outcome {
            Ok(answer) => {
                measured.sent_at.push((answer.sent - self.start).as_secs_f64());
                measured.answers.push(answer);
            }
            Err(Failed::Rejected) => measured.num_rejected += 1,
            Err(failed) => {
                let group = measured.failures.entry(failed.slug());
                let new = || FailureGroup { count: 0, example: failed.to_string() };
                group.or_insert_with(new).count += 1;
            }
        }
    }

    fn sample(&self, pid: Option<u32>) -> Sample {
        let server_cpu = pid.and_then(CpuTime::of);
        let at = self.start.elapsed().as_secs_f64();
        let state = self.state();
        Sample { at, num_events: state.num_events, in_flight: state.in_flight, server_cpu }
    }
}

impl OnRead for Run {
    fn on_read(&self, now: Instant, previous: Option<Instant>, events: u32) {
        let mut state = self.state();
        state.num_events += u64::from(events);
        let gaps = &mut state.measured.gaps;
        if let Some(previous) = previous {
            gaps.record(now - previous, 1);
        }
        if events > 1 {
            gaps.record(Duration::ZERO, u64::from(events - 1));
        }
    }
}

/// Sends `prompts` at `arrivals` (seconds), and returns when all have ended.
pub(crate) async fn run(
    wire: &Arc<Wire>,
    prompts: Vec<Prompt>,
    arrivals: &[f64],
    args: &LoadArgs,
    server_pid: Option<u32>,
    progress: &mut Progress,
) -> Result<Measured> {
    let permits = args.max_concurrency.map_or(Semaphore::MAX_PERMITS, |count| count as usize);
    let permits = Arc::new(Semaphore::new(permits));
    let (server_cpu, client_cpu) = (server_pid.and_then(CpuTime::of), CpuTime::of(std::process::id()));
    let total = prompts.len();
    let run = Arc::new(Run { start: Instant::now(), state: Mutex::default() });
    let mut tasks = JoinSet::new();
    let timeout = args.request_timeout;
    let send = async {
        for (prompt, &due) in prompts.into_iter().zip(arrivals) {
            let due = run.start + Duration::from_secs_f64(due);
            if due > Instant::now() {
                tokio::time::sleep_until(due.into()).await;
            }
            let permit = Arc::clone(&permits).acquire_owned().await.expect("the semaphore is never closed");
            let (wire, run) = (Arc::clone(wire), Arc::clone(&run));
            tasks.spawn(async move {
                run.begin();
                let body = prompt.body();
                let answer = tokio::time::timeout(timeout, wire.stream(&body, &*run)).await;
                run.end(answer.unwrap_or(Err(Failed::Timeout)));
                drop(permit);
            });
            // Those that ended need not be kept.
            while let Some(ended) = tasks.try_join_next() {
                check(ended)?;
            }
        }
        while let Some(ended) = tasks.join_next().await {
            check(ended)?;
        }
        Ok::<(), Failure>(())
    };
    let mut samples = Vec::new();
    tokio::select! {
        sent = send => sent?,
        never = watch(&run, server_pid, &mut samples, total, progress) => match never {},
    }
    let last = run.sample(server_pid);
    let mut measured = std::mem::take(&mut run.state().measured);
    measured.seconds = last.at;
    measured.server_cpu = last.server_cpu.zip(server_cpu).map(|(after, before)| after - before);
    let client_cpu_after = CpuTime::of(std::process::id());
    measured.client_cpu = client_cpu_after.zip(client_cpu).map(|(after, before)| after - before);
    samples.push(last);
    measured.samples = samples;
    Ok(measured)
}

fn check(ended: Result<(), tokio::task::JoinError>) -> Result<()> {
    ended.map_err(|panic| Failure(format!("a request of this program failed: {panic}")))
}

/// Samples until it is dropped.
async fn watch(
    run: &Run,
    pid: Option<u32>,
    samples: &mut Vec<Sample>,
    total: usize,
    progress: &mut Progress,
) -> std::convert::Infallible {
    let mut interval = SAMPLE_INTERVAL;
    loop {
        let sample = run.sample(pid);
        samples.push(sample);
        if samples.len() == MAX_SAMPLES {
            let mut keep = false;
            samples.retain(|_| {
                keep = !keep;
                keep
            });
            interval *= 2;
        }
        progress.say(|| {
            let done = run.state().measured.answers.len();
            format!("{done} of {total} requests answered, {} on their way", sample.in_flight)
        });
        tokio::time::sleep(interval).await;
    }
}
