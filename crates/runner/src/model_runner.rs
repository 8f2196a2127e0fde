//! One step, from a plan to its answer.
//!
//! `submit` brings the mirror up to date; the work is enqueued there, or, on a backend that computes at once, done in
//! `collect`. A step is a sequence of passes, nearly always one (see `pass.rs`).

use std::collections::VecDeque;
use std::sync::Arc;

use quire_backend::{Backend, BackendError, GraphKey, KvLayout};
use quire_core::{
    ExecError, Executor, ExecutorLimits, HostCopy, LateInputs, ModelRunnerOutput, SchedulerOutput, Shard,
    Slot, StepId,
};
use quire_model::Checkpoint;

use crate::decoder::{Decoder, PassKind};
use crate::error::PlanError;
use crate::input_batch::InputBatch;
use crate::load::load_decoder;
use crate::memory::kv_layout;
use crate::pass::{Cursor, Pass};
use crate::sharding::spec_of_rank;
use crate::workspace::{Workspace, WorkspaceShape};
use crate::{LoadProgress, MemoryPlan, RunnerConfig, RunnerError};

/// Steps of decoding alone: the same launches, on a number of rows that the backend rounds up as it likes.
const DECODE: GraphKey = GraphKey(0);
/// The same where a row has an adapter.
const DECODE_WITH_ADAPTERS: GraphKey = GraphKey(1);
/// With one step computing, another one ready behind it.
const PIPELINE: u32 = 2;
const NOT_SAMPLED: &str = "`sample` was not called for it";

/// A model on a device, with its KV cache and the mirrored batch.
pub struct ModelRunner<B: Backend> {
    pub(crate) backend: B,
    decoder: Decoder<B>,
    workspace: Workspace<B>,
    pub(crate) kv: B::Kv,
    pub(crate) batch: InputBatch,
    pass: Pass,
    pub(crate) limits: ExecutorLimits,
    pub(crate) memory: MemoryPlan,
    /// Of the device's cache.
    pub(crate) kv_layout: KvLayout,
    num_host_blocks: u32,
    /// Submitted and not collected, oldest first.
    in_flight: VecDeque<InFlight>,
    /// Lists of collected steps, to be used again.
    spare_sampled: Vec<Vec<(Slot, u32)>>,
    late: LateInputs,
    /// [`Backend::INLINE`]: the work is done in `collect`.
    inline: bool,
}

/// A step between `submit` and `collect`.
struct InFlight {
    plan: Arc<SchedulerOutput>,
    /// Where the next pass begins.
    cursor: Cursor,
    is_sampled: bool,
    /// Who gets the tokens: see [`InputBatch::expect_sampled`].
    sampled: Vec<(Slot, u32)>,
    /// The answer, if it had to be fetched before it is collected.
    answer: Option<ModelRunnerOutput>,
}

impl<B: Backend> ModelRunner<B> {
    /// Loads the weights and allocates everything else.
    ///
    /// # Errors
    /// A limit makes no sense, the checkpoint cannot be read, or the device cannot hold it.
    pub fn load(
        backend: B,
        checkpoint: &Checkpoint,
        config: &RunnerConfig,
        progress: impl FnMut(LoadProgress),
    ) -> Result<Self, RunnerError> {
        Self::load_shard(backend, checkpoint, config, Shard::WHOLE, progress)
    }

    /// The same for one rank of a tensor-parallel group, which `backend` must be a member of. The ranks of a group run the
    /// same steps at the same time: see [`crate::TensorParallel`].
    ///
    /// # Errors
    /// As for [`Self::load`], or the model cannot be split over so many ranks.
    pub fn load_shard(
        mut backend: B,
        checkpoint: &Checkpoint,
        config: &RunnerConfig,
        shard: Shard,
        mut progress: impl FnMut(LoadProgress),
    ) -> Result<Self, RunnerError> {
        config.validate()?;
        let spec = &spec_of_rank(checkpoint.spec(), config.quant, shard.world)?;
        let decoder = load_decoder(&mut backend, checkpoint, config, shard, &mut progress)?;
        let workspace = Workspace::new(&mut backend, &WorkspaceShape::new(spec, config, shard))?;
        let kv_layout = kv_layout(spec, config);
        let kv = backend.alloc_kv(&kv_layout)?;
        let kv_groups: Vec<_> = spec.kv_groups().iter().map(|group| group.window).collect();
        Ok(Self {
            batch: InputBatch::new(config, kv_groups.len(), checkpoint.adapters().len()),
            pass: Pass::new(config),
            limits: ExecutorLimits {
                block_size: config.block_size,
                num_blocks: config.num_blocks,
                max_num_seqs: config.max_num_seqs,
                max_num_batched_tokens: config.max_num_batched_tokens,
                max_model_len: config.max_model_len,
                vocab_size: spec.vocab_size as u32,
                // More than one needs a backend that feeds its own sampled tokens.
                max_steps_in_flight: if B::INLINE { 1 } else { PIPELINE },
                kv_groups,
            },
            memory: MemoryPlan::of_checkpoint(checkpoint, config, shard.world)?,
            kv_layout,
            num_host_blocks: 0,
            in_flight: VecDeque::with_capacity(PIPELINE as usize),
            spare_sampled: Vec::with_capacity(PIPELINE as usize),
            late: LateInputs::default(),
            inline: B::INLINE,
            backend,
            decoder,
            workspace,
            kv,
        })
    }

    /// Puts `num_blocks` blocks in host memory behind the KV cache; plans may copy to and from them.
    ///
    /// # Errors
    /// The backend has no host tier, or there is not so much memory.
    pub fn with_host_blocks(mut self, num_blocks: u32) -> Result<Self, RunnerError> {
        let layout = KvLayout { num_blocks, ..self.kv_layout.clone() };
        self.backend.alloc_host_kv(&mut self.kv, &layout)?;
        self.num_host_blocks = num_blocks;
        Ok(self)
    }

    /// What was planned for memory at start.
    pub fn memory_plan(&self) -> &MemoryPlan {
        &self.memory
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The logits of the last pass, `[logit_rows, vocab_size]`, for tests and comparisons. Call it after `collect`;
    /// rows that were sampled with penalties or masks may hold the changed values.
    ///
    /// # Errors
    /// The device failed.
    pub fn read_logits(&mut self) -> Result<Vec<f32>, ExecError> {
        let rows = self.pass.num_logit_rows();
        self.backend.read(&self.workspace.logits, rows).map_err(|error| self.backend_failed(error))
    }

    /// Prepares and runs the next pass of the step, up to its logits. Returns where the one after it begins.
    fn forward_pass(&mut self, plan: &SchedulerOutput, cursor: Cursor) -> Result<Cursor, ExecError> {
        let next = self.pass.fill(plan, &self.batch, cursor).map_err(|error| self.bad_plan(&error))?;
        let is_first = cursor == Cursor::default();
        self.enqueue_forward(plan, is_first).map_err(|error| self.backend_failed(error))?;
        Ok(next)
    }

    fn enqueue_forward(&mut self, plan: &SchedulerOutput, is_first: bool) -> Result<(), BackendError> {
        let input = self.pass.as_step_input(plan.step, self.batch.seqs());
        let has_copies = !input.block_copies.is_empty();
        let has_tokens = input.num_tokens() > 0;
        let has_adapters = self.pass.has_adapters();
        let kind = PassKind { wants_logits: !input.logit_rows.is_empty(), has_adapters };
        let decode = if has_adapters { DECODE_WITH_ADAPTERS } else { DECODE };
        let key = self.pass.is_decode().then_some(decode);
        self.backend.prepare(&input)?;
        let (to_host, to_device) = (&plan.copies_to_host, &plan.copies_to_device);
        if is_first && !(to_host.is_empty() && to_device.is_empty()) {
            self.backend.copy_host_blocks(&mut self.kv, to_host, to_device)?;
        }
        if has_copies {
            self.backend.copy_blocks(&mut self.kv)?;
        }
        if !has_tokens {
            return Ok(());
        }
        let Self { backend, decoder, workspace, kv, .. } = self;
        backend.run(key, |backend| decoder.forward(backend, workspace, kv, kind))
    }

    fn sample_pass(&mut self) -> Result<(), ExecError> {
        let logits = &mut self.workspace.logits;
        let sampled = self.backend.sample(logits, self.batch.seqs(), &self.late);
        sampled.map_err(|error| self.backend_failed(error))
    }

    /// Runs what is left of a step, and waits for it.
    fn finish(&mut self, step: &mut InFlight, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        let mut is_enqueued = !self.inline;
        loop {
            if !is_enqueued {
                step.cursor = self.forward_pass(&step.plan, step.cursor)?;
                self.sample_pass()?;
            }
            self.backend.fetch(step.plan.step, out).map_err(|error| self.backend_failed(error))?;
            is_enqueued = false;
            if step.cursor.at_end(&step.plan) {
                return Ok(());
            }
        }
    }

    /// A step of several passes (see `pass.rs`) must be through before another one is enqueued behind it, which may
    /// need what its last pass computes. Rare, so the wait does not matter.
    fn finish_passes(&mut self) -> Result<(), ExecError> {
        let Some(mut step) = self.in_flight.pop_back() else { return Ok(()) };
        if !step.cursor.at_end(&step.plan) && !self.inline {
            if !step.is_sampled {
                return Err(self.bad_plan(&PlanError::OutOfOrder(step.plan.step, NOT_SAMPLED)));
            }
            let mut answer = ModelRunnerOutput { step: step.plan.step, ..Default::default() };
            self.finish(&mut step, &mut answer)?;
            step.answer = Some(answer);
        }
        self.in_flight.push_back(step);
        Ok(())
    }

    fn in_flight(&mut self, step: StepId) -> Result<&mut InFlight, PlanError> {
        let found = self.in_flight.iter_mut().find(|in_flight| in_flight.plan.step == step);
        found.ok_or(PlanError::OutOfOrder(step, "was not submitted"))
    }

    pub(crate) fn bad_plan(&self, error: &PlanError) -> ExecError {
        ExecError { device: self.backend.name(), message: format!("inconsistent plan: {error}") }
    }

    pub(crate) fn backend_failed(&self, error: BackendError) -> ExecError {
        match error {
            BackendError::Device(error) => error,
            other => ExecError { device: self.backend.name(), message: other.to_string() },
        }
    }
}

fn check_host_copies(plan: &SchedulerOutput, num_blocks: u32, num_host_blocks: u32) -> Result<(), PlanError> {
    let mut copies = plan.copies_to_host.iter().chain(&plan.copies_to_device);
    let outside = |copy: &&HostCopy| copy.device.0 >= num_blocks || copy.host.0 >= num_host_blocks;
    copies.find(outside).map_or(Ok(()), |&copy| {
        Err(PlanError::BadHostCopy { device: copy.device, host: copy.host, num_blocks, num_host_blocks })
    })
}

impl<B: Backend> Executor for ModelRunner<B> {
    fn limits(&self) -> ExecutorLimits {
        self.limits.clone()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        let step = plan.step;
        if self.in_flight.len() >= self.limits.max_steps_in_flight as usize {
            return Err(self.bad_plan(&PlanError::OutOfOrder(step, "the step before was not collected")));
        }
        self.finish_passes()?;
        let (device, host) = (self.limits.num_blocks, self.num_host_blocks);
        let applied = check_host_copies(&plan, device, host)
            .and_then(|()| self.batch.apply(&plan))
            .and_then(|()| self.pass.check(&plan, &self.batch));
        applied.map_err(|error| self.bad_plan(&error))?;
        let mut cursor = Cursor::default();
        if !self.inline {
            cursor = self.forward_pass(&plan, cursor)?;
        }
        let mut sampled = self.spare_sampled.pop().unwrap_or_default();
        sampled.clear();
        self.batch.expect_sampled(&plan, &mut sampled);
        self.in_flight.push_back(InFlight { plan, cursor, is_sampled: false, sampled, answer: None });
        Ok(step)
    }

    fn sample(&mut self, step: StepId, late: &LateInputs) -> Result<(), ExecError> {
        match self.in_flight(step) {
            Ok(in_flight) => in_flight.is_sampled = true,
            Err(error) => return Err(self.bad_plan(&error)),
        }
        self.late.masks.clone_from(&late.masks);
        if self.inline { Ok(()) } else { self.sample_pass() }
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        let refuse = |why| PlanError::OutOfOrder(step, why);
        match self.in_flight.front() {
            Some(oldest) if oldest.plan.step == step && oldest.is_sampled => {}
            Some(oldest) if oldest.plan.step == step => return Err(self.bad_plan(&refuse(NOT_SAMPLED))),
            Some(_) if self.in_flight.iter().any(|in_flight| in_flight.plan.step == step) => {
                return Err(self.bad_plan(&refuse("is not the oldest one submitted")));
            }
            _ => return Err(self.bad_plan(&refuse("was not submitted"))),
        }
        let mut in_flight = self.in_flight.pop_front().expect("it was found just now");
        out.clear();
        out.step = step;
        match in_flight.answer.take() {
            Some(answer) => *out = answer,
            None => self.finish(&mut in_flight, out)?,
        }
        let appended = self.batch.append_sampled(out, &in_flight.sampled);
        self.spare_sampled.push(in_flight.sampled);
        appended.map_err(|error| self.bad_plan(&error))
    }
}

#[cfg(test)]
mod tests {
    use quire_backend::reference::RefBackend;
    use quire_core::{
        BlockId, DType, LogitRows, NewSeq, QuantFormat, RequestId, SamplingParams, Scheduled, Slot, TokenId,
    };
    use quire_model::ModelSpec;

    use super::*;

    fn runner() -> ModelRunner<RefBackend> {
        let spec = ModelSpec::from_config_json(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32,
                "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
                "max_position_embeddings": 128, "tie_word_embeddings": true}"#,
        );
        let config = RunnerConfig {
            max_num_seqs: 2,
            max_num_batched_tokens: 128,
            max_model_len: 128,
            block_size: 128,
            num_blocks: 2,
            kv_dtype: DType::F32,
            quant: QuantFormat::None,
        };
        ModelRunner::load(RefBackend::new(), &Checkpoint::dummy(spec.unwrap(), 1), &config, |_| {}).unwrap()
    }

    /// Two prompts with all their log-probabilities in one step, then two steps of decoding.
    fn plans() -> Vec<SchedulerOutput> {
        let params =
            SamplingParams { prompt_logprobs: Some(2), logprobs: Some(2), ..SamplingParams::greedy(9) };
        let new = [70, 40].into_iter().enumerate().map(|(slot, len)| NewSeq {
            slot: Slot(slot as u32),
            request: RequestId(0),
            index: 0,
            tokens: (0..len as TokenId).map(|i| (i * i + 3) % 50).collect(),
            prompt_len: len,
            params: Arc::new(params.clone()),
            adapter: None,
            seed: 0,
            block_tables: vec![vec![BlockId(slot as u32)]],
            num_computed_tokens: 0,
        });
        let row = |slot, num_computed_tokens, num_new_tokens, logits| Scheduled {
            slot: Slot(slot),
            num_computed_tokens,
            num_new_tokens,
            logits,
            sample: true,
        };
        let step = |step, scheduled| SchedulerOutput { step: StepId(step), scheduled, ..Default::default() };
        let mut first = step(0, vec![row(0, 0, 70, LogitRows::All), row(1, 0, 40, LogitRows::All)]);
        first.new = new.collect();
        let decode =
            |start: u32| vec![row(0, 70 + start, 1, LogitRows::Last), row(1, 40 + start, 1, LogitRows::Last)];
        vec![first, step(1, decode(0)), step(2, decode(1))]
    }

    #[test]
    fn work_enqueued_in_submit_gives_what_work_in_collect_gives() {
        let (mut inline, mut enqueued) = (runner(), runner());
        assert!(inline.inline);
        enqueued.inline = false;
        let collect = |runner: &mut ModelRunner<RefBackend>, plan| {
            let mut out = ModelRunnerOutput::default();
            let step = runner.submit(Arc::new(plan)).unwrap();
            runner.sample(step, &LateInputs::default()).unwrap();
            runner.collect(step, &mut out).unwrap();
            out
        };
        for (a, b) in plans().into_iter().zip(plans()) {
            let (a, b) = (collect(&mut inline, a), collect(&mut enqueued, b));
            assert_eq!(a.rows.len(), 2);
            assert_eq!((&a.rows, &a.tokens, &a.logprobs), (&b.rows, &b.tokens, &b.logprobs));
            assert_eq!(a.prompt_logprobs, b.prompt_logprobs);
            assert!(a.step > StepId(0) || a.prompt_logprobs.len() == 69 + 39, "two passes");
        }
    }
}
