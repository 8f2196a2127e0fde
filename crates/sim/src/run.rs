//! One simulation: clients act, the engine steps, virtual time passes, everything is checked.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use quire_core::{Micros, Request, RequestError, RequestId};
use quire_engine::EngineCore;
use quire_scheduler::{Policy, SchedulerConfig, SchedulerStats};

use crate::checker::Checker;
use crate::executor::{SharedWorld, SimExecutor, World, lock};
use crate::workload::{Action, Workload};

/// What a run that kept all invariants did.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Steps given to the executor.
    pub num_steps: u64,
    /// Requests accepted, and refused because the queue was full.
    pub num_requests: u64,
    /// See `num_requests`.
    pub num_refused: u64,
    /// Tokens that clients received.
    pub num_tokens: u64,
    /// Times a sequence lost its blocks.
    pub num_preemptions: u64,
    /// Prompt tokens found in the prefix cache.
    pub num_cached_tokens: u64,
    /// Cached blocks given up.
    pub num_evictions: u64,
    /// Blocks copied for continuations.
    pub num_copies: u64,
    /// Blocks copied to the host tier and from it.
    pub num_host_copies: [u64; 2],
    /// Times a sequence lost its blocks to the host tier.
    pub num_swaps: u64,
    /// Virtual time at the end.
    pub virtual_time: Micros,
    /// Hash of every plan, every result and the time; equal for equal seeds.
    pub trace_hash: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} steps, {} requests ({} refused), {} tokens, {} preemptions, {} cached tokens, {} evictions, \
             {} copies, {} to and {} from the host tier, {} swaps, {:.3} s virtual, trace {:016x}",
            self.seed,
            self.num_steps,
            self.num_requests,
            self.num_refused,
            self.num_tokens,
            self.num_preemptions,
            self.num_cached_tokens,
            self.num_evictions,
            self.num_copies,
            self.num_host_copies[0],
            self.num_host_copies[1],
            self.num_swaps,
            self.virtual_time.as_secs_f64(),
            self.trace_hash
        )
    }
}

/// A broken invariant.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// Run this seed again to see it again.
    pub seed: u64,
    /// Calls of `EngineCore::step` until then.
    pub step: u64,
    /// What was broken.
    pub violation: String,
    /// The configuration, for the reader.
    pub config: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}, step {}: {}\n  with {}", self.seed, self.step, self.violation, self.config)
    }
}

impl std::error::Error for Failure {}

/// Runs the simulation of one seed to its end.
///
/// # Errors
/// The first broken invariant; a panic in the code under test counts as one.
pub fn run_seed(seed: u64) -> Result<Report, Failure> {
    run_workload(seed, Workload::new(seed))
}

/// The same without a host tier, whether the seed has one or not: what seeds meant before there was any.
///
/// # Errors
/// As [`run_seed`].
pub fn run_seed_without_host_tier(seed: u64) -> Result<Report, Failure> {
    let mut workload = Workload::new(seed);
    workload.config.host_tier = None;
    run_workload(seed, workload)
}

fn run_workload(seed: u64, workload: Workload) -> Result<Report, Failure> {
    let mut run = Run::new(seed, workload);
    let result = catch_unwind(AssertUnwindSafe(|| run.play()));
    let violation = match result {
        Ok(Ok(())) => return Ok(run.report()),
        Ok(Err(violation)) => violation,
        Err(panic) => format!("panic: {}", panic_message(panic.as_ref())),
    };
    Err(Failure { seed, step: run.num_calls, violation, config: describe(&run.workload.config) })
}

struct Run {
    seed: u64,
    workload: Workload,
    core: EngineCore,
    world: SharedWorld,
    checker: Checker,
    /// Turns that follow the request in the same conversation.
    turns: BTreeMap<RequestId, u32>,
    num_calls: u64,
    num_refused: u64,
    stats: SchedulerStats,
}

impl Run {
    fn new(seed: u64, workload: Workload) -> Self {
        let world = Arc::new(Mutex::new(World::default()));
        let limits = workload.config.limits.clone();
        let checker = Checker::new(limits.vocab_size, &workload);
        let num_host_blocks = workload.config.host_tier.map_or(0, |host| host.num_blocks);
        let executor = SimExecutor::new(limits, num_host_blocks, workload.cost, Arc::clone(&world));
        let mut core = EngineCore::new(workload.config.clone(), Box::new(executor));
        core.set_tenants(&workload.tenants);
        Self {
            seed,
            workload,
            core,
            world,
            checker,
            turns: BTreeMap::new(),
            num_calls: 0,
            num_refused: 0,
            stats: SchedulerStats::default(),
        }
    }

    fn play(&mut self) -> Result<(), String> {
        loop {
            self.act()?;
            if self.core.has_work() {
                self.step()?;
                continue;
            }
            self.check_idle()?;
            let Some(&(at, _)) = self.workload.actions.front() else { return Ok(()) };
            let mut world = lock(&self.world);
            world.now = world.now.max(at);
        }
    }

    /// Does what clients do up to now.
    fn act(&mut self) -> Result<(), String> {
        let now = lock(&self.world).now;
        while self.workload.actions.front().is_some_and(|&(at, _)| at <= now) {
            match self.workload.actions.pop_front() {
                Some((_, Action::Send { request, turns })) => self.send(request, turns)?,
                Some((_, Action::Finish { id, index, reason })) => {
                    self.checker.asked_to_finish(id, index, reason);
                    self.core.finish(id, index, reason);
                }
                None => {}
            }
        }
        Ok(())
    }

    fn send(&mut self, request: Request, turns: u32) -> Result<(), String> {
        lock(&self.world).salts.insert(request.id, request.salt);
        match self.core.add(request.clone()) {
            Ok(()) => {
                self.turns.insert(request.id, turns);
                self.checker.accepted(request);
            }
            Err(RequestError::Overloaded { queued, limit, .. }) if queued >= limit => self.num_refused += 1,
            Err(RequestError::Late { .. } | RequestError::DeadlineExceeded)
                if self.workload.config.policy != Policy::Fcfs =>
            {
                self.num_refused += 1;
            }
            Err(error) => return Err(format!("request {} was refused: {error}", request.id)),
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        self.num_calls += 1;
        let world = Arc::clone(&self.world);
        let began = lock(&world).now;
        let outcome = self.core.step_with(|| Micros(lock(&world).now)).map_err(|error| error.message)?;
        self.core.check_invariants()?;
        let now = lock(&self.world).now;
        self.checker.check_step(began, now, self.core.events(), self.core.output())?;
        let idle = outcome.submitted.is_none() && outcome.collected.is_none();
        if idle && self.core.events().is_empty() {
            return Err("the engine has work but does nothing".into());
        }
        self.check_stats()?;
        for answer in self.checker.take_answers() {
            let turns = self.turns.remove(&answer.request.id).unwrap_or(0);
            if turns > 0
                && let Some(request) = self.workload.next_turn(&answer.request, &answer.output, now)
            {
                self.workload.push(now, Action::Send { request, turns: turns - 1 });
            }
        }
        Ok(())
    }

    fn check_stats(&mut self) -> Result<(), String> {
        let stats = self.core.stats();
        let blocks =
            [stats.kv_blocks_free, stats.kv_blocks_cached, stats.kv_blocks_used, stats.kv_blocks_quarantined];
        if blocks.iter().sum::<u32>() != self.workload.config.limits.num_blocks {
            return Err(format!("blocks (free, cached, used, quarantined) {blocks:?} are not the pool"));
        }
        if stats.running > self.workload.config.limits.max_num_seqs {
            return Err(format!("{} sequences run at once", stats.running));
        }
        self.stats = stats;
        Ok(())
    }

    fn check_idle(&self) -> Result<(), String> {
        if !self.checker.is_idle() {
            return Err("the engine is idle, but a request has not ended".into());
        }
        let stats = self.core.stats();
        if stats.kv_blocks_used + stats.kv_blocks_quarantined + stats.running + stats.waiting > 0 {
            return Err(format!("idle, but something is left: {stats:?}"));
        }
        Ok(())
    }

    fn report(&self) -> Report {
        let world = lock(&self.world);
        Report {
            seed: self.seed,
            num_steps: world.num_steps,
            num_requests: self.checker.num_accepted,
            num_refused: self.num_refused,
            num_tokens: self.checker.num_tokens,
            num_preemptions: self.stats.num_preemptions,
            num_cached_tokens: self.stats.prefix_cache_hits,
            num_evictions: self.stats.num_evictions,
            num_copies: world.num_copies,
            num_host_copies: [world.num_copies_to_host, world.num_copies_to_device],
            num_swaps: self.stats.host.num_swaps,
            virtual_time: Micros(world.now),
            trace_hash: world.trace,
        }
    }
}

fn describe(config: &SchedulerConfig) -> String {
    let limits = &config.limits;
    format!(
        "block_size {} num_blocks {} max_num_seqs {} max_num_batched_tokens {} max_prefill_chunk {} window {:?} \
         depth {} prefix caching {} host blocks {}",
        limits.block_size,
        limits.num_blocks,
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        config.max_prefill_chunk,
        limits.kv_groups[0],
        limits.max_steps_in_flight,
        config.enable_prefix_caching,
        config.host_tier.map_or(0, |host| host.num_blocks)
    )
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unknown".into())
}
