//! A cache as large as what the device has left: on a cache of one block the largest steps are run, which make everything
//! that a backend makes at first use; what is free then is known and not guessed. Afterwards steps of decoding are run on
//! the whole cache, for the backend to record.

use std::sync::Arc;

use quire_backend::{Backend, BackendError};
use quire_core::{
    AdapterId, BlockId, ExecError, Executor, LateInputs, LogitRows, ModelRunnerOutput, NewSeq, RequestId,
    SamplingParams, Scheduled, SchedulerOutput, Shard, Slot, StepId,
};
use quire_model::Checkpoint;

use crate::input_batch::InputBatch;
use crate::memory::kv_layout;
use crate::sharding::spec_of_rank;
use crate::{LoadProgress, MemoryPlan, ModelRunner, RunnerConfig, RunnerError};

/// Fewer cannot work: a sequence of one block could never be copied or preempted.
const MIN_BLOCKS: u32 = 2;
/// Alternatives per token that steps at start ask for: what requests may ask for at most.
const LOGPROBS: u32 = 20;

/// A sequence of a step at start: its length, and how many of its last tokens are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    len: u32,
    new: u32,
}

impl<B: Backend> ModelRunner<B> {
    /// As [`ModelRunner::load`], but with as many blocks as fit into what `kv_bytes` says that the cache may take. It is
    /// asked after the largest steps were run. `config.num_blocks` are enough, if there is room for more.
    ///
    /// # Errors
    /// As `load`; those of `kv_bytes`; or there is no room for two blocks.
    pub fn load_measured(
        backend: B,
        checkpoint: &Checkpoint,
        config: &RunnerConfig,
        progress: impl FnMut(LoadProgress),
        kv_bytes: impl FnOnce(&B) -> Result<u64, BackendError>,
    ) -> Result<Self, RunnerError> {
        let num_blocks = |backend: &B, plan: &MemoryPlan| Ok(plan.num_blocks_in(kv_bytes(backend)?));
        Self::load_shard_measured(backend, checkpoint, config, Shard::WHOLE, progress, num_blocks)
    }

    /// As [`Self::load_measured`], of one rank of several, which run the steps together; `num_blocks` says how many blocks
    /// fit, the same number on every rank.
    pub(crate) fn load_shard_measured(
        backend: B,
        checkpoint: &Checkpoint,
        config: &RunnerConfig,
        shard: Shard,
        progress: impl FnMut(LoadProgress),
        num_blocks: impl FnOnce(&B, &MemoryPlan) -> Result<u32, BackendError>,
    ) -> Result<Self, RunnerError> {
        let smallest = RunnerConfig { num_blocks: 1, ..config.clone() };
        let mut runner = Self::load_shard(backend, checkpoint, &smallest, shard, progress)?;
        runner.run_largest_steps().map_err(BackendError::Device)?;
        let num_blocks = num_blocks(&runner.backend, &runner.memory)?.min(config.num_blocks);
        if num_blocks < MIN_BLOCKS {
            let rule = format!(
                "must be at least {MIN_BLOCKS}, and weights and activations leave room for {num_blocks}"
            );
            return Err(RunnerError::Config { field: "num_blocks", value: num_blocks.into(), rule });
        }
        runner.replace_cache(checkpoint, &RunnerConfig { num_blocks, ..config.clone() }, shard.world)?;
        runner.run_decode_steps().map_err(BackendError::Device)?;
        Ok(runner)
    }

    fn replace_cache(
        &mut self,
        checkpoint: &Checkpoint,
        config: &RunnerConfig,
        world: u32,
    ) -> Result<(), RunnerError> {
        let spec = checkpoint.spec();
        self.kv_layout = kv_layout(&spec_of_rank(spec, config.quant, world)?, config);
        self.kv = self.backend.alloc_kv(&self.kv_layout)?;
        self.batch = InputBatch::new(config, self.limits.kv_groups.len(), checkpoint.adapters().len());
        self.memory = MemoryPlan::of_checkpoint(checkpoint, config, world)?;
        self.limits.num_blocks = config.num_blocks;
        let pool = u64::from(config.num_blocks) * u64::from(config.block_size);
        self.limits.max_model_len = config.max_model_len.min(u32::try_from(pool).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Without adapters, and with one if there are any.
    fn adapters_at_start(&self) -> impl Iterator<Item = Option<AdapterId>> + use<B> {
        let first = (self.batch.num_adapters() > 0).then_some(AdapterId(0));
        [None].into_iter().chain(first.map(Some))
    }

    /// The most rows with the most logits, then the longest sequence.
    fn run_largest_steps(&mut self) -> Result<(), ExecError> {
        let limits = &self.limits;
        let longest = Row { len: limits.max_model_len, new: 1 };
        let rows = largest_step(limits.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len);
        for adapter in self.adapters_at_start() {
            self.run_step_at_start(&rows, adapter)?;
            self.run_step_at_start(&[longest], adapter)?;
        }
        Ok(())
    }

    /// Each size twice: a backend makes what is missing, then records.
    fn run_decode_steps(&mut self) -> Result<(), ExecError> {
        for rows in self.backend.recorded_rows(self.limits.max_num_seqs as usize) {
            for adapter in self.adapters_at_start() {
                for _ in 0..2 {
                    self.run_step_at_start(&vec![Row { len: 1, new: 1 }; rows], adapter)?;
                }
            }
        }
        Ok(())
    }

    /// Sequences of one step, all of them in block 0, whose content nobody will read.
    fn run_step_at_start(&mut self, rows: &[Row], adapter: Option<AdapterId>) -> Result<(), ExecError> {
        let step = self.submit(Arc::new(self.plan_at_start(rows, adapter)))?;
        self.sample(step, &LateInputs::default())?;
        self.collect(step, &mut ModelRunnerOutput::default())?;
        let freed = (0..rows.len() as u32).map(Slot).collect();
        let left = self.batch.apply(&SchedulerOutput { freed, ..SchedulerOutput::default() });
        left.map_err(|error| self.bad_plan(&error))
    }

    fn plan_at_start(&self, rows: &[Row], adapter: Option<AdapterId>) -> SchedulerOutput {
        // With everything that takes memory: counts of tokens, alternatives.
        let params = Arc::new(SamplingParams {
            max_tokens: 1,
            presence_penalty: 0.5,
            logprobs: Some(LOGPROBS),
            ..SamplingParams::default()
        });
        let table = |row: &Row| vec![BlockId(0); row.len.div_ceil(self.limits.block_size) as usize];
        let new = |(slot, row): (usize, &Row)| NewSeq {
            slot: Slot(slot as u32),
            request: RequestId(0),
            index: 0,
            tokens: vec![0; row.len as usize].into(),
            prompt_len: row.len,
            params: Arc::clone(&params),
            adapter,
            seed: 0,
            block_tables: vec![table(row); self.limits.kv_groups.len()],
            num_computed_tokens: row.len - row.new,
        };
        let scheduled = |(slot, row): (usize, &Row)| Scheduled {
            slot: Slot(slot as u32),
            num_computed_tokens: row.len - row.new,
            num_new_tokens: row.new,
            logits: LogitRows::Last,
            sample: true,
        };
        SchedulerOutput {
            step: StepId(0),
            new: rows.iter().enumerate().map(new).collect(),
            scheduled: rows.iter().enumerate().map(scheduled).collect(),
            ..SchedulerOutput::default()
        }
    }
}

/// As many sequences as there may be, and as many tokens: the first ones take what the others, of one token each, leave.
fn largest_step(max_num_seqs: u32, max_num_batched_tokens: u32, max_model_len: u32) -> Vec<Row> {
    let num_seqs = max_num_seqs.min(max_num_batched_tokens);
    let mut left = max_num_batched_tokens;
    let row = |i: u32| {
        let len = max_model_len.min(left - (num_seqs - 1 - i));
        left -= len;
        Row { len, new: len }
    };
    (0..num_seqs).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_step_uses_every_sequence_and_every_token_it_can() {
        for (seqs, tokens, len) in [(4, 32, 256), (4, 32, 10), (4, 4, 10), (8, 4, 10), (1, 100, 7), (3, 9, 3)]
        {
            let rows = largest_step(seqs, tokens, len);
            assert_eq!(rows.len() as u32, seqs.min(tokens));
            assert!(rows.iter().all(|row| row.len >= 1 && row.len <= len && row.new == row.len));
            let total: u32 = rows.iter().map(|row| row.len).sum();
            assert_eq!(total, tokens.min(seqs.min(tokens) * len), "{seqs} {tokens} {len}: {rows:?}");
        }
    }
}
