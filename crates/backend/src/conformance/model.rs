//! A small decoder that uses every operation, with each output kept in a buffer of its own.

use quire_core::{DType, QuantFormat};

use super::random::{HostTensor, Rng};
use crate::{
    Activation, AddNorm, Attention, AttnShape, Backend, BackendError, BufRole, Embed, GraphKey, KvLayerShape,
    KvLayout, Linear, LinearPart, LinearSource, Logits, Mlp, MlpShape, RopeAndCache, RopeTable,
};

/// One point of the grid.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub ffn: usize,
    pub attn: AttnShape,
    pub vocab: usize,
    pub window: Option<u32>,
    pub soft_cap: Option<f32>,
    pub sinks: bool,
    pub qk_norm: bool,
    /// Whether what attention and the feed-forward layer give is normalised, too.
    pub post_norms: bool,
    pub embed_scale: f32,
    pub logit_cap: Option<f32>,
    pub bias: bool,
    /// 0: no positions at all.
    pub rotary_dim: u32,
    pub mlp: MlpShape,
    pub activation: Activation,
    pub weight_dtype: DType,
    pub kv_dtype: DType,
    pub block_size: u32,
    pub num_blocks: u32,
    /// Token rows of the largest step.
    pub max_rows: usize,
}

const NUM_LAYERS: usize = 2;
const EPS: f32 = 1e-5;

struct LayerWeights<B: Backend> {
    norm1: B::Norm,
    qkv: B::Weight,
    qk_norm: Option<(B::Norm, B::Norm)>,
    sinks: Option<B::Norm>,
    o: B::Weight,
    norm2: B::Norm,
    post_norms: Option<(B::Norm, B::Norm)>,
    up: B::Weight,
    down: B::Weight,
}

struct LayerBuffers<B: Backend> {
    norm1: B::Buf,
    qkv: B::Buf,
    attn: B::Buf,
    o: B::Buf,
    norm2: B::Buf,
    scratch: B::Buf,
    mlp: B::Buf,
}

/// Weights, cache and buffers on one backend.
pub(super) struct TinyModel<B: Backend> {
    pub shape: Shape,
    embed: B::Weight,
    head: B::Weight,
    final_norm: B::Norm,
    rope: Option<B::Rope>,
    layers: Vec<(LayerWeights<B>, LayerBuffers<B>)>,
    pub kv: B::Kv,
    residual: B::Buf,
    normed: B::Buf,
    logits: B::Buf,
    keys: Vec<(usize, usize)>,
}

/// What one step computed.
pub(super) struct Outputs {
    /// `(name, cols, values)`: one row per token row.
    pub by_token: Vec<(String, usize, Vec<f32>)>,
    /// One row per logit row.
    pub logits: Vec<f32>,
}

struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    rng: Rng,
    dtype: DType,
}

impl<B: Backend> Loader<'_, B> {
    fn linear(&mut self, outs: &[usize], cols: usize, bias: bool) -> Result<B::Weight, BackendError> {
        let scale = 1.5 / (cols as f32).sqrt();
        let dtype = self.dtype;
        let tensors: Vec<_> = outs
            .iter()
            .map(|&rows| {
                let weight = HostTensor::random(&mut self.rng, dtype, &[rows, cols], 0.0, scale);
                let bias = bias.then(|| HostTensor::random(&mut self.rng, dtype, &[rows], 0.0, 0.3));
                (weight, bias)
            })
            .collect();
        let parts: Vec<_> = tensors
            .iter()
            .map(|(w, b)| LinearPart { weight: w.view(), bias: b.as_ref().map(HostTensor::view) })
            .collect();
        let source = LinearSource { name: "test", parts: &parts, quant: QuantFormat::None };
        self.backend.load_linear(&source)
    }

    fn norm(&mut self, n: usize) -> Result<B::Norm, BackendError> {
        self.vector(n, 1.0, 0.3)
    }

    fn vector(&mut self, n: usize, mean: f32, scale: f32) -> Result<B::Norm, BackendError> {
        let tensor = HostTensor::random(&mut self.rng, self.dtype, &[n], mean, scale);
        self.backend.load_norm("test", tensor.view())
    }

    fn layer(&mut self, shape: &Shape) -> Result<LayerWeights<B>, BackendError> {
        let (attn, head_dim) = (shape.attn, shape.attn.head_dim as usize);
        let up: &[usize] = match shape.mlp {
            MlpShape::Gated => &[shape.ffn, shape.ffn],
            MlpShape::Plain => &[shape.ffn],
        };
        let qkv = [attn.q_size(), attn.kv_size(), attn.kv_size()];
        Ok(LayerWeights {
            norm1: self.norm(shape.hidden)?,
            qkv: self.linear(&qkv, shape.hidden, shape.bias)?,
            qk_norm: match shape.qk_norm {
                true => Some((self.norm(head_dim)?, self.norm(head_dim)?)),
                false => None,
            },
            sinks: match shape.sinks {
                true => Some(self.vector(attn.num_heads as usize, 0.5, 2.0)?),
                false => None,
            },
            o: self.linear(&[shape.hidden], attn.q_size(), false)?,
            norm2: self.norm(shape.hidden)?,
            post_norms: match shape.post_norms {
                true => Some((self.norm(shape.hidden)?, self.norm(shape.hidden)?)),
                false => None,
            },
            up: self.linear(up, shape.hidden, shape.bias)?,
            down: self.linear(&[shape.hidden], shape.ffn, shape.bias)?,
        })
    }
}

fn kv_layout(shape: &Shape) -> KvLayout {
    let layer = KvLayerShape { num_kv_heads: shape.attn.num_kv_heads, head_dim: shape.attn.head_dim };
    KvLayout {
        num_blocks: shape.num_blocks,
        block_size: shape.block_size,
        layers: vec![layer; NUM_LAYERS],
        dtype: shape.kv_dtype,
    }
}

impl<B: Backend> TinyModel<B> {
    /// The same weights for the same shape, on any backend.
    pub(super) fn load(backend: &mut B, shape: &Shape) -> Result<Self, BackendError> {
        let mut loader = Loader { backend, rng: Rng::new(17), dtype: shape.weight_dtype };
        let embed = loader.linear(&[shape.vocab], shape.hidden, false)?;
        let head = loader.linear(&[shape.vocab], shape.hidden, false)?;
        let final_norm = loader.norm(shape.hidden)?;
        let weights: Vec<_> = (0..NUM_LAYERS).map(|_| loader.layer(shape)).collect::<Result<_, _>>()?;

        let rope = match shape.rotary_dim {
            0 => None,
            dim => {
                let inv_freq = (0..dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
                Some(backend.load_rope(&RopeTable { inv_freq, attention_factor: 1.0, max_positions: 512 })?)
            }
        };
        let kv = backend.alloc_kv(&kv_layout(shape))?;
        let mut alloc = |cols| backend.alloc(BufRole::Hidden, shape.max_rows, cols);
        let layers: Vec<_> = weights
            .into_iter()
            .map(|weights| {
                let buffers = LayerBuffers {
                    norm1: alloc(shape.hidden)?,
                    qkv: alloc(shape.attn.qkv_size())?,
                    attn: alloc(shape.attn.q_size())?,
                    o: alloc(shape.hidden)?,
                    norm2: alloc(shape.hidden)?,
                    scratch: alloc(shape.ffn * if shape.mlp == MlpShape::Gated { 2 } else { 1 })?,
                    mlp: alloc(shape.hidden)?,
                };
                Ok((weights, buffers))
            })
            .collect::<Result<_, BackendError>>()?;
        Ok(Self {
            embed,
            head,
            final_norm,
            rope,
            layers,
            kv,
            normed: alloc(shape.hidden)?,
            residual: backend.alloc(BufRole::Residual, shape.max_rows, shape.hidden)?,
            logits: backend.alloc(BufRole::Logits, shape.max_rows, shape.vocab)?,
            keys: Vec::new(),
            shape: shape.clone(),
        })
    }

    /// Puts blocks in host memory behind the cache.
    pub(super) fn add_host_blocks(&mut self, backend: &mut B, num_blocks: u32) -> Result<(), BackendError> {
        backend.alloc_host_kv(&mut self.kv, &KvLayout { num_blocks, ..kv_layout(&self.shape) })
    }

    /// Runs the prepared step of `num_tokens` rows, of which `num_logits` need logits.
    pub(super) fn forward(
        &mut self,
        backend: &mut B,
        num_tokens: usize,
        num_logits: usize,
    ) -> Result<Outputs, BackendError> {
        let signature = (num_tokens, num_logits);
        let key = self.keys.iter().position(|k| *k == signature).unwrap_or_else(|| {
            self.keys.push(signature);
            self.keys.len() - 1
        });
        backend.run(Some(GraphKey(key as u32)), |backend| self.body(backend))?;
        self.read(backend, num_tokens, num_logits)
    }

    fn body(&mut self, backend: &mut B) -> Result<(), BackendError> {
        let Self { shape, layers, kv, residual, .. } = self;
        backend.copy_blocks(kv)?;
        backend.embed(Embed { table: &self.embed, scale: shape.embed_scale, out: residual })?;
        let mut delta: Option<(&B::Buf, Option<&B::Norm>)> = None;
        for (layer, (w, b)) in layers.iter_mut().enumerate() {
            backend.add_norm(AddNorm {
                residual,
                delta: delta.map(|(delta, _)| delta),
                delta_norm: delta.and_then(|(_, norm)| norm),
                weight: &w.norm1,
                eps: EPS,
                out: &mut b.norm1,
            })?;
            backend.linear(Linear { x: &b.norm1, weight: &w.qkv, out: &mut b.qkv })?;
            backend.rope_and_cache(RopeAndCache {
                qkv: &mut b.qkv,
                shape: shape.attn,
                qk_norm: w.qk_norm.as_ref().map(|(q, k)| (q, k)),
                eps: EPS,
                rope: self.rope.as_ref(),
                kv,
                layer,
            })?;
            backend.attention(Attention {
                qkv: &b.qkv,
                shape: shape.attn,
                scale: (shape.attn.head_dim as f32).powf(-0.5),
                soft_cap: shape.soft_cap,
                window: shape.window,
                sinks: w.sinks.as_ref(),
                kv,
                layer,
                out: &mut b.attn,
            })?;
            backend.linear(Linear { x: &b.attn, weight: &w.o, out: &mut b.o })?;
            let post_norms = w.post_norms.as_ref();
            backend.add_norm(AddNorm {
                residual,
                delta: Some(&b.o),
                delta_norm: post_norms.map(|(norm, _)| norm),
                weight: &w.norm2,
                eps: EPS,
                out: &mut b.norm2,
            })?;
            backend.mlp(Mlp {
                x: &b.norm2,
                shape: shape.mlp,
                up: &w.up,
                down: &w.down,
                activation: shape.activation,
                up_lora: None,
                down_lora: None,
                scratch: &mut b.scratch,
                out: &mut b.mlp,
            })?;
            delta = Some((&b.mlp, post_norms.map(|(_, norm)| norm)));
        }
        backend.add_norm(AddNorm {
            residual,
            delta: delta.map(|(delta, _)| delta),
            delta_norm: delta.and_then(|(_, norm)| norm),
            weight: &self.final_norm,
            eps: EPS,
            out: &mut self.normed,
        })?;
        backend.logits(Logits {
            x: &self.normed,
            head: &self.head,
            soft_cap: shape.logit_cap,
            out: &mut self.logits,
        })
    }

    fn read(&self, backend: &mut B, num_tokens: usize, num_logits: usize) -> Result<Outputs, BackendError> {
        let mut by_token = Vec::new();
        let mut keep = |name: String, buf: &B::Buf| -> Result<(), BackendError> {
            let values = backend.read(buf, num_tokens)?;
            by_token.push((name, values.len() / num_tokens, values));
            Ok(())
        };
        for (layer, (_, b)) in self.layers.iter().enumerate() {
            keep(format!("layer {layer} input norm"), &b.norm1)?;
            keep(format!("layer {layer} qkv after rope"), &b.qkv)?;
            keep(format!("layer {layer} attention"), &b.attn)?;
            keep(format!("layer {layer} output projection"), &b.o)?;
            keep(format!("layer {layer} feed-forward norm"), &b.norm2)?;
            keep(format!("layer {layer} feed-forward"), &b.mlp)?;
        }
        keep("residual".into(), &self.residual)?;
        keep("final norm".into(), &self.normed)?;
        Ok(Outputs { by_token, logits: backend.read(&self.logits, num_logits)? })
    }
}
