//! The buffers of the forward pass: allocated once, for the largest step.

use quire_backend::{Backend, BackendError, BufRole, MoeScratch};
use quire_core::Shard;
use quire_model::{Ffn, FfnShape, Mixer, ModelSpec, MoeFfn};

use crate::RunnerConfig;

/// Rows and columns of each buffer, from the model and the limits. Also what the memory plan counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkspaceShape {
    tokens: usize,
    hidden: usize,
    qkv: usize,
    attn: usize,
    /// Of dense feed-forward layers; 0 if there are none.
    mlp: usize,
    moe: Option<MoeShape>,
    logit_rows: usize,
    vocab: usize,
    /// Of the vocabulary, for a rank that has not all of it.
    vocab_part: Option<usize>,
}

/// Columns of what a mixture of experts works in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MoeShape {
    num_experts: usize,
    hidden: usize,
    expert_out: usize,
}

impl MoeShape {
    fn new(moe: &MoeFfn, hidden_size: usize) -> Self {
        Self {
            num_experts: moe.num_experts,
            hidden: moe.num_experts_per_tok * 2 * moe.intermediate_size,
            expert_out: moe.num_experts_per_tok * hidden_size,
        }
    }
}

impl WorkspaceShape {
    /// Of one rank; `spec` is as [`crate::sharding`] makes it for a rank.
    pub fn new(spec: &ModelSpec, config: &RunnerConfig, shard: Shard) -> Self {
        let Mixer::Gqa(gqa) = &spec.layers[0].mixer;
        let up_width = |ffn: &Ffn| match ffn {
            Ffn::Dense(ffn) if ffn.shape == FfnShape::Gated => 2 * ffn.intermediate_size,
            Ffn::Dense(ffn) => ffn.intermediate_size,
            Ffn::Moe(_) => 0,
        };
        let moe = spec.layers.iter().find_map(|layer| match &layer.ffn {
            Ffn::Moe(moe) => Some(MoeShape::new(moe, spec.hidden_size)),
            Ffn::Dense(_) => None,
        });
        let attn = gqa.num_heads * gqa.head_dim;
        Self {
            tokens: config.max_num_batched_tokens as usize,
            hidden: spec.hidden_size,
            qkv: attn + 2 * gqa.num_kv_heads * gqa.head_dim,
            attn,
            mlp: spec.layers.iter().map(|layer| up_width(&layer.ffn)).max().unwrap_or(0),
            moe,
            logit_rows: config.max_logit_rows() as usize,
            vocab: spec.vocab_size,
            vocab_part: (shard != Shard::WHOLE).then(|| shard.range(spec.vocab_size).len()),
        }
    }

    /// Bytes of all buffers, in f32.
    pub fn bytes(&self) -> u64 {
        let moe = self.moe.map_or(0, |moe| moe.num_experts + moe.hidden + moe.expert_out);
        let per_token = 3 * self.hidden + self.qkv + self.attn + self.mlp + moe;
        let per_logit_row = self.vocab + self.vocab_part.unwrap_or(0);
        let elements = self.tokens as u64 * per_token as u64 + self.logit_rows as u64 * per_logit_row as u64;
        elements * size_of::<f32>() as u64
    }
}

/// Activations of one pass. `T` is at most `max_num_batched_tokens`.
pub(crate) struct Workspace<B: Backend> {
    /// `[T, hidden]` the residual stream.
    pub residual: B::Buf,
    /// `[T, hidden]` what a mixer or feed-forward layer reads: the residual, normalised.
    pub hidden: B::Buf,
    /// `[T, hidden]` what it adds to the residual.
    pub delta: B::Buf,
    /// `[T, qkv_size]`.
    pub qkv: B::Buf,
    /// `[T, q_size]` attention's result.
    pub attn: B::Buf,
    /// `[T, up's out_features]`; `None` if no layer is dense.
    pub mlp: Option<B::Buf>,
    pub moe: Option<MoeBuffers<B>>,
    /// `[max_logit_rows, vocab]`.
    pub logits: B::Buf,
    /// `[max_logit_rows, this rank's part of the vocabulary]`, where it has not all of it.
    pub logits_part: Option<B::Buf>,
}

/// See [`MoeScratch`].
pub(crate) struct MoeBuffers<B: Backend> {
    logits: B::Buf,
    hidden: B::Buf,
    expert_out: B::Buf,
}

impl<B: Backend> MoeBuffers<B> {
    fn new(backend: &mut B, tokens: usize, shape: &MoeShape) -> Result<Self, BackendError> {
        Ok(Self {
            logits: backend.alloc(BufRole::Logits, tokens, shape.num_experts)?,
            hidden: backend.alloc(BufRole::Hidden, tokens, shape.hidden)?,
            expert_out: backend.alloc(BufRole::Hidden, tokens, shape.expert_out)?,
        })
    }

    pub fn scratch(&mut self) -> MoeScratch<'_, B> {
        MoeScratch { logits: &mut self.logits, hidden: &mut self.hidden, expert_out: &mut self.expert_out }
    }
}

impl<B: Backend> Workspace<B> {
    pub fn new(backend: &mut B, shape: &WorkspaceShape) -> Result<Self, BackendError> {
        let tokens = shape.tokens;
        Ok(Self {
            residual: backend.alloc(BufRole::Residual, tokens, shape.hidden)?,
            hidden: backend.alloc(BufRole::Hidden, tokens, shape.hidden)?,
            delta: backend.alloc(BufRole::Hidden, tokens, shape.hidden)?,
            qkv: backend.alloc(BufRole::Hidden, tokens, shape.qkv)?,
            attn: backend.alloc(BufRole::Hidden, tokens, shape.attn)?,
            mlp: match shape.mlp {
                0 => None,
                width => Some(backend.alloc(BufRole::Hidden, tokens, width)?),
            },
            moe: shape.moe.map(|moe| MoeBuffers::new(backend, tokens, &moe)).transpose()?,
            logits: backend.alloc(BufRole::Logits, shape.logit_rows, shape.vocab)?,
            logits_part: shape
                .vocab_part
                .map(|part| backend.alloc(BufRole::Logits, shape.logit_rows, part))
                .transpose()?,
        })
    }
}
