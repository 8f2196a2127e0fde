//! What can go wrong: at start ([`RunnerError`]), and with a plan ([`PlanError`]).

use quire_backend::BackendError;
use quire_core::{AdapterId, BlockId, HostBlockId, Slot, StepId};
use quire_model::ModelError;

/// Why a model could not be made ready to run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    /// A tensor of the checkpoint cannot be had.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device cannot hold or run it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A limit makes no sense.
    #[error("{field} = {value}: {rule}")]
    Config {
        /// The field of [`crate::RunnerConfig`].
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        rule: String,
    },
    /// The model cannot be split over so many ranks.
    #[error(
        "the model cannot be split over {ranks} ranks ({why}); numbers of ranks that work: {}",
        possible.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    Ranks {
        /// As asked for.
        ranks: u32,
        /// What does not come out even.
        why: String,
        /// What would do, up to 16.
        possible: Vec<usize>,
    },
    /// A thread for a rank cannot be had.
    #[error("cannot start a thread for a tensor-parallel rank: {0}")]
    Thread(std::io::Error),
    /// The model has a form that this decoder does not run.
    #[error("layer {layer}: {what}")]
    Unsupported {
        /// Which layer.
        layer: usize,
        /// What is special about it.
        what: &'static str,
    },
}

/// A plan that contradicts the mirrored batch or the limits: a defect of whoever made it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("slot {0} is outside the batch of {1} slots")]
    NoSuchSlot(Slot, usize),
    #[error("slot {0} gets a new sequence, but was not freed")]
    SlotTaken(Slot),
    #[error("slot {0} holds no sequence")]
    SlotEmpty(Slot),
    #[error("slot {slot}: a new sequence with {given} block tables where there are {expected} KV groups")]
    WrongGroups { slot: Slot, given: usize, expected: usize },
    #[error(
        "slot {slot}: {tokens} tokens, of which {prompt_len} are prompt; at most {max_model_len} are possible"
    )]
    BadLength { slot: Slot, tokens: usize, prompt_len: u32, max_model_len: u32 },
    #[error("slot {slot}: adapter {adapter} does not exist; there are {adapters}")]
    NoSuchAdapter { slot: Slot, adapter: AdapterId, adapters: usize },
    #[error("slot {slot}: block {block} is outside the pool of {num_blocks} blocks")]
    NoSuchBlock { slot: Slot, block: BlockId, num_blocks: u32 },
    #[error("slot {slot}: a table of more than {max} blocks")]
    TableFull { slot: Slot, max: u32 },
    #[error("KV group {group} does not exist; there are {groups}")]
    NoSuchGroup { group: u8, groups: usize },
    #[error("{tokens} tokens are scheduled in one step; at most {max} are possible")]
    TooManyTokens { tokens: u64, max: u32 },
    #[error("slot {slot}: tokens {start}..{end} are scheduled, but {known} are known")]
    UnknownTokens { slot: Slot, start: u32, end: u32, known: usize },
    #[error("slot {slot}: tokens {start}..{end} are scheduled, but its blocks hold {capacity}")]
    NoBlocks { slot: Slot, start: u32, end: u32, capacity: u32 },
    #[error("slot {slot}: a token is to be sampled after token {end}, but {known} are known")]
    SampleInside { slot: Slot, end: u32, known: usize },
    #[error(
        "a copy between block {device} of {num_blocks} and host block {host} of {num_host_blocks} is outside its pool"
    )]
    BadHostCopy { device: BlockId, host: HostBlockId, num_blocks: u32, num_host_blocks: u32 },
    #[error("step {0} is called for, but {1}")]
    OutOfOrder(StepId, &'static str),
}
