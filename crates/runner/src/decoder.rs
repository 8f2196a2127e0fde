//! One decoder for every model: layers of attention and a feed-forward network on a residual stream.
//!
//! Only what the spec says differs; no family has a name here. All work is enqueued on the backend, on buffers that
//! never move, so that the same calls can be recorded once and replayed.

use quire_backend::{
    Activation, AddLora, AddNorm, AllGather, AllReduce, Attention, AttnShape, Backend, BackendError, Embed,
    Linear, Logits, Mlp, MlpShape, Moe, RopeAndCache,
};

use crate::workspace::Workspace;

/// A model's weights on a device, and its forward pass.
pub struct Decoder<B: Backend> {
    /// `[vocab, hidden]`.
    pub(crate) embed: B::Weight,
    pub(crate) embed_scale: f32,
    pub(crate) layers: Vec<DecoderLayer<B>>,
    /// The distinct rotary tables of the layers.
    pub(crate) ropes: Vec<B::Rope>,
    pub(crate) final_norm: B::Norm,
    /// `[vocab, hidden]`, or this rank's rows of it; `None` where the embedding table serves.
    pub(crate) head: Option<B::Weight>,
    pub(crate) logit_soft_cap: Option<f32>,
    pub(crate) norm_eps: f32,
}

/// `x += attn(norm(x)); x += ffn(norm(x))`.
pub(crate) struct DecoderLayer<B: Backend> {
    pub attn_norm: B::Norm,
    /// Of what attention and the feed-forward network give, before it is added.
    pub post_norms: Option<(B::Norm, B::Norm)>,
    pub attn: AttnLayer<B>,
    pub mlp_norm: B::Norm,
    pub ffn: FfnLayer<B>,
}

/// What the layer before has left to be added to the residual stream.
pub(crate) enum Delta<'a, B: Backend> {
    None,
    /// The buffer of that name, normalised first if there is a weight for that.
    Some(Option<&'a B::Norm>),
}

/// The part of a layer that works on each token by itself.
pub(crate) enum FfnLayer<B: Backend> {
    Dense(MlpLayer<B>),
    Moe(MoeLayer<B>),
}

/// Grouped-query attention.
pub(crate) struct AttnLayer<B: Backend> {
    /// Query, key and value rows in one.
    pub qkv: B::Weight,
    pub o: B::Weight,
    /// What adapters add to `qkv` and `o`; `None`: nothing.
    pub qkv_lora: Option<B::Lora>,
    pub o_lora: Option<B::Lora>,
    pub qk_norm: Option<(B::Norm, B::Norm)>,
    /// Index into [`Decoder::ropes`].
    pub rope: usize,
    pub shape: AttnShape,
    pub scale: f32,
    pub soft_cap: Option<f32>,
    pub window: Option<u32>,
}

/// A dense feed-forward network.
pub(crate) struct MlpLayer<B: Backend> {
    /// Gate and up rows in one, if there is a gate.
    pub up: B::Weight,
    pub down: B::Weight,
    /// What adapters add to `up` and `down`.
    pub up_lora: Option<B::Lora>,
    pub down_lora: Option<B::Lora>,
    pub shape: MlpShape,
    pub activation: Activation,
}

/// A mixture of experts; see [`Moe`].
pub(crate) struct MoeLayer<B: Backend> {
    pub router: B::Weight,
    /// Gate and up rows of every expert in one.
    pub up: B::Weight,
    pub down: B::Weight,
    pub top_k: usize,
    pub renormalise: bool,
    pub activation: Activation,
}

/// What a pass asks for beyond its rows; the launches depend on nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PassKind {
    pub wants_logits: bool,
    /// Whether a row has an adapter.
    pub has_adapters: bool,
}

impl<B: Backend> Decoder<B> {
    /// The pass prepared last, from its tokens to its logits (none are computed if it wants none).
    pub(crate) fn forward(
        &self,
        backend: &mut B,
        ws: &mut Workspace<B>,
        kv: &mut B::Kv,
        kind: PassKind,
    ) -> Result<(), BackendError> {
        backend.embed(Embed { table: &self.embed, scale: self.embed_scale, out: &mut ws.residual })?;
        let mut delta = Delta::None;
        for (index, layer) in self.layers.iter().enumerate() {
            let (post_attn, post_ffn) = layer.post_norms.as_ref().map(|(attn, ffn)| (attn, ffn)).unzip();
            self.add_norm(backend, ws, &layer.attn_norm, &delta)?;
            self.attention(backend, ws, kv, (index, &layer.attn), kind)?;
            backend.all_reduce(AllReduce { buf: &mut ws.delta })?;
            self.add_norm(backend, ws, &layer.mlp_norm, &Delta::Some(post_attn))?;
            match &layer.ffn {
                FfnLayer::Dense(mlp) => self.mlp(backend, ws, mlp, kind)?,
                FfnLayer::Moe(moe) => self.moe(backend, ws, moe)?,
            }
            backend.all_reduce(AllReduce { buf: &mut ws.delta })?;
            delta = Delta::Some(post_ffn);
        }
        if !kind.wants_logits {
            return Ok(());
        }
        self.add_norm(backend, ws, &self.final_norm, &delta)?;
        let (head, soft_cap) = (self.head.as_ref().unwrap_or(&self.embed), self.logit_soft_cap);
        let Some(part) = &mut ws.logits_part else {
            return backend.logits(Logits { x: &ws.hidden, head, soft_cap, out: &mut ws.logits });
        };
        backend.logits(Logits { x: &ws.hidden, head, soft_cap, out: part })?;
        backend.all_gather(AllGather { part, out: &mut ws.logits })
    }

    /// Adds what the layer before has made to the residual stream, and normalises it into `hidden`.
    fn add_norm(
        &self,
        backend: &mut B,
        ws: &mut Workspace<B>,
        weight: &B::Norm,
        delta: &Delta<'_, B>,
    ) -> Result<(), BackendError> {
        let (delta, delta_norm) = match *delta {
            Delta::None => (None, None),
            Delta::Some(norm) => (Some(&ws.delta), norm),
        };
        backend.add_norm(AddNorm {
            residual: &mut ws.residual,
            delta,
            delta_norm,
            weight,
            eps: self.norm_eps,
            out: &mut ws.hidden,
        })
    }

    /// `hidden` to `delta`; keys and values go into layer `index` of the cache.
    fn attention(
        &self,
        backend: &mut B,
        ws: &mut Workspace<B>,
        kv: &mut B::Kv,
        (index, attn): (usize, &AttnLayer<B>),
        kind: PassKind,
    ) -> Result<(), BackendError> {
        backend.linear(Linear { x: &ws.hidden, weight: &attn.qkv, out: &mut ws.qkv })?;
        if let (Some(lora), true) = (&attn.qkv_lora, kind.has_adapters) {
            backend.add_lora(AddLora { x: &ws.hidden, lora, out: &mut ws.qkv })?;
        }
        backend.rope_and_cache(RopeAndCache {
            qkv: &mut ws.qkv,
            shape: attn.shape,
            qk_norm: attn.qk_norm.as_ref().map(|(q, k)| (q, k)),
            eps: self.norm_eps,
            rope: Some(&self.ropes[attn.rope]),
            kv,
            layer: index,
        })?;
        backend.attention(Attention {
            qkv: &ws.qkv,
            shape: attn.shape,
            scale: attn.scale,
            soft_cap: attn.soft_cap,
            window: attn.window,
            sinks: None,
            kv,
            layer: index,
            out: &mut ws.attn,
        })?;
        backend.linear(Linear { x: &ws.attn, weight: &attn.o, out: &mut ws.delta })?;
        match &attn.o_lora {
            Some(lora) if kind.has_adapters => {
                backend.add_lora(AddLora { x: &ws.attn, lora, out: &mut ws.delta })
            }
            _ => Ok(()),
        }
    }

    /// `hidden` to `delta`.
    fn mlp(
        &self,
        backend: &mut B,
        ws: &mut Workspace<B>,
        mlp: &MlpLayer<B>,
        kind: PassKind,
    ) -> Result<(), BackendError> {
        backend.mlp(Mlp {
            x: &ws.hidden,
            shape: mlp.shape,
            up: &mlp.up,
            down: &mlp.down,
            activation: mlp.activation,
            up_lora: mlp.up_lora.as_ref().filter(|_| kind.has_adapters),
            down_lora: mlp.down_lora.as_ref().filter(|_| kind.has_adapters),
            scratch: ws.mlp.as_mut().expect("a model with dense layers has room for them"),
            out: &mut ws.delta,
        })
    }

    /// `hidden` to `delta`.
    fn moe(&self, backend: &mut B, ws: &mut Workspace<B>, moe: &MoeLayer<B>) -> Result<(), BackendError> {
        backend.moe(Moe {
            x: &ws.hidden,
            router: &moe.router,
            up: &moe.up,
            down: &moe.down,
            top_k: moe.top_k,
            renormalise: moe.renormalise,
            activation: moe.activation,
            scratch: ws.moe.as_mut().expect("a model with experts has room for them").scratch(),
            out: &mut ws.delta,
        })
    }
}
