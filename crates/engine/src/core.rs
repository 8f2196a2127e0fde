//! The engine without its thread: a scheduler, an executor, and the order in which they are called.
//!
//! Passive: no thread, clock or channel, so that a simulator in virtual time and the live shell run the same code. In a
//! steady step it allocates nothing: plans come from a ring of `max_steps_in_flight + 1`, results and events are reused.

use std::sync::Arc;

use quire_core::{
    ExecError, Executor, FinishReason, LateInputs, Micros, ModelRunnerOutput, Request, RequestError,
    RequestId, SchedulerOutput, StepId, TenantShare, Usage,
};
use quire_scheduler::{Scheduler, SchedulerConfig, SchedulerStats, SeqEvent, SeqEventKind, SeqNote};

/// What one call of [`EngineCore::step`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepOutcome {
    /// The step that was given to the executor, if there was anything to run.
    pub submitted: Option<StepId>,
    /// The step whose results came back; [`EngineCore::output`] holds them.
    pub collected: Option<StepId>,
}

/// Numbers of one call of [`EngineCore::step`], for metrics. The live shell adds what needs a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepStats {
    /// The scheduler after the call.
    pub scheduler: SchedulerStats,
    /// Rows in the step that was submitted; 0 if none was.
    pub num_rows: u32,
    /// Tokens sampled in the step that was collected.
    pub num_sampled: u32,
    /// How long the call took, in microseconds. Filled by the live shell.
    pub duration_us: u64,
    /// When the call ended. Filled by the live shell.
    pub at: Micros,
}

/// Owns the scheduler and the executor; the only place where both are known.
pub struct EngineCore {
    scheduler: Scheduler,
    executor: Box<dyn Executor>,
    depth: usize,
    /// Plans, used in turn. The executor gives up its share of one before the step is collected.
    ring: Vec<Arc<SchedulerOutput>>,
    next_plan: usize,
    /// Steps submitted and not collected, oldest first; at most `depth`.
    in_flight: std::collections::VecDeque<StepId>,
    late: LateInputs,
    output: ModelRunnerOutput,
    events: Vec<SeqEvent>,
    /// Events that arose between steps.
    pending: Vec<SeqEvent>,
    stats: StepStats,
    poisoned: Option<ExecError>,
}

impl EngineCore {
    /// An idle engine. `config.limits` are the executor's.
    ///
    /// # Panics
    /// As [`Scheduler::new`] does.
    pub fn new(config: SchedulerConfig, executor: Box<dyn Executor>) -> Self {
        debug_assert_eq!(config.limits, executor.limits());
        let depth = config.limits.max_steps_in_flight as usize;
        Self {
            scheduler: Scheduler::new(config),
            executor,
            depth,
            ring: (0..=depth).map(|_| Arc::default()).collect(),
            next_plan: 0,
            in_flight: std::collections::VecDeque::with_capacity(depth),
            late: LateInputs::default(),
            output: ModelRunnerOutput::default(),
            events: Vec::new(),
            pending: Vec::new(),
            stats: StepStats::default(),
            poisoned: None,
        }
    }

    /// Accepts a request; its events come from later steps.
    ///
    /// # Errors
    /// As [`Scheduler::add`], and [`RequestError::Unavailable`] once the device has failed.
    pub fn add(&mut self, request: Request) -> Result<(), RequestError> {
        if self.poisoned.is_some() {
            return Err(RequestError::Unavailable { state: "dead" });
        }
        self.scheduler.add(request)
    }

    /// Ends a request, or one continuation of it. Its `Finished` events come with the next step.
    pub fn finish(&mut self, id: RequestId, index: Option<u32>, reason: FinishReason) {
        self.scheduler.finish(id, index, reason);
    }

    /// Makes a place in the queue at the expense of a lower priority. See [`Scheduler::displace`].
    pub fn displace(&mut self, priority: i8) -> u32 {
        self.scheduler.displace(priority)
    }

    /// Ends every request; the `Finished` events come with the next step.
    pub fn finish_all(&mut self, reason: FinishReason) {
        self.scheduler.finish_all(reason);
    }

    /// Sets the shares of all tenants. See [`Scheduler::set_tenants`].
    pub fn set_tenants(&mut self, shares: &[TenantShare]) {
        self.scheduler.set_tenants(shares);
    }

    /// Reports the end of a request that was never accepted, so that whoever waits for it hears of it.
    pub fn reject(&mut self, id: RequestId, n: u32, now: Micros, reason: FinishReason) {
        let usage =
            Usage { arrival: now, first_scheduled: now, first_token: now, finished: now, ..Usage::default() };
        let usage = Box::new(usage);
        let kind = SeqEventKind::Finished { reason, stop_token: None, usage };
        self.pending.extend((0..n).map(|index| SeqEvent { request: id, index, kind: kind.clone() }));
    }

    /// Ends every request at once, without the executor. The events replace those of the last step.
    pub fn fail_all(&mut self, now: Micros, reason: FinishReason) {
        self.events.clear();
        self.end_all(now, reason);
    }

    /// Runs one round: plan a step, submit it, and collect the oldest in flight once the executor is full or there is
    /// nothing new to run. Afterwards [`Self::events`] and [`Self::output`] hold the results. `now` counts as the time
    /// of the whole round.
    ///
    /// # Errors
    /// The device failed. Every live sequence has a `Finished { Error }` in [`Self::events`]; the core refuses further
    /// steps and requests.
    pub fn step(&mut self, now: Micros) -> Result<StepOutcome, ExecError> {
        self.step_with(|| now)
    }

    /// [`Self::step`] with a clock: it is read before planning, and again when results are in.
    ///
    /// # Errors
    /// As for [`Self::step`].
    pub fn step_with(&mut self, clock: impl Fn() -> Micros) -> Result<StepOutcome, ExecError> {
        if let Some(error) = &self.poisoned {
            return Err(error.clone());
        }
        self.events.clear();
        self.output.clear();
        self.events.append(&mut self.pending);
        let result = self.run_round(&clock);
        if let Err(error) = &result {
            self.poisoned = Some(error.clone());
            self.end_all(clock(), FinishReason::Error);
        }
        self.stats.scheduler = self.scheduler.stats();
        result
    }

    fn run_round(&mut self, clock: &impl Fn() -> Micros) -> Result<StepOutcome, ExecError> {
        let submitted = self.submit_next(clock())?;
        let full = self.in_flight.len() >= self.depth;
        let mut collected = None;
        if (full || submitted.is_none())
            && let Some(step) = self.in_flight.pop_front()
        {
            self.executor.collect(step, &mut self.output)?;
            self.scheduler.update(clock(), &self.output, &mut self.events);
            collected = Some(step);
        }
        self.stats.num_sampled = self.output.tokens.len() as u32;
        Ok(StepOutcome { submitted, collected })
    }

    fn submit_next(&mut self, now: Micros) -> Result<Option<StepId>, ExecError> {
        let plan = Arc::get_mut(&mut self.ring[self.next_plan])
            .expect("the executor drops a plan before its step is collected");
        self.scheduler.schedule(now, plan, &mut self.events);
        self.stats.num_rows = plan.scheduled.len() as u32;
        if plan.is_empty() {
            return Ok(None);
        }
        let step = self.executor.submit(Arc::clone(&self.ring[self.next_plan]))?;
        self.in_flight.push_back(step);
        self.next_plan = (self.next_plan + 1) % self.ring.len();
        self.executor.sample(step, &self.late)?;
        Ok(Some(step))
    }

    fn end_all(&mut self, now: Micros, reason: FinishReason) {
        self.events.append(&mut self.pending);
        self.scheduler.finish_all(reason);
        self.scheduler.drain_events(now, &mut self.events);
    }

    /// What happened in the last step, in order. Rows and entries point into [`Self::output`].
    pub fn events(&self) -> &[SeqEvent] {
        &self.events
    }

    /// The executor's answer of the last step; empty if none was collected.
    pub fn output(&self) -> &ModelRunnerOutput {
        &self.output
    }

    /// Exchanges the results of the last step for buffers to reuse, whose content does not matter.
    pub fn swap_results(&mut self, events: &mut Vec<SeqEvent>, output: &mut ModelRunnerOutput) {
        std::mem::swap(&mut self.events, events);
        std::mem::swap(&mut self.output, output);
        self.events.clear();
        self.output.clear();
    }

    /// Why sequences wait and how they get on, as far as the last step changed it. See [`Scheduler::notes`].
    pub fn notes(&self) -> &[SeqNote] {
        self.scheduler.notes()
    }

    /// Exchanges the notes of the last step for a buffer to reuse. See [`Scheduler::swap_notes`].
    pub fn swap_notes(&mut self, notes: &mut Vec<SeqNote>) {
        self.scheduler.swap_notes(notes);
    }

    /// Whether a call of [`Self::step`] would do anything.
    pub fn has_work(&self) -> bool {
        !self.pending.is_empty() || (self.poisoned.is_none() && self.scheduler.has_work())
    }

    /// Numbers about the queue, the batch and the blocks.
    pub fn stats(&self) -> SchedulerStats {
        self.scheduler.stats()
    }

    /// Numbers of the last step.
    pub fn step_stats(&self) -> StepStats {
        self.stats
    }

    /// See [`Scheduler::check_invariants`].
    ///
    /// # Errors
    /// The first broken invariant, in words.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.scheduler.check_invariants()
    }
}

#[cfg(test)]
mod tests {
    use quire_core::{BlockHasher, CacheSalt, ExecutorLimits, SamplingParams, TenantId};

    use super::*;

    /// Answers every sampled row with token 7 and fails at a given step.
    struct Fake {
        limits: ExecutorLimits,
        plans: Vec<Arc<SchedulerOutput>>,
        fail_at: u64,
    }

    impl Executor for Fake {
        fn limits(&self) -> ExecutorLimits {
            self.limits.clone()
        }

        fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
            let step = plan.step;
            self.plans.push(plan);
            assert!(self.plans.len() <= self.limits.max_steps_in_flight as usize);
            Ok(step)
        }

        fn sample(&mut self, _: StepId, _: &LateInputs) -> Result<(), ExecError> {
            Ok(())
        }

        fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
            let plan = self.plans.remove(0);
            assert_eq!(plan.step, step, "oldest first");
            if step.0 == self.fail_at {
                return Err(ExecError { device: "fake".into(), message: "broken".into() });
            }
            out.step = step;
            plan.scheduled.iter().filter(|row| row.sample).for_each(|row| out.push_row(row.slot, &[7], []));
            Ok(())
        }
    }

    fn core(depth: u32, fail_at: u64) -> EngineCore {
        let limits = ExecutorLimits {
            block_size: 4,
            num_blocks: 64,
            max_num_seqs: 4,
            max_num_batched_tokens: 16,
            max_model_len: 64,
            vocab_size: 100,
            max_steps_in_flight: depth,
            kv_groups: vec![None],
        };
        let config = SchedulerConfig::new(limits.clone(), BlockHasher::new((1, 2), 4));
        EngineCore::new(config, Box::new(Fake { limits, plans: Vec::new(), fail_at }))
    }

    fn request(id: u64, max_tokens: u32) -> Request {
        Request {
            id: RequestId(id),
            prompt: Arc::from([1, 2, 3]),
            block_hashes: Arc::from([]),
            salt: CacheSalt(0),
            adapter: None,
            params: Arc::new(SamplingParams::greedy(max_tokens)),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(0),
            deadline: None,
        }
    }

    fn finished(core: &EngineCore) -> Vec<(u64, FinishReason)> {
        let finished = core.events().iter().filter_map(|event| match event.kind {
            SeqEventKind::Finished { reason, .. } => Some((event.request.0, reason)),
            _ => None,
        });
        finished.collect()
    }

    #[test]
    fn depth_decides_how_many_steps_run_ahead() {
        for depth in [1, 2] {
            let mut core = core(depth, 0);
            core.add(request(1, 3)).unwrap();
            let mut log = Vec::new();
            while core.has_work() {
                let StepOutcome { submitted, collected } = core.step(Micros(1)).unwrap();
                log.push((submitted.map(|s| s.0), collected.map(|s| s.0)));
            }
            let expected: &[_] = match depth {
                1 => &[(Some(1), Some(1)), (Some(2), Some(2)), (Some(3), Some(3))],
                _ => &[(Some(1), None), (Some(2), Some(1)), (Some(3), Some(2)), (None, Some(3))],
            };
            assert_eq!(log, expected);
            assert_eq!(finished(&core), [(1, FinishReason::Length)]);
        }
    }

    #[test]
    fn a_device_error_ends_every_sequence_and_poisons_the_core() {
        for depth in [1, 2] {
            let mut core = core(depth, 2);
            core.add(request(1, 9)).unwrap();
            core.add(request(2, 9)).unwrap();
            let error = loop {
                if let Err(error) = core.step(Micros(5)) {
                    break error;
                }
                assert!(finished(&core).is_empty());
            };
            assert_eq!(finished(&core), [(1, FinishReason::Error), (2, FinishReason::Error)]);
            assert_eq!(core.step(Micros(6)), Err(error));
            assert!(matches!(core.add(request(3, 1)), Err(RequestError::Unavailable { .. })));
            assert!(!core.has_work());
        }
    }

    #[test]
    fn rejected_and_failed_requests_are_reported() {
        let mut core = core(1, 0);
        core.reject(RequestId(5), 2, Micros(3), FinishReason::Error);
        assert!(core.has_work());
        core.step(Micros(4)).unwrap();
        assert_eq!(finished(&core), [(5, FinishReason::Error); 2]);
        assert!(!core.has_work());
        core.add(request(6, 1)).unwrap();
        core.fail_all(Micros(5), FinishReason::Abort);
        assert_eq!(finished(&core), [(6, FinishReason::Abort)]);
        let (mut events, mut output) = (Vec::new(), ModelRunnerOutput::default());
        core.swap_results(&mut events, &mut output);
        assert_eq!(events.len(), 1);
        assert!(core.events().is_empty());
    }
}
