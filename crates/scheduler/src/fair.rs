//! What each tenant was served, and what it may hold.
//!
//! Virtual token counters (VTC; Sheng et al., arXiv 2401.00588): a tenant's counter grows by the tokens computed for it,
//! weighted by kind and divided by its share; admission serves the smallest counter. Cached prompt tokens, and those
//! computed again after a preemption, are free. A
//! tenant that had nothing waiting is lifted to the others' level, so that nobody saves up service.

use std::cmp::Ordering;

use quire_core::{TenantId, TenantShare};

/// Tenants beyond this share one counter. Ids index the configured tenants, so nobody gets here by accident.
const MAX_TENANTS: u32 = 1 << 16;
/// Weights outside are clamped.
const WEIGHTS: (f64, f64) = (1e-3, 1e6);

/// A lead with which a tenant's sequences go on, in units of the dearest request. The bound on the gap is two of them,
/// and a step adds to a lead before it can be corrected.
const TOLERATED_LEAD: f64 = 1.0;

/// The quantum, and the tolerated lead, where the pool does not hold the prefixes that are waited for. Each turn begins
/// with one that has to be computed, so it is as long as the bound on the gap allows. It ends a little earlier than
/// sequences begin to stand still, because answers may be longer than was expected.
const CROWDED_QUANTUM: f64 = 1.6;
const CROWDED_LEAD: f64 = 1.75;
/// Of the pool, the part that prefixes fill which are waited for when turns become long, since the batch needs the rest,
/// and when they become short again: later, or tenants with the lead of a long turn would stand still.
const CROWDED_FROM: f64 = 0.75;
const CROWDED_TO: f64 = 0.25;

/// What one finished request changes of the mean output of its tenant.
const OUTPUT_MEMORY: f64 = 0.125;

/// What fairness means here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FairnessConfig {
    /// Cost of a prompt token that is computed.
    pub prompt_token_cost: f64,
    /// Cost of an output token.
    pub output_token_cost: f64,
    /// The tenant served last stays in turn until it is so much ahead of the smallest counter, in units of the dearest
    /// request so far: its requests often share a prefix, which is still cached (deficit longest prefix match; Cao et
    /// al., arXiv 2501.14312). 0: strict VTC.
    pub quantum: f64,
    /// Who waits longer, in microseconds, gets a place whatever its priority (every other one).
    pub max_queue_age: u64,
}

impl Default for FairnessConfig {
    /// 1 and 2 as in the VTC paper, a quarter of the dearest request, and 30 s.
    fn default() -> Self {
        Self { prompt_token_cost: 1.0, output_token_cost: 2.0, quantum: 0.25, max_queue_age: 30_000_000 }
    }
}

/// Service received, in weighted tokens per unit of share. Never NaN.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counter(pub(crate) f64);

impl Eq for Counter {}

impl PartialOrd for Counter {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Counter {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[derive(Clone, Copy, Debug)]
struct Tenant {
    counter: Counter,
    per_prompt_token: f64,
    per_output_token: f64,
    /// Blocks that its running sequences hold, and how many they may.
    num_blocks: u32,
    max_blocks: u32,
    num_running: u32,
    /// Mean output of its latest requests.
    mean_output: Option<f64>,
}

/// The counters of all tenants.
#[derive(Debug)]
pub(crate) struct FairShare {
    config: FairnessConfig,
    pool_blocks: u32,
    shares: Vec<TenantShare>,
    tenants: Vec<Tenant>,
    /// The dearest request so far, on its tenant's account.
    max_cost: f64,
    /// Mean output of everybody's latest requests.
    mean_output: f64,
    /// The pool is too small for the prefixes that are waited for.
    crowded: bool,
}

impl FairShare {
    pub(crate) fn new(config: FairnessConfig, pool_blocks: u32) -> Self {
        Self {
            config,
            pool_blocks,
            shares: Vec::new(),
            tenants: Vec::new(),
            max_cost: 0.0,
            mean_output: 0.0,
            crowded: false,
        }
    }

    /// Tenants wait for prefixes of so many blocks in all.
    pub(crate) fn set_shared_blocks(&mut self, num_blocks: u64) {
        let part = if self.crowded { CROWDED_TO } else { CROWDED_FROM };
        self.crowded = self.tenants.len() > 1 && num_blocks as f64 > part * f64::from(self.pool_blocks);
    }

    pub(crate) fn config(&self) -> &FairnessConfig {
        &self.config
    }

    /// Whether turns are as long as can be, because each begins with a prefix that has to be computed.
    pub(crate) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// New shares, from now on; counters stay.
    pub(crate) fn set_shares(&mut self, shares: &[TenantShare]) {
        self.shares = shares.to_vec();
        for at in 0..self.tenants.len() {
            let fresh = self.fresh(at);
            let Tenant { counter, num_blocks, num_running, mean_output, .. } = self.tenants[at];
            self.tenants[at] = Tenant { counter, num_blocks, num_running, mean_output, ..fresh };
        }
    }

    /// The id under which a tenant is known from here on; makes room for it.
    pub(crate) fn register(&mut self, tenant: TenantId) -> TenantId {
        let tenant = TenantId(tenant.0.min(MAX_TENANTS - 1));
        while self.tenants.len() <= tenant.0 as usize {
            let fresh = self.fresh(self.tenants.len());
            self.tenants.push(fresh);
        }
        tenant
    }

    fn fresh(&self, at: usize) -> Tenant {
        let share = self.shares.get(at).copied().unwrap_or_default();
        let weight = f64::from(share.weight);
        let weight = if weight > 0.0 { weight.clamp(WEIGHTS.0, WEIGHTS.1) } else { WEIGHTS.0 };
        let part = f64::from(share.kv_blocks_share).clamp(0.0, 1.0);
        Tenant {
            counter: Counter::default(),
            per_prompt_token: self.config.prompt_token_cost / weight,
            per_output_token: self.config.output_token_cost / weight,
            num_blocks: 0,
            max_blocks: (f64::from(self.pool_blocks) * part).ceil() as u32,
            num_running: 0,
            mean_output: None,
        }
    }

    fn get(&self, tenant: TenantId) -> &Tenant {
        &self.tenants[tenant.0 as usize]
    }

    fn get_mut(&mut self, tenant: TenantId) -> &mut Tenant {
        &mut self.tenants[tenant.0 as usize]
    }

    pub(crate) fn counter(&self, tenant: TenantId) -> Counter {
        self.get(tenant).counter
    }

    pub(crate) fn charge_prompt(&mut self, tenant: TenantId, num_tokens: u32) {
        let tenant = self.get_mut(tenant);
        tenant.counter.0 += f64::from(num_tokens) * tenant.per_prompt_token;
    }

    #[inline]
    pub(crate) fn charge_output_token(&mut self, tenant: TenantId) {
        let tenant = self.get_mut(tenant);
        tenant.counter.0 += tenant.per_output_token;
    }

    /// Takes note of what a request cost, in all or so far.
    pub(crate) fn note_cost(&mut self, tenant: TenantId, num_prompt_tokens: u32, num_output_tokens: u32) {
        let tenant = self.get(tenant);
        let cost = f64::from(num_prompt_tokens) * tenant.per_prompt_token
            + f64::from(num_output_tokens) * tenant.per_output_token;
        self.max_cost = self.max_cost.max(cost);
    }

    /// Takes note of how long an answer was.
    pub(crate) fn note_output(&mut self, tenant: TenantId, num_output_tokens: u32) {
        let output = f64::from(num_output_tokens);
        self.mean_output += (output - self.mean_output) * OUTPUT_MEMORY;
        let tenant = self.get_mut(tenant);
        let mean = tenant.mean_output.unwrap_or(output);
        tenant.mean_output = Some(mean + (output - mean) * OUTPUT_MEMORY);
    }

    /// The tenant's counter once its running sequences, and one more that computes `num_prompt_tokens`, have ended, if
    /// their answers are as long as others were. Says when a turn ends, no more: nobody loses by a wrong guess.
    pub(crate) fn committed(&self, tenant: TenantId, num_prompt_tokens: u32) -> Counter {
        let tenant = self.get(tenant);
        let num_output_tokens =
            tenant.mean_output.unwrap_or(self.mean_output) * f64::from(tenant.num_running + 1);
        let prompt = f64::from(num_prompt_tokens) * tenant.per_prompt_token;
        Counter(tenant.counter.0 + prompt + num_output_tokens * tenant.per_output_token)
    }

    /// The counter beyond which a tenant is too far ahead of `behind`.
    pub(crate) fn ceiling(&self, behind: TenantId) -> Counter {
        Counter(self.counter(behind).0 + self.tolerance())
    }

    /// How far the tenant served last may be ahead and stay in turn.
    pub(crate) fn quantum(&self) -> f64 {
        self.relative_quantum() * self.max_cost
    }

    /// In units of the dearest request.
    fn relative_quantum(&self) -> f64 {
        let least = if self.crowded { CROWDED_QUANTUM } else { 0.0 };
        self.config.quantum.max(least)
    }

    /// How many places `ahead` should give up to `behind` at once: one for each request it is ahead, or a quarter of
    /// what it has, because each of its sequences makes the lead larger.
    pub(crate) fn places_owed(&self, ahead: TenantId, behind: TenantId) -> u32 {
        (self.lead(ahead, behind) as u32).max(self.num_running(ahead) / 4)
    }

    /// In units of what is tolerated.
    fn lead(&self, ahead: TenantId, behind: TenantId) -> f64 {
        (self.counter(ahead).0 - self.counter(behind).0) / self.tolerance()
    }

    fn tolerance(&self) -> f64 {
        let lead = if self.crowded { CROWDED_LEAD } else { TOLERATED_LEAD };
        (lead.max(self.config.quantum) * self.max_cost).max(1.0)
    }

    /// A tenant that comes back does not bring service it has not used.
    pub(crate) fn lift(&mut self, tenant: TenantId, to: Counter) {
        let tenant = self.get_mut(tenant);
        tenant.counter = tenant.counter.max(to);
    }

    /// Whether `num_more` blocks would put the tenant over its share. What runs alone may have what it needs, and whoever
    /// may have all has what the pool has, which is more than it seems: blocks count for each sequence that holds them.
    pub(crate) fn is_over_share(&self, tenant: TenantId, num_more: u32, num_others_running: u32) -> bool {
        let Tenant { num_blocks, max_blocks, .. } = *self.get(tenant);
        let is_limited = max_blocks < self.pool_blocks;
        is_limited && num_others_running > 0 && num_blocks.saturating_add(num_more) > max_blocks
    }

    /// How much of the service `other` gets while `tenant` gets one unit of it.
    pub(crate) fn relative_share(&self, other: TenantId, tenant: TenantId) -> f64 {
        self.get(tenant).per_prompt_token / self.get(other).per_prompt_token
    }

    pub(crate) fn num_running(&self, tenant: TenantId) -> u32 {
        self.get(tenant).num_running
    }

    pub(crate) fn entered(&mut self, tenant: TenantId, num_blocks: u32) {
        let tenant = self.get_mut(tenant);
        tenant.num_running += 1;
        tenant.num_blocks += num_blocks;
    }

    pub(crate) fn left(&mut self, tenant: TenantId, num_blocks: u32) {
        let tenant = self.get_mut(tenant);
        tenant.num_running -= 1;
        tenant.num_blocks -= num_blocks;
    }

    pub(crate) fn took_blocks(&mut self, tenant: TenantId, num_blocks: u32) {
        self.get_mut(tenant).num_blocks += num_blocks;
    }

    pub(crate) fn gave_blocks(&mut self, tenant: TenantId, num_blocks: u32) {
        self.get_mut(tenant).num_blocks -= num_blocks;
    }

    /// Compares with `(blocks, running)` recounted, by tenant.
    pub(crate) fn check(&self, counted: &[(u32, u32)]) -> Result<(), String> {
        for (at, tenant) in self.tenants.iter().enumerate() {
            let counted = counted.get(at).copied().unwrap_or_default();
            if (tenant.num_blocks, tenant.num_running) != counted {
                return Err(format!(
                    "tenant {at} holds (blocks, running) {counted:?}, but its account says {tenant:?}"
                ));
            }
            if !tenant.counter.0.is_finite() || tenant.counter.0 < 0.0 {
                return Err(format!("tenant {at} has counter {:?}", tenant.counter));
            }
        }
        Ok(())
    }

    pub(crate) fn num_tenants(&self) -> usize {
        self.tenants.len()
    }
}
