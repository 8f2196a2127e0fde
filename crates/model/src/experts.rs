//! Experts that a checkpoint stores together, taken apart: what transformers 5 writes with `save_original_format=False`.
//!
//! Nothing is copied. A fused tensor's entry becomes one entry per expert and projection, each a part of its bytes, under
//! the names that all other checkpoints use.

use crate::error::{ModelError, Result};
use crate::spec::{Ffn, ModelSpec};
use crate::store::Store;
use crate::weights::{LayerTensor, WeightNames};

/// Replaces the fused tensors of each layer that has experts, where there are such tensors.
pub(crate) fn split_fused(spec: &ModelSpec, names: &WeightNames, store: &mut Store) -> Result<()> {
    for (layer, layer_spec) in spec.layers.iter().enumerate() {
        let Ffn::Moe(moe) = &layer_spec.ffn else { continue };
        let (width, hidden) = (moe.intermediate_size, spec.hidden_size);
        let experts = 0..moe.num_experts;
        let gate_up = experts.clone().flat_map(|e| [LayerTensor::ExpertGate(e), LayerTensor::ExpertUp(e)]);
        let down = experts.map(LayerTensor::ExpertDown);
        let fused = [
            (names.fused.gate_up, [moe.num_experts, 2 * width, hidden], [width, hidden], gate_up.collect()),
            (names.fused.down, [moe.num_experts, hidden, width], [hidden, width], down.collect::<Vec<_>>()),
        ];
        for (name, shape, part, tensors) in fused {
            let name = format!("{}{layer}.{name}", names.layer_prefix);
            let Some(stored) = store.get(&name) else { continue };
            if stored.shape != shape {
                return Err(ModelError::Mismatch(format!(
                    "{}: tensor `{name}` has shape {:?}, but config.json asks for {shape:?}",
                    stored.file, stored.shape
                )));
            }
            let parts = tensors.into_iter().map(|tensor| names.layer_name(layer, tensor)).collect();
            store.split(&name, parts, &part)?;
        }
    }
    Ok(())
}
