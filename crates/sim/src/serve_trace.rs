//! Serves a trace in virtual time with the production engine: the cost model says how long each step takes, nothing is
//! computed, and what clients would have seen is counted.
//!
//! The scheduler sees prompts, block addresses and `max_tokens`, as in production; the trace's output length shows only
//! as the stop token that ends the answer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quire_core::{
    BlockHash, BlockHasher, CacheSalt, ExecError, Executor, ExecutorLimits, FinishReason, LateInputs, Micros,
    ModelRunnerOutput, Request, RequestId, SamplingParams, SchedulerOutput, StepId, TenantId, TokenId,
};
use quire_engine::EngineCore;
use quire_scheduler::{
    Calibration, CostModel, EvictionPolicy, FairnessConfig, HostTierConfig, LatencyTargets, NoteKind, Policy,
    SchedulerConfig, SchedulerStats, SeqEvent, SeqEventKind, SeqNote, StepShape, WaitCause,
};

use crate::replay::address;
use crate::rng::mix;
use crate::serve_report::{Gaps, ServeReport, Served, Waits};
use crate::service::{Accounts, Fairness, MAX_TENANTS};
use crate::trace::{TRACE_BLOCK_SIZE, TraceRequest};

/// What every client asks for; the trace decides how much it gets.
const MAX_TOKENS: u32 = 2000;
const STOP: TokenId = 1;
/// Tokens in a KV block of the engine that serves.
pub const BLOCK_SIZE: u32 = 16;
/// How far time moves on when the engine has work and can do none of it.
const IDLE: u64 = 1000;
/// Times at which the tenants' service is noted, until the last arrival.
const NUM_SAMPLES: u64 = 200;
/// They are no closer than this, in microseconds: a backlog that came at once is served for long after its last arrival.
const MIN_PERIOD: u64 = 10_000;

/// What serves the trace.
#[derive(Clone, Copy, Debug)]
pub struct ServeConfig {
    /// The device and the model.
    pub calibration: Calibration,
    /// The order, and the latency targets if it has any.
    pub policy: Policy,
    /// Which cached blocks go first.
    pub eviction: EvictionPolicy,
    /// KV in host memory, in blocks of [`BLOCK_SIZE`] tokens.
    pub host_tier: Option<HostTierConfig>,
    /// Tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Sequences in a step.
    pub max_num_seqs: u32,
    /// Arrivals per recorded arrival: 2 means twice the trace's rate.
    pub rate_scale: f64,
    /// What clients expect; counted, whatever the policy knows.
    pub targets: LatencyTargets,
    /// Tenants to whom the requests are dealt out: the k-th gets one for every k of the first one's. At most
    /// [`MAX_TENANTS`].
    pub num_tenants: u32,
    /// How service is shared between them.
    pub fairness: FairnessConfig,
}

impl ServeConfig {
    /// 1,024 sequences, 8,192 tokens a step, learned eviction, least slack first.
    pub fn new(calibration: Calibration) -> Self {
        let targets = LatencyTargets::new(calibration.cost());
        Self {
            calibration,
            policy: Policy::DeadlineSlack(targets),
            eviction: EvictionPolicy::Learned,
            host_tier: None,
            max_num_batched_tokens: 8192,
            max_num_seqs: 1024,
            rate_scale: 1.0,
            targets,
            num_tenants: 1,
            fairness: FairnessConfig::default(),
        }
    }

    /// Who sends request `at`.
    pub fn tenant(&self, at: u64) -> TenantId {
        let num_tenants = self.num_tenants.clamp(1, MAX_TENANTS);
        let share = |tenant: u32| 1.0 / f64::from(tenant + 1);
        let all: f64 = (0..num_tenants).map(share).sum();
        let mut place = all * (mix(at) >> 11) as f64 / (1_u64 << 53) as f64;
        let tenant = (0..num_tenants).find(|&tenant| {
            place -= share(tenant);
            place < 0.0
        });
        TenantId(tenant.unwrap_or(0))
    }

    fn limits(&self) -> ExecutorLimits {
        ExecutorLimits {
            block_size: BLOCK_SIZE,
            num_blocks: self.calibration.kv_capacity_tokens / BLOCK_SIZE,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.calibration.kv_capacity_tokens.min(1 << 18),
            vocab_size: 2,
            max_steps_in_flight: 1,
            kv_groups: vec![None],
        }
    }
}

/// Serves the whole trace on one device. The same inputs give the same report.
///
/// # Errors
/// If the engine fails, which would be a defect.
pub fn serve_trace(trace: &[TraceRequest], config: &ServeConfig) -> Result<ServeReport, ExecError> {
    serve_fleet(trace, config, 1)
}

/// Serves it on several devices that take requests in turn, as behind a load balancer that knows nothing of them.
///
/// # Errors
/// As [`serve_trace`].
pub fn serve_fleet(
    trace: &[TraceRequest],
    config: &ServeConfig,
    num_devices: usize,
) -> Result<ServeReport, ExecError> {
    let (mut report, mut all, mut end) = (ServeReport::default(), Vec::new(), Micros(0));
    let last_arrival = trace.last().map_or(0, |last| scaled(last, config.rate_scale));
    for device in 0..num_devices {
        let part: Vec<TraceRequest> = trace.iter().skip(device).step_by(num_devices).cloned().collect();
        let served = serve(&part, config, last_arrival)?;
        report.gaps.merge(&served.gaps);
        report.num_preemptions += served.stats.num_preemptions;
        report.kv.add(&served.stats, served.num_computed_tokens);
        end = end.max(served.end);
        report.fairness.merge(served.fairness);
        report.waits.merge(&served.waits);
        all.extend(served.requests);
    }
    report.fill(&all, last_arrival, end);
    Ok(report)
}

/// What one device did.
struct Outcome {
    requests: Vec<Served>,
    gaps: Gaps,
    stats: SchedulerStats,
    num_computed_tokens: u64,
    fairness: Fairness,
    waits: Waits,
    end: Micros,
}

fn serve(trace: &[TraceRequest], config: &ServeConfig, last_arrival: u64) -> Result<Outcome, ExecError> {
    let clock = Arc::new(AtomicU64::new(0));
    let limits = config.limits();
    let mut scheduler = SchedulerConfig::new(limits.clone(), BlockHasher::new((0, 0), BLOCK_SIZE));
    scheduler.policy = config.policy;
    scheduler.eviction = config.eviction;
    scheduler.host_tier = config.host_tier;
    scheduler.fairness = config.fairness;
    scheduler.max_queued_requests = trace.len() as u32 + 1;
    let executor = VirtualExecutor {
        limits,
        cost: config.host_tier.map_or(config.calibration.cost(), |host| host.cost),
        clock: Arc::clone(&clock),
        output_tokens: trace.iter().map(|request| request.output_tokens.min(MAX_TOKENS)).collect(),
        slots: vec![0; config.max_num_seqs as usize],
        in_flight: VecDeque::new(),
        spare: Vec::new(),
    };
    let mut core = EngineCore::new(scheduler, Box::new(executor));
    let mut clients = Clients::new(trace, config, last_arrival);
    let mut num_computed_tokens = 0;
    let now = || Micros(clock.load(Ordering::Relaxed));
    loop {
        clients.send(now(), &mut core);
        if core.has_work() {
            let outcome = core.step_with(now)?;
            clients.take(now(), core.events());
            clients.account(now(), core.notes());
            let stats = &core.step_stats().scheduler;
            num_computed_tokens += u64::from(stats.prefill_tokens + stats.decode_tokens);
            if outcome.submitted.is_some() || outcome.collected.is_some() {
                continue;
            }
            // Waiting requests that only time can help.
            let next = clients.next_arrival().unwrap_or(u64::MAX);
            clock.store(next.min(now().0 + IDLE), Ordering::Relaxed);
        } else if let Some(next) = clients.next_arrival() {
            clock.store(next.max(now().0), Ordering::Relaxed);
        } else {
            break;
        }
    }
    let (stats, end) = (core.stats(), now());
    let Clients { served, gaps, accounts, waits, .. } = clients;
    Ok(Outcome {
        requests: served,
        gaps,
        stats,
        num_computed_tokens,
        fairness: accounts.finish(),
        waits,
        end,
    })
}

/// When a request arrives, in microseconds.
fn scaled(request: &TraceRequest, rate_scale: f64) -> u64 {
    (request.arrival.0 as f64 / rate_scale) as u64
}

/// Sends what the trace says and notes what comes back.
struct Clients<'a> {
    trace: &'a [TraceRequest],
    config: &'a ServeConfig,
    num_sent: usize,
    served: Vec<Served>,
    params: Arc<SamplingParams>,
    gaps: Gaps,
    accounts: Accounts,
    waits: Waits,
}

impl<'a> Clients<'a> {
    fn new(trace: &'a [TraceRequest], config: &'a ServeConfig, last_arrival: u64) -> Self {
        let params = SamplingParams { stop_token_ids: vec![STOP], ..SamplingParams::greedy(MAX_TOKENS) };
        Self {
            trace,
            config,
            num_sent: 0,
            served: Vec::with_capacity(trace.len()),
            params: Arc::new(params),
            gaps: Gaps::default(),
            accounts: Accounts::new(
                config.num_tenants.clamp(1, MAX_TENANTS),
                (last_arrival / NUM_SAMPLES).max(MIN_PERIOD),
            ),
            waits: Waits::default(),
        }
    }

    fn next_arrival(&self) -> Option<u64> {
        self.trace.get(self.num_sent).map(|request| scaled(request, self.config.rate_scale))
    }

    fn send(&mut self, now: Micros, core: &mut EngineCore) {
        while let Some(arrival) = self.next_arrival().filter(|&arrival| arrival <= now.0) {
            let at = self.num_sent;
            let recorded = &self.trace[at];
            let request = Request {
                id: RequestId(at as u64),
                prompt: vec![0; recorded.input_tokens as usize].into(),
                block_hashes: addresses(recorded),
                salt: CacheSalt(0),
                adapter: None,
                params: Arc::clone(&self.params),
                tenant: self.config.tenant(at as u64),
                priority: 0,
                arrival: Micros(arrival),
                deadline: None,
            };
            let alone = StepShape::default().with_row(0, recorded.input_tokens);
            let targets = &self.config.targets;
            let due = targets.cost.predict(&alone) * targets.ttft_stretch;
            let due = Micros(arrival + targets.ttft.0.max(due as u64));
            let tenant = request.tenant.0;
            self.served.push(Served::new(tenant, recorded.input_tokens, Micros(arrival), due));
            if core.add(request).is_ok() {
                self.accounts.sent(tenant);
                self.served[at].waits = Some((WaitCause::Step, Micros(arrival)));
            } else {
                self.served[at].refuse(now);
            }
            self.num_sent += 1;
        }
    }

    fn take(&mut self, now: Micros, events: &[SeqEvent]) {
        for event in events {
            let served = &mut self.served[event.request.0 as usize];
            if matches!(event.kind, SeqEventKind::Finished { .. }) {
                self.waits.change(&mut served.waits, now, None);
            }
            match &event.kind {
                SeqEventKind::Started { .. } => {
                    served.started = true;
                    self.accounts.waits_no_more(served.tenant);
                }
                SeqEventKind::Tokens { .. } => {
                    self.accounts.token(served.tenant);
                    if let Some(gap) = served.token(now, self.config.targets.itl) {
                        self.gaps.add(gap);
                    }
                }
                SeqEventKind::Finished {
                    reason: FinishReason::Stop | FinishReason::Length, usage, ..
                } => {
                    let computed = usage.prompt_tokens - usage.cached_tokens;
                    self.accounts.ended(computed, usage.generated_tokens);
                    served.finish(usage);
                }
                SeqEventKind::Finished { .. } => {
                    if !served.started {
                        self.accounts.waits_no_more(served.tenant);
                    }
                    served.refuse(now);
                }
                SeqEventKind::PromptLogprobs { .. } => {}
            }
        }
    }

    /// Counts the prompt tokens that the step computed, those of a second time left out.
    fn account(&mut self, now: Micros, notes: &[SeqNote]) {
        for note in notes {
            let served = &mut self.served[note.request.0 as usize];
            let waits = match note.kind {
                NoteKind::Waits(cause) | NoteKind::Preempted(cause) => Some(Some(cause)),
                NoteKind::Entered { .. } => Some(None),
                _ => None,
            };
            if let Some(cause) = waits {
                self.waits.change(&mut served.waits, note.at, cause);
            }
            let fresh = match note.kind {
                NoteKind::Chunk { num_tokens } => served.computed(num_tokens),
                NoteKind::Entered { cached_tokens } => served.found(cached_tokens),
                _ => continue,
            };
            self.accounts.computed(served.tenant, fresh);
        }
        self.accounts.step(now.0);
    }
}

/// Addresses of the engine's blocks, made from the trace's larger ones; none if the trace has none.
fn addresses(request: &TraceRequest) -> Arc<[BlockHash]> {
    const PARTS: u64 = (TRACE_BLOCK_SIZE / BLOCK_SIZE) as u64;
    if request.blocks.is_empty() {
        return Arc::from([]);
    }
    let num_full = request.input_tokens / BLOCK_SIZE;
    let part = |at: u64| request.blocks[(at / PARTS) as usize].wrapping_mul(PARTS) + at % PARTS;
    (0..u64::from(num_full)).map(|at| address(part(at))).collect()
}

/// Computes nothing, in the time that the cost model says.
struct VirtualExecutor {
    limits: ExecutorLimits,
    cost: CostModel,
    clock: Arc<AtomicU64>,
    /// Per request.
    output_tokens: Vec<u32>,
    /// Per slot: the position after which the answer ends.
    slots: Vec<u32>,
    in_flight: VecDeque<(u64, ModelRunnerOutput)>,
    spare: Vec<ModelRunnerOutput>,
}

impl Executor for VirtualExecutor {
    fn limits(&self) -> ExecutorLimits {
        self.limits.clone()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        for new in &plan.new {
            let output_tokens = self.output_tokens[new.request.0 as usize];
            self.slots[new.slot.0 as usize] = new.prompt_len + output_tokens - 1;
        }
        let mut output = self.spare.pop().unwrap_or_default();
        output.clear();
        output.step = plan.step;
        let num_copied_blocks = (plan.copies_to_host.len() + plan.copies_to_device.len()) as u32;
        let mut shape = StepShape { num_copied_blocks, ..StepShape::default() };
        for row in &plan.scheduled {
            shape.add_row(row.num_computed_tokens, row.num_new_tokens);
            if row.sample {
                let end = row.num_computed_tokens + row.num_new_tokens;
                let last = self.slots[row.slot.0 as usize];
                output.push_row(row.slot, &[if end >= last { STOP } else { 0 }], []);
            }
        }
        let start =
            self.in_flight.back().map_or(0, |&(done, _)| done).max(self.clock.load(Ordering::Relaxed));
        self.in_flight.push_back((start + self.cost.predict(&shape) as u64, output));
        Ok(plan.step)
    }

    fn sample(&mut self, _: StepId, _: &LateInputs) -> Result<(), ExecError> {
        Ok(())
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        let Some((done, mut output)) = self.in_flight.pop_front().filter(|(_, out)| out.step == step) else {
            let message = format!("step {step} is not the oldest in flight");
            return Err(ExecError { device: "virtual".into(), message });
        };
        self.clock.fetch_max(done, Ordering::Relaxed);
        std::mem::swap(out, &mut output);
        self.spare.push(output);
        Ok(())
    }
}
