//! Mixtures of experts.

use super::linear::RefWeight;
use crate::Activation;

/// The experts of one token and their weights, in rank order: by weight, the largest first, ties to the lower number.
///
/// Weights are the softmax over all experts in f32 and in order of their number; with `renormalise` they are divided by
/// the sum of those chosen, in rank order. A NaN counts as the smallest.
pub(super) fn route(logits: &[f32], top_k: usize, renormalise: bool) -> Vec<(usize, f32)> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f32 = exps.iter().sum();
    let key = |expert: usize| if logits[expert].is_nan() { f32::NEG_INFINITY } else { logits[expert] };
    let mut chosen: Vec<(usize, f32)> = Vec::new();
    for _ in 0..top_k {
        let rest = (0..logits.len()).filter(|expert| chosen.iter().all(|(taken, _)| taken != expert));
        let best = rest.reduce(|best, expert| if key(expert) > key(best) { expert } else { best });
        chosen.extend(best.map(|expert| (expert, exps[expert] / sum)));
    }
    if renormalise {
        let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
        chosen.iter_mut().for_each(|(_, weight)| *weight /= sum);
    }
    chosen
}

/// One row through one expert, whose hidden numbers and results are rounded.
pub(super) fn expert(
    index: usize,
    activation: Activation,
    (up, down): (&RefWeight, &RefWeight),
    round: &impl Fn(f32) -> f32,
    x: &[f32],
    out: &mut [f32],
) {
    let width = down.in_features;
    let mut hidden = vec![0.0; 2 * width];
    up.apply_expert(index * 2 * width, x, &mut hidden);
    let (gate, values) = hidden.split_at_mut(width);
    gate.iter_mut().zip(values).for_each(|(g, u)| *g = round(activation.apply(*g) * *u));
    down.apply_expert(index * out.len(), gate, out);
    out.iter_mut().for_each(|x| *x = round(*x));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_ranked_and_weighted() {
        // e^0, e^1, e^2 over their sum with e^1 once more.
        let logits = [1.0, 2.0, 0.0, 1.0];
        let sum = 1.0 + 2.0 * 1f32.exp() + 2f32.exp();
        let close = |got: Vec<(usize, f32)>, want: &[(usize, f32)]| {
            assert_eq!(got.len(), want.len());
            for ((expert, weight), (wanted, exact)) in got.iter().zip(want) {
                assert!(expert == wanted && (weight - exact).abs() < 1e-6, "{got:?}, not {want:?}");
            }
        };
        close(route(&logits, 2, false), &[(1, 2f32.exp() / sum), (0, 1f32.exp() / sum)]);
        let (first, second) = (2f32.exp(), 1f32.exp());
        close(route(&logits, 2, true), &[(1, first / (first + second)), (0, second / (first + second))]);
        close(route(&[7.0; 3], 3, false), &[(0, 1.0 / 3.0), (1, 1.0 / 3.0), (2, 1.0 / 3.0)]);
        let with_nan: Vec<_> = route(&[f32::NAN, -1.0, 2.0], 2, true).iter().map(|(e, _)| *e).collect();
        assert_eq!(with_nan, [2, 1]);
    }
}
