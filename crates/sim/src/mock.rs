//! An executor for live servers without a model (`--executor mock`): valid random tokens, at a pace of your choice.
//!
//! It exercises and measures everything around the model. Tokens depend on seed and position only, so that a request
//! gets the same tokens whoever else is served.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_core::{
    ExecError, Executor, ExecutorLimits, LateInputs, LogitRows, ModelRunnerOutput, SamplingParams,
    SchedulerOutput, StepId, TokenId, TokenLogprobs,
};

use crate::oracle;
use crate::rng::mix;

/// How long a step takes: `fixed + per_token * tokens`. Zero: no sleeping at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MockTiming {
    /// Of any step.
    pub fixed: Duration,
    /// Of each token in it.
    pub per_token: Duration,
}

#[derive(Clone, Debug)]
struct MockSeq {
    seed: u64,
    prompt_len: u32,
    params: Arc<SamplingParams>,
    tokens: Arc<[TokenId]>,
}

#[derive(Debug)]
struct MockStep {
    done_at: Instant,
    output: ModelRunnerOutput,
}

/// See the module's page.
#[derive(Debug)]
pub struct MockExecutor {
    limits: ExecutorLimits,
    timing: MockTiming,
    slots: Vec<Option<MockSeq>>,
    in_flight: VecDeque<MockStep>,
    spare: Vec<ModelRunnerOutput>,
}

impl MockExecutor {
    /// An executor that offers `limits`.
    pub fn new(limits: ExecutorLimits, timing: MockTiming) -> Self {
        let slots = vec![None; limits.max_num_seqs as usize];
        Self { limits, timing, slots, in_flight: VecDeque::new(), spare: Vec::new() }
    }

    fn run(&self, plan: &SchedulerOutput, output: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        output.clear();
        output.step = plan.step;
        for row in &plan.scheduled {
            let seq = self.slots.get(row.slot.0 as usize).and_then(Option::as_ref);
            let seq = seq.ok_or_else(|| ExecError {
                device: "mock".into(),
                message: format!("step {} schedules vacant slot {}", plan.step, row.slot),
            })?;
            let end = row.num_computed_tokens + row.num_new_tokens;
            if row.logits == LogitRows::All {
                for position in row.num_computed_tokens + 1..(end + 1).min(seq.prompt_len) {
                    let token = seq.tokens[position as usize];
                    let logprobs =
                        self.logprobs(seq, position, token, seq.params.prompt_logprobs.unwrap_or(0));
                    output.prompt_logprobs.push((row.slot, position, logprobs));
                }
            }
            if row.sample {
                let prefix = mix(u64::from(end));
                let token = oracle::sample(
                    prefix,
                    seq.seed,
                    end - seq.prompt_len,
                    &seq.params,
                    self.limits.vocab_size,
                );
                let logprobs = seq.params.logprobs.map(|k| self.logprobs(seq, end, token, k));
                output.push_row(row.slot, &[token], [logprobs]);
            }
        }
        Ok(())
    }

    /// The token itself is the most likely one; the others follow it.
    fn logprobs(&self, seq: &MockSeq, position: u32, token: TokenId, k: u32) -> TokenLogprobs {
        let logprob = oracle::logprobs(mix(seq.seed ^ u64::from(position)), token).logprob / 16.0;
        let others = (0..k).map(|i| ((token + i) % self.limits.vocab_size, logprob - i as f32));
        TokenLogprobs { logprob, rank: 1, top: others.collect() }
    }
}

impl Executor for MockExecutor {
    fn limits(&self) -> ExecutorLimits {
        self.limits.clone()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        for slot in &plan.freed {
            self.slots[slot.0 as usize] = None;
        }
        for new in &plan.new {
            self.slots[new.slot.0 as usize] = Some(MockSeq {
                seed: new.seed,
                prompt_len: new.prompt_len,
                params: new.params.clone(),
                tokens: new.tokens.clone(),
            });
        }
        let mut output = self.spare.pop().unwrap_or_default();
        self.run(&plan, &mut output)?;
        // Steps run one after the other, as on a device.
        let start = self.in_flight.back().map_or_else(Instant::now, |step| step.done_at.max(Instant::now()));
        let done_at = start + self.timing.fixed + self.timing.per_token * plan.num_tokens();
        self.in_flight.push_back(MockStep { done_at, output });
        Ok(plan.step)
    }

    fn sample(&mut self, _: StepId, _: &LateInputs) -> Result<(), ExecError> {
        Ok(())
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        let done = self.in_flight.pop_front().filter(|done| done.output.step == step);
        let Some(mut done) = done else {
            let message = format!("step {step} is not the oldest in flight");
            return Err(ExecError { device: "mock".into(), message });
        };
        let left = done.done_at.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            std::thread::sleep(left);
        }
        std::mem::swap(out, &mut done.output);
        self.spare.push(done.output);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use quire_core::{BlockHasher, CacheSalt, Micros, Request, RequestId, TenantId};
    use quire_engine::EngineCore;
    use quire_scheduler::{SchedulerConfig, SeqEventKind};

    use super::*;

    fn limits(max_steps_in_flight: u32) -> ExecutorLimits {
        ExecutorLimits {
            block_size: 16,
            num_blocks: 64,
            max_num_seqs: 8,
            max_num_batched_tokens: 32,
            max_model_len: 256,
            vocab_size: 300,
            max_steps_in_flight,
            kv_groups: vec![None],
        }
    }

    /// Tokens of request 1, with `others` beside it.
    fn tokens(depth: u32, others: u64, timing: MockTiming) -> Vec<TokenId> {
        let config = SchedulerConfig::new(limits(depth), BlockHasher::new((1, 2), 16));
        let mut core = EngineCore::new(config, Box::new(MockExecutor::new(limits(depth), timing)));
        for id in 1..=others + 1 {
            let params = SamplingParams {
                seed: id,
                logprobs: Some(2),
                prompt_logprobs: Some(1),
                ..SamplingParams::greedy(20)
            };
            core.add(Request {
                id: RequestId(id),
                prompt: (0..40).collect(),
                block_hashes: Arc::from([]),
                salt: CacheSalt(0),
                adapter: None,
                params: Arc::new(params),
                tenant: TenantId(0),
                priority: 0,
                arrival: Micros(0),
                deadline: None,
            })
            .unwrap();
        }
        let (mut tokens, mut num_prompt_logprobs) = (Vec::new(), 0);
        while core.has_work() {
            core.step(Micros(0)).unwrap();
            for event in core.events().iter().filter(|event| event.request == RequestId(1)) {
                match event.kind {
                    SeqEventKind::Tokens { row, .. } => {
                        let row = &core.output().rows[row as usize];
                        tokens.extend_from_slice(core.output().tokens_of(row));
                        assert_eq!(core.output().logprobs_of(row)[0].as_ref().unwrap().top.len(), 2);
                    }
                    SeqEventKind::PromptLogprobs { .. } => num_prompt_logprobs += 1,
                    _ => {}
                }
            }
        }
        assert_eq!(num_prompt_logprobs, 39);
        tokens
    }

    #[test]
    fn tokens_do_not_depend_on_company_depth_or_pace() {
        let alone = tokens(1, 0, MockTiming::default());
        assert_eq!(alone.len(), 20);
        assert!(alone.iter().all(|&token| token < 300));
        assert_eq!(alone, tokens(1, 11, MockTiming::default()));
        assert_eq!(alone, tokens(2, 11, MockTiming::default()));
        let slow = MockTiming { fixed: Duration::from_millis(1), per_token: Duration::from_micros(10) };
        let started = Instant::now();
        assert_eq!(alone, tokens(2, 0, slow));
        assert!(
            started.elapsed() >= Duration::from_millis(21),
            "40 prompt tokens take 2 steps, then 19 decodes"
        );
    }
}
