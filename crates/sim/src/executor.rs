//! The fake device: it keeps the contract of [`Executor`] and distrusts the scheduler in everything.
//!
//! A broken invariant is reported as a device error, which ends the run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quire_core::{
    BlockId, CacheSalt, ExecError, Executor, ExecutorLimits, HostBlockId, LateInputs, LogitRows, Micros,
    ModelRunnerOutput, NewSeq, RequestId, SamplingParams, Scheduled, SchedulerOutput, Slot, StepId, TokenId,
};

use crate::oracle;
use crate::rng::mix;
use crate::shadow_kv::ShadowKv;

/// Virtual time of one step: `fixed + per_token * tokens + per_seq * rows + per_host_copy * copies`, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CostModel {
    pub(crate) fixed: u64,
    pub(crate) per_token: u64,
    pub(crate) per_seq: u64,
    pub(crate) per_host_copy: u64,
}

/// What the device shares with the driver of the simulation.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Virtual time in microseconds.
    pub(crate) now: u64,
    /// Hash of all that happened.
    pub(crate) trace: u64,
    /// Salts of requests: the device must know them to tell namespaces apart.
    pub(crate) salts: BTreeMap<RequestId, CacheSalt>,
    pub(crate) num_copies: u64,
    pub(crate) num_copies_to_host: u64,
    pub(crate) num_copies_to_device: u64,
    pub(crate) num_steps: u64,
}

impl World {
    pub(crate) fn record(&mut self, value: u64) {
        self.trace = mix(self.trace ^ value).wrapping_add(0x9E37_79B9);
    }
}

pub(crate) type SharedWorld = Arc<Mutex<World>>;

/// The world, also after a panic elsewhere: the report still wants its numbers.
pub(crate) fn lock(world: &SharedWorld) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the device knows of the sequence in a slot.
struct Mirror {
    request: RequestId,
    tokens: Vec<TokenId>,
    /// `chain[p]` sums up `tokens[..p]`.
    chain: Vec<u64>,
    prompt_len: u32,
    params: Arc<SamplingParams>,
    seed: u64,
    table: Vec<BlockId>,
    num_computed_tokens: u32,
}

impl Mirror {
    fn new(new: &NewSeq, salt: CacheSalt) -> Self {
        let mut mirror = Self {
            request: new.request,
            tokens: Vec::new(),
            chain: vec![oracle::root(salt)],
            prompt_len: new.prompt_len,
            params: new.params.clone(),
            seed: new.seed,
            table: new.block_tables[0].clone(),
            num_computed_tokens: new.num_computed_tokens,
        };
        new.tokens.iter().for_each(|&token| mirror.push(token));
        mirror
    }

    fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        self.chain.push(oracle::extend(self.chain[self.chain.len() - 1], token));
    }
}

/// A step that was submitted and not collected.
struct Flight {
    step: StepId,
    /// Blocks it reads or writes.
    touched: BTreeSet<BlockId>,
    /// Blocks of the host tier that it reads or writes.
    touched_on_host: BTreeSet<HostBlockId>,
    done_at: u64,
    output: ModelRunnerOutput,
}

pub(crate) struct SimExecutor {
    limits: ExecutorLimits,
    num_host_blocks: u32,
    cost: CostModel,
    world: SharedWorld,
    kv: ShadowKv,
    slots: Vec<Option<Mirror>>,
    flights: VecDeque<Flight>,
    last_step: StepId,
}

/// `Err` with the words, unless the condition holds.
macro_rules! require {
    ($condition:expr, $($words:tt)*) => {
        if !$condition {
            return Err(format!($($words)*));
        }
    };
}

impl SimExecutor {
    pub(crate) fn new(
        limits: ExecutorLimits,
        num_host_blocks: u32,
        cost: CostModel,
        world: SharedWorld,
    ) -> Self {
        let kv = ShadowKv::new(limits.num_blocks, limits.block_size, limits.kv_groups[0])
            .with_host_blocks(num_host_blocks);
        let slots = (0..limits.max_num_seqs).map(|_| None).collect();
        Self {
            limits,
            num_host_blocks,
            cost,
            world,
            kv,
            slots,
            flights: VecDeque::new(),
            last_step: StepId(0),
        }
    }

    /// Everything at once; the real device's order of effects.
    fn execute(&mut self, plan: &SchedulerOutput) -> Result<Flight, String> {
        require!(plan.step > self.last_step, "step {} after step {}", plan.step, self.last_step);
        require!(
            self.flights.len() < self.limits.max_steps_in_flight as usize,
            "more than {} steps in flight",
            self.limits.max_steps_in_flight
        );
        require!(!plan.is_empty(), "an empty plan was submitted");
        self.last_step = plan.step;
        self.apply_diffs(plan)?;
        let tokens = plan.num_tokens();
        require!(tokens <= self.limits.max_num_batched_tokens, "{tokens} tokens are over the budget");
        require!(plan.scheduled.len() <= self.limits.max_num_seqs as usize, "more rows than slots");
        let touched = self.check_rows(plan)?;
        let mut output = ModelRunnerOutput { step: plan.step, ..ModelRunnerOutput::default() };
        for row in &plan.scheduled {
            self.compute_row(row, &mut output)?;
        }
        let copies = plan.copies_to_host.iter().chain(&plan.copies_to_device);
        let touched_on_host = copies.map(|copy| copy.host).collect();
        let done_at = self.finish_time(plan);
        Ok(Flight { step: plan.step, touched, touched_on_host, done_at, output })
    }

    fn finish_time(&self, plan: &SchedulerOutput) -> u64 {
        let start = self.flights.back().map_or(0, |flight| flight.done_at).max(lock(&self.world).now);
        let CostModel { fixed, per_token, per_seq, per_host_copy } = self.cost;
        let num_copies = (plan.copies_to_host.len() + plan.copies_to_device.len()) as u64;
        start
            + fixed
            + per_token * u64::from(plan.num_tokens())
            + per_seq * plan.scheduled.len() as u64
            + per_host_copy * num_copies
    }

    fn apply_diffs(&mut self, plan: &SchedulerOutput) -> Result<(), String> {
        for slot in &plan.freed {
            require!(self.slots[slot.0 as usize].take().is_some(), "slot {slot} was freed but is vacant");
        }
        for new in &plan.new {
            require!(self.slots[new.slot.0 as usize].is_none(), "slot {} is taken", new.slot);
            require!(new.block_tables.len() == 1, "one table per KV group");
            let salt = lock(&self.world).salts.get(&new.request).copied();
            let salt = salt.ok_or_else(|| format!("request {} is unknown", new.request))?;
            let fresh = (new.num_computed_tokens / self.limits.block_size) as usize;
            for &block in new.block_tables[0].get(fresh..).unwrap_or_default() {
                self.check_fresh(block)?;
            }
            self.slots[new.slot.0 as usize] = Some(Mirror::new(new, salt));
        }
        for grown in &plan.grown {
            self.check_fresh(grown.block)?;
            let Some(mirror) = &mut self.slots[grown.slot.0 as usize] else {
                return Err(format!("the table of vacant slot {} was grown", grown.slot));
            };
            mirror.table.push(grown.block);
        }
        self.move_between_tiers(plan)?;
        for &copy in &plan.block_copies {
            self.check_fresh(copy.dst)?;
            self.kv.copy(copy);
        }
        lock(&self.world).num_copies += plan.block_copies.len() as u64;
        Ok(())
    }

    /// Out, then in; within each list in reverse, since its order must not matter.
    fn move_between_tiers(&mut self, plan: &SchedulerOutput) -> Result<(), String> {
        let mut written = BTreeSet::new();
        for &copy in plan.copies_to_host.iter().rev() {
            let host = copy.host;
            require!(host.0 < self.num_host_blocks, "host block {host} does not exist");
            require!(copy.device.0 < self.limits.num_blocks, "block {} does not exist", copy.device);
            require!(written.insert(host), "host block {host} is written twice");
            for flight in &self.flights {
                require!(
                    !flight.touched_on_host.contains(&host),
                    "host block {host} is written while step {} is in flight",
                    flight.step
                );
            }
            self.kv.copy_to_host(copy)?;
        }
        let mut written = BTreeSet::new();
        for &copy in plan.copies_to_device.iter().rev() {
            require!(copy.host.0 < self.num_host_blocks, "host block {} does not exist", copy.host);
            require!(written.insert(copy.device), "block {} is written twice", copy.device);
            self.check_fresh(copy.device)?;
            self.kv.copy_to_device(copy);
        }
        let mut world = lock(&self.world);
        world.num_copies_to_host += plan.copies_to_host.len() as u64;
        world.num_copies_to_device += plan.copies_to_device.len() as u64;
        Ok(())
    }

    /// A block that a sequence gets to write must not belong to a step in flight.
    fn check_fresh(&self, block: BlockId) -> Result<(), String> {
        require!(block.0 < self.limits.num_blocks, "block {block} does not exist");
        for flight in &self.flights {
            require!(
                !flight.touched.contains(&block),
                "block {block} was given away while step {} is in flight",
                flight.step
            );
        }
        Ok(())
    }

    /// Proves every row's view before anything is written, and returns what the step touches.
    fn check_rows(&self, plan: &SchedulerOutput) -> Result<BTreeSet<BlockId>, String> {
        let mut touched: BTreeSet<BlockId> = plan.block_copies.iter().flat_map(|c| [c.src, c.dst]).collect();
        touched.extend(plan.copies_to_host.iter().chain(&plan.copies_to_device).map(|copy| copy.device));
        let holders = self.count_holders();
        let mut seen = BTreeSet::new();
        for row in &plan.scheduled {
            require!(seen.insert(row.slot), "slot {} is scheduled twice", row.slot);
            let mirror = self.mirror(row.slot)?;
            let name = mirror.request;
            let (start, end) = (row.num_computed_tokens, row.num_computed_tokens + row.num_new_tokens);
            require!(row.num_new_tokens > 0, "request {name}: an empty row");
            require!(
                start == mirror.num_computed_tokens,
                "request {name}: the row starts at {start}, not at {}",
                mirror.num_computed_tokens
            );
            let known = mirror.tokens.len() as u32;
            require!(end <= known, "request {name}: row {start}..{end} but only {known} tokens exist");
            require!(
                end < self.limits.max_model_len,
                "request {name}: row {start}..{end} leaves the context"
            );
            require!(
                row.sample == (end == known),
                "request {name}: sample = {} at {end} of {known}",
                row.sample
            );
            require!(!row.sample || row.logits != LogitRows::None, "request {name}: a sample without logits");
            let blocks = end.div_ceil(self.limits.block_size) as usize;
            require!(blocks <= mirror.table.len(), "request {name}: position {} has no block", end - 1);
            self.kv
                .verify(&mirror.table, &mirror.chain, start)
                .map_err(|e| format!("request {name}, row {start}..{end}: {e}"))?;
            let first_visible = (self.kv.first_visible(start) / self.limits.block_size) as usize;
            let first_written = (start / self.limits.block_size) as usize;
            for (at, &block) in mirror.table.iter().enumerate().take(blocks).skip(first_visible) {
                touched.insert(block);
                require!(
                    at < first_written || holders[block.0 as usize] == 1,
                    "request {name} writes block {block}, which {} sequences hold",
                    holders[block.0 as usize]
                );
            }
        }
        Ok(touched)
    }

    /// How many sequences in the batch can see each block.
    fn count_holders(&self) -> Vec<u32> {
        let mut holders = vec![0; self.limits.num_blocks as usize];
        for mirror in self.slots.iter().flatten() {
            let first = self.kv.first_visible(mirror.num_computed_tokens) / self.limits.block_size;
            for block in mirror.table.iter().skip(first as usize) {
                holders[block.0 as usize] += 1;
            }
        }
        holders
    }

    fn mirror(&self, slot: Slot) -> Result<&Mirror, String> {
        self.slots[slot.0 as usize].as_ref().ok_or_else(|| format!("vacant slot {slot} is scheduled"))
    }

    fn compute_row(&mut self, row: &Scheduled, output: &mut ModelRunnerOutput) -> Result<(), String> {
        let Some(mirror) = &mut self.slots[row.slot.0 as usize] else {
            return Err(format!("vacant slot {} is scheduled", row.slot));
        };
        let (start, end) = (row.num_computed_tokens, row.num_computed_tokens + row.num_new_tokens);
        for position in start..end {
            let prefix = mirror.chain[position as usize + 1];
            self.kv.set(&mirror.table, position, prefix);
            let next = position as usize + 1;
            if row.logits == LogitRows::All && next < mirror.tokens.len() {
                let logprobs = oracle::logprobs(prefix, mirror.tokens[next]);
                output.prompt_logprobs.push((row.slot, next as u32, logprobs));
            }
        }
        mirror.num_computed_tokens = end;
        if row.sample {
            let read = self.kv.get(&mirror.table, end - 1);
            let num_generated = end - mirror.prompt_len;
            let token =
                oracle::sample(read, mirror.seed, num_generated, &mirror.params, self.limits.vocab_size);
            let logprobs = mirror.params.logprobs.map(|_| oracle::logprobs(read, token));
            output.push_row(row.slot, &[token], [logprobs]);
            mirror.push(token);
        }
        Ok(())
    }

    fn record(&self, plan: &SchedulerOutput) {
        let mut world = lock(&self.world);
        world.num_steps += 1;
        world.record(plan.step.0);
        plan.freed.iter().for_each(|slot| world.record(u64::from(slot.0)));
        for new in &plan.new {
            world.record(new.request.0 << 32 | u64::from(new.slot.0) << 8 | u64::from(new.index));
            new.block_tables[0].iter().for_each(|block| world.record(u64::from(block.0)));
        }
        plan.grown
            .iter()
            .for_each(|grown| world.record(u64::from(grown.block.0) << 32 | u64::from(grown.slot.0)));
        plan.block_copies
            .iter()
            .for_each(|copy| world.record(u64::from(copy.src.0) << 32 | u64::from(copy.dst.0)));
        for copy in plan.copies_to_host.iter().chain(&plan.copies_to_device) {
            world.record(u64::from(copy.device.0) << 32 | u64::from(copy.host.0));
        }
        for row in &plan.scheduled {
            world.record(
                u64::from(row.slot.0) << 40 | u64::from(row.num_new_tokens) << 20 | u64::from(row.sample),
            );
        }
    }
}

impl Executor for SimExecutor {
    fn limits(&self) -> ExecutorLimits {
        self.limits.clone()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        self.record(&plan);
        let flight = self.execute(&plan).map_err(|violation| violated(&violation))?;
        self.flights.push_back(flight);
        Ok(plan.step)
    }

    fn sample(&mut self, step: StepId, _: &LateInputs) -> Result<(), ExecError> {
        if self.flights.back().is_some_and(|flight| flight.step == step) {
            return Ok(());
        }
        Err(violated(&format!("step {step} is sampled but was not the last one submitted")))
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        let flight = self.flights.pop_front().filter(|flight| flight.step == step);
        let Some(flight) = flight else {
            return Err(violated(&format!("step {step} is collected but is not the oldest in flight")));
        };
        let mut world = lock(&self.world);
        world.now = world.now.max(flight.done_at);
        let now = world.now;
        world.record(Micros(now).0);
        *out = flight.output;
        Ok(())
    }
}

fn violated(violation: &str) -> ExecError {
    ExecError { device: "sim".into(), message: violation.into() }
}
