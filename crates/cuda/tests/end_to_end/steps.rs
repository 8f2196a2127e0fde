//! Runs a fixed set of sequences through a runner: one step of prefill for all, then decoding.

use std::sync::Arc;

use quire_backend::Backend;
use quire_core::{
    AdapterId, BlockId, ExecError, Executor, GrownTable, LateInputs, LogitRows, ModelRunnerOutput, NewSeq,
    RequestId, SamplingParams, Scheduled, SchedulerOutput, Slot, StepId, TokenId,
};
use quire_runner::{ModelRunner, TensorParallel};

use crate::host::Spent;

/// What steps run on.
pub trait Runner: Executor {
    /// Of the last pass.
    fn logits(&mut self) -> Result<Vec<f32>, ExecError>;
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn logits(&mut self) -> Result<Vec<f32>, ExecError> {
        self.read_logits()
    }
}

impl Runner for TensorParallel {
    fn logits(&mut self) -> Result<Vec<f32>, ExecError> {
        let mut all = self.read_logits()?;
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(all.iter().all(|logits| bits(logits) == bits(&all[0])), "ranks differ");
        Ok(all.swap_remove(0))
    }
}

/// A runner and its sequences. Sequence `s` lives in slot `s`.
pub struct Steps<R> {
    runner: R,
    prompts: Vec<Vec<TokenId>>,
    params: Vec<Arc<SamplingParams>>,
    outputs: Vec<Vec<TokenId>>,
    /// Of each sequence.
    pub adapters: Vec<Option<AdapterId>>,
    /// Tokens scheduled so far.
    scheduled: Vec<usize>,
    blocks: Vec<usize>,
    next_block: u32,
    next_step: u64,
    block_size: usize,
    /// What this thread spent in the runner.
    pub spent: Spent,
    /// Reused, as the engine does.
    out: ModelRunnerOutput,
    /// Sequences whose last token was replaced: they enter anew.
    forced: Vec<usize>,
}

impl<R: Runner> Steps<R> {
    pub fn new(runner: R, prompts: Vec<Vec<TokenId>>, params: &SamplingParams) -> Self {
        let n = prompts.len();
        let seeded = |s: usize| Arc::new(SamplingParams { seed: params.seed + s as u64, ..params.clone() });
        Self {
            block_size: runner.limits().block_size as usize,
            runner,
            params: (0..n).map(seeded).collect(),
            outputs: vec![Vec::new(); n],
            adapters: vec![None; n],
            scheduled: vec![0; n],
            blocks: vec![0; n],
            next_block: 0,
            next_step: 0,
            spent: Spent::default(),
            out: ModelRunnerOutput::default(),
            forced: Vec::new(),
            prompts,
        }
    }

    /// The only sequence takes the seed that it has as number `s`.
    pub fn reseed(&mut self, s: u64) {
        let params = &*self.params[0];
        self.params[0] = Arc::new(SamplingParams { seed: params.seed + s, ..params.clone() });
    }

    pub fn outputs(&self) -> Vec<Vec<TokenId>> {
        self.outputs.clone()
    }

    pub fn last_token(&self, s: usize) -> TokenId {
        *self.outputs[s].last().expect("a step was made")
    }

    /// Goes on as if this had been sampled last: the sequence comes back with all its tokens, as after a preemption.
    pub fn force(&mut self, s: usize, token: TokenId) {
        let last = self.outputs[s].last_mut().expect("a step was made");
        if *last != token {
            *last = token;
            self.forced.push(s);
        }
    }

    /// Only the first `count` sequences go on.
    pub fn keep(&mut self, count: usize) {
        self.prompts.truncate(count);
        self.outputs.truncate(count);
    }

    /// `[sequences, vocab]` of the last step.
    pub fn logits(&mut self) -> Vec<f32> {
        self.runner.logits().expect("the device lives")
    }

    pub fn into_runner(self) -> R {
        self.runner
    }

    pub fn step(&mut self) {
        self.try_step().expect("the device lives");
    }

    /// One step, waited for.
    pub fn try_step(&mut self) -> Result<(), ExecError> {
        let step = self.submit()?;
        self.collect(step)
    }

    pub fn pipelined(&mut self, count: usize) {
        self.try_pipelined(count).expect("the device lives");
    }

    /// `count` steps, each submitted before the one before it is collected.
    pub fn try_pipelined(&mut self, count: usize) -> Result<(), ExecError> {
        let mut before = None;
        for _ in 0..count {
            let step = self.submit()?;
            if let Some(before) = before.replace(step) {
                self.collect(before)?;
            }
        }
        before.map_or(Ok(()), |step| self.collect(step))
    }

    fn submit(&mut self) -> Result<StepId, ExecError> {
        let step = StepId(self.next_step);
        self.next_step += 1;
        let mut plan = SchedulerOutput { step, ..SchedulerOutput::default() };
        for s in std::mem::take(&mut self.forced) {
            plan.freed.push(Slot(s as u32));
            self.scheduled[s] = 0;
            self.blocks[s] = 0;
        }
        for s in 0..self.prompts.len() {
            self.plan(s, &mut plan);
        }
        let (plan, late, start) = (Arc::new(plan), LateInputs::default(), Spent::by_now());
        self.runner.submit(plan)?;
        self.runner.sample(step, &late)?;
        self.spent.add_since(start);
        Ok(step)
    }

    fn plan(&mut self, s: usize, plan: &mut SchedulerOutput) {
        let slot = Slot(s as u32);
        let start = self.scheduled[s];
        let is_new = start == 0;
        let known = self.prompts[s].len() + self.outputs[s].len();
        let count = if is_new { known } else { 1 };
        let mut table = Vec::new();
        while self.blocks[s] * self.block_size < start + count {
            table.push(BlockId(self.next_block % self.runner.limits().num_blocks));
            self.next_block += 1;
            self.blocks[s] += 1;
        }
        if is_new {
            plan.new.push(NewSeq {
                slot,
                request: RequestId(s as u64),
                index: 0,
                tokens: self.prompts[s].iter().chain(&self.outputs[s]).copied().collect(),
                prompt_len: self.prompts[s].len() as u32,
                params: self.params[s].clone(),
                adapter: self.adapters[s],
                seed: self.params[s].seed,
                block_tables: vec![table],
                num_computed_tokens: 0,
            });
        } else {
            plan.grown.extend(table.into_iter().map(|block| GrownTable { slot, group: 0, block }));
        }
        plan.scheduled.push(Scheduled {
            slot,
            num_computed_tokens: start as u32,
            num_new_tokens: count as u32,
            logits: LogitRows::Last,
            sample: true,
        });
        self.scheduled[s] = start + count;
    }

    fn collect(&mut self, step: StepId) -> Result<(), ExecError> {
        let start = Spent::by_now();
        self.runner.collect(step, &mut self.out)?;
        self.spent.add_since(start);
        assert_eq!(self.out.rows.len(), self.prompts.len());
        for row in &self.out.rows {
            self.outputs[row.slot.0 as usize].extend_from_slice(self.out.tokens_of(row));
        }
        Ok(())
    }
}
