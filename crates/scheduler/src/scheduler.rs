//! The scheduler's parts, and how requests enter.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use quire_core::{
    BlockHash, BlockHasher, BlockId, ExecutorLimits, Micros, Request, RequestError, RequestId, Slot, StepId,
    TenantShare, TokenId, Usage,
};

use crate::cost::{OnlineCostModel, StepShape};
use crate::event::SeqEvent;
use crate::eviction::EvictionPolicy;
use crate::explain::Notes;
use crate::fair::{FairShare, FairnessConfig};
use crate::host_tier::{HostTierConfig, PromptCosts};
use crate::kv_cache::{BlockTable, KvCacheManager};
use crate::note::WaitCause;
use crate::pacing::{Due, Pacing};
use crate::policy::{OrderKey, Policy};
use crate::sequence::{SeqIndex, SeqState, SequenceData};
use crate::sequence_table::SequenceTable;
use crate::stats::{HostStats, SchedulerStats};
use crate::waiting::WaitingQueue;

/// The entry of [`RequestEntry::seqs`] of a continuation that ended.
pub(crate) const ENDED: SeqIndex = SeqIndex::MAX;

/// What a scheduler works with, fixed at start.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// What the executor offers.
    pub limits: ExecutorLimits,
    /// Addresses of blocks; the same key as the one that computed `Request::block_hashes`.
    pub hasher: BlockHasher,
    /// Whether computed blocks are kept and found again.
    pub enable_prefix_caching: bool,
    /// Which of the kept blocks go first when room is needed.
    pub eviction: EvictionPolicy,
    /// Tokens of one sequence in one step at most; `u32::MAX` leaves only the step's own budget.
    pub max_prefill_chunk: u32,
    /// Requests that may wait for their first place; more are refused.
    pub max_queued_requests: u32,
    /// How service is shared between tenants.
    pub fairness: FairnessConfig,
    /// The order among requests of one tenant.
    pub policy: Policy,
    /// A second pool of blocks in host memory, if the executor has one.
    pub host_tier: Option<HostTierConfig>,
}

impl SchedulerConfig {
    /// Prefix caching on, chunks bounded by the step's budget alone, 1024 queued requests.
    pub fn new(limits: ExecutorLimits, hasher: BlockHasher) -> Self {
        Self {
            limits,
            hasher,
            enable_prefix_caching: true,
            eviction: EvictionPolicy::default(),
            max_prefill_chunk: u32::MAX,
            max_queued_requests: 1024,
            fairness: FairnessConfig::default(),
            policy: Policy::Fcfs,
            host_tier: None,
        }
    }
}

/// A request with its continuations.
#[derive(Debug)]
pub(crate) struct RequestEntry {
    pub(crate) request: Request,
    /// Continuation to sequence, or [`ENDED`].
    pub(crate) seqs: Vec<SeqIndex>,
    pub(crate) num_live: u32,
    /// Whether any continuation ever entered the batch.
    pub(crate) started: bool,
    /// When its first token is due, where there are latency targets.
    pub(crate) due: Option<Due>,
}

/// One row of a step in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InFlightRow {
    pub(crate) seq: SeqIndex,
    pub(crate) identity: u32,
    /// `num_computed_tokens` after the row.
    pub(crate) end: u32,
    pub(crate) slot: Slot,
    pub(crate) epoch: u8,
    pub(crate) sample: bool,
    pub(crate) prompt_logprobs: bool,
}

/// A step that was scheduled and not yet collected.
#[derive(Debug, Default)]
pub(crate) struct InFlightStep {
    pub(crate) step: StepId,
    pub(crate) planned: Micros,
    pub(crate) shape: StepShape,
    pub(crate) rows: Vec<InFlightRow>,
}

/// The state machine. See the crate's page.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) kv: KvCacheManager,
    pub(crate) seqs: SequenceTable,
    /// Slab of requests; `vacant_requests` lists its holes.
    pub(crate) requests: Vec<Option<RequestEntry>>,
    pub(crate) vacant_requests: Vec<u32>,
    pub(crate) by_id: BTreeMap<RequestId, u32>,
    pub(crate) deadlines: BTreeSet<(Micros, RequestId)>,
    /// Requests that never entered the batch.
    pub(crate) num_queued: u32,
    pub(crate) waiting: WaitingQueue,
    pub(crate) fair: FairShare,
    /// Sequences that must leave the batch for somebody who was served far less.
    pub(crate) num_owed_places: u32,
    /// The first that waited when the last step had no room for it.
    pub(crate) blocked: Option<OrderKey>,
    pub(crate) num_followers: u32,
    /// Waiting sequences that hold blocks of their leader.
    pub(crate) num_parked: u32,
    /// The batch in policy order; may hold sequences that ended since `schedule` last looked.
    pub(crate) running: Vec<SeqIndex>,
    pub(crate) num_running: u32,
    pub(crate) num_prefilling: u32,
    /// Tokens computed of all sequences that decode.
    pub(crate) decode_context: u64,
    pub(crate) pacing: Option<Pacing>,
    /// What steps take, where there is a host tier and no pacing that would know.
    pub(crate) step_model: Option<Box<OnlineCostModel>>,
    /// What prompts take, where there is a host tier.
    pub(crate) prompt_costs: PromptCosts,
    /// When the previous step was collected, for that model.
    pub(crate) last_collected: Micros,
    pub(crate) free_slots: Vec<Slot>,
    /// Slots that left the batch and that the executor has not been told about.
    pub(crate) freed_slots: Vec<Slot>,
    pub(crate) in_flight: VecDeque<InFlightStep>,
    pub(crate) spare_steps: Vec<InFlightStep>,
    pub(crate) next_step: StepId,
    /// Sources of this step's block copies, released once the step counts as in flight.
    pub(crate) copy_sources: Vec<BlockId>,
    /// Sequences of the batch whose prompts this step has put off until the decodes have their rows.
    pub(crate) prompts: Vec<SeqIndex>,
    /// Events of `finish`, delivered by the next `schedule` or `update`.
    pub(crate) ended: Vec<SeqEvent>,
    pub(crate) now: Micros,
    pub(crate) stats: SchedulerStats,
    pub(crate) notes: Notes,
    /// Full blocks whose addresses are known and not yet in the prefix cache.
    pub(crate) to_publish: Vec<(BlockHash, BlockId)>,
    /// Tokens of one block, for hashing.
    pub(crate) block_tokens: Vec<TokenId>,
}

impl Scheduler {
    /// A scheduler with an empty pool.
    ///
    /// # Panics
    /// If the limits are not usable: no block, slot, budget, context or step in flight, several KV groups, or a hasher
    /// with another block size.
    pub fn new(config: SchedulerConfig) -> Self {
        let limits = &config.limits;
        assert!(limits.num_blocks > 0 && limits.block_size > 0, "the KV pool is empty: {limits:?}");
        assert!(
            limits.max_num_seqs > 0 && limits.max_num_batched_tokens > 0,
            "no room in a step: {limits:?}"
        );
        assert!(limits.max_model_len > 1 && config.max_prefill_chunk > 0, "no room for a token: {limits:?}");
        assert!(limits.max_steps_in_flight > 0, "no step may be in flight: {limits:?}");
        assert!(limits.kv_groups.len() == 1, "exactly one KV group is supported: {limits:?}");
        assert!(limits.kv_groups[0] != Some(0), "a sliding window of 0 sees nothing: {limits:?}");
        assert_eq!(config.hasher.block_size(), limits.block_size, "the hasher has another block size");
        let slots = limits.max_num_seqs as usize;
        Self {
            kv: KvCacheManager::new(&config),
            seqs: SequenceTable::with_capacity(slots + config.max_queued_requests as usize),
            requests: Vec::new(),
            vacant_requests: Vec::new(),
            by_id: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            num_queued: 0,
            waiting: WaitingQueue::default(),
            num_owed_places: 0,
            blocked: None,
            fair: FairShare::new(config.fairness, limits.num_blocks),
            num_followers: 0,
            num_parked: 0,
            running: Vec::with_capacity(slots),
            num_running: 0,
            num_prefilling: 0,
            decode_context: 0,
            pacing: match config.policy {
                Policy::Fcfs => None,
                Policy::DeadlineSlack(mut targets) => {
                    if let Some(host) = &config.host_tier {
                        targets.cost.per_copied_block = host.cost.per_copied_block;
                    }
                    Some(Pacing::new(targets))
                }
            },
            step_model: match (config.host_tier, config.policy) {
                (Some(host), Policy::Fcfs) => Some(Box::new(OnlineCostModel::new(host.cost))),
                _ => None,
            },
            prompt_costs: PromptCosts::default(),
            last_collected: Micros(0),
            free_slots: (0..limits.max_num_seqs).rev().map(Slot).collect(),
            freed_slots: Vec::with_capacity(slots),
            in_flight: VecDeque::with_capacity(limits.max_steps_in_flight as usize),
            spare_steps: (0..limits.max_steps_in_flight)
                .map(|_| InFlightStep { rows: Vec::with_capacity(slots), ..InFlightStep::default() })
                .collect(),
            next_step: StepId(1),
            copy_sources: Vec::new(),
            prompts: Vec::new(),
            ended: Vec::new(),
            now: Micros(0),
            stats: SchedulerStats::default(),
            notes: Notes::default(),
            to_publish: Vec::with_capacity(slots),
            block_tokens: Vec::with_capacity(limits.block_size as usize),
            config,
        }
    }

    /// What the executor offers.
    pub fn limits(&self) -> &ExecutorLimits {
        &self.config.limits
    }

    /// Accepts a request; its events come from `schedule` and `update`.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`] if the queue is full, [`RequestError::TooLong`] if it could not run even alone,
    /// [`RequestError::Invalid`] where `Request::validate` would have said so, or for an id already in use.
    pub fn add(&mut self, request: Request) -> Result<(), RequestError> {
        self.check_request(&request)?;
        let due = self.check_latency(&request)?;
        if self.kv.host().is_some() {
            self.learn_prompt_cost(request.prompt.len() as u32);
        }
        let n = request.params.n;
        let entry = match self.vacant_requests.pop() {
            Some(entry) => entry,
            None => {
                self.requests.push(None);
                self.requests.len() as u32 - 1
            }
        };
        let seqs: Vec<SeqIndex> = {
            let due = due.map_or(request.arrival, |due| due.place.due);
            (0..n).map(|index| self.insert_sequence(&request, entry, index, due)).collect()
        };
        self.enqueue(seqs[0]);
        self.num_followers += n - 1;
        if let Some(deadline) = request.deadline {
            self.deadlines.insert((deadline, request.id));
        }
        if let (Some(pacing), Some(due)) = (&mut self.pacing, &due) {
            pacing.enqueue(request.id, due);
            pacing.promised(due, self.now.max(request.arrival));
        }
        self.by_id.insert(request.id, entry);
        self.requests[entry as usize] =
            Some(RequestEntry { request, seqs, num_live: n, started: false, due });
        self.num_queued += 1;
        Ok(())
    }

    /// Sets the shares of all tenants, from now on; what they were served so far stays on their account.
    pub fn set_tenants(&mut self, shares: &[TenantShare]) {
        self.fair.set_shares(shares);
    }

    /// Puts a sequence into the waiting queue.
    pub(crate) fn enqueue(&mut self, seq: SeqIndex) {
        let key = self.seqs.data(seq).key;
        let fresh = self.seqs.data(seq).usage.num_preemptions == 0;
        self.waiting.insert(key, seq, fresh, &mut self.fair);
        self.waiting.note_shared(&key, self.num_shared_blocks(seq));
        self.ask_why(seq);
    }

    /// With how many of its prompt's blocks the next one of its tenant begins, too.
    pub(crate) fn num_shared_blocks(&self, seq: SeqIndex) -> u32 {
        let data = self.seqs.data(seq);
        let next = self.waiting.head_of(&data.key).filter(|&next| next != seq);
        let Some(next) = next else { return 0 };
        let next = self.seqs.data(next).prompt_hashes.iter();
        data.prompt_hashes.iter().zip(next).take_while(|(mine, theirs)| mine == theirs).count() as u32
    }

    /// Whether any request lives, any step is in flight, or any event waits for delivery.
    pub fn has_work(&self) -> bool {
        !self.by_id.is_empty() || !self.in_flight.is_empty() || !self.ended.is_empty()
    }

    /// Tokens of a prompt with these block addresses that are in the prefix cache now, in whole blocks.
    pub fn cached_prefix(&mut self, hashes: &[BlockHash]) -> u32 {
        let hit = self.kv.lookup(hashes.iter().copied(), u32::MAX);
        hit.num_blocks * self.config.limits.block_size
    }

    /// Numbers for metrics and for admission outside.
    pub fn stats(&self) -> SchedulerStats {
        let pool = self.kv.pool();
        SchedulerStats {
            running: self.num_running,
            waiting: self.waiting.len() as u32 + self.num_followers,
            lowest_waiting: self.waiting.lowest_priority(),
            kv_blocks_total: pool.len(),
            kv_blocks_free: pool.num_free(),
            kv_blocks_cached: pool.num_idle(),
            kv_blocks_used: pool.num_referenced(),
            kv_blocks_quarantined: pool.num_quarantined(),
            kv_usage: f64::from(pool.num_referenced()) / f64::from(pool.len()),
            num_evictions: self.kv.num_evictions(),
            host: self.kv.host().map_or(HostStats::default(), |host| host.stats(self.stats.host)),
            step_time_error_p90: self.pacing.as_ref().map_or(0.0, |pacing| pacing.model().error_p90()),
            ..self.stats
        }
    }

    fn check_request(&self, request: &Request) -> Result<(), RequestError> {
        let (limits, params) = (&self.config.limits, &request.params);
        let prompt_tokens = request.prompt.len() as u64;
        if prompt_tokens == 0 {
            return Err(RequestError::invalid("prompt", "must hold at least one token"));
        }
        if params.n == 0 || params.n > limits.max_num_seqs {
            let message = format!("must be between 1 and {}, got {}", limits.max_num_seqs, params.n);
            return Err(RequestError::invalid("n", message));
        }
        if params.max_tokens == 0 {
            return Err(RequestError::invalid("max_tokens", "must be at least 1"));
        }
        let full_blocks = prompt_tokens / u64::from(limits.block_size);
        if !request.block_hashes.is_empty() && request.block_hashes.len() as u64 != full_blocks {
            let message = format!("{} hashes for {full_blocks} full blocks", request.block_hashes.len());
            return Err(RequestError::invalid("block_hashes", message));
        }
        let needed = prompt_tokens + u64::from(params.max_tokens);
        let too_long = |max_model_len| RequestError::TooLong { prompt_tokens, needed, max_model_len };
        if needed > u64::from(limits.max_model_len) {
            return Err(too_long(limits.max_model_len));
        }
        // The last token is never an input, so its KV needs no place.
        if self.kv.peak_blocks(needed as u32 - 1) > limits.num_blocks {
            return Err(too_long(
                limits.max_model_len.min(limits.num_blocks.saturating_mul(limits.block_size)),
            ));
        }
        if self.by_id.contains_key(&request.id) {
            return Err(RequestError::invalid("id", format!("request {} is already running", request.id)));
        }
        if self.num_queued >= self.config.max_queued_requests {
            return Err(RequestError::Overloaded {
                queued: self.num_queued,
                limit: self.config.max_queued_requests,
                retry_after: Duration::from_secs(1),
            });
        }
        Ok(())
    }

    /// When the request is due. Under latency targets, one that cannot be served in time is refused.
    fn check_latency(&mut self, request: &Request) -> Result<Option<Due>, RequestError> {
        let decodes = self.decode_shape();
        let Some(pacing) = &mut self.pacing else { return Ok(None) };
        let tenant = self.fair.register(request.tenant);
        let hashes = request.block_hashes.iter().copied();
        let hit = self.kv.lookup(hashes, request.prompt.len() as u32 - 1);
        let due = pacing.due(request, tenant, hit.num_blocks * self.config.limits.block_size);
        pacing.arrived(&due);
        // The clock of the latest step; a request may have come in since.
        let now = self.now.max(request.arrival);
        if due.start_by < now {
            return Err(RequestError::DeadlineExceeded);
        }
        let fair = &self.fair;
        let late = pacing.lateness(&due, now, &decodes, &|other| fair.relative_share(other, tenant));
        if late > 0.0 {
            let retry_after = Duration::from_secs_f64((late / 1e6).clamp(1.0, 60.0));
            return Err(RequestError::Late { retry_after });
        }
        Ok(Some(due))
    }

    /// What the decodes of the next step are.
    pub(crate) fn decode_shape(&self) -> StepShape {
        let num_decodes = self.num_running - self.num_prefilling;
        StepShape {
            num_rows: num_decodes,
            num_tokens: num_decodes,
            num_context_tokens: self.decode_context,
            ..StepShape::default()
        }
    }

    fn insert_sequence(&mut self, request: &Request, entry: u32, index: u32, due: Micros) -> SeqIndex {
        let prompt_len = request.prompt.len() as u32;
        let tenant = self.fair.register(request.tenant);
        let seq = self.seqs.insert(SequenceData {
            request: entry,
            key: OrderKey::new(request, index, tenant, due),
            prompt: request.prompt.clone(),
            prompt_hashes: if self.config.enable_prefix_caching {
                request.block_hashes.clone()
            } else {
                Arc::default()
            },
            salt: request.salt,
            adapter: request.adapter,
            params: request.params.clone(),
            generated: Vec::new(),
            later_hashes: Vec::new(),
            table: BlockTable::default(),
            parked: false,
            num_reported_rows: 0,
            held_tail: None,
            num_lost_tokens: 0,
            num_charged_tokens: 0,
            usage: Usage { prompt_tokens: prompt_len, arrival: request.arrival, ..Usage::default() },
            started: false,
            wait_cause: WaitCause::Step,
        });
        let hot = self.seqs.hot_mut(seq);
        hot.request = request.id;
        hot.index = index;
        hot.tenant = tenant;
        hot.num_tokens = prompt_len;
        hot.max_total_tokens = prompt_len + request.params.max_tokens;
        hot.set_stops(&request.params, prompt_len);
        hot.state = if index == 0 { SeqState::Waiting } else { SeqState::Follower };
        hot.leads = index == 0 && request.params.n > 1;
        seq
    }

    pub(crate) fn entry(&self, at: u32) -> &RequestEntry {
        self.requests[at as usize].as_ref().expect("a live sequence has a request")
    }

    pub(crate) fn entry_mut(&mut self, at: u32) -> &mut RequestEntry {
        self.requests[at as usize].as_mut().expect("a live sequence has a request")
    }
}
