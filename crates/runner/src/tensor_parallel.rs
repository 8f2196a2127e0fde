//! Several ranks of one model as one executor: a thread for each, all in step.
//!
//! Every rank gets every plan, mirrors the batch, and draws every token itself. It can: after the last gather all hold the
//! same bits of every logit, and a token is a function of logits, parameters, seed and position. So no token travels between
//! ranks before the next step may begin. What they drew is compared in `collect`, so that ranks which ever part are an
//! error, not a cache that is wrong from then on.
//!
//! The first failure of any rank is the failure of all. That rank drops its backend, with its place among the ranks, and so
//! nobody waits for it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use quire_backend::{Backend, BackendError, CollectiveError, Communicator};
use quire_core::{
    ExecError, Executor, ExecutorLimits, LateInputs, ModelRunnerOutput, SchedulerOutput, Shard, StepId,
};
use quire_model::Checkpoint;

use crate::{LoadProgress, MemoryPlan, ModelRunner, RunnerConfig, RunnerError};

/// Orders that may wait for a rank: three a step, and two steps in flight.
const MAX_ORDERS: usize = 8;
/// Steps of loading that may wait to be told, per rank.
const MAX_PROGRESS: usize = 16;

/// After a failure: how long the end may take. The process is to end then, whatever its devices do.
const PATIENCE: Duration = Duration::from_secs(5);

/// A model split over ranks. Dropping it ends their threads.
pub struct TensorParallel {
    limits: ExecutorLimits,
    ranks: Vec<Rank>,
    answers: Receiver<(usize, Answer)>,
    /// Of each rank, used again and again.
    outputs: Vec<ModelRunnerOutput>,
    /// Why nothing can be done any more.
    failure: Option<ExecError>,
}

struct Rank {
    /// `None` once it shall end.
    orders: Option<SyncSender<Order>>,
    thread: Option<JoinHandle<()>>,
}

enum Order {
    Submit(Arc<SchedulerOutput>),
    Sample(StepId, LateInputs),
    /// Answered with the output.
    Collect(StepId, ModelRunnerOutput),
    /// Answered with the logits.
    ReadLogits,
}

enum Done {
    Step(ModelRunnerOutput),
    Logits(Vec<f32>),
}

/// A rank ends after an error.
type Answer = Result<Done, ExecError>;

/// Loads the ranks of a model at the same time, each on its backend; the backends are the members of one group, by rank.
/// `progress` hears of the slowest.
///
/// # Errors
/// As for [`ModelRunner::load_shard`].
pub fn load_ranks<B: Backend>(
    backends: Vec<B>,
    checkpoint: &Checkpoint,
    config: &RunnerConfig,
    progress: impl FnMut(LoadProgress),
) -> Result<Vec<ModelRunner<B>>, RunnerError> {
    on_ranks(backends, progress, |backend, shard, progress| {
        ModelRunner::load_shard(backend, checkpoint, config, shard, progress)
    })
}

/// As [`load_ranks`], but with as many blocks as fit into what `kv_bytes` says that the cache may take, on the rank with
/// least: see [`ModelRunner::load_measured`].
///
/// # Errors
/// As for [`ModelRunner::load_measured`].
pub fn load_ranks_measured<B: Backend>(
    backends: Vec<B>,
    checkpoint: &Checkpoint,
    config: &RunnerConfig,
    progress: impl FnMut(LoadProgress),
    kv_bytes: impl Fn(&B) -> Result<u64, BackendError> + Sync,
) -> Result<Vec<ModelRunner<B>>, RunnerError> {
    let group = Communicator::group(backends.len());
    let members = backends.into_iter().zip(group).collect();
    on_ranks(members, progress, |(backend, mut others), shard, progress| {
        let num_blocks = |backend: &B, plan: &MemoryPlan| {
            least(&mut others, plan.num_blocks_in(kv_bytes(backend)?))
                .map_err(|error| ExecError { device: backend.name(), message: error.to_string() }.into())
        };
        ModelRunner::load_shard_measured(backend, checkpoint, config, shard, progress, num_blocks)
    })
}

/// The least of the numbers of all ranks.
fn least(others: &mut Communicator, own: u32) -> Result<u32, CollectiveError> {
    // Ranks tell each other floats, which are whole numbers up to here; no cache has more blocks.
    const MOST: u32 = 1 << f32::MANTISSA_DIGITS;
    let mut all = vec![0.0; others.world()];
    others.all_gather(&[own.min(MOST) as f32], &mut all, 1)?;
    Ok(all.into_iter().fold(own.min(MOST), |least, theirs| least.min(theirs as u32)))
}

/// Runs `load` for every rank at the same time, each on a thread of its own. What belongs to a rank is dropped as soon as
/// that rank has failed, or cannot be started.
fn on_ranks<B: Backend, R: Send>(
    ranks: Vec<R>,
    mut progress: impl FnMut(LoadProgress),
    load: impl Fn(R, Shard, &mut dyn FnMut(LoadProgress)) -> Result<ModelRunner<B>, RunnerError> + Sync,
) -> Result<Vec<ModelRunner<B>>, RunnerError> {
    let (world, load) = (ranks.len() as u32, &load);
    std::thread::scope(|scope| {
        let (tell, told) = sync_channel(MAX_PROGRESS * ranks.len());
        let start = |(rank, own): (usize, R)| {
            let (shard, tell) = (Shard { rank: rank as u32, world }, tell.clone());
            let thread = std::thread::Builder::new().name(format!("quire-load-{rank}"));
            let load = move || {
                let mut progress = |now| {
                    // Nobody listens any more if another rank could not be started.
                    let _ = tell.send((rank, now));
                };
                load(own, shard, &mut progress)
            };
            thread.spawn_scoped(scope, load).map_err(RunnerError::Thread)
        };
        let threads = ranks.into_iter().enumerate().map(start).collect::<Result<Vec<_>, _>>()?;
        drop(tell);
        let mut done = vec![0; threads.len()];
        let mut slowest = None;
        while let Ok((rank, LoadProgress { done_bytes, total_bytes })) = told.recv() {
            done[rank] = done_bytes;
            let now = done.iter().min().copied();
            if now > slowest {
                slowest = now;
                progress(LoadProgress { done_bytes: now.unwrap_or(0), total_bytes });
            }
        }
        let panicked = |rank, panic: Box<dyn Any + Send>| RunnerError::Backend(died(rank, &*panic).into());
        let joined = threads.into_iter().enumerate();
        joined
            .map(|(rank, thread)| thread.join().unwrap_or_else(|panic| Err(panicked(rank, panic))))
            .collect()
    })
}

impl TensorParallel {
    /// Starts a thread for each rank of [`load_ranks`].
    ///
    /// # Errors
    /// The system refuses a thread.
    ///
    /// # Panics
    /// Without ranks.
    pub fn new<B: Backend>(runners: Vec<ModelRunner<B>>) -> Result<Self, RunnerError> {
        let limits = runners[0].limits();
        let (send, answers) = sync_channel(2 * runners.len());
        let start = |(rank, runner): (usize, ModelRunner<B>)| {
            let (orders, receive) = sync_channel(MAX_ORDERS);
            let send = send.clone();
            let thread = std::thread::Builder::new().name(format!("quire-rank-{rank}"));
            let thread =
                thread.spawn(move || serve(rank, runner, &receive, &send)).map_err(RunnerError::Thread)?;
            Ok(Rank { orders: Some(orders), thread: Some(thread) })
        };
        let outputs = runners.iter().map(|_| ModelRunnerOutput::default()).collect();
        let ranks = runners.into_iter().enumerate().map(start).collect::<Result<_, RunnerError>>()?;
        Ok(Self { limits, ranks, answers, outputs, failure: None })
    }

    /// The logits of the last pass on each rank, for tests: see [`ModelRunner::read_logits`].
    ///
    /// # Errors
    /// A rank failed.
    pub fn read_logits(&mut self) -> Result<Vec<Vec<f32>>, ExecError> {
        self.order(|_| Order::ReadLogits)?;
        let mut all = vec![Vec::new(); self.ranks.len()];
        for _ in 0..self.ranks.len() {
            if let (rank, Done::Logits(logits)) = self.answer()? {
                all[rank] = logits;
            }
        }
        Ok(all)
    }

    /// Gives each rank its order.
    fn order(&mut self, mut order: impl FnMut(usize) -> Order) -> Result<(), ExecError> {
        if let Some(error) = &self.failure {
            return Err(error.clone());
        }
        for (rank, to) in self.ranks.iter().enumerate() {
            let sent = to.orders.as_ref().is_some_and(|orders| orders.send(order(rank)).is_ok());
            if !sent {
                // It has ended, and its answer says why.
                while self.failure.is_none() {
                    let _ = self.answer();
                }
                return self.failure.clone().map_or(Ok(()), Err);
            }
        }
        Ok(())
    }

    /// The next answer of any rank. The first error comes from the rank that failed first: it tells before it leaves.
    fn answer(&mut self) -> Result<(usize, Done), ExecError> {
        let (rank, answer) = match self.answers.recv() {
            Ok(answer) => answer,
            Err(_) => (0, Err(failed("all tensor-parallel ranks have stopped".into()))),
        };
        match answer {
            Ok(done) => Ok((rank, done)),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn fail(&mut self, error: ExecError) -> ExecError {
        self.ranks.iter_mut().for_each(|rank| rank.orders = None);
        self.failure.get_or_insert(error).clone()
    }
}

impl Executor for TensorParallel {
    fn limits(&self) -> ExecutorLimits {
        self.limits.clone()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        let step = plan.step;
        self.order(|_| Order::Submit(plan.clone()))?;
        Ok(step)
    }

    fn sample(&mut self, step: StepId, late: &LateInputs) -> Result<(), ExecError> {
        self.order(|_| Order::Sample(step, LateInputs { masks: late.masks.clone() }))
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        let mut outputs = std::mem::take(&mut self.outputs);
        self.order(|rank| Order::Collect(step, std::mem::take(&mut outputs[rank])))?;
        for _ in 0..self.ranks.len() {
            if let (rank, Done::Step(output)) = self.answer()? {
                outputs[rank] = output;
            }
        }
        let first = &outputs[0];
        let parted = outputs.iter().position(|own| (&own.rows, &own.tokens) != (&first.rows, &first.tokens));
        if let Some(rank) = parted {
            let message =
                format!("tensor-parallel rank {rank} sampled other tokens than rank 0 in step {step}");
            return Err(self.fail(failed(message)));
        }
        std::mem::swap(out, &mut outputs[0]);
        self.outputs = outputs;
        Ok(())
    }
}

impl Drop for TensorParallel {
    /// Waits for the ranks, but for one that a device holds up no longer than [`PATIENCE`].
    fn drop(&mut self) {
        self.ranks.iter_mut().for_each(|rank| rank.orders = None);
        let begin = Instant::now();
        let is_running = |rank: &Rank| rank.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        while self.failure.is_some() && self.ranks.iter().any(is_running) {
            if begin.elapsed() > PATIENCE {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in self.ranks.iter_mut().filter_map(|rank| rank.thread.take()) {
            // It catches its panics.
            let _ = thread.join();
        }
    }
}

/// A rank's thread.
fn serve<B: Backend>(
    rank: usize,
    mut runner: ModelRunner<B>,
    orders: &Receiver<Order>,
    answers: &SyncSender<(usize, Answer)>,
) {
    while let Ok(order) = orders.recv() {
        let outcome = catch_unwind(AssertUnwindSafe(|| obey(&mut runner, order)));
        let answer = match outcome.unwrap_or_else(|panic| Err(died(rank, &*panic))) {
            Ok(None) => continue,
            Ok(Some(done)) => Ok(done),
            Err(error) => Err(error),
        };
        let is_last = answer.is_err();
        if answers.send((rank, answer)).is_err() || is_last {
            return;
        }
    }
}

fn obey<B: Backend>(runner: &mut ModelRunner<B>, order: Order) -> Result<Option<Done>, ExecError> {
    match order {
        Order::Submit(plan) => runner.submit(plan).map(|_| None),
        Order::Sample(step, late) => runner.sample(step, &late).map(|()| None),
        Order::Collect(step, mut output) => {
            runner.collect(step, &mut output)?;
            Ok(Some(Done::Step(output)))
        }
        Order::ReadLogits => Ok(Some(Done::Logits(runner.read_logits()?))),
    }
}

fn failed(message: String) -> ExecError {
    ExecError { device: "tensor parallel".into(), message }
}

fn died(rank: usize, panic: &(dyn Any + Send)) -> ExecError {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    failed(format!("tensor-parallel rank {rank} panicked: {text}"))
}
