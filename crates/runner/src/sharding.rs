//! What one rank of a tensor-parallel group holds of a model (Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053, section 3).
//!
//! Query, key, value, gate and up (of every expert, where there are experts) are split by their outputs, along heads and
//! along the intermediate width; o and down by their inputs, so that each rank makes a full-width summand and one sum over the ranks ends each half of a layer. Where
//! there are more ranks than key/value heads, several ranks hold the same one. The output head is split by the
//! vocabulary: at four ranks, a head of a model like Llama 3.1 8B held whole would be a fifth of all that a rank reads in
//! a step of decoding. What is left, embeddings and norms, every rank holds as a whole.

use std::borrow::Cow;
use std::ops::Range;

use quire_backend::quant::INT4_GROUP;
use quire_core::{QuantFormat, Shard};
use quire_model::{Ffn, LayerTensor, Mixer, ModelSpec, Tensor};

use crate::RunnerError;

/// The model as one rank sees it: its heads, its part of the intermediate width; the same on every rank.
///
/// # Errors
/// It does not come out even; the message says which numbers of ranks would do.
pub(crate) fn spec_of_rank(
    spec: &ModelSpec,
    quant: QuantFormat,
    world: u32,
) -> Result<ModelSpec, RunnerError> {
    let refused = |why| {
        let possible = (1..=MAX_RANKS).filter(|&ranks| split(spec, quant, ranks).is_ok()).collect();
        RunnerError::Ranks { ranks: world, why, possible }
    };
    split(spec, quant, world as usize).map_err(refused)
}

/// What [`RunnerError::Ranks`] tries; a machine has no more GPUs.
const MAX_RANKS: usize = 16;

fn split(spec: &ModelSpec, quant: QuantFormat, world: usize) -> Result<ModelSpec, String> {
    let mut spec = spec.clone();
    if world == 1 {
        return Ok(spec);
    }
    let in_groups = |what: &str, columns: usize| match quant {
        QuantFormat::Int4 if !columns.is_multiple_of(INT4_GROUP) => Err(format!(
            "{columns} columns of {what} on each are no whole groups of {INT4_GROUP}, which int4 needs"
        )),
        _ => Ok(()),
    };
    for layer in &mut spec.layers {
        let Mixer::Gqa(gqa) = &mut layer.mixer;
        gqa.num_heads = even("query heads", gqa.num_heads, world)?;
        gqa.num_kv_heads = match gqa.num_kv_heads {
            few if few < world && world.is_multiple_of(few) => 1,
            heads => even("key/value heads", heads, world)?,
        };
        in_groups("the attention's output", gqa.num_heads * gqa.head_dim)?;
        let width = match &mut layer.ffn {
            Ffn::Dense(ffn) => &mut ffn.intermediate_size,
            Ffn::Moe(moe) => &mut moe.intermediate_size,
        };
        *width = even("the intermediate width", *width, world)?;
        in_groups("the feed-forward output", *width)?;
    }
    let last = Shard { rank: world as u32 - 1, world: world as u32 };
    match last.range(spec.vocab_size).is_empty() {
        true => Err(format!("a vocabulary of {} tokens leaves nothing for the last", spec.vocab_size)),
        false => Ok(spec),
    }
}

fn even(what: &str, number: usize, world: usize) -> Result<usize, String> {
    match number.is_multiple_of(world) {
        true => Ok(number / world),
        false => Err(format!("{what}: {number}")),
    }
}

/// Rows of the largest part of the output head.
pub(crate) fn head_rows(vocab_size: usize, world: u32) -> usize {
    Shard { rank: 0, world }.range(vocab_size).len()
}

/// Which part of a tensor a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    /// Of a matrix, or of its bias.
    Rows(Range<usize>),
    Columns(Range<usize>),
}

impl Part {
    /// Of a tensor of a layer, `spec` being that of the whole model. `None`: another rank adds this bias to the sum.
    pub fn of_layer_tensor(
        spec: &ModelSpec,
        layer: usize,
        tensor: LayerTensor,
        shard: Shard,
    ) -> Option<Self> {
        use LayerTensor::*;
        if shard == Shard::WHOLE {
            return Some(Self::Whole);
        }
        let Mixer::Gqa(gqa) = &spec.layers[layer].mixer;
        let intermediate_size = match &spec.layers[layer].ffn {
            Ffn::Dense(ffn) => ffn.intermediate_size,
            Ffn::Moe(moe) => moe.intermediate_size,
        };
        let heads = |Range { start, end }| start * gqa.head_dim..end * gqa.head_dim;
        Some(match tensor {
            Q | QBias => Self::Rows(heads(shard.range(gqa.num_heads))),
            K | KBias | V | VBias => Self::Rows(heads(kv_heads(gqa.num_kv_heads, shard))),
            O => Self::Columns(heads(shard.range(gqa.num_heads))),
            Gate | GateBias | Up | UpBias | ExpertGate(_) | ExpertUp(_) => {
                Self::Rows(shard.range(intermediate_size))
            }
            Down | ExpertDown(_) => Self::Columns(shard.range(intermediate_size)),
            OBias | DownBias if shard.rank > 0 => return None,
            Router | OBias | DownBias | MixerNorm | FfnNorm | PostMixerNorm | PostFfnNorm | QNorm | KNorm => {
                Self::Whole
            }
        })
    }

    /// Cuts it out: rows are borrowed, columns copied.
    pub fn cut<'a>(&self, tensor: &'a Tensor<'_>) -> Tensor<'a> {
        let (dtype, shape) = (tensor.dtype, &*tensor.shape);
        let width = tensor.data.len() / shape[0].max(1);
        match self {
            Self::Whole => Tensor { dtype, shape: shape.into(), data: Cow::Borrowed(&tensor.data) },
            Self::Rows(rows) => {
                let mut own = shape.to_vec();
                own[0] = rows.len();
                let data = &tensor.data[rows.start * width..rows.end * width];
                Tensor { dtype, shape: own.into(), data: Cow::Borrowed(data) }
            }
            Self::Columns(columns) => {
                let bytes = columns.start * dtype.size()..columns.end * dtype.size();
                let mut data = Vec::with_capacity(shape[0] * bytes.len());
                tensor.data.chunks_exact(width).for_each(|row| data.extend_from_slice(&row[bytes.clone()]));
                Tensor { dtype, shape: vec![shape[0], columns.len()].into(), data: data.into() }
            }
        }
    }
}

/// Which key/value heads the query heads of a rank read.
fn kv_heads(num_kv_heads: usize, shard: Shard) -> Range<usize> {
    let (rank, world) = (shard.rank as usize, shard.world as usize);
    if num_kv_heads < world {
        let head = rank * num_kv_heads / world;
        return head..head + 1;
    }
    shard.range(num_kv_heads)
}

#[cfg(test)]
mod tests {
    use quire_core::DType;

    use super::*;

    fn spec(heads: usize, kv_heads: usize, intermediate: usize) -> ModelSpec {
        let json = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": {intermediate},
                "num_hidden_layers": 1, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
                "head_dim": 8, "vocab_size": 500, "max_position_embeddings": 64}}"#
        );
        ModelSpec::from_config_json(&json).unwrap()
    }

    fn ranks(world: u32) -> impl Iterator<Item = Shard> {
        (0..world).map(move |rank| Shard { rank, world })
    }

    #[test]
    fn query_heads_keep_the_key_value_heads_they_read() {
        for (heads, kv, world) in [(4, 2, 2), (8, 2, 4), (12, 4, 2), (6, 1, 3), (16, 8, 16), (12, 2, 6)] {
            let of_rank = spec_of_rank(&spec(heads, kv, 480), QuantFormat::None, world).unwrap();
            let Mixer::Gqa(gqa) = &of_rank.layers[0].mixer;
            for shard in ranks(world) {
                let own: Vec<_> = kv_heads(kv, shard).collect();
                assert_eq!(own.len(), gqa.num_kv_heads);
                for (local, head) in shard.range(heads).enumerate() {
                    let read = own[local / (gqa.num_heads / gqa.num_kv_heads)];
                    assert_eq!(read, head / (heads / kv), "{heads}/{kv} heads, {shard:?}, query head {head}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_come_out_even_is_refused_with_what_would() {
        let message = |spec, quant, world| spec_of_rank(&spec, quant, world).unwrap_err().to_string();
        let text = message(spec(12, 4, 96), QuantFormat::None, 3);
        assert!(text.contains("3 ranks") && text.contains("key/value heads: 4"), "{text}");
        assert!(text.ends_with("1, 2, 4, 12"), "{text}");
        let text = message(spec(12, 4, 96), QuantFormat::None, 8);
        assert!(text.contains("query heads: 12"), "{text}");
        let text = message(spec(12, 4, 97), QuantFormat::None, 2);
        assert!(text.contains("intermediate width: 97") && text.ends_with(" 1"), "{text}");
        let text = message(spec(8, 4, 96), QuantFormat::Int4, 2);
        assert!(text.contains("48 columns") && text.contains("groups of 32"), "{text}");
    }

    #[test]
    fn parts_make_up_the_whole() {
        let data: Vec<u8> = (0..4 * 6 * 2).collect();
        let shape = [4, 6];
        let whole = Tensor { dtype: DType::BF16, shape: shape[..].into(), data: data[..].into() };
        let of = |part: Part| part.cut(&whole);
        let rows = of(Part::Rows(2..4));
        assert_eq!((&*rows.shape, &*rows.data), (&[2, 6][..], &data[24..]));
        assert!(matches!(rows.data, Cow::Borrowed(_)));
        let columns = of(Part::Columns(3..6));
        let want: Vec<u8> = [6..12, 18..24, 30..36, 42..48].into_iter().flatten().collect();
        assert_eq!((&*columns.shape, &*columns.data), (&[4, 3][..], &want[..]));
        let bias = |rank| {
            let shard = Shard { rank, world: 2 };
            Part::of_layer_tensor(&spec(4, 2, 96), 0, LayerTensor::DownBias, shard)
        };
        assert_eq!((bias(0), bias(1)), (Some(Part::Whole), None), "it is added once");
    }
}
