//! A model split over ranks, each with a CPU backend of its own: the same tokens as in one piece, and the same bits however
//! a batch is put together.

use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_backend::Communicator;
use quire_backend::reference::RefBackend;
use quire_core::{
    ExecError, Executor, ExecutorLimits, LateInputs, ModelRunnerOutput, SchedulerOutput, Shard, StepId,
};
use quire_model::{Checkpoint, ModelSpec};
use quire_runner::tensor_parallel::load_ranks;
use quire_runner::{MemoryPlan, ModelRunner, RunnerConfig, TensorParallel};

use crate::checkpoints::{family_named, max_error};
use crate::driver::{Driver, TestBackend, config, cpu, greedy};
use crate::{families, invariance, lora, quantized};

/// A model split over `N` CPU ranks.
struct Ranks<const N: usize>(TensorParallel);

impl<const N: usize> TestBackend for Ranks<N> {
    const NAME: &'static str = if N == 2 { "2 ranks" } else { "4 ranks" };

    fn takes(checkpoint: &Checkpoint) -> bool {
        MemoryPlan::of_rank(checkpoint.spec(), &config(64, 16), N as u32).is_ok()
    }

    fn load(checkpoint: &Checkpoint, config: &RunnerConfig) -> Self {
        let group = Communicator::group(N).into_iter();
        let backends = group.map(|rank| cpu().with_communicator(rank)).collect();
        let runners = load_ranks(backends, checkpoint, config, |_| {}).unwrap();
        Self(TensorParallel::new(runners).unwrap())
    }

    /// Of rank 0; all have the same.
    fn logits(&mut self) -> Vec<f32> {
        let mut all = self.0.read_logits().unwrap();
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(all.len(), N);
        assert!(all.iter().all(|logits| bits(logits) == bits(&all[0])), "ranks differ");
        all.swap_remove(0)
    }
}

impl<const N: usize> Executor for Ranks<N> {
    fn limits(&self) -> ExecutorLimits {
        self.0.limits()
    }

    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError> {
        self.0.submit(plan)
    }

    fn sample(&mut self, step: StepId, late: &LateInputs) -> Result<(), ExecError> {
        self.0.sample(step, late)
    }

    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError> {
        self.0.collect(step, out)
    }
}

/// All families but the one with three heads; each key/value head is on two ranks where a model has one.
#[test]
fn two_ranks_agree_with_transformers() {
    families::agrees_with_transformers::<Ranks<2>>();
}

/// Four query heads and two key/value heads, so that pairs of ranks share one.
#[test]
fn four_ranks_agree_with_transformers() {
    assert!(Ranks::<4>::takes(&family_named("llama3").checkpoint));
    families::agrees_with_transformers::<Ranks<4>>();
}

/// The factors of adapters are split as the layers are that they adapt.
#[test]
fn ranks_agree_with_peft() {
    lora::agrees_with_peft_in_one_batch::<Ranks<2>>();
    lora::agrees_with_peft_in_one_batch::<Ranks<4>>();
    lora::agrees_with_peft_on_experts::<Ranks<2>>();
}

#[test]
fn two_ranks_ignore_chunks_blocks_and_company() {
    invariance::ignores_chunks_blocks_and_company::<Ranks<2>>();
}

#[test]
fn two_ranks_continue_cached_prefixes() {
    invariance::continues_cached_prefixes::<Ranks<2>>();
}

#[test]
fn two_ranks_resume_and_fork() {
    invariance::resumes_preempted_sequences::<Ranks<2>>();
    invariance::forks_with_block_copies::<Ranks<2>>();
}

#[test]
fn four_ranks_cut_steps_and_obey_masks() {
    invariance::cuts_steps_with_many_logit_rows::<Ranks<4>>();
    invariance::obeys_late_masks::<Ranks<4>>();
}

#[test]
fn quantized_ranks_keep_the_quality() {
    quantized::demo_model_keeps_its_quality::<Ranks<2>>();
}

fn small(seed: u64) -> Checkpoint {
    let spec = ModelSpec::from_config_json(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
            "max_position_embeddings": 128, "tie_word_embeddings": true, "mlp_bias": true}"#,
    );
    Checkpoint::dummy(spec.unwrap(), seed)
}

/// 50 tokens over four ranks: 13, 13, 13, 11. Biases of down are added once.
#[test]
fn a_vocabulary_need_not_come_out_even() {
    let (checkpoint, config) = (small(1), config(64, 16));
    let prompt: Vec<_> = (0..40).map(|i| (7 * i + 3) % 50).collect();
    let mut whole = Driver::<ModelRunner<RefBackend>>::new(&checkpoint, &config);
    let mut split = Driver::<Ranks<4>>::new(&checkpoint, &config);
    let seqs = (whole.add(&prompt, &greedy()), split.add(&prompt, &greedy()));
    whole.step(&[(seqs.0, 40)]);
    split.step(&[(seqs.1, 40)]);
    let (whole, split) = (whole.logits(), split.logits());
    assert_eq!(split.len(), 40 * 50);
    let error = max_error(&split, &whole);
    assert!(error < 1e-4, "{error}");
}

/// Four heads over two key/value heads, and experts of 32 columns: a rank of four has one head and eight columns of each.
fn experts() -> Checkpoint {
    let spec = ModelSpec::from_config_json(
        r#"{"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "vocab_size": 50, "max_position_embeddings": 128, "tie_word_embeddings": true, "num_experts": 8,
            "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": true,
            "mlp_only_layers": [1]}"#,
    );
    Checkpoint::dummy(spec.unwrap(), 3)
}

/// Against the reference in one piece: every rank chooses the same experts and has its columns of each.
fn experts_agree<B: TestBackend>() {
    let (checkpoint, config) = (experts(), config(64, 16));
    assert!(B::takes(&checkpoint));
    let prompt: Vec<_> = (0..40).map(|i| (11 * i + 5) % 50).collect();
    let mut whole = Driver::<ModelRunner<RefBackend>>::new(&checkpoint, &config);
    let mut split = Driver::<B>::new(&checkpoint, &config);
    let seqs = (whole.add(&prompt, &greedy()), split.add(&prompt, &greedy()));
    whole.step(&[(seqs.0, 40)]);
    split.step(&[(seqs.1, 40)]);
    let error = max_error(&split.logits(), &whole.logits());
    assert!(error < 1e-4, "{}: {error}", B::NAME);
    whole.run(&[seqs.0], 1, |_| 8);
    split.run(&[seqs.1], 1, |_| 8);
    assert_eq!(split.seqs[seqs.1].output(), whole.seqs[seqs.0].output(), "{}", B::NAME);
}

#[test]
fn experts_are_split_over_two_and_four_ranks() {
    experts_agree::<Ranks<2>>();
    experts_agree::<Ranks<4>>();
}

fn ref_ranks(configs: [&RunnerConfig; 2]) -> TensorParallel {
    let runner = |(rank, (communicator, config)): (usize, (Communicator, &RunnerConfig))| {
        let backend = RefBackend::new().with_communicator(communicator);
        let shard = Shard { rank: rank as u32, world: 2 };
        ModelRunner::load_shard(backend, &small(1), config, shard, |_| {}).unwrap()
    };
    let members = Communicator::group(2).into_iter().zip(configs);
    TensorParallel::new(members.enumerate().map(runner).collect()).unwrap()
}

/// A step of one prompt.
fn prompt_step(executor: &mut TensorParallel, len: usize) -> Result<(), ExecError> {
    let plan = crate::driver::first_step(len);
    let step = executor.submit(Arc::new(plan))?;
    executor.sample(step, &LateInputs::default())?;
    executor.collect(step, &mut ModelRunnerOutput::default())
}

/// One rank takes shorter steps than the other, which waits for it in the first sum.
#[test]
fn a_rank_that_fails_ends_the_step_of_all() {
    let config = config(64, 16);
    let narrow = RunnerConfig { max_num_batched_tokens: 8, ..config.clone() };
    for configs in [[&config, &narrow], [&narrow, &config]] {
        let mut executor = ref_ranks(configs);
        let begin = Instant::now();
        let error = prompt_step(&mut executor, 20).unwrap_err();
        assert!(error.message.contains("20 tokens") && error.message.contains("at most 8"), "{error}");
        assert_eq!(executor.submit(Arc::new(crate::driver::first_step(1))), Err(error), "and so for ever");
        drop(executor);
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    }
}

/// Two whole models with other weights: what they sample has nothing to do with one another.
#[test]
fn ranks_that_part_are_found_out() {
    let runner = |seed| ModelRunner::load(RefBackend::new(), &small(seed), &config(64, 16), |_| {}).unwrap();
    let mut executor = TensorParallel::new(vec![runner(1), runner(2)]).unwrap();
    let error = prompt_step(&mut executor, 20).unwrap_err();
    assert!(error.message.contains("rank 1 sampled other tokens"), "{error}");
}
