//! The vocabulary and the contracts of Quire, as plain data.
//!
//! Every other crate speaks in these types; this one depends on none of ours, knows no device, no thread and no
//! clock, and does no I/O.
//!
//! Invariants:
//! * time is a number ([`Micros`]) handed in by the caller;
//! * the scheduler and whatever executes its decisions meet only in [`step`] and [`executor`];
//! * a [`Request`] that reaches an engine has been validated once, against [`Limits`].
//!
//! Reading order: [`ids`], [`sampling`], [`request`], [`step`], [`executor`]; then [`limits`], [`error`],
//! [`block_hash`], [`tenant`], [`meter`], [`tensor`], [`constraint`], [`calendar`], [`metric_names`].
#![forbid(unsafe_code)]

pub mod block_hash;
pub mod calendar;
pub mod constraint;
pub mod error;
pub mod executor;
pub mod ids;
pub mod limits;
pub mod meter;
pub mod metric_names;
pub mod request;
pub mod sampling;
pub mod step;
pub mod tenant;
pub mod tensor;

pub use block_hash::{BlockHash, BlockHasher, CacheSalt};
pub use constraint::TokenConstraint;
pub use error::{ExecError, RequestError};
pub use executor::{Executor, ExecutorLimits, LateInputs};
pub use ids::{AdapterId, BlockId, HostBlockId, Micros, RequestId, Slot, StepId, TenantId, TokenId};
pub use limits::Limits;
pub use meter::Meter;
pub use request::{FinishReason, Request, Usage};
pub use sampling::SamplingParams;
pub use step::{
    BlockCopy, GrownTable, HostCopy, LogitRows, ModelRunnerOutput, NewSeq, RowOutput, Scheduled,
    SchedulerOutput, TokenLogprobs,
};
pub use tenant::TenantShare;
pub use tensor::{DType, QuantFormat, Shard, TensorView};
