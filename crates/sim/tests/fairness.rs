//! Fair share as a property: whatever two backlogged tenants send, neither gets ahead by more than twice the dearest
//! request.

use std::collections::BTreeMap;
use std::sync::Arc;

use quire_core::{
    BlockHash, BlockHasher, CacheSalt, ExecutorLimits, Micros, ModelRunnerOutput, Request, RequestId,
    SamplingParams, SchedulerOutput, Slot, TenantId, TenantShare,
};
use quire_scheduler::{Scheduler, SchedulerConfig, SeqEventKind};

struct Rng(u64);

impl Rng {
    fn range(&mut self, low: u32, high: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        low + ((self.0 >> 33) % u64::from(high - low + 1)) as u32
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.range(0, from.len() as u32 - 1) as usize]
    }
}

/// What a tenant sends: ranges of prompt and output lengths.
#[derive(Clone, Copy, Debug)]
struct Tenant {
    weight: f32,
    prompt: (u32, u32),
    output: (u32, u32),
    /// Blocks with which all its prompts begin, as far as they are so long.
    num_shared_blocks: u32,
    /// Requests it keeps waiting.
    backlog: u32,
    service: f64,
    waiting: u32,
    /// It always had something waiting.
    backlogged: bool,
}

struct Mix {
    rng: Rng,
    scheduler: Scheduler,
    tenants: Vec<Tenant>,
    next_id: u64,
    now: u64,
    owner: BTreeMap<RequestId, usize>,
    in_slot: BTreeMap<Slot, RequestId>,
    /// Of each live request, prompt tokens that were computed once, and their number.
    computed: BTreeMap<RequestId, (u32, u32)>,
    num_preempted: u64,
}

impl Mix {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed * 7919 + 1);
        let num_tenants = rng.pick(&[2, 2, 3, 8, 50, 1000]);
        let profiles =
            [((300, 400), (1, 2)), ((1, 8), (150, 200)), ((20, 200), (20, 100)), ((8, 32), (4, 16))];
        let max_num_seqs = rng.pick(&[4, 16, 64]);
        // Of the long prompts most; with many tenants these prefixes do not fit in the pool.
        let num_shared_blocks = if seed % 2 == 1 { 16 } else { 0 };
        let tenants: Vec<_> = (0..num_tenants)
            .map(|_| {
                let (prompt, output) = rng.pick(&profiles);
                let weight = rng.pick(&[0.5, 1.0, 1.0, 2.0, 4.0]);
                // Enough to be backlogged whatever happens in a step.
                let backlog = if num_tenants > 50 { 4 } else { max_num_seqs + 4 };
                Tenant {
                    weight,
                    prompt,
                    output,
                    num_shared_blocks,
                    backlog,
                    service: 0.0,
                    waiting: 0,
                    backlogged: true,
                }
            })
            .collect();
        let limits = ExecutorLimits {
            block_size: 16,
            // From room for everybody to a fraction of it.
            num_blocks: rng.pick(&[max_num_seqs * 40, max_num_seqs * 10, 60]),
            max_num_seqs,
            max_num_batched_tokens: rng.pick(&[128, 512, 2048]),
            max_model_len: 640,
            vocab_size: 100,
            max_steps_in_flight: 1,
            kv_groups: vec![None],
        };
        let mut config = SchedulerConfig::new(limits, BlockHasher::new((1, 2), 16));
        config.max_queued_requests = 100_000;
        let mut scheduler = Scheduler::new(config);
        let share = |tenant: &Tenant| TenantShare { weight: tenant.weight, ..TenantShare::default() };
        scheduler.set_tenants(&tenants.iter().map(share).collect::<Vec<_>>());
        Self {
            rng,
            scheduler,
            tenants,
            next_id: 1,
            now: 0,
            owner: BTreeMap::new(),
            in_slot: BTreeMap::new(),
            computed: BTreeMap::new(),
            num_preempted: 0,
        }
    }

    /// The dearest request anybody may send, on its sender's account.
    fn max_cost(&self) -> f64 {
        let cost = |t: &Tenant| f64::from(t.prompt.1 + 2 * t.output.1) / f64::from(t.weight);
        self.tenants.iter().map(cost).fold(0.0, f64::max)
    }

    fn top_up(&mut self) {
        for at in 0..self.tenants.len() {
            while self.tenants[at].waiting < self.tenants[at].backlog {
                self.tenants[at].waiting += 1;
                let Tenant { prompt, output, num_shared_blocks, .. } = self.tenants[at];
                let id = RequestId(self.next_id);
                self.next_id += 1;
                self.owner.insert(id, at);
                let len = self.rng.range(prompt.0, prompt.1);
                self.computed.insert(id, (0, len));
                let max_tokens = self.rng.range(output.0, output.1);
                let request = Request {
                    id,
                    prompt: (0..len).collect(),
                    block_hashes: addresses(at, id, len / 16, num_shared_blocks),
                    salt: CacheSalt(0),
                    adapter: None,
                    params: Arc::new(SamplingParams::greedy(max_tokens)),
                    tenant: TenantId(at as u32),
                    priority: 0,
                    arrival: Micros(self.now),
                    deadline: None,
                };
                self.scheduler.add(request).expect("the queue is long enough");
            }
        }
    }

    fn step(&mut self, plan: &mut SchedulerOutput) {
        self.top_up();
        self.now += 10_000;
        let mut events = Vec::new();
        self.scheduler.schedule(Micros(self.now), plan, &mut events);
        let mut output = ModelRunnerOutput { step: plan.step, ..ModelRunnerOutput::default() };
        for new in &plan.new {
            self.in_slot.insert(new.slot, new.request);
            self.num_preempted += u64::from(new.tokens.len() as u32 > new.prompt_len);
        }
        for row in &plan.scheduled {
            let id = self.in_slot[&row.slot];
            let (tenant, (computed, prompt_len)) =
                (self.owner[&id], self.computed.get_mut(&id).expect("it is live"));
            let end = (row.num_computed_tokens + row.num_new_tokens).min(*prompt_len);
            // What was found in the cache is not computed.
            let fresh = end.saturating_sub((*computed).max(row.num_computed_tokens));
            *computed = end.max(*computed);
            self.tenants[tenant].service += f64::from(fresh) / f64::from(self.tenants[tenant].weight);
            if row.sample {
                self.tenants[tenant].service += 2.0 / f64::from(self.tenants[tenant].weight);
                output.push_row(row.slot, &[1], []);
            }
        }
        self.scheduler.update(Micros(self.now), &output, &mut events);
        for event in &events {
            match event.kind {
                SeqEventKind::Started { .. } => self.tenants[self.owner[&event.request]].waiting -= 1,
                SeqEventKind::Finished { .. } => {
                    self.owner.remove(&event.request);
                    self.computed.remove(&event.request);
                }
                _ => {}
            }
        }
        self.tenants.iter_mut().for_each(|tenant| tenant.backlogged &= tenant.waiting > 0);
    }

    fn gap(&self) -> f64 {
        let service = self.tenants.iter().filter(|tenant| tenant.backlogged).map(|tenant| tenant.service);
        service.clone().fold(0.0, f64::max) - service.fold(f64::INFINITY, f64::min)
    }
}

/// None where nothing is shared.
fn addresses(tenant: usize, id: RequestId, num_blocks: u32, num_shared: u32) -> Arc<[BlockHash]> {
    let address = |block: u32| {
        let owner = if block < num_shared { tenant as u64 } else { 1 << 32 | id.0 };
        BlockHash(u128::from(owner) << 64 | u128::from(block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    };
    if num_shared == 0 { Arc::from([]) } else { (0..num_blocks).map(address).collect() }
}

#[test]
fn backlogged_tenants_stay_within_two_requests_of_each_other() {
    let mut worst = (0.0, 0);
    let num_seeds = std::env::var("QUIRE_FAIR_SEEDS").map_or(40, |seeds| seeds.parse().unwrap());
    for seed in 0..num_seeds {
        let mut mix = Mix::new(seed);
        let mut plan = SchedulerOutput::default();
        let num_steps = if mix.tenants.len() > 50 { 4000 } else { 2500 };
        let (mut gap, mut at) = (0.0, 0);
        for step in 0..num_steps {
            mix.step(&mut plan);
            if mix.gap() > gap {
                (gap, at) = (mix.gap(), step);
            }
        }
        let ratio = gap / mix.max_cost();
        println!(
            "seed {seed}: {} of {} tenants backlogged, {} slots, {} blocks, {} tokens a step: gap {gap:.0} = {ratio:.2} \
             requests at step {at}, {} readmissions",
            mix.tenants.iter().filter(|tenant| tenant.backlogged).count(),
            mix.tenants.len(),
            mix.scheduler.limits().max_num_seqs,
            mix.scheduler.limits().num_blocks,
            mix.scheduler.limits().max_num_batched_tokens,
            mix.num_preempted
        );
        worst = if ratio > worst.0 { (ratio, seed) } else { worst };
    }
    println!("worst gap: {:.2} of the dearest request (seed {})", worst.0, worst.1);
    assert!(worst.0 <= 2.0, "seed {}: the gap is {:.2} times the dearest request", worst.1, worst.0);
}
