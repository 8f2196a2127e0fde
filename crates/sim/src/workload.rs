//! What a seed means: a configuration and a list of things that clients do at points in virtual time.

use std::collections::VecDeque;
use std::sync::Arc;

use quire_core::{
    BlockHasher, CacheSalt, ExecutorLimits, FinishReason, Micros, Request, RequestId, SamplingParams,
    TenantId, TenantShare, TokenId,
};
use quire_scheduler::{FairnessConfig, HostTierConfig, LatencyTargets, Policy, SchedulerConfig};

use crate::executor::CostModel;
use crate::rng::{Rng, mix};

/// Something a client does.
#[derive(Debug)]
pub(crate) enum Action {
    /// Sends a request; `turns` more follow in the same conversation, each after the answer to the one before.
    Send { request: Request, turns: u32 },
    /// Ends a request or one continuation of it.
    Finish { id: RequestId, index: Option<u32>, reason: FinishReason },
}

/// The configuration and the clients of one run.
#[derive(Debug)]
pub(crate) struct Workload {
    pub(crate) config: SchedulerConfig,
    pub(crate) cost: CostModel,
    pub(crate) tenants: Vec<TenantShare>,
    /// Ascending in time.
    pub(crate) actions: VecDeque<(u64, Action)>,
    rng: Rng,
    next_id: u64,
    /// Prompts and outputs are at most this long together.
    max_request_tokens: u32,
    /// Beginnings that several prompts share.
    prefixes: Vec<Vec<TokenId>>,
    salts: Vec<CacheSalt>,
    /// Whose request is next.
    tenant_rng: Rng,
    features: Features,
}

/// Which kinds of trouble this seed makes.
#[derive(Clone, Copy, Debug)]
struct Features {
    aborts: bool,
    deadlines: bool,
    priorities: bool,
    continuations: bool,
    stops: bool,
    prompt_logprobs: bool,
    turns: bool,
    uncached_requests: bool,
}

impl Features {
    fn random(rng: &mut Rng) -> Self {
        let mut flip = || rng.one_in(2);
        Self {
            aborts: flip(),
            deadlines: flip(),
            priorities: flip(),
            continuations: flip(),
            stops: flip(),
            prompt_logprobs: flip(),
            turns: flip(),
            uncached_requests: flip(),
        }
    }
}

impl Workload {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let max_request_tokens = rng.range(4, 120);
        let mut config = random_config(&mut rng, max_request_tokens);
        // A stream of its own, so that what older seeds mean did not change when tenants came.
        let mut tenant_rng = Rng::new(mix(seed));
        let tenants = random_tenants(&mut tenant_rng);
        let mut cost = CostModel {
            fixed: 50,
            per_token: u64::from(rng.range(0, 20)),
            per_seq: u64::from(rng.range(0, 10)),
            per_host_copy: 0,
        };
        config.fairness = random_fairness(&mut tenant_rng);
        config.policy = random_policy(&mut tenant_rng, cost);
        // Again one of its own.
        let mut host_rng = Rng::new(mix(!seed));
        if !host_rng.one_in(3) {
            cost.per_host_copy = *host_rng.pick(&[0_u64, 1, 1, 5, 100]);
            config.host_tier = Some(random_host_tier(&mut host_rng, &config.limits, cost));
        }
        let vocab_size = config.limits.vocab_size;
        let prefixes =
            (0..rng.range(1, 3)).map(|_| random_tokens(&mut rng, max_request_tokens, vocab_size)).collect();
        let salts = (0..rng.range(1, 3)).map(|n| config.hasher.salt(&n.to_le_bytes())).collect();
        let features = Features::random(&mut rng);
        let mut workload = Self {
            config,
            cost,
            tenants,
            actions: VecDeque::new(),
            rng,
            next_id: 1,
            max_request_tokens,
            prefixes,
            salts,
            tenant_rng,
            features,
        };
        workload.fill();
        workload
    }

    fn fill(&mut self) {
        let num_requests = self.rng.range(5, 40);
        // From everything at once to mostly idle.
        let mean_gap = *self.rng.pick(&[0, 50, 400, 3000]);
        let mut at = 0;
        let mut actions = Vec::new();
        for _ in 0..num_requests {
            if !self.rng.one_in(3) {
                at += u64::from(self.rng.range(0, 2 * mean_gap));
            }
            let turns = if self.features.turns && self.rng.one_in(3) { self.rng.range(1, 3) } else { 0 };
            let prompt = self.random_prompt();
            let salt = *self.rng.pick(&self.salts);
            let request = self.request(prompt, salt, at);
            if self.features.aborts && self.rng.one_in(4) {
                actions.push((at + u64::from(self.rng.range(0, 5000)), self.finish_of(&request)));
            }
            actions.push((at, Action::Send { request, turns }));
        }
        // Stable, so that a request is sent before it is aborted at the same time only if it was pushed so.
        actions.sort_by_key(|&(at, _)| at);
        self.actions = actions.into();
    }

    fn finish_of(&mut self, request: &Request) -> Action {
        let index = if self.rng.one_in(2) { None } else { Some(self.rng.range(0, request.params.n - 1)) };
        let reason = if self.rng.one_in(2) { FinishReason::Abort } else { FinishReason::Stop };
        Action::Finish { id: request.id, index, reason }
    }

    /// The next turn of a conversation: all that was said, and a little more. `None` when the context is full.
    pub(crate) fn next_turn(&mut self, before: &Request, output: &[TokenId], at: u64) -> Option<Request> {
        let mut prompt = [&before.prompt[..], output].concat();
        prompt.extend(random_tokens(&mut self.rng, 6, self.config.limits.vocab_size));
        (prompt.len() < self.max_request_tokens as usize).then(|| self.request(prompt, before.salt, at))
    }

    pub(crate) fn push(&mut self, at: u64, action: Action) {
        let index = self.actions.partition_point(|&(other, _)| other <= at);
        self.actions.insert(index, (at, action));
    }

    fn random_prompt(&mut self) -> Vec<TokenId> {
        // Short prompts with long outputs are what fills a pool behind the scheduler's back.
        let longest =
            if self.rng.one_in(2) { self.max_request_tokens - 1 } else { self.max_request_tokens / 4 };
        let len = self.rng.range(1, longest) as usize;
        let mut prompt = Vec::new();
        if !self.rng.one_in(3) {
            let prefix = self.rng.pick(&self.prefixes).clone();
            let shared = self.rng.range(0, prefix.len() as u32) as usize;
            prompt.extend_from_slice(&prefix[..shared]);
        }
        while prompt.len() < len {
            prompt.push(self.rng.range(0, self.config.limits.vocab_size - 1));
        }
        prompt.truncate(len);
        prompt
    }

    fn request(&mut self, prompt: Vec<TokenId>, salt: CacheSalt, at: u64) -> Request {
        let (features, rng) = (self.features, &mut self.rng);
        let room = self.max_request_tokens - prompt.len() as u32;
        let max_tokens = if rng.one_in(8) { 1 } else { rng.range(1, room) };
        let stops = if features.stops && rng.one_in(2) { rng.range(1, 4) } else { 0 };
        let vocab_size = self.config.limits.vocab_size;
        let many = features.continuations && rng.one_in(3);
        let params = SamplingParams {
            seed: rng.next(),
            n: if many { rng.range(1, self.config.limits.max_num_seqs.min(5)) } else { 1 },
            max_tokens,
            min_tokens: rng.range(0, max_tokens.min(3)),
            stop_token_ids: (0..stops).map(|_| rng.range(0, vocab_size - 1)).collect(),
            prompt_logprobs: (features.prompt_logprobs && rng.one_in(4)).then_some(0),
            logprobs: rng.one_in(4).then_some(0),
            ..SamplingParams::default()
        };
        let uncached = features.uncached_requests && rng.one_in(4);
        let block_hashes = if uncached { Vec::new() } else { self.config.hasher.chain(salt, &prompt) };
        let priority = if features.priorities { rng.range(0, 2) as i8 - 1 } else { 0 };
        let deadline = features.deadlines && rng.one_in(4);
        let deadline = deadline.then(|| Micros(at + u64::from(rng.range(0, 8000))));
        let id = RequestId(self.next_id);
        self.next_id += 1;
        Request {
            id,
            prompt: prompt.into(),
            block_hashes: block_hashes.into(),
            salt,
            adapter: None,
            params: Arc::new(params),
            tenant: TenantId(self.tenant_rng.range(0, self.tenants.len() as u32 - 1)),
            priority,
            arrival: Micros(at),
            deadline,
        }
    }
}

fn random_tokens(rng: &mut Rng, max_len: u32, vocab_size: u32) -> Vec<TokenId> {
    (0..rng.range(1, max_len)).map(|_| rng.range(0, vocab_size - 1)).collect()
}

fn random_config(rng: &mut Rng, max_request_tokens: u32) -> SchedulerConfig {
    let block_size = *rng.pick(&[1, 2, 3, 4, 4, 8, 16, 32, 64]);
    let window = rng.one_in(3).then(|| rng.range(1, 40));
    // The largest request alone just fits, or a little more, or much more.
    let least = max_request_tokens.div_ceil(block_size);
    let num_blocks = match rng.range(0, 3) {
        0 => least,
        1 => least + rng.range(0, 4),
        2 => least + rng.range(0, 2 * least),
        _ => 8 * least + 64,
    };
    let limits = ExecutorLimits {
        block_size,
        num_blocks,
        max_num_seqs: *rng.pick(&[1, 2, 3, 5, 8, 16]),
        max_num_batched_tokens: *rng.pick(&[1, 2, 5, 16, 32, 64, 200]),
        max_model_len: max_request_tokens,
        vocab_size: *rng.pick(&[4, 20, 200, 50_000]),
        max_steps_in_flight: rng.range(1, 2),
        kv_groups: vec![window],
    };
    let mut config = SchedulerConfig::new(limits, BlockHasher::new((rng.next(), rng.next()), block_size));
    config.enable_prefix_caching = !rng.one_in(4);
    config.max_prefill_chunk = *rng.pick(&[1, 3, 8, 32, u32::MAX, u32::MAX]);
    config.max_queued_requests = *rng.pick(&[3, 10, 1000, 1000]);
    config
}

fn random_tenants(rng: &mut Rng) -> Vec<TenantShare> {
    let num_tenants = if rng.one_in(2) { 1 } else { rng.range(2, 6) };
    let capped = rng.one_in(2);
    let share = |_| TenantShare {
        weight: *rng.pick(&[0.25, 1.0, 1.0, 3.0]),
        kv_blocks_share: if capped { *rng.pick(&[0.01, 0.3, 0.6, 1.0]) } else { 1.0 },
    };
    (0..num_tenants).map(share).collect()
}

fn random_fairness(rng: &mut Rng) -> FairnessConfig {
    FairnessConfig {
        quantum: *rng.pick(&[0.0, 0.25, 2.0, 100.0]),
        max_queue_age: *rng.pick(&[300, 5000, 30_000_000, 30_000_000]),
        ..FairnessConfig::default()
    }
}

/// What the scheduler is told that steps cost; it may be far off.
fn random_guess(rng: &mut Rng, cost: CostModel) -> quire_scheduler::CostModel {
    let wrong = *rng.pick(&[1.0, 1.0, 0.1, 10.0]);
    quire_scheduler::CostModel {
        fixed: wrong * cost.fixed as f64,
        per_row: wrong * cost.per_seq as f64,
        weights: 0.0,
        per_token: wrong * cost.per_token as f64,
        per_context_token: 0.0,
        per_attention: 0.0,
        per_copied_block: cost.per_host_copy as f64,
    }
}

/// From room for one block to room for everything.
fn random_host_tier(rng: &mut Rng, limits: &ExecutorLimits, cost: CostModel) -> HostTierConfig {
    let num_blocks = *rng.pick(&[1, 2, 5, limits.num_blocks / 2 + 1, 4 * limits.num_blocks]);
    HostTierConfig { num_blocks, block_bytes: 1, cost: random_guess(rng, cost) }
}

/// Latency targets in a third of the runs.
fn random_policy(rng: &mut Rng, cost: CostModel) -> Policy {
    if !rng.one_in(3) {
        return Policy::Fcfs;
    }
    let model = random_guess(rng, cost);
    Policy::DeadlineSlack(LatencyTargets {
        ttft: Micros(u64::from(rng.range(500, 20_000))),
        itl: Micros(u64::from(rng.range(60, 1000))),
        max_wait: Micros(u64::from(rng.range(2000, 100_000))),
        ..LatencyTargets::new(model)
    })
}
