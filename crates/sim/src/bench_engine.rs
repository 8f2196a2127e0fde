//! How many tokens a second pass from an engine to whoever reads them, in this process: no socket, no text.
//!
//! The way is the real one: engine thread, message of a step, dispatcher, mailbox, and a task for each request that reads
//! it through [`EngineClient`], dispatcher and readers on one thread. A reader that is late finds several tokens in one
//! piece, which is cheaper, so here none ever is: the device gives a step's tokens only when those of the step before have
//! all been read. Everything else of a step overlaps with that.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quire_core::{
    BlockHasher, ExecError, Executor, ExecutorLimits, LateInputs, Limits, ModelRunnerOutput, SamplingParams,
    SchedulerOutput, StepId, TenantId,
};
use quire_engine::{Engine, EngineClient, EngineConfig, RequestSpec};
use quire_scheduler::SchedulerConfig;

use crate::bench_scheduler::BenchRow;
use crate::mock::{MockExecutor, MockTiming};

const BLOCK_SIZE: u32 = 16;
const PROMPT_LEN: u32 = 32;
/// Readers that are silent for so long are gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// Readers at once, and the microseconds a token that 300,000 tokens a second leave.
const STREAMS: [u32; 2] = [256, 1024];
const TARGET_US: f64 = 1e6 / 300e3;
/// Tokens of one run, of which the median counts.
const NUM_TOKENS: u32 = 1 << 20;
const NUM_RUNS: usize = 5;

/// The time of a token, and how many come together, for each number of readers. Takes a few seconds.
///
/// # Errors
/// As [`stream_tokens`].
pub fn run() -> Result<Vec<BenchRow>, String> {
    let mut rows = Vec::new();
    for num_seqs in STREAMS {
        let runs = (0..NUM_RUNS).map(|_| stream_tokens(num_seqs, NUM_TOKENS / num_seqs));
        let mut runs = runs.collect::<Result<Vec<_>, _>>()?;
        runs.sort_by_key(|passed| passed.elapsed);
        let Passed { tokens, pieces, elapsed } = runs[NUM_RUNS / 2];
        let value = 1e6 * elapsed.as_secs_f64() / tokens as f64;
        let name = format!("engine_token_us/{num_seqs}");
        rows.push(BenchRow { name, value, unit: "us", target: TARGET_US });
        let name = format!("engine_tokens_per_event/{num_seqs}");
        rows.push(BenchRow { name, value: tokens as f64 / pieces as f64, unit: "ratio", target: 1.0 });
    }
    Ok(rows)
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Passed {
    /// Tokens that were read.
    pub tokens: u64,
    /// Pieces with tokens: as many, if nothing was put together.
    pub pieces: u64,
    /// From the first request to the last token.
    pub elapsed: Duration,
}

/// Streams `num_tokens` tokens to each of `num_seqs` readers at once.
///
/// # Errors
/// There is no thread for the engine or the readers, or a request was refused.
pub fn stream_tokens(num_seqs: u32, num_tokens: u32) -> Result<Passed, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|error| error.to_string())?;
    let read = Arc::new(Read::default());
    let (config, limits) = config(num_seqs, num_tokens);
    let mock = MockExecutor::new(limits, MockTiming::default());
    let executor = Box::new(Paced { mock, given: 0, read: Arc::clone(&read) });
    let engine = Engine::start(config, executor, runtime.handle()).map_err(|error| error.to_string())?;
    let started = Instant::now();
    let pieces = runtime.block_on(read_all(&engine.client(), num_seqs, num_tokens, &read))?;
    Ok(Passed { tokens: read.count.load(Ordering::Relaxed), pieces, elapsed: started.elapsed() })
}

/// Pieces of all answers.
async fn read_all(
    client: &EngineClient,
    num_seqs: u32,
    num_tokens: u32,
    read: &Arc<Read>,
) -> Result<u64, String> {
    let mut readers = tokio::task::JoinSet::new();
    for at in 0..num_seqs {
        let spec = RequestSpec {
            prompt: (0..PROMPT_LEN).map(|i| at + i).collect(),
            params: Arc::new(SamplingParams::greedy(num_tokens)),
            tenant: TenantId(0),
            priority: 0,
            adapter: None,
            cache_salt: None,
            session: None,
            timeout: None,
        };
        let mut handle = client.submit(spec).map_err(|error| error.to_string())?;
        let read = Arc::clone(read);
        readers.spawn(async move {
            let mut pieces = 0;
            while let Some(delta) = handle.next().await {
                // That a request has started may be told apart.
                pieces += u64::from(!delta.tokens.is_empty());
                read.add(delta.tokens.len() as u64);
            }
            pieces
        });
    }
    Ok(readers.join_all().await.into_iter().sum())
}

fn config(num_seqs: u32, num_tokens: u32) -> (EngineConfig, ExecutorLimits) {
    let max_model_len = PROMPT_LEN + num_tokens;
    let limits = ExecutorLimits {
        block_size: BLOCK_SIZE,
        num_blocks: num_seqs * (max_model_len.div_ceil(BLOCK_SIZE) + 1),
        max_num_seqs: num_seqs,
        max_num_batched_tokens: num_seqs * PROMPT_LEN,
        max_model_len,
        vocab_size: 50_000,
        max_steps_in_flight: 2,
        kv_groups: vec![None],
    };
    let hasher = BlockHasher::new((1, 2), BLOCK_SIZE);
    let config = EngineConfig {
        limits: Limits {
            vocab_size: limits.vocab_size,
            max_model_len,
            max_num_seqs: num_seqs,
            max_num_batched_tokens: limits.max_num_batched_tokens,
            max_queued_requests: num_seqs,
            block_size: BLOCK_SIZE,
            num_blocks: limits.num_blocks,
            ..Limits::default()
        },
        scheduler: SchedulerConfig::new(limits.clone(), hasher),
        hasher,
        model_name: "bench".into(),
    };
    (config, limits)
}

/// How far the readers are. Each number has a cache line of its own: the device looks at one of them all the time.
#[derive(Default)]
struct Read {
    /// Tokens read: the readers' own.
    count: Line,
    /// Tokens after which the device is told.
    wanted: Line,
    /// What it was told last.
    reached: Line,
}

#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU64);

impl std::ops::Deref for Line {
    type Target = AtomicU64;

    fn deref(&self) -> &AtomicU64 {
        &self.0
    }
}

impl Read {
    fn add(&self, num_tokens: u64) {
        let count = self.count.load(Ordering::Relaxed) + num_tokens;
        // All readers are on one thread.
        self.count.store(count, Ordering::Relaxed);
        if count == self.wanted.load(Ordering::Relaxed) {
            self.reached.store(count, Ordering::Release);
        }
    }
}

/// A device that is as fast as its readers.
struct Paced {
    mock: MockExecutor,
    given: u64,
    read: Arc<Read>,
}

impl Executor for Paced {
    fn limits(&self) -> ExecutorLimits {
        self.mock.limits()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        self.mock.submit(plan)
    }

    fn sample(&mut self, step: StepId, late: &LateInputs) -> Result<(), ExecError> {
        self.mock.sample(step, late)
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        let started = Instant::now();
        while self.read.reached.load(Ordering::Acquire) < self.given {
            if started.elapsed() > PATIENCE {
                let message = format!("nobody reads: {} tokens were given", self.given);
                return Err(ExecError { device: "mock".into(), message });
            }
            std::thread::yield_now();
        }
        self.mock.collect(step, out)?;
        self.given += out.tokens.len() as u64;
        self.read.wanted.store(self.given, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_comes_alone() {
        let passed = stream_tokens(48, 50).unwrap();
        assert_eq!((passed.tokens, passed.pieces), (48 * 50, 48 * 50));
    }
}
