//! Why a sequence waits and how it gets on, for people who ask later. Said only when it changes, so that a steady step
//! says nothing.

use quire_core::{Micros, RequestId};

/// Something worth telling about continuation `index` of `request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeqNote {
    /// The request.
    pub request: RequestId,
    /// Which of its `n` continuations.
    pub index: u32,
    /// When.
    pub at: Micros,
    /// What.
    pub kind: NoteKind,
}

/// The kinds of notes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoteKind {
    /// It waits for a place in the batch, from now on for this reason.
    Waits(WaitCause),
    /// It has a place. So many of its tokens were there: found in the prefix cache, or shared by a sibling.
    Entered {
        /// Tokens that need not be computed.
        cached_tokens: u32,
    },
    /// A piece of its prompt (after a preemption, of all its tokens) is computed in the step that starts now.
    Chunk {
        /// Tokens in it.
        num_tokens: u32,
    },
    /// It lost its place, and waits again.
    Preempted(WaitCause),
    /// Its first token was accepted.
    FirstToken,
}

/// What keeps a sequence out of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum WaitCause {
    /// The step that ran when it came: nobody enters in between.
    Step,
    /// Requests of its own tenant that go first.
    Queue,
    /// Requests of a higher priority.
    Priority,
    /// Another tenant, which was served less, is in turn.
    Fairness,
    /// The batch has no free place (`max_num_seqs`).
    BatchFull,
    /// The tokens of the step are given out (`max_num_batched_tokens`).
    TokenBudget,
    /// A piece of its prompt would make the step longer than the target between tokens allows.
    LatencyTarget,
    /// The KV pool has too few free blocks.
    KvPressure,
    /// Its tenant has its share of the KV blocks (`kv_blocks_share`).
    KvShare,
}

impl WaitCause {
    /// All causes, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Step,
        Self::Queue,
        Self::Priority,
        Self::Fairness,
        Self::BatchFull,
        Self::TokenBudget,
        Self::LatencyTarget,
        Self::KvPressure,
        Self::KvShare,
    ];

    /// As timelines call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Queue => "queue",
            Self::Priority => "priority",
            Self::Fairness => "fairness",
            Self::BatchFull => "batch_full",
            Self::TokenBudget => "token_budget",
            Self::LatencyTarget => "latency_target",
            Self::KvPressure => "kv_pressure",
            Self::KvShare => "kv_share",
        }
    }
}
