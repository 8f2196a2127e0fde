//! A scheduler of no intelligence: does to an executor exactly what a test asks for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use quire_backend::reference::RefBackend;
use quire_core::{
    AdapterId, BlockCopy, BlockId, DType, Executor, GrownTable, LateInputs, LogitRows, ModelRunnerOutput,
    NewSeq, QuantFormat, RequestId, SamplingParams, Scheduled, SchedulerOutput, Slot, StepId, TokenId,
    TokenLogprobs,
};
use quire_cpu::{CpuBackend, CpuConfig};
use quire_model::Checkpoint;
use quire_runner::{ModelRunner, RunnerConfig};

/// What the same tests run on.
pub trait TestBackend: Executor {
    const NAME: &'static str;

    /// Whether the model can be split so; everything else runs every model.
    fn takes(_: &Checkpoint) -> bool {
        true
    }

    fn load(checkpoint: &Checkpoint, config: &RunnerConfig) -> Self;

    /// Of the last pass.
    fn logits(&mut self) -> Vec<f32>;
}

impl TestBackend for ModelRunner<RefBackend> {
    const NAME: &'static str = "reference";

    fn load(checkpoint: &Checkpoint, config: &RunnerConfig) -> Self {
        Self::load(RefBackend::new(), checkpoint, config, |_| {}).unwrap()
    }

    fn logits(&mut self) -> Vec<f32> {
        self.read_logits().unwrap()
    }
}

impl TestBackend for ModelRunner<CpuBackend> {
    const NAME: &'static str = "cpu";

    fn load(checkpoint: &Checkpoint, config: &RunnerConfig) -> Self {
        Self::load(cpu(), checkpoint, config, |_| {}).unwrap()
    }

    fn logits(&mut self) -> Vec<f32> {
        self.read_logits().unwrap()
    }
}

/// With another number of threads each time, which must not show anywhere.
pub fn cpu() -> CpuBackend {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let threads = 1 + MADE.fetch_add(1, Ordering::Relaxed) % 3;
    CpuBackend::new(CpuConfig { threads, ..CpuConfig::default() }).unwrap()
}

/// Limits that fit the small models.
pub fn config(max_model_len: u32, block_size: u32) -> RunnerConfig {
    RunnerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 512,
        max_model_len,
        block_size,
        num_blocks: 8 * max_model_len.div_ceil(block_size),
        kv_dtype: DType::F32,
        quant: QuantFormat::None,
    }
}

/// Greedy, with the log-probabilities of every token, prompt included.
pub fn greedy() -> Arc<SamplingParams> {
    let params =
        SamplingParams { prompt_logprobs: Some(1), logprobs: Some(1), ..SamplingParams::greedy(1000) };
    Arc::new(params)
}

/// A first step that samples after a prompt of so many tokens, in blocks of 16.
pub fn first_step(len: usize) -> SchedulerOutput {
    let new = NewSeq {
        slot: Slot(0),
        request: RequestId(0),
        index: 0,
        tokens: (0..len as TokenId).collect(),
        prompt_len: len as u32,
        params: Arc::new(SamplingParams::greedy(8)),
        adapter: None,
        seed: 0,
        block_tables: vec![(0..len.div_ceil(16) as u32).map(BlockId).collect()],
        num_computed_tokens: 0,
    };
    let row = Scheduled {
        slot: Slot(0),
        num_computed_tokens: 0,
        num_new_tokens: len as u32,
        logits: LogitRows::Last,
        sample: true,
    };
    SchedulerOutput { new: vec![new], scheduled: vec![row], ..SchedulerOutput::default() }
}

/// A sequence as the driver keeps it.
#[derive(Debug)]
pub struct Seq {
    pub slot: Slot,
    /// Prompt, then output.
    pub tokens: Vec<TokenId>,
    pub prompt_len: usize,
    pub computed: usize,
    blocks: Vec<BlockId>,
    params: Arc<SamplingParams>,
    pub adapter: Option<AdapterId>,
    is_new: bool,
    /// By position.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// From this position on every token has a log-probability.
    pub logprobs_from: usize,
}

impl Seq {
    /// What was generated.
    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len..]
    }

    /// Tokens not computed yet.
    pub fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

/// Drives one executor.
pub struct Driver<B> {
    runner: B,
    block_size: usize,
    step: u64,
    pub seqs: Vec<Seq>,
    free_slots: Vec<Slot>,
    /// Scattered, so that no two blocks of a sequence are neighbours by plan.
    free_blocks: Vec<BlockId>,
    freed: Vec<Slot>,
    copies: Vec<BlockCopy>,
    /// For the sampler, in every step.
    pub late: LateInputs,
    out: ModelRunnerOutput,
}

impl<B: TestBackend> Driver<B> {
    pub fn new(checkpoint: &Checkpoint, config: &RunnerConfig) -> Self {
        Self::on(B::load(checkpoint, config), config)
    }

    /// On this one.
    pub fn on(runner: B, config: &RunnerConfig) -> Self {
        let scattered = |i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        let mut free_blocks: Vec<_> = (0..config.num_blocks).map(BlockId).collect();
        free_blocks.sort_by_key(|block| scattered(u64::from(block.0) + 1));
        Self {
            runner,
            block_size: config.block_size as usize,
            step: 0,
            seqs: Vec::new(),
            free_slots: (0..config.max_num_seqs).map(Slot).collect(),
            free_blocks,
            freed: Vec::new(),
            copies: Vec::new(),
            late: LateInputs::default(),
            out: ModelRunnerOutput::default(),
        }
    }

    /// A sequence that starts from nothing.
    pub fn add(&mut self, prompt: &[TokenId], params: &Arc<SamplingParams>) -> usize {
        self.seqs.push(Seq {
            slot: self.free_slots.pop().unwrap(),
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            computed: 0,
            blocks: Vec::new(),
            params: params.clone(),
            adapter: None,
            is_new: true,
            logprobs: vec![None; prompt.len()],
            logprobs_from: if params.prompt_logprobs.is_some() { 1 } else { prompt.len() },
        });
        self.seqs.len() - 1
    }

    /// A sequence that finds the first `num_blocks` blocks of another one in the cache.
    pub fn add_with_prefix(&mut self, prompt: &[TokenId], of: usize, num_blocks: usize) -> usize {
        let shared = &self.seqs[of];
        let (blocks, params) = (shared.blocks[..num_blocks].to_vec(), shared.params.clone());
        let computed = num_blocks * self.block_size;
        assert_eq!(prompt[..computed], shared.tokens[..computed]);
        assert!(computed <= shared.computed && computed < prompt.len());
        self.add_computed(prompt, &params, blocks, computed)
    }

    /// A second continuation of a computed prompt: full blocks are shared, the partial one is copied.
    pub fn fork(&mut self, of: usize) -> usize {
        let parent = &self.seqs[of];
        let prompt = parent.tokens[..parent.prompt_len].to_vec();
        let computed = prompt.len() - 1;
        let mut blocks = parent.blocks[..computed.div_ceil(self.block_size)].to_vec();
        let params = parent.params.clone();
        if !computed.is_multiple_of(self.block_size) {
            let src = *blocks.last().unwrap();
            let dst = self.free_blocks.pop().unwrap();
            self.copies.push(BlockCopy { group: 0, src, dst });
            *blocks.last_mut().unwrap() = dst;
        }
        self.add_computed(&prompt, &params, blocks, computed)
    }

    fn add_computed(
        &mut self,
        prompt: &[TokenId],
        params: &Arc<SamplingParams>,
        blocks: Vec<BlockId>,
        computed: usize,
    ) -> usize {
        let seq = self.add(prompt, params);
        let state = &mut self.seqs[seq];
        (state.blocks, state.computed) = (blocks, computed);
        state.logprobs_from = state.logprobs_from.max(computed + 1);
        seq
    }

    /// Takes slot and blocks from a sequence; it comes back, in another slot and other blocks, with all its tokens.
    pub fn preempt(&mut self, seq: usize) {
        let state = &mut self.seqs[seq];
        assert!(!state.is_new);
        self.freed.push(state.slot);
        self.free_slots.insert(0, state.slot);
        self.free_blocks.splice(0..0, state.blocks.drain(..));
        state.slot = self.free_slots.pop().unwrap();
        state.computed = 0;
        state.is_new = true;
    }

    /// One step: so many tokens of each of these sequences.
    pub fn step(&mut self, rows: &[(usize, usize)]) {
        let mut plan = SchedulerOutput { step: StepId(self.step), ..SchedulerOutput::default() };
        self.step += 1;
        plan.freed = std::mem::take(&mut self.freed);
        plan.block_copies = std::mem::take(&mut self.copies);
        rows.iter().for_each(|&(seq, count)| self.plan_row(&mut plan, seq, count));
        let step = self.runner.submit(Arc::new(plan)).unwrap();
        self.runner.sample(step, &self.late).unwrap();
        self.runner.collect(step, &mut self.out).unwrap();
        assert_eq!(self.out.step, step);
        rows.iter().for_each(|&(seq, count)| self.seqs[seq].computed += count);
        self.take_output();
    }

    /// Steps until every sequence of `seqs` has `num_output` tokens, each with at most `chunk` tokens a step.
    pub fn run(&mut self, seqs: &[usize], chunk: usize, num_output: impl Fn(usize) -> usize) {
        loop {
            let wants = |seq: &usize| self.seqs[*seq].output().len() < num_output(*seq);
            let rows: Vec<_> = seqs.iter().copied().filter(|seq| wants(seq)).collect();
            if rows.is_empty() {
                return;
            }
            let rows: Vec<_> = rows.iter().map(|&seq| (seq, self.seqs[seq].left().min(chunk))).collect();
            self.step(&rows);
        }
    }

    /// Logits of the last pass.
    pub fn logits(&mut self) -> Vec<f32> {
        self.runner.logits()
    }

    fn plan_row(&mut self, plan: &mut SchedulerOutput, seq: usize, count: usize) {
        let state = &mut self.seqs[seq];
        let num_blocks = (state.computed + count).div_ceil(self.block_size);
        if state.is_new {
            // Only what is there already; the rest arrives as growth within the same step.
            state.is_new = false;
            plan.new.push(NewSeq {
                slot: state.slot,
                request: RequestId(seq as u64),
                index: 0,
                tokens: state.tokens.as_slice().into(),
                prompt_len: state.prompt_len as u32,
                params: state.params.clone(),
                adapter: state.adapter,
                seed: state.params.seed,
                block_tables: vec![state.blocks.clone()],
                num_computed_tokens: state.computed as u32,
            });
        }
        while state.blocks.len() < num_blocks {
            let block = self.free_blocks.pop().unwrap();
            state.blocks.push(block);
            plan.grown.push(GrownTable { slot: state.slot, group: 0, block });
        }
        let sample = state.left() == count;
        plan.scheduled.push(Scheduled {
            slot: state.slot,
            num_computed_tokens: state.computed as u32,
            num_new_tokens: count as u32,
            logits: match (state.params.prompt_logprobs, sample) {
                (Some(_), _) => LogitRows::All,
                (None, true) => LogitRows::Last,
                (None, false) => LogitRows::None,
            },
            sample,
        });
    }

    fn take_output(&mut self) {
        let of_slot = |seqs: &[Seq], slot| seqs.iter().position(|seq| seq.slot == slot).unwrap();
        for (slot, position, logprobs) in self.out.prompt_logprobs.drain(..) {
            let seq = of_slot(&self.seqs, slot);
            self.seqs[seq].logprobs[position as usize] = Some(logprobs);
        }
        for row in &self.out.rows {
            let seq = of_slot(&self.seqs, row.slot);
            self.seqs[seq].tokens.extend_from_slice(self.out.tokens_of(row));
            self.seqs[seq].logprobs.extend_from_slice(self.out.logprobs_of(row));
        }
    }
}
