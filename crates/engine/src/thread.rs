//! The live shell around [`EngineCore`]: one plain OS thread, a clock, and two channels.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::Instant;

use quire_core::{BlockHasher, ExecError, Executor, FinishReason, Limits, RequestError};
use quire_scheduler::SchedulerConfig;
use tokio::sync::{mpsc as async_mpsc, watch};

use crate::client::{Command, EngineClient, EngineState, Shared};
use crate::core::EngineCore;
use crate::dispatch::{self, StepMessage};
use crate::metrics::EngineMetrics;
use crate::queue::{self, Place};

/// Steps the dispatcher may be behind before the engine waits for it.
const STEP_CHANNEL_CAPACITY: usize = 64;

/// What an engine needs beside its executor.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Bounds of requests; `num_blocks`, `block_size` and the like agree with the executor's.
    pub limits: Limits,
    /// Scheduling policy and sizes.
    pub scheduler: SchedulerConfig,
    /// Addresses of prefix-cache blocks.
    pub hasher: BlockHasher,
    /// Label of the metrics.
    pub model_name: String,
}

/// A running engine. Dropping it stops the thread and waits for it.
pub struct Engine {
    client: EngineClient,
    outcome: watch::Receiver<Option<Result<(), ExecError>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Engine {
    /// Starts the engine thread, and the dispatcher on `runtime`.
    ///
    /// # Errors
    /// The operating system refused the thread.
    pub fn start(
        mut config: EngineConfig,
        executor: Box<dyn Executor>,
        runtime: &tokio::runtime::Handle,
    ) -> std::io::Result<Self> {
        // The client's admission is the bound; a burst may be entirely in the scheduler's queue before the first step.
        config.scheduler.max_queued_requests = queue::most(&config.limits);
        let metrics = EngineMetrics::new(&config.model_name);
        let caches_prefixes = config.scheduler.enable_prefix_caching;
        let shared = Arc::new(Shared::new(config.limits, config.hasher, caches_prefixes, metrics));
        let (inbox, commands) = mpsc::channel();
        let (steps, step_receiver) = async_mpsc::channel(STEP_CHANNEL_CAPACITY);
        let (recycle, recycled) = mpsc::channel();
        let (outcome_sender, outcome) = watch::channel(None);
        runtime.spawn(dispatch::run(Arc::clone(&shared), step_receiver, recycle));
        let core = EngineCore::new(config.scheduler, executor);
        let shell = Shell { core, shared: Arc::clone(&shared), commands, steps, recycled };
        let thread = std::thread::Builder::new().name("quire-engine".into()).spawn(move || {
            let result = shell.run_guarded();
            // Nobody may be waiting.
            let _ = outcome_sender.send(Some(result));
        })?;
        Ok(Self { client: EngineClient::new(shared, inbox), outcome, thread: Some(thread) })
    }

    /// The async side.
    pub fn client(&self) -> EngineClient {
        self.client.clone()
    }

    /// Resolves when the engine thread has ended: `Ok` after [`EngineClient::stop`], `Err` when the device failed.
    ///
    /// # Errors
    /// What the device reported.
    pub async fn ended(&self) -> Result<(), ExecError> {
        let mut outcome = self.outcome.clone();
        let result = outcome.wait_for(Option::is_some).await;
        match result {
            Ok(value) => value.clone().unwrap_or(Ok(())),
            Err(_) => {
                Err(ExecError { device: "engine".into(), message: "the engine thread vanished".into() })
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.client.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there was already turned into an outcome.
            let _ = thread.join();
        }
    }
}

struct Shell {
    core: EngineCore,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    steps: async_mpsc::Sender<StepMessage>,
    recycled: Receiver<StepMessage>,
}

impl Shell {
    /// Runs to the end; whatever ends the loop, the state is dead afterwards and every stream has its final piece.
    fn run_guarded(mut self) -> Result<(), ExecError> {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.run()));
        let result = result.unwrap_or_else(|panic| {
            let message = panic_message(panic.as_ref());
            Err(ExecError {
                device: "engine".into(),
                message: format!("panic in the engine thread: {message}"),
            })
        });
        self.shared.advance_state(EngineState::Dead);
        let reason = if result.is_ok() { FinishReason::Abort } else { FinishReason::Error };
        if let Err(error) = &result {
            tracing::error!(%error, "the engine failed; every stream ends");
        }
        self.finish_everything(reason);
        result
    }

    fn run(&mut self) -> Result<(), ExecError> {
        loop {
            if !self.core.has_work() {
                match self.commands.recv() {
                    Ok(Command::Stop) | Err(_) => return Ok(()),
                    Ok(command) => self.apply(command),
                }
            }
            loop {
                match self.commands.try_recv() {
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(()),
                    Ok(command) => self.apply(command),
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.step()?;
        }
    }

    fn step(&mut self) -> Result<(), ExecError> {
        let started = Instant::now();
        let shared = &self.shared;
        let result = self.core.step_with(|| shared.now());
        self.publish(started);
        result.map(drop)
    }

    /// Hands the step's buffers to the dispatcher and takes used ones back.
    fn publish(&mut self, started: Instant) {
        let mut message = self.recycled.try_recv().unwrap_or_default();
        self.core.swap_results(&mut message.events, &mut message.output);
        self.core.swap_notes(&mut message.notes);
        message.stats = self.core.step_stats();
        message.stats.duration_us = started.elapsed().as_micros() as u64;
        message.stats.at = self.shared.now();
        // The dispatcher ends only with the runtime; then nobody listens any more.
        let _ = self.steps.blocking_send(message);
    }

    fn apply(&mut self, command: Command) {
        match command {
            Command::Add { request, place } => {
                let (id, n) = (request.id, request.params.n);
                if place == Place::Displaces && !self.displace(n, request.priority) {
                    self.core.reject(id, n, self.shared.now(), FinishReason::Rejected);
                    return;
                }
                if let Err(error) = self.core.add(request) {
                    let reason = refusal(&error);
                    if reason == FinishReason::Error {
                        // Validation has passed, so this is a bug; the request ends instead of hanging.
                        tracing::error!(%error, request = %id, "the scheduler refused a validated request");
                    }
                    self.core.reject(id, n, self.shared.now(), reason);
                }
            }
            Command::Finish { id, index, reason } => self.core.finish(id, index, reason),
            Command::AbortAll { reason } => self.core.finish_all(reason),
            Command::SetTenants(shares) => self.core.set_tenants(&shares),
            Command::Stop => {}
        }
    }

    /// Ends waiting requests of lower priorities until `n` places are free; false if there are none left.
    fn displace(&mut self, n: u32, priority: i8) -> bool {
        let mut num_free = 0;
        while num_free < n {
            match self.core.displace(priority) {
                0 => return false,
                num_ended => num_free += num_ended,
            }
        }
        true
    }

    /// Ends what is live, and what still arrives until the last handle is gone or nothing is live.
    fn finish_everything(&mut self, reason: FinishReason) {
        let now = self.shared.now();
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Add { request, .. } = command {
                self.core.reject(request.id, request.params.n, now, FinishReason::Error);
            }
        }
        self.core.fail_all(now, reason);
        self.publish(Instant::now());
    }
}

/// How a request ends that the scheduler refuses: latency targets may make it, at any time.
fn refusal(error: &RequestError) -> FinishReason {
    match error {
        RequestError::Overloaded { .. } | RequestError::Late { .. } => FinishReason::Rejected,
        RequestError::DeadlineExceeded => FinishReason::Deadline,
        _ => FinishReason::Error,
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown".into())
}
