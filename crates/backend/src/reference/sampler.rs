//! How a token is chosen from a row of logits: the definition that every backend follows to the bit of the chosen id.
//!
//! Steps, in the order of [`quire_core::sampling`]:
//! 1. NaN becomes -∞ and +∞ the largest finite number, so a broken row stays its own affair.
//! 2. Stop ids are masked (-∞) while fewer than `min_tokens` tokens were generated.
//! 3. Tokens outside the bitmask are masked.
//! 4. `logit_bias` is added.
//! 5. Repetition penalty over prompt and output: `l > 0 ? l / r : l * r`. Then, over the output alone, `l -= presence`
//!    and `l -= frequency * count`.
//! 6. Temperature 0: the largest logit, ties to the lower id. Otherwise `l /= temperature` and `p = exp(l - max l)` in
//!    f64, tokens ranked by `l` descending, ties to the lower id.
//! 7. `top_k`: the first k ranks. `top_p`: the shortest prefix of ranks whose sum of p reaches `top_p` times the sum
//!    over what `top_k` left; at least one. `min_p`: p >= `min_p`.
//! 8. One draw `u` (see [`crate::sampling_rng`]): the first kept token, in the order of ids, at which the running sum of
//!    p exceeds `u` times the total.
//!
//! Ids outside the row (a vocabulary larger than the head) are ignored. If no token is left, the bitmask's lowest id is chosen (0 without a bitmask): structure outranks `min_tokens`.
//! Sums run in f64; an implementation that rounds otherwise may differ only where `u` hits a boundary to within
//! its rounding error.

use std::cmp::Ordering;

use quire_core::{TokenId, TokenLogprobs};

use crate::{LogitRow, SeqState, sampling_rng};

/// Chooses the token of one row.
pub(super) fn choose(logits: &[f32], row: &LogitRow, seq: &SeqState, mask: Option<&[u32]>) -> TokenId {
    let params = &seq.params;
    let mut logits: Vec<f32> = logits.iter().map(|&l| sanitize(l)).collect();
    adjust(&mut logits, row, seq, mask);
    if logits.iter().all(|&l| l == f32::NEG_INFINITY) {
        return lowest_allowed(mask);
    }
    if params.temperature == 0.0 {
        return ranking(&logits)[0];
    }
    logits.iter_mut().for_each(|l| *l = sanitize(*l / params.temperature));
    let kept = truncate(&logits, seq);
    draw(&kept, sampling_rng::uniform(seq.seed, row.position))
}

/// Steps 2 to 5.
fn adjust(logits: &mut [f32], row: &LogitRow, seq: &SeqState, mask: Option<&[u32]>) {
    let params = &seq.params;
    let known = &seq.tokens[..seq.tokens.len().min(row.position as usize)];
    let output = known.get(seq.prompt_len as usize..).unwrap_or_default();

    if row.position.saturating_sub(seq.prompt_len) < params.min_tokens {
        for &id in &params.stop_token_ids {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    if let Some(mask) = mask {
        for (id, logit) in logits.iter_mut().enumerate() {
            if !allowed(mask, id) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit += bias;
        }
    }
    let count = |tokens: &[TokenId]| {
        let mut counts = vec![0u32; logits.len()];
        for &id in tokens {
            if let Some(count) = counts.get_mut(id as usize) {
                *count += 1;
            }
        }
        counts
    };
    let (known, output) = (count(known), count(output));
    for ((logit, known), output) in logits.iter_mut().zip(known).zip(output) {
        if params.repetition_penalty != 1.0 && known > 0 {
            let r = params.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / r } else { *logit * r };
        }
        if output > 0 {
            *logit -= params.presence_penalty;
            *logit -= params.frequency_penalty * output as f32;
        }
        *logit = sanitize(*logit);
    }
}

/// Step 7: what may be drawn, as (id, p) in the order of ids.
fn truncate(logits: &[f32], seq: &SeqState) -> Vec<(TokenId, f64)> {
    let params = &seq.params;
    let mut ranked = ranking(logits);
    let max = f64::from(logits[ranked[0] as usize]);
    let p = |id: TokenId| (f64::from(logits[id as usize]) - max).exp();
    if params.top_k > 0 {
        ranked.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let limit = f64::from(params.top_p) * ranked.iter().map(|&id| p(id)).sum::<f64>();
        let mut before = 0.0;
        let kept = ranked.iter().take_while(|&&id| {
            let keep = before < limit;
            before += p(id);
            keep
        });
        let kept = kept.count();
        ranked.truncate(kept);
    }
    ranked.retain(|&id| p(id) >= f64::from(params.min_p));
    ranked.sort_unstable();
    ranked.into_iter().map(|id| (id, p(id))).collect()
}

/// Step 8.
fn draw(kept: &[(TokenId, f64)], u: f64) -> TokenId {
    let target = u * kept.iter().map(|&(_, p)| p).sum::<f64>();
    let mut sum = 0.0;
    for &(id, p) in kept {
        sum += p;
        if sum > target {
            return id;
        }
    }
    kept.last().expect("the most likely token is always kept").0
}

/// Log-probability of `token` under the raw logits, its rank, and the `k` most likely tokens.
pub(super) fn logprobs(logits: &[f32], token: TokenId, k: u32) -> TokenLogprobs {
    let logits: Vec<f32> = logits.iter().map(|&l| sanitize(l)).collect();
    let ranked = ranking(&logits);
    let max = f64::from(logits[ranked[0] as usize]);
    let log_sum = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum::<f64>().ln();
    let logprob = |id: TokenId| match logits[id as usize] {
        f32::NEG_INFINITY => f32::NEG_INFINITY,
        l => (f64::from(l) - max - log_sum) as f32,
    };
    let rank = ranked.iter().position(|&id| id == token).map_or(0, |r| r as u32 + 1);
    let top = ranked.iter().take(k as usize).map(|&id| (id, logprob(id))).collect();
    TokenLogprobs { logprob: logprob(token), rank, top }
}

/// All ids, most likely first, ties by lower id.
fn ranking(logits: &[f32]) -> Vec<TokenId> {
    let mut ids: Vec<TokenId> = (0..logits.len() as TokenId).collect();
    ids.sort_by(|&a, &b| {
        let by_logit = logits[b as usize].partial_cmp(&logits[a as usize]).unwrap_or(Ordering::Equal);
        by_logit.then(a.cmp(&b))
    });
    ids
}

/// Step 1.
fn sanitize(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

fn allowed(mask: &[u32], id: usize) -> bool {
    mask.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
}

fn lowest_allowed(mask: Option<&[u32]>) -> TokenId {
    let words = mask.unwrap_or_default().iter().enumerate();
    let first = words.filter(|(_, w)| **w != 0).map(|(i, w)| i as u32 * 32 + w.trailing_zeros()).next();
    first.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quire_core::{SamplingParams, Slot};

    use super::*;
    use crate::LogitKind;

    const ROW: LogitRow = LogitRow { row: 0, slot: Slot(0), position: 4, kind: LogitKind::Sample };

    /// Two prompt tokens (0, 3), two of output (1, 1).
    fn seq(params: SamplingParams) -> SeqState {
        SeqState { tokens: vec![0, 3, 1, 1], prompt_len: 2, params: Arc::new(params), seed: 11 }
    }

    fn greedy(logits: &[f32], params: SamplingParams) -> TokenId {
        choose(logits, &ROW, &seq(SamplingParams { temperature: 0.0, ..params }), None)
    }

    /// Everything that can be drawn over many positions.
    fn support(logits: &[f32], params: &SamplingParams) -> Vec<TokenId> {
        let seq = seq(params.clone());
        let mut ids: Vec<_> =
            (4..2000).map(|position| choose(logits, &LogitRow { position, ..ROW }, &seq, None)).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    #[test]
    fn greedy_breaks_ties_by_lower_id_and_survives_broken_logits() {
        let d = SamplingParams::default;
        assert_eq!(greedy(&[0.0, 2.0, 2.0], d()), 1);
        assert_eq!(greedy(&[f32::NAN, -5.0, f32::NAN], d()), 1);
        assert_eq!(greedy(&[1.0, f32::INFINITY, f32::INFINITY], d()), 1);
        assert_eq!(greedy(&[f32::NAN; 3], d()), 0);
    }

    #[test]
    fn penalties_count_prompt_and_output_as_documented() {
        let d = SamplingParams::default;
        let logits = [3.0, 2.9, 2.0, 2.8];
        assert_eq!(greedy(&logits, d()), 0);
        let repetition = SamplingParams { repetition_penalty: 2.0, ..d() };
        assert_eq!(greedy(&logits, repetition.clone()), 2, "prompt and output are halved");
        assert_eq!(greedy(&[-3.0, -2.9, -4.0, -2.8], repetition), 2, "negative logits are doubled");
        let flipped = [2.0, 2.9, 2.0, 2.8];
        let presence = SamplingParams { presence_penalty: 0.2, ..d() };
        assert_eq!(greedy(&flipped, presence), 3, "1 was generated; 3 is prompt and keeps its logit");
        let frequency = SamplingParams { frequency_penalty: 0.06, ..d() };
        assert_eq!(greedy(&flipped, frequency), 3, "0.06 counts twice");
    }

    #[test]
    fn bias_and_masks_come_before_penalties() {
        let d = SamplingParams::default;
        assert_eq!(greedy(&[0.0, 1.0, 0.5], SamplingParams { logit_bias: vec![(2, 0.6)], ..d() }), 2);
        let stop = SamplingParams { stop_token_ids: vec![1], max_tokens: 9, ..d() };
        assert_eq!(greedy(&[0.0, 1.0, 0.5], SamplingParams { min_tokens: 2, ..stop.clone() }), 1);
        assert_eq!(greedy(&[0.0, 1.0, 0.5], SamplingParams { min_tokens: 3, ..stop.clone() }), 2);
        let constrained = seq(SamplingParams { min_tokens: 3, temperature: 0.0, ..stop });
        assert_eq!(choose(&[0.0, 1.0, 0.5], &ROW, &constrained, Some(&[0b011])), 0);
        assert_eq!(choose(&[0.0, 1.0, 0.5], &ROW, &constrained, Some(&[0b010])), 1, "nothing else is left");
    }

    #[test]
    fn truncation_keeps_what_it_should() {
        let d = SamplingParams::default;
        // Probabilities 0.4, 0.3, 0.2, 0.1.
        let logits = [0.4f32.ln(), 0.3f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        assert_eq!(support(&logits, &d()), [0, 1, 2, 3]);
        assert_eq!(support(&logits, &SamplingParams { top_k: 2, ..d() }), [0, 1]);
        assert_eq!(support(&logits, &SamplingParams { top_p: 0.65, ..d() }), [0, 1]);
        assert_eq!(support(&logits, &SamplingParams { top_p: 0.75, ..d() }), [0, 1, 2]);
        assert_eq!(support(&logits, &SamplingParams { top_p: 1e-6, ..d() }), [0]);
        assert_eq!(support(&logits, &SamplingParams { min_p: 0.45, ..d() }), [0, 1, 2]);
        let after_top_k = SamplingParams { top_k: 3, top_p: 0.75, ..d() };
        assert_eq!(support(&logits, &after_top_k), [0, 1], "0.7 of the 0.9 left is enough");
        assert_eq!(support(&[1.0; 4], &SamplingParams { top_k: 2, ..d() }), [0, 1], "ties by lower id");
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let seq = seq(SamplingParams::default());
        let mut counts = [0u32; 3];
        for position in 4..10_004 {
            counts[choose(&logits, &LogitRow { position, ..ROW }, &seq, None) as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([7000, 2000, 1000]) {
            assert!(count.abs_diff(expected) < 150, "{counts:?}");
        }
    }

    #[test]
    fn logprobs_are_of_the_raw_logits_with_rank_and_ties() {
        let got = logprobs(&[0.25f32.ln(), 0.5f32.ln(), 0.25f32.ln()], 2, 2);
        assert!((got.logprob - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(got.rank, 3);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 0]);
        let broken = logprobs(&[f32::NAN, 0.0], 0, 5);
        assert_eq!((broken.logprob, broken.rank, broken.top.len()), (f32::NEG_INFINITY, 2, 2));
    }
}
