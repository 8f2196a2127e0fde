//! One engine step as data: what the scheduler decides, and what the executor answers.
//!
//! Both structures hold differences, not copies: the executor mirrors the running batch by [`Slot`]. Buffers are reused,
//! so that a steady step allocates nothing. Order of effects within one `SchedulerOutput`: `freed`, `new`, `grown`,
//! `block_copies`, then `scheduled`.

use std::sync::Arc;

use crate::{AdapterId, BlockId, HostBlockId, RequestId, SamplingParams, Slot, StepId, TokenId};

/// What to run in one step.
#[derive(Debug, Default)]
pub struct SchedulerOutput {
    /// Which step.
    pub step: StepId,
    /// Slots that left the batch since the last step (finished or preempted). Their blocks may be in use elsewhere.
    pub freed: Vec<Slot>,
    /// Sequences that enter the batch, resumed ones included.
    pub new: Vec<NewSeq>,
    /// Blocks appended to tables of sequences already in the batch.
    pub grown: Vec<GrownTable>,
    /// Blocks whose content moves to the host tier. They are read as the steps before left them: what this step writes
    /// to the same device blocks comes after. No two copies of the list have a host block in common.
    pub copies_to_host: Vec<HostCopy>,
    /// Blocks that come back, after all of `copies_to_host` and before anything of this step is computed. No two copies
    /// of the list have a device block in common; a host block written just now may be read.
    pub copies_to_device: Vec<HostCopy>,
    /// Copies of whole blocks, all layers, done in order before anything of this step is computed.
    pub block_copies: Vec<BlockCopy>,
    /// The rows to compute. Σ `num_new_tokens` <= `max_num_batched_tokens`; each slot at most once.
    pub scheduled: Vec<Scheduled>,
}

impl SchedulerOutput {
    /// Forgets the content, keeps the memory.
    pub fn clear(&mut self) {
        self.freed.clear();
        self.new.clear();
        self.grown.clear();
        self.copies_to_host.clear();
        self.copies_to_device.clear();
        self.block_copies.clear();
        self.scheduled.clear();
    }

    /// Whether nothing is to be computed.
    pub fn is_empty(&self) -> bool {
        self.scheduled.is_empty()
    }

    /// Tokens computed in this step.
    pub fn num_tokens(&self) -> u32 {
        self.scheduled.iter().map(|row| row.num_new_tokens).sum()
    }
}

/// A sequence that enters the batch.
#[derive(Clone, Debug)]
pub struct NewSeq {
    /// Where it lives until it is freed.
    pub slot: Slot,
    /// Whose it is (for logs and checks, not for decisions).
    pub request: RequestId,
    /// Which of the request's `n` continuations.
    pub index: u32,
    /// Every token known so far: the prompt, and what was generated before a preemption.
    pub tokens: Arc<[TokenId]>,
    /// How many of `tokens` are prompt.
    pub prompt_len: u32,
    /// How to sample.
    pub params: Arc<SamplingParams>,
    /// Which adapter is put on the model for it, if any.
    pub adapter: Option<AdapterId>,
    /// The key of its random stream.
    pub seed: u64,
    /// One block table per KV group (one group today). A table may hold stale ids where a sliding window has passed.
    pub block_tables: Vec<Vec<BlockId>>,
    /// Tokens whose KV is already in those blocks (prefix-cache hit or shared prompt).
    pub num_computed_tokens: u32,
}

/// One block appended to the table of `slot` in KV group `group`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrownTable {
    /// The sequence.
    pub slot: Slot,
    /// The KV group.
    pub group: u8,
    /// The block.
    pub block: BlockId,
}

/// Copy one block of KV group `group`, all layers of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// The KV group.
    pub group: u8,
    /// From here.
    pub src: BlockId,
    /// To here.
    pub dst: BlockId,
}

/// Copy one block of KV group `group`, all layers of the group, between the device and the host tier. The list that it
/// is in says which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCopy {
    /// The KV group.
    pub group: u8,
    /// On the device.
    pub device: BlockId,
    /// In host memory.
    pub host: HostBlockId,
}

/// Which of a sequence's new rows need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// A prefill chunk that does not reach the end of the known tokens.
    None,
    /// Sample after the last new token.
    Last,
    /// Prompt log-probabilities for every new row; sample after the last one only if it is the last known token.
    All,
}

/// `num_new_tokens` tokens of one sequence, starting at position `num_computed_tokens`. A decode row whose input token
/// is still on the device is simply the next position: the executor feeds what it sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// The sequence.
    pub slot: Slot,
    /// Tokens whose KV was computed (or scheduled in an earlier step in flight).
    pub num_computed_tokens: u32,
    /// Tokens to compute now; >= 1.
    pub num_new_tokens: u32,
    /// Which rows need logits.
    pub logits: LogitRows,
    /// Whether a token is sampled after the last row.
    pub sample: bool,
}

/// The executor's answer for one step: ragged, per slot a range of tokens. The caller reuses it.
#[derive(Debug, Default)]
pub struct ModelRunnerOutput {
    /// Which step.
    pub step: StepId,
    /// One entry per scheduled row with `sample`, in the order of `scheduled`.
    pub rows: Vec<RowOutput>,
    /// Sampled tokens of all rows.
    pub tokens: Vec<TokenId>,
    /// Parallel to `tokens`; log-probabilities where asked for.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// `(slot, position, logprobs)`: log-probability of the prompt token at `position` given those before it.
    pub prompt_logprobs: Vec<(Slot, u32, TokenLogprobs)>,
    /// Pooled vectors of sequences that ask for an embedding.
    pub pooled: Vec<(Slot, Vec<f32>)>,
}

impl ModelRunnerOutput {
    /// Forgets the content, keeps the memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.tokens.clear();
        self.logprobs.clear();
        self.prompt_logprobs.clear();
        self.pooled.clear();
    }

    /// Appends a row with its tokens and log-probabilities (`logprobs` is empty or as long as `tokens`).
    pub fn push_row(
        &mut self,
        slot: Slot,
        tokens: &[TokenId],
        logprobs: impl IntoIterator<Item = Option<TokenLogprobs>>,
    ) {
        let start = self.tokens.len() as u32;
        self.tokens.extend_from_slice(tokens);
        self.logprobs.extend(logprobs);
        self.logprobs.resize(self.tokens.len(), None);
        self.rows.push(RowOutput { slot, start, num_tokens: tokens.len() as u32 });
    }

    /// The tokens of one row.
    pub fn tokens_of(&self, row: &RowOutput) -> &[TokenId] {
        &self.tokens[row.start as usize..(row.start + row.num_tokens) as usize]
    }

    /// The log-probabilities of one row, parallel to its tokens.
    pub fn logprobs_of(&self, row: &RowOutput) -> &[Option<TokenLogprobs>] {
        &self.logprobs[row.start as usize..(row.start + row.num_tokens) as usize]
    }
}

/// Tokens accepted for one slot in one step: `tokens[start..start + num_tokens]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowOutput {
    /// The sequence.
    pub slot: Slot,
    /// First token.
    pub start: u32,
    /// How many; one today, several with speculation.
    pub num_tokens: u32,
}

/// Log-probabilities at one position, from the raw logits (natural logarithm).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token at this position.
    pub logprob: f32,
    /// 1 for the most likely token; ties count the lower id first.
    pub rank: u32,
    /// The k most likely tokens, best first, ties by lower id.
    pub top: Vec<(TokenId, f32)>,
}
