//! What the scheduler itself costs: microseconds of CPU per step, and per admitted prompt.
//!
//! The device is as cheap as can be: [`Rig::answer`] gives every sampled row the same token. Only `schedule` and `update`
//! are timed, by the thread's CPU clock, so that other load on the machine does not count. Everything is on: prefix
//! caching, stop ids, several tenants, events, statistics.

use std::sync::Arc;

use quire_core::{
    BlockHasher, ExecutorLimits, FinishReason, Micros, ModelRunnerOutput, Request, RequestId, SamplingParams,
    SchedulerOutput, TenantId, TokenId,
};
use quire_engine::sessions::chain_after;
use quire_scheduler::{Scheduler, SchedulerConfig, SeqEvent};

const BLOCK_SIZE: u32 = 16;
const NUM_TENANTS: u32 = 16;
/// The token of every row; stop ids are others.
const TOKEN: TokenId = 7;
/// Prompts of a steady batch differ in length by up to a block, so that each step has its share of block boundaries.
const STEADY_PROMPT: u32 = 64;

/// One number of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchRow {
    /// Stable: scripts rely on it.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it should be at most.
    pub target: f64,
}

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct BenchConfig {
    /// Timed steps per batch size.
    pub num_steps: u32,
    /// Timed repetitions of each prompt operation.
    pub num_prompts: u32,
    /// Sequences in the batch, with the target of a step in microseconds.
    pub batches: &'static [(u32, f64)],
}

impl Default for BenchConfig {
    fn default() -> Self {
        Self {
            num_steps: 1000,
            num_prompts: 50,
            batches: &[(32, 1.0), (256, 5.0), (1024, 20.0), (4096, 100.0), (16_384, 600.0)],
        }
    }
}

/// Measures everything. Takes a few seconds.
pub fn run(config: &BenchConfig) -> Vec<BenchRow> {
    let mut rows = Vec::new();
    for &(num_seqs, target) in config.batches {
        // A quarter of the steps where there are many sequences: the pool must hold all tokens.
        let num_steps = if num_seqs > 4096 { config.num_steps / 4 } else { config.num_steps };
        let mut samples = steady_steps(num_seqs, num_steps);
        let (p50, p99) = (quantile(&mut samples, 0.5), quantile(&mut samples, 0.99));
        rows.push(BenchRow { name: format!("step_us/{num_seqs}"), value: p50, unit: "us", target });
        rows.push(BenchRow {
            name: format!("step_p99_over_p50/{num_seqs}"),
            value: p99 / p50,
            unit: "ratio",
            target: 2.0,
        });
    }
    rows.push(BenchRow {
        name: "fair_decision_us/10000".into(),
        value: fair_decision(config.num_prompts),
        unit: "us",
        target: 1.0,
    });
    for (name, len) in [("16k", 16_384), ("131k", 131_072)] {
        let num_prompts = if len > 16_384 { config.num_prompts.div_ceil(8) } else { config.num_prompts };
        let samples = prompt_costs(len, num_prompts);
        for ((operation, target), mut samples) in PROMPT_OPERATIONS.into_iter().zip(samples) {
            let value = quantile(&mut samples, 0.5);
            // Eight times the tokens, and a little more for what no longer fits the caches.
            let target = if len > 16_384 { 9.0 * target } else { target };
            rows.push(BenchRow { name: format!("prompt_{name}_{operation}_us"), value, unit: "us", target });
        }
    }
    rows
}

/// What [`prompt_costs`] measures, with the target for 16,384 tokens in microseconds.
pub const PROMPT_OPERATIONS: [(&str, f64); 6] = [
    ("hash", 150.0),
    ("rehash", 15.0),
    ("admit", 60.0),
    ("full_hit", 5.0),
    ("admit_full_hit", 60.0),
    ("free", 10.0),
];

fn quantile(samples: &mut [f64], q: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[((samples.len() - 1) as f64 * q).round() as usize]
}

/// Microseconds of CPU time of this thread.
pub fn thread_cpu_us() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

/// The CPU clock of this thread, and what reading it twice costs.
struct CpuClock {
    overhead: f64,
}

impl CpuClock {
    fn new() -> Self {
        let mut reads: Vec<f64> = (0..201).map(|_| Self::now()).collect();
        for at in 0..200 {
            reads[at] = reads[at + 1] - reads[at];
        }
        reads.pop();
        Self { overhead: quantile(&mut reads, 0.5) }
    }

    fn now() -> f64 {
        thread_cpu_us()
    }

    /// Microseconds that `work` takes.
    fn time(&self, work: impl FnOnce()) -> f64 {
        let start = Self::now();
        work();
        (Self::now() - start - self.overhead).max(0.0)
    }
}

/// A scheduler with a device that does nothing.
pub struct Rig {
    /// The scheduler.
    pub scheduler: Scheduler,
    hasher: BlockHasher,
    plan: SchedulerOutput,
    output: ModelRunnerOutput,
    events: Vec<SeqEvent>,
    now: u64,
    next_id: u64,
}

impl Rig {
    /// Room for `num_seqs` sequences of `num_tokens` tokens.
    pub fn new(num_seqs: u32, num_tokens: u32) -> Self {
        let limits = ExecutorLimits {
            block_size: BLOCK_SIZE,
            num_blocks: num_seqs * (num_tokens.div_ceil(BLOCK_SIZE) + 1),
            max_num_seqs: num_seqs,
            max_num_batched_tokens: num_tokens.max(num_seqs * 2 * STEADY_PROMPT),
            max_model_len: num_tokens,
            vocab_size: 50_000,
            max_steps_in_flight: 1,
            kv_groups: vec![None],
        };
        let hasher = BlockHasher::new((1, 2), BLOCK_SIZE);
        let mut config = SchedulerConfig::new(limits, hasher);
        config.max_queued_requests = num_seqs;
        Self {
            scheduler: Scheduler::new(config),
            hasher,
            plan: SchedulerOutput::default(),
            output: ModelRunnerOutput::default(),
            events: Vec::new(),
            now: 0,
            next_id: 1,
        }
    }

    /// The same scheduler, empty, with a longer queue.
    fn with_queue(&self, max_queued_requests: u32) -> Scheduler {
        let mut config = SchedulerConfig::new(self.scheduler.limits().clone(), self.hasher);
        config.max_queued_requests = max_queued_requests;
        Scheduler::new(config)
    }

    /// A batch of `num_seqs` sequences that decode, with room for `num_steps` steps more.
    pub fn steady(num_seqs: u32, num_steps: u32) -> Self {
        let warm_up = 2 * BLOCK_SIZE;
        let mut rig = Self::new(num_seqs, STEADY_PROMPT + BLOCK_SIZE + warm_up + num_steps + 2);
        for at in 0..num_seqs {
            let prompt = (0..STEADY_PROMPT + at % BLOCK_SIZE).map(|i| (at + i * 31) % 50_000).collect();
            let request = rig.request(prompt, warm_up + num_steps + 1);
            rig.scheduler.add(request).expect("the rig has room for it");
        }
        for _ in 0..warm_up {
            rig.schedule();
            rig.answer();
            rig.update();
        }
        assert_eq!(rig.plan.scheduled.len() as u32, num_seqs, "all decode after the warm-up");
        rig
    }

    /// A request whose hashes are computed.
    pub fn request(&mut self, prompt: Arc<[TokenId]>, max_tokens: u32) -> Request {
        let salt = self.hasher.salt(b"bench");
        let id = self.next_id;
        self.next_id += 1;
        Request {
            id: RequestId(id),
            block_hashes: self.hasher.chain(salt, &prompt).into(),
            prompt,
            salt,
            adapter: None,
            params: Arc::new(SamplingParams {
                stop_token_ids: vec![1, 2],
                ..SamplingParams::greedy(max_tokens)
            }),
            tenant: TenantId(id as u32 % NUM_TENANTS),
            priority: 0,
            arrival: Micros(self.now),
            deadline: None,
        }
    }

    /// Plans a step.
    pub fn schedule(&mut self) {
        self.now += 1000;
        self.scheduler.schedule(Micros(self.now), &mut self.plan, &mut self.events);
    }

    /// The device's part: a token for each sampled row.
    pub fn answer(&mut self) {
        self.output.clear();
        self.output.step = self.plan.step;
        for row in self.plan.scheduled.iter().filter(|row| row.sample) {
            self.output.push_row(row.slot, &[TOKEN], []);
        }
    }

    /// Takes the results; what happened is looked at by nobody.
    pub fn update(&mut self) {
        self.now += 1000;
        self.scheduler.update(Micros(self.now), &self.output, &mut self.events);
        std::hint::black_box(self.scheduler.stats());
        self.events.clear();
    }
}

/// Microseconds of each of `num_steps` decode steps.
pub fn steady_steps(num_seqs: u32, num_steps: u32) -> Vec<f64> {
    let clock = CpuClock::new();
    let mut rig = Rig::steady(num_seqs, num_steps);
    let step = |_| {
        let schedule = clock.time(|| rig.schedule());
        rig.answer();
        schedule + clock.time(|| rig.update())
    };
    (0..num_steps).map(step).collect()
}

/// Microseconds that an admission takes longer with 10,000 waiting tenants than with one.
pub fn fair_decision(num_steps: u32) -> f64 {
    const NUM_TENANTS: u32 = 10_000;
    const NUM_PLACES: u32 = 64;
    let clock = CpuClock::new();
    let [one, many] = [1, NUM_TENANTS].map(|num_tenants| {
        let mut rig = Rig::new(NUM_PLACES, 32);
        rig.scheduler = rig.with_queue(NUM_TENANTS + NUM_PLACES * num_steps);
        for at in 0..NUM_TENANTS + NUM_PLACES * num_steps {
            let mut request = rig.request((0..8).collect(), 1);
            request.tenant = TenantId(at % num_tenants);
            rig.scheduler.add(request).expect("the queue has room for it");
        }
        let step = |_| {
            let cost = clock.time(|| rig.schedule());
            rig.answer();
            rig.update();
            cost / f64::from(NUM_PLACES)
        };
        quantile(&mut (0..num_steps).map(step).collect::<Vec<_>>(), 0.5)
    });
    many - one
}

/// Microseconds of each of [`PROMPT_OPERATIONS`]: hashing a prompt; hashing a conversation's next turn of 512 tokens more,
/// when the last one is remembered; admitting a prompt to an empty cache (its first and only chunk, and making its
/// blocks known); finding all of it in the cache; admitting it again when all of it is there; freeing it.
pub fn prompt_costs(len: u32, num_prompts: u32) -> [Vec<f64>; PROMPT_OPERATIONS.len()] {
    let clock = CpuClock::new();
    let mut rig = Rig::new(4, len + 64);
    let [mut hash, mut rehash, mut admit, mut full_hit, mut admit_full_hit, mut free] =
        [const { Vec::new() }; 6];
    for at in 0..num_prompts {
        let tokens = |len| (0..len).map(|i| (at * 7 + i * 31) % 50_000);
        let prompt: Arc<[TokenId]> = tokens(len).collect();
        let salt = rig.hasher.salt(b"bench");
        hash.push(clock.time(|| drop(std::hint::black_box(rig.hasher.chain(salt, &prompt)))));
        let known = rig.hasher.chain(salt, &prompt);
        let next_turn: Arc<[TokenId]> = tokens(len + 512).collect();
        rehash.push(clock.time(|| {
            drop(std::hint::black_box(chain_after(&rig.hasher, salt, &prompt, &known, &next_turn)));
        }));
        for hit in [false, true] {
            let request = rig.request(Arc::clone(&prompt), 8);
            let id = request.id;
            if hit {
                let hashes = Arc::clone(&request.block_hashes);
                let mut found = 0;
                full_hit.push(clock.time(|| found = rig.scheduler.cached_prefix(&hashes)));
                assert_eq!(found, len / BLOCK_SIZE * BLOCK_SIZE);
            }
            let mut cost = clock.time(|| {
                rig.scheduler.add(request).expect("the rig is empty");
                rig.schedule();
            });
            rig.answer();
            cost += clock.time(|| rig.update());
            if hit { &mut admit_full_hit } else { &mut admit }.push(cost);
            let cost = clock.time(|| rig.scheduler.finish(id, None, FinishReason::Abort));
            if hit {
                free.push(cost);
            }
        }
    }
    [hash, rehash, admit, full_hit, admit_full_hit, free]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_table_is_there_once_and_positive() {
        let config = BenchConfig { num_steps: 40, num_prompts: 2, batches: &[(32, 1.0), (256, 5.0)] };
        let rows = run(&config);
        assert_eq!(rows.len(), 2 * 2 + 1 + 2 * PROMPT_OPERATIONS.len());
        let mut names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert!(names.contains(&"step_us/256") && names.contains(&"prompt_16k_hash_us"));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len());
        for row in &rows {
            println!("{:24} {:10.2} {} (target {})", row.name, row.value, row.unit, row.target);
            assert!(row.value.is_finite() && (row.value >= 0.0 || row.name.starts_with("fair")));
        }
    }
}
