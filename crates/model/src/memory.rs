//! How much memory a model needs, computed from its shape alone.

use quire_core::DType;

use crate::spec::{Mixer, ModelSpec};

impl ModelSpec {
    /// Number of stored weights. A tied head counts once.
    pub fn num_parameters(&self) -> u64 {
        let elements = |shape: &[usize]| shape.iter().map(|&dim| dim as u64).product::<u64>();
        let global: u64 = self.global_tensors().iter().map(|(_, shape)| elements(shape)).sum();
        let layer = |index| self.layer_tensors(index).iter().map(|(_, shape)| elements(shape)).sum::<u64>();
        global + (0..self.layers.len()).map(layer).sum::<u64>()
    }

    /// Bytes of all weights when each is stored as `dtype`, without quantization scales.
    pub fn weight_bytes(&self, dtype: DType) -> u64 {
        self.num_parameters() * dtype.size() as u64
    }

    /// Bytes of keys and values that one token keeps in all layers, without quantization scales.
    pub fn kv_bytes_per_token(&self, dtype: DType) -> u64 {
        let elements = |layer: &crate::LayerSpec| {
            let Mixer::Gqa(gqa) = &layer.mixer;
            2 * (gqa.num_kv_heads * gqa.head_dim) as u64
        };
        self.layers.iter().map(elements).sum::<u64>() * dtype.size() as u64
    }
}
