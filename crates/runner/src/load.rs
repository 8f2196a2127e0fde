//! From a checkpoint to a [`Decoder`]: tensors by role, merged where one GEMM serves several of them.
//!
//! What a family does differently is in the spec or already folded into the tensors; nothing is decided here.

use quire_backend::{
    Activation, AttnShape, Backend, LinearPart, LinearSource, LoraPart, LoraSource, MlpShape, RopeTable,
};
use quire_core::{QuantFormat, Shard};
use quire_model::{
    Checkpoint, DenseFfn, Ffn, FfnShape, GlobalTensor, GqaSpec, Head, LayerSpec, LayerTensor, LoraPair,
    Mixer, ModelError, ModelSpec, MoeFfn, NormPlacement, QkNorm, RopeSpec, Tensor,
};

use crate::decoder::{AttnLayer, Decoder, DecoderLayer, FfnLayer, MlpLayer, MoeLayer};
use crate::sharding::{Part, spec_of_rank};
use crate::weights::embed_format;
use crate::{RunnerConfig, RunnerError};

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of the checkpoint that were read and packed.
    pub done_bytes: u64,
    /// Bytes in the end; the last call has `done_bytes == total_bytes`.
    pub total_bytes: u64,
}

/// Loads every weight, or what `shard` has of it. `progress` is called after each merged tensor.
pub(crate) fn load_decoder<B: Backend>(
    backend: &mut B,
    checkpoint: &Checkpoint,
    config: &RunnerConfig,
    shard: Shard,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Decoder<B>, RunnerError> {
    let spec = checkpoint.spec();
    check_uniform(checkpoint)?;
    let ignored = checkpoint.ignored_tensors();
    let used = checkpoint.tensors().into_iter().filter(|tensor| !ignored.contains(&tensor.name));
    let total_bytes = used.map(|tensor| tensor.bytes).sum();
    let rank_spec = spec_of_rank(spec, config.quant, shard.world)?;
    let mut loader = Loader {
        backend,
        checkpoint,
        rank_spec: &rank_spec,
        shard,
        quant: config.quant,
        progress,
        done_bytes: 0,
        total_bytes,
        ropes: Vec::new(),
    };

    let format = embed_format(spec, config.quant);
    let embed = loader.global_linear(GlobalTensor::Embed, "embed", format, &Part::Whole)?;
    let layers = (0..spec.layers.len()).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
    let final_norm = checkpoint.global_tensor(GlobalTensor::FinalNorm)?;
    let final_norm = loader.norm("final_norm", &final_norm)?;
    let head = match spec.head {
        Head::Tied if shard == Shard::WHOLE => None,
        Head::Tied | Head::Own => {
            let rows = Part::Rows(shard.range(spec.vocab_size));
            Some(loader.global_linear(GlobalTensor::LmHead, "lm_head", config.quant, &rows)?)
        }
    };
    let ropes = loader.load_ropes(config.max_model_len)?;
    loader.finish();
    Ok(Decoder {
        embed,
        embed_scale: spec.embed_scale,
        layers,
        ropes,
        final_norm,
        head,
        logit_soft_cap: spec.logit_soft_cap,
        norm_eps: spec.norm_eps,
    })
}

/// The workspace is shared by all layers, so those of one kind must have one shape.
fn check_uniform(checkpoint: &Checkpoint) -> Result<(), RunnerError> {
    let layers = &checkpoint.spec().layers;
    let attention = |layer: &LayerSpec| {
        let Mixer::Gqa(gqa) = &layer.mixer;
        (gqa.num_heads, gqa.num_kv_heads, gqa.head_dim)
    };
    let differs = |layer: &LayerSpec| {
        let is_of_its_kind =
            |other: &&LayerSpec| std::mem::discriminant(&other.ffn) == std::mem::discriminant(&layer.ffn);
        let first = layers.iter().find(is_of_its_kind).unwrap_or(layer);
        attention(layer) != attention(&layers[0]) || ffn_shape(&layer.ffn) != ffn_shape(&first.ffn)
    };
    match layers.iter().position(differs) {
        None => Ok(()),
        Some(layer) => Err(RunnerError::Unsupported {
            layer,
            what: "its widths differ from those of the first layer of its kind",
        }),
    }
}

/// Numbers that decide the widths of buffers.
fn ffn_shape(ffn: &Ffn) -> [usize; 3] {
    match ffn {
        Ffn::Dense(ffn) => [ffn.intermediate_size, usize::from(ffn.shape == FfnShape::Gated), 0],
        Ffn::Moe(moe) => [moe.intermediate_size, moe.num_experts, moe.num_experts_per_tok],
    }
}

fn activation(activation: quire_model::Activation) -> Activation {
    match activation {
        quire_model::Activation::Silu => Activation::Silu,
        quire_model::Activation::Gelu => Activation::Gelu,
        quire_model::Activation::GeluTanh => Activation::GeluTanh,
    }
}

/// A tensor, and which part of it is this rank's.
type Piece<'a> = (Tensor<'a>, Part);

fn own_part<'a>((tensor, part): &'a Piece<'_>) -> Tensor<'a> {
    part.cut(tensor)
}

/// This rank's part of what an adapter adds to a linear layer.
struct OwnPair<'a> {
    first: usize,
    a: Tensor<'a>,
    b: Tensor<'a>,
    scaling: f32,
}

impl OwnPair<'_> {
    fn view(&self) -> LoraPart<'_> {
        LoraPart { first: self.first, a: self.a.view(), b: self.b.view(), scaling: self.scaling }
    }
}

/// Of a layer split by its outputs a rank has rows of `B`, of one split by its inputs columns of `A`.
fn pair_of_rank<'a>(pair: &LoraPair<'a>, part: &Part) -> (Tensor<'a>, Tensor<'a>) {
    match part {
        Part::Whole => (pair.a.clone(), pair.b.clone()),
        Part::Rows(_) => (pair.a.clone(), owned(part.cut(&pair.b))),
        Part::Columns(_) => (owned(part.cut(&pair.a)), pair.b.clone()),
    }
}

fn owned(tensor: Tensor<'_>) -> Tensor<'static> {
    let Tensor { dtype, shape, data } = tensor;
    Tensor { dtype, shape: shape.into_owned().into(), data: data.into_owned().into() }
}

struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    checkpoint: &'a Checkpoint,
    /// See [`spec_of_rank`].
    rank_spec: &'a ModelSpec,
    shard: Shard,
    quant: QuantFormat,
    progress: &'a mut dyn FnMut(LoadProgress),
    done_bytes: u64,
    total_bytes: u64,
    /// Distinct rotary embeddings met so far.
    ropes: Vec<RopeSpec>,
}

impl<'a, B: Backend> Loader<'a, B> {
    fn layer(&mut self, layer: usize) -> Result<DecoderLayer<B>, RunnerError> {
        let spec = &self.rank_spec.layers[layer];
        let Mixer::Gqa(gqa) = &spec.mixer;
        let post_norms = match spec.norms {
            NormPlacement::Pre => None,
            NormPlacement::PreAndPost => Some((
                self.layer_norm(layer, LayerTensor::PostMixerNorm)?,
                self.layer_norm(layer, LayerTensor::PostFfnNorm)?,
            )),
        };
        Ok(DecoderLayer {
            post_norms,
            attn_norm: self.layer_norm(layer, LayerTensor::MixerNorm)?,
            attn: self.attention(layer, gqa)?,
            mlp_norm: self.layer_norm(layer, LayerTensor::FfnNorm)?,
            ffn: match &spec.ffn {
                Ffn::Dense(ffn) => FfnLayer::Dense(self.mlp(layer, ffn)?),
                Ffn::Moe(moe) => FfnLayer::Moe(self.moe(layer, moe)?),
            },
        })
    }

    fn attention(&mut self, layer: usize, gqa: &GqaSpec) -> Result<AttnLayer<B>, RunnerError> {
        use LayerTensor::{K, KBias, KNorm, O, OBias, Q, QBias, QNorm, V, VBias};
        let qkv = [(Q, QBias), (K, KBias), (V, VBias)];
        Ok(AttnLayer {
            qkv: self.layer_linear(layer, "qkv", &qkv, gqa.qkv_bias)?,
            o: self.layer_linear(layer, "o", &[(O, OBias)], gqa.out_bias)?,
            qkv_lora: self.lora(layer, "qkv", &[Q, K, V])?,
            o_lora: self.lora(layer, "o", &[O])?,
            qk_norm: match gqa.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some((self.layer_norm(layer, QNorm)?, self.layer_norm(layer, KNorm)?)),
            },
            rope: self.rope_index(&gqa.rope),
            shape: AttnShape {
                num_heads: gqa.num_heads as u32,
                num_kv_heads: gqa.num_kv_heads as u32,
                head_dim: gqa.head_dim as u32,
            },
            scale: gqa.softmax_scale,
            soft_cap: gqa.soft_cap,
            window: gqa.window,
        })
    }

    fn mlp(&mut self, layer: usize, ffn: &DenseFfn) -> Result<MlpLayer<B>, RunnerError> {
        use LayerTensor::{Down, DownBias, Gate, GateBias, Up, UpBias};
        let (shape, up, targets): (_, &[_], &[_]) = match ffn.shape {
            FfnShape::Gated => (MlpShape::Gated, &[(Gate, GateBias), (Up, UpBias)], &[Gate, Up]),
            FfnShape::Plain => (MlpShape::Plain, &[(Up, UpBias)], &[Up]),
        };
        Ok(MlpLayer {
            up: self.layer_linear(layer, "up", up, ffn.bias)?,
            down: self.layer_linear(layer, "down", &[(Down, DownBias)], ffn.bias)?,
            up_lora: self.lora(layer, "up", targets)?,
            down_lora: self.lora(layer, "down", &[Down])?,
            shape,
            activation: activation(ffn.activation),
        })
    }

    /// Routers are small and decide much: they are never quantized.
    fn moe(&mut self, layer: usize, moe: &MoeFfn) -> Result<MoeLayer<B>, RunnerError> {
        use LayerTensor::{ExpertDown, ExpertGate, ExpertUp, Router};
        let tensors = |loader: &Self, roles: &mut dyn Iterator<Item = LayerTensor>| {
            let pieces = roles.filter_map(|role| loader.piece(layer, role).transpose());
            pieces.map(|piece| Ok((piece?, None))).collect::<Result<Vec<_>, ModelError>>()
        };
        let name = |what: &str| format!("layers.{layer}.{what}");
        let experts = 0..moe.num_experts;
        let router = tensors(self, &mut [Router].into_iter())?;
        let router = self.linear(&name("router"), &router, QuantFormat::None)?;
        let gates_and_ups = |expert| [ExpertGate(expert), ExpertUp(expert)];
        let up = tensors(self, &mut experts.clone().flat_map(gates_and_ups))?;
        let up = self.linear(&name("experts.up"), &up, self.quant)?;
        let down = tensors(self, &mut experts.map(ExpertDown))?;
        Ok(MoeLayer {
            router,
            up,
            down: self.linear(&name("experts.down"), &down, self.quant)?,
            top_k: moe.num_experts_per_tok,
            renormalise: moe.norm_topk_prob,
            activation: activation(moe.activation),
        })
    }

    /// A tensor of a layer with this rank's part of it; `None` if another rank adds this bias.
    fn piece(&self, layer: usize, role: LayerTensor) -> Result<Option<Piece<'a>>, ModelError> {
        let part = Part::of_layer_tensor(self.checkpoint.spec(), layer, role, self.shard);
        part.map(|part| Ok((self.checkpoint.layer_tensor(layer, role)?, part))).transpose()
    }

    /// One linear layer out of several, their outputs one after the other.
    fn layer_linear(
        &mut self,
        layer: usize,
        name: &str,
        parts: &[(LayerTensor, LayerTensor)],
        has_bias: bool,
    ) -> Result<B::Weight, RunnerError> {
        let mut pieces = Vec::with_capacity(parts.len());
        for &(weight, bias) in parts {
            let bias = if has_bias { self.piece(layer, bias)? } else { None };
            pieces.extend(self.piece(layer, weight)?.map(|weight| (weight, bias)));
        }
        self.linear(&format!("layers.{layer}.{name}"), &pieces, self.quant)
    }

    /// What the adapters add to a linear layer of these merged parts; `None` if none of them adapts it.
    fn lora(
        &mut self,
        layer: usize,
        name: &str,
        targets: &[LayerTensor],
    ) -> Result<Option<B::Lora>, RunnerError> {
        let shapes = self.rank_spec.layer_tensors(layer);
        let (mut out_features, mut in_features) = (0, 0);
        let mut own: Vec<Vec<OwnPair<'_>>> = self.checkpoint.adapters().iter().map(|_| Vec::new()).collect();
        for &target in targets {
            let Some((_, shape)) = shapes.iter().find(|(tensor, _)| *tensor == target) else { continue };
            let part = Part::of_layer_tensor(self.checkpoint.spec(), layer, target, self.shard);
            for (pairs, adapter) in own.iter_mut().zip(self.checkpoint.adapters()) {
                if let Some(pair) = adapter.pair(layer, target)? {
                    let (a, b) = pair_of_rank(&pair, part.as_ref().unwrap_or(&Part::Whole));
                    pairs.push(OwnPair { first: out_features, a, b, scaling: adapter.scaling() });
                }
            }
            (out_features, in_features) = (out_features + shape[0], shape[1]);
        }
        if own.iter().all(Vec::is_empty) {
            return Ok(None);
        }
        let adapters: Vec<_> = own.iter().map(|pairs| pairs.iter().map(OwnPair::view).collect()).collect();
        let name = &format!("layers.{layer}.{name}");
        Ok(Some(self.backend.load_lora(&LoraSource {
            name,
            in_features,
            out_features,
            adapters: &adapters,
        })?))
    }

    fn global_linear(
        &mut self,
        role: GlobalTensor,
        name: &str,
        quant: QuantFormat,
        part: &Part,
    ) -> Result<B::Weight, RunnerError> {
        let tensor = self.checkpoint.global_tensor(role)?;
        self.linear(name, &[((tensor, part.clone()), None)], quant)
    }

    /// Loads this rank's parts of these weights and biases.
    fn linear(
        &mut self,
        name: &str,
        parts: &[(Piece<'_>, Option<Piece<'_>>)],
        quant: QuantFormat,
    ) -> Result<B::Weight, RunnerError> {
        let own: Vec<_> =
            parts.iter().map(|(weight, bias)| (own_part(weight), bias.as_ref().map(own_part))).collect();
        let views: Vec<_> = own
            .iter()
            .map(|(weight, bias)| LinearPart { weight: weight.view(), bias: bias.as_ref().map(Tensor::view) })
            .collect();
        let weight = self.backend.load_linear(&LinearSource { name, parts: &views, quant })?;
        parts.iter().for_each(|((weight, _), _)| self.checkpoint.release(weight));
        let bytes = parts.iter().map(|((weight, _), bias)| {
            weight.data.len() + bias.as_ref().map_or(0, |(bias, _)| bias.data.len())
        });
        self.advance(bytes.sum());
        Ok(weight)
    }

    fn layer_norm(&mut self, layer: usize, role: LayerTensor) -> Result<B::Norm, RunnerError> {
        let tensor = self.checkpoint.layer_tensor(layer, role)?;
        self.norm(&format!("layers.{layer}.{role:?}"), &tensor)
    }

    fn norm(&mut self, name: &str, tensor: &Tensor<'_>) -> Result<B::Norm, RunnerError> {
        let norm = self.backend.load_norm(name, tensor.view())?;
        self.advance(tensor.data.len());
        Ok(norm)
    }

    fn rope_index(&mut self, rope: &RopeSpec) -> usize {
        self.ropes.iter().position(|known| known == rope).unwrap_or_else(|| {
            self.ropes.push(rope.clone());
            self.ropes.len() - 1
        })
    }

    fn load_ropes(&mut self, max_model_len: u32) -> Result<Vec<B::Rope>, RunnerError> {
        let table = |rope: &RopeSpec| RopeTable {
            inv_freq: rope.inv_freq(max_model_len as usize),
            attention_factor: rope.attention_factor(),
            max_positions: max_model_len,
        };
        let load = |rope| self.backend.load_rope(&table(rope)).map_err(RunnerError::from);
        self.ropes.iter().map(load).collect()
    }

    fn advance(&mut self, bytes: usize) {
        self.done_bytes = (self.done_bytes + bytes as u64).min(self.total_bytes);
        (self.progress)(LoadProgress { done_bytes: self.done_bytes, total_bytes: self.total_bytes });
    }

    /// A tied head that is stored twice is read once, so the sum may fall short until here.
    fn finish(&mut self) {
        let total_bytes = self.total_bytes;
        (self.progress)(LoadProgress { done_bytes: total_bytes, total_bytes });
    }
}
