//! The buffers of the forward pass: allocated once, for the largest step.

use quire_backend::{Backend, BackendError, BufRole};
use quire_core::Shard;
use quire_model::{Ffn, FfnShape, Mixer, ModelSpec};

use crate::RunnerConfig;

/// Rows and columns of each buffer, from the model and the limits. Also what the memory plan counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkspaceShape {
    tokens: usize,
    hidden: usize,
    qkv: usize,
    attn: usize,
    mlp: usize,
    logit_rows: usize,
    vocab: usize,
    /// Of the vocabulary, for a rank that has not all of it.
    vocab_part: Option<usize>,
}

impl WorkspaceShape {
    /// Of one rank; `spec` is as [`crate::sharding`] makes it for a rank.
    pub fn new(spec: &ModelSpec, config: &RunnerConfig, shard: Shard) -> Self {
        let Mixer::Gqa(gqa) = &spec.layers[0].mixer;
        let Ffn::Dense(ffn) = &spec.layers[0].ffn;
        let attn = gqa.num_heads * gqa.head_dim;
        Self {
            tokens: config.max_num_batched_tokens as usize,
            hidden: spec.hidden_size,
            qkv: attn + 2 * gqa.num_kv_heads * gqa.head_dim,
            attn,
            mlp: match ffn.shape {
                FfnShape::Gated => 2 * ffn.intermediate_size,
                FfnShape::Plain => ffn.intermediate_size,
            },
            logit_rows: config.max_logit_rows() as usize,
            vocab: spec.vocab_size,
            vocab_part: (shard != Shard::WHOLE).then(|| shard.range(spec.vocab_size).len()),
        }
    }

    /// Bytes of all buffers, in f32.
    pub fn bytes(&self) -> u64 {
        let per_token = 3 * self.hidden + self.qkv + self.attn + self.mlp;
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
    /// `[T, up's out_features]`.
    pub mlp: B::Buf,
    /// `[max_logit_rows, vocab]`.
    pub logits: B::Buf,
    /// `[max_logit_rows, this rank's part of the vocabulary]`, where it has not all of it.
    pub logits_part: Option<B::Buf>,
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
            mlp: backend.alloc(BufRole::Hidden, tokens, shape.mlp)?,
            logits: backend.alloc(BufRole::Logits, shape.logit_rows, shape.vocab)?,
            logits_part: shape
                .vocab_part
                .map(|part| backend.alloc(BufRole::Logits, shape.logit_rows, part))
                .transpose()?,
        })
    }
}
