//! Feed-forward layers.

use super::linear::RefWeight;
use crate::{Activation, MlpShape};

/// One row through the layer.
pub(super) fn mlp(
    shape: MlpShape,
    activation: Activation,
    up: &RefWeight,
    down: &RefWeight,
    x: &[f32],
    out: &mut [f32],
) {
    let mut hidden = vec![0.0; up.out_features()];
    up.apply(x, &mut hidden);
    match shape {
        MlpShape::Plain => hidden.iter_mut().for_each(|h| *h = activation.apply(*h)),
        MlpShape::Gated => {
            let (gate, up) = hidden.split_at_mut(down.in_features);
            gate.iter_mut().zip(up).for_each(|(g, u)| *g = activation.apply(*g) * *u);
        }
    }
    down.apply(&hidden[..down.in_features], out);
}
