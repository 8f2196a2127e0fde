//! The seam between deciding and doing: whatever can run a [`SchedulerOutput`].

use std::sync::Arc;

use crate::{ExecError, ModelRunnerOutput, SchedulerOutput, Slot, StepId};

/// What an executor offers, fixed at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutorLimits {
    /// Tokens in one KV block.
    pub block_size: u32,
    /// Blocks in the pool, the same for every KV group.
    pub num_blocks: u32,
    /// Slots.
    pub max_num_seqs: u32,
    /// Tokens in one step.
    pub max_num_batched_tokens: u32,
    /// Tokens in one sequence.
    pub max_model_len: u32,
    /// Tokens of vocabulary.
    pub vocab_size: u32,
    /// Steps that may be submitted before the oldest is collected: 1 on CPU, 2 on CUDA.
    pub max_steps_in_flight: u32,
    /// One entry per KV group: the sliding window in tokens, or `None` where every position stays visible.
    pub kv_groups: Vec<Option<u32>>,
}

/// Inputs of sampling that needed the previous step's token.
#[derive(Debug, Default)]
pub struct LateInputs {
    /// Token bitmasks (see [`crate::TokenConstraint`]) of constrained rows; rows absent here are unconstrained.
    pub masks: Vec<(Slot, Vec<u32>)>,
}

/// Runs steps, in order. Implemented by the model runner of each backend and by the simulator.
///
/// For each step: `submit`, then `sample`, then `collect`; at most `max_steps_in_flight` submitted and not collected.
/// The executor drops its `Arc` of a plan before `collect` returns, so that the caller can reuse it.
pub trait Executor: Send {
    /// What it offers.
    fn limits(&self) -> ExecutorLimits;

    /// Enqueues the forward pass. Never waits for a device.
    ///
    /// # Errors
    /// The device failed; the executor must not be used again.
    fn submit(&mut self, plan: Arc<SchedulerOutput>) -> Result<StepId, ExecError>;

    /// Enqueues sampling. Called at once when no row is constrained.
    ///
    /// # Errors
    /// As for `submit`.
    fn sample(&mut self, step: StepId, late: &LateInputs) -> Result<(), ExecError>;

    /// Waits for the step and fills `out`.
    ///
    /// # Errors
    /// As for `submit`.
    fn collect(&mut self, step: StepId, out: &mut ModelRunnerOutput) -> Result<(), ExecError>;
}
