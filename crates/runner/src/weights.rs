//! Which weights are quantized, and the bytes that all of them take.

use quire_backend::quant::row_bytes;
use quire_core::{DType, QuantFormat};
use quire_model::{Head, LORA_TARGETS, LayerTensor, LoraAdapter, ModelSpec};

use crate::RunnerError;
use crate::sharding::head_rows;

/// The format of the table of input embeddings: a lookup gains nothing from quantization, but a table that is the output
/// head, too, is as large as any layer and read as a whole.
///
/// Every other linear layer has the format asked for, the output head included. To keep the head at 8 bits beside int4
/// layers, as llama.cpp does, takes a third to a half off what int4 costs in divergence (see `tests/golden/quantized.rs`),
/// but a head is a fifth to a quarter of a model of about a billion weights, and would be read at twice the bytes.
pub(crate) fn embed_format(spec: &ModelSpec, quant: QuantFormat) -> QuantFormat {
    match spec.head {
        Head::Tied => quant,
        Head::Own => QuantFormat::None,
    }
}

/// What the weights of a model take once they are loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightPlan {
    /// How linear layers are stored.
    pub quant: QuantFormat,
    /// Parameters of the model.
    pub num_weights: u64,
    /// Bytes of all of them, with their scales. Vectors are kept in f32.
    pub bytes: u64,
    /// Bytes of those that are not quantized, and what they are, in words.
    pub unquantized_bytes: u64,
    /// As in `norms`, `biases`.
    pub unquantized: Vec<&'static str>,
}

impl WeightPlan {
    /// The plan for a model.
    pub fn new(spec: &ModelSpec, quant: QuantFormat) -> Self {
        Self::of_rank(spec, quant, 1)
    }

    /// The plan for one of `world` ranks, with the model as [`crate::sharding`] makes it for a rank.
    pub(crate) fn of_rank(spec: &ModelSpec, quant: QuantFormat, world: u32) -> Self {
        let empty = Self { quant, num_weights: 0, bytes: 0, unquantized_bytes: 0, unquantized: Vec::new() };
        let mut plan = empty;
        let table = [spec.vocab_size, spec.hidden_size];
        plan.add(spec.dtype, &table, embed_format(spec, quant), "input embeddings");
        if spec.head == Head::Own || world > 1 {
            plan.add(
                spec.dtype,
                &[head_rows(spec.vocab_size, world), spec.hidden_size],
                quant,
                "output head",
            );
        }
        plan.add(spec.dtype, &[spec.hidden_size], QuantFormat::None, "norms");
        for (tensor, shape) in (0..spec.layers.len()).flat_map(|layer| spec.layer_tensors(layer)) {
            match kind(tensor) {
                what @ "linear layers" => plan.add(spec.dtype, &shape, quant, what),
                what => plan.add(spec.dtype, &shape, QuantFormat::None, what),
            }
        }
        plan
    }

    /// Of all weights together.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.num_weights as f64
    }

    fn add(&mut self, dtype: DType, shape: &[usize], quant: QuantFormat, what: &'static str) {
        let num_weights: u64 = shape.iter().map(|&dim| dim as u64).product();
        let bytes = match *shape {
            [rows, cols] => rows as u64 * row_bytes(dtype, quant, cols) as u64,
            _ => num_weights * size_of::<f32>() as u64,
        };
        self.num_weights += num_weights;
        self.bytes += bytes;
        if quant == QuantFormat::None {
            self.unquantized_bytes += bytes;
            if !self.unquantized.contains(&what) {
                self.unquantized.push(what);
            }
        }
    }
}

/// What a rank holds of these adapters, in f32: of each linear layer that one changes, a factor of its inputs and one of its
/// outputs, as wide as the layer is on the rank.
///
/// # Errors
/// Those of [`LoraAdapter::pair`].
pub(crate) fn adapter_bytes(adapters: &[LoraAdapter], rank_spec: &ModelSpec) -> Result<u64, RunnerError> {
    let mut numbers = 0;
    for layer in 0..rank_spec.layers.len() {
        let tensors = rank_spec.layer_tensors(layer).into_iter();
        for (target, shape) in tensors.filter(|(tensor, _)| LORA_TARGETS.contains(tensor)) {
            for adapter in adapters {
                if adapter.pair(layer, target)?.is_some() {
                    numbers += adapter.rank() * shape.iter().sum::<usize>();
                }
            }
        }
    }
    Ok((numbers * size_of::<f32>()) as u64)
}

/// What people call the tensor.
const fn kind(tensor: LayerTensor) -> &'static str {
    use LayerTensor::*;
    match tensor {
        Q | K | V | O | Gate | Up | Down => "linear layers",
        ExpertGate(_) | ExpertUp(_) | ExpertDown(_) => "linear layers",
        Router => "routers",
        QBias | KBias | VBias | OBias | GateBias | UpBias | DownBias => "biases",
        MixerNorm | FfnNorm | PostMixerNorm | PostFfnNorm | QNorm | KNorm => "norms",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(more: &str) -> ModelSpec {
        let json = format!(
            r#"{{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 100,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
                "max_position_embeddings": 256, "torch_dtype": "bfloat16", {more}}}"#
        );
        ModelSpec::from_config_json(&json).unwrap()
    }

    #[test]
    fn tied_tables_are_quantized_and_others_stay() {
        let tied = spec(r#""tie_word_embeddings": true"#);
        let own = spec(r#""tie_word_embeddings": false"#);
        // Two layers: q, o 64x64; k, v 32x64; gate, up 100x64; down 64x100. Biases 64 + 32 + 32, two norms of 64; one more.
        let (rows_of_64, rows_of_100) = (2 * (64 + 64 + 32 + 32 + 100 + 100), 2 * 64);
        let vectors = 4 * (2 * (128 + 128) + 64);

        let plan = WeightPlan::new(&tied, QuantFormat::Int8);
        assert_eq!(plan.num_weights, tied.num_parameters());
        assert_eq!(plan.bytes, (rows_of_64 + 1000) * (64 + 4) + rows_of_100 * (100 + 4) + vectors);
        assert_eq!((plan.unquantized_bytes, plan.unquantized), (vectors, vec!["norms", "biases"]));

        // Rows of 100 are padded to 128.
        let plan = WeightPlan::new(&own, QuantFormat::Int4);
        assert_eq!(plan.num_weights, own.num_parameters());
        let table = 1000 * 64 * 2;
        assert_eq!(plan.bytes, table + (rows_of_64 + 1000) * (34 + 4) + rows_of_100 * (68 + 4) + vectors);
        assert_eq!(plan.unquantized, ["input embeddings", "norms", "biases"]);

        let plan = WeightPlan::new(&tied, QuantFormat::None);
        assert_eq!(plan.bytes, plan.unquantized_bytes);
        assert!((16.0..16.3).contains(&plan.bits_per_weight()), "vectors take 32 bits: {plan:?}");
    }
}
