//! Feed-forward layers.

use quire_core::AdapterId;

use super::linear::RefWeight;
use super::lora::RefLora;
use crate::{Activation, MlpShape};

/// One row through the layer.
pub(super) fn mlp(
    shape: MlpShape,
    activation: Activation,
    up: &RefWeight,
    down: &RefWeight,
    lora: Option<(AdapterId, Option<&RefLora>, Option<&RefLora>)>,
    x: &[f32],
    out: &mut [f32],
) {
    let mut hidden = vec![0.0; up.out_features()];
    up.apply(x, &mut hidden);
    if let Some((adapter, Some(up), _)) = lora {
        up.add(adapter, x, &mut hidden);
    }
    match shape {
        MlpShape::Plain => hidden.iter_mut().for_each(|h| *h = activation.apply(*h)),
        MlpShape::Gated => {
            let (gate, up) = hidden.split_at_mut(down.in_features);
            gate.iter_mut().zip(up).for_each(|(g, u)| *g = activation.apply(*g) * *u);
        }
    }
    let hidden = &hidden[..down.in_features];
    down.apply(hidden, out);
    if let Some((adapter, _, Some(down))) = lora {
        down.add(adapter, hidden, out);
    }
}
