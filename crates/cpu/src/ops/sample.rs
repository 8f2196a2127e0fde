//! Choosing a token, as [`quire_backend::reference::sampler`] defines it, without sorting the vocabulary.
//!
//! Candidates that survive `top_k`, `top_p` or `min_p` are few: they are collected by a threshold, and only they are
//! sorted and summed in f64, by the reference's own formulas. Without truncation the whole row is summed in blocks.

use quire_backend::{LogitRow, SeqState, sampling_rng};
use quire_core::{SamplingParams, TokenId, TokenLogprobs};

use super::highest::{Highest, sanitized};
use super::topk::{TopK, id_of, key, sort_best_first};
use crate::simd::{Isa, Kernel, LANES, Simd, dispatch, exp};

/// Logits summed at once; the draw finds its block first, then its token.
const BLOCK: usize = 64;

/// Working memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    logits: Vec<f32>,
    p: Vec<f32>,
    block_sums: Vec<f64>,
    candidates: Vec<u64>,
    counts: Vec<Counts>,
}

/// How often a token occurs.
#[derive(Clone, Copy, Default)]
struct Counts {
    known: u32,
    output: u32,
}

/// One row of logits with what decides its token.
pub(crate) struct SampleRow<'a> {
    pub isa: Isa,
    /// Raw, but sanitized.
    pub logits: &'a [f32],
    pub highest: Highest,
    pub row: &'a LogitRow,
    pub seq: &'a SeqState,
    pub mask: Option<&'a [u32]>,
}

impl SampleRow<'_> {
    /// The chosen token.
    pub(crate) fn choose(&self, scratch: &mut Scratch) -> TokenId {
        let params = &*self.seq.params;
        if params.temperature == 0.0 && !self.is_adjusted() {
            return self.greedy(self.logits, self.highest);
        }
        let mut logits = std::mem::take(&mut scratch.logits);
        logits.clear();
        logits.extend_from_slice(self.logits);
        if self.is_adjusted() {
            self.adjust(&mut logits, &mut scratch.counts);
        }
        let token = if params.temperature == 0.0 {
            self.greedy(&logits, Highest::of(self.isa, &logits))
        } else {
            if params.temperature != 1.0 {
                logits.iter_mut().for_each(|l| *l = sanitized(*l / params.temperature));
            }
            self.draw(&logits, scratch)
        };
        scratch.logits = logits;
        token
    }

    fn generated(&self) -> u32 {
        self.row.position.saturating_sub(self.seq.prompt_len)
    }

    /// Whether anything but the temperature changes the logits.
    fn is_adjusted(&self) -> bool {
        let params = &*self.seq.params;
        let masks_stop = self.generated() < params.min_tokens && !params.stop_token_ids.is_empty();
        masks_stop || self.mask.is_some() || !params.logit_bias.is_empty() || params.needs_history()
    }

    fn adjust(&self, logits: &mut [f32], counts: &mut Vec<Counts>) {
        let params = &*self.seq.params;
        if self.generated() < params.min_tokens {
            for &id in &params.stop_token_ids {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(mask) = self.mask {
            apply_mask(logits, mask);
        }
        for &(id, bias) in &params.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = sanitized(*logit + bias);
            }
        }
        if params.needs_history() {
            self.penalize(logits, counts);
        }
    }

    /// Touches only the tokens that occurred; `counts` is all zero before and after.
    fn penalize(&self, logits: &mut [f32], counts: &mut Vec<Counts>) {
        let params = &*self.seq.params;
        let tokens = &self.seq.tokens;
        let known = &tokens[..tokens.len().min(self.row.position as usize)];
        counts.resize(logits.len(), Counts::default());
        for (i, &id) in known.iter().enumerate() {
            if let Some(counts) = counts.get_mut(id as usize) {
                counts.known += 1;
                counts.output += u32::from(i >= self.seq.prompt_len as usize);
            }
        }
        for &id in known {
            let Some(counts) = counts.get_mut(id as usize) else { continue };
            let Counts { known, output } = std::mem::take(counts);
            if known > 0 {
                let logit = &mut logits[id as usize];
                *logit = penalized(*logit, params, output);
            }
        }
    }

    /// The largest logit, ties to the lower id.
    fn greedy(&self, logits: &[f32], highest: Highest) -> TokenId {
        if highest.logit == f32::NEG_INFINITY {
            return self.lowest_allowed();
        }
        highest.id(logits)
    }

    fn draw(&self, logits: &[f32], scratch: &mut Scratch) -> TokenId {
        let params = &*self.seq.params;
        let max = Highest::of(self.isa, logits).logit;
        if max == f32::NEG_INFINITY {
            return self.lowest_allowed();
        }
        let u = sampling_rng::uniform(self.seq.seed, self.row.position);
        if params.top_k > 0 {
            let mut top = TopK::new(&mut scratch.candidates, params.top_k as usize);
            top.extend(logits);
            top.finish();
        } else if params.top_p < 1.0 {
            self.nucleus(logits, max, scratch);
        } else if params.min_p > 0.0 {
            let margin = params.min_p.ln() - 0.01;
            at_least(&mut scratch.candidates, logits, max + margin);
        } else {
            return self.draw_from_all(logits, max, u, scratch);
        }
        draw_from_candidates(logits, max, params, u, &mut scratch.candidates)
    }

    /// Leaves the best ranks whose sum reaches `top_p`, best first: widens the threshold until they suffice.
    fn nucleus(&self, logits: &[f32], max: f32, scratch: &mut Scratch) {
        let limit = f64::from(self.seq.params.top_p) * self.exponentials(logits, max, scratch);
        for width in [4.0, 8.0, 16.0, 32.0, f32::INFINITY] {
            at_least(&mut scratch.candidates, logits, max - width);
            sort_best_first(&mut scratch.candidates);
            let mut before = 0.0;
            let enough = scratch.candidates.iter().position(|&key| {
                let reached = before >= limit;
                before += p_of(logits, max, id_of(key));
                reached
            });
            if let Some(enough) = enough {
                scratch.candidates.truncate(enough);
                return;
            }
        }
    }

    fn draw_from_all(&self, logits: &[f32], max: f32, u: f64, scratch: &mut Scratch) -> TokenId {
        let target = u * self.exponentials(logits, max, scratch);
        let mut sum = 0.0;
        let mut last = 0;
        for (block, (p, block_sum)) in scratch.p.chunks(BLOCK).zip(&scratch.block_sums).enumerate() {
            if sum + block_sum <= target {
                sum += block_sum;
                continue;
            }
            for (i, &p) in p.iter().enumerate() {
                sum += f64::from(p);
                if p > 0.0 {
                    last = block * BLOCK + i;
                }
                if sum > target {
                    return last as TokenId;
                }
            }
        }
        // Rounding left the sum just below the target: the last token that has a probability.
        let last = scratch.p.iter().rposition(|&p| p > 0.0).unwrap_or(last);
        last as TokenId
    }

    /// `p = e^(l - max)` for all, their sums by block, and the sum of all.
    fn exponentials(&self, logits: &[f32], max: f32, scratch: &mut Scratch) -> f64 {
        scratch.p.resize(logits.len(), 0.0);
        scratch.block_sums.clear();
        let Scratch { p, block_sums, .. } = scratch;
        // SAFETY: `isa` was detected.
        unsafe { dispatch(self.isa, Exponentials { logits, max, p, block_sums }) };
        scratch.block_sums.iter().sum()
    }

    fn lowest_allowed(&self) -> TokenId {
        let mut words = self.mask.unwrap_or_default().iter().enumerate();
        words.find(|(_, word)| **word != 0).map_or(0, |(i, word)| i as u32 * 32 + word.trailing_zeros())
    }

    /// Log-probability of `token` under the raw logits, its rank, and the `k` most likely tokens.
    pub(crate) fn logprobs(&self, token: TokenId, k: u32, scratch: &mut Scratch) -> TokenLogprobs {
        let logits = self.logits;
        let max = self.highest.logit;
        let log_sum = self.exponentials(logits, max, scratch).ln();
        let logprob = |id: TokenId| match logits.get(id as usize) {
            None | Some(&f32::NEG_INFINITY) => f32::NEG_INFINITY,
            Some(&l) => (f64::from(l) - f64::from(max) - log_sum) as f32,
        };
        let own = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let better = logits.iter().filter(|&&l| l > own).count();
        let tied = logits.iter().take(token as usize).filter(|&&l| l == own).count();
        let mut top = TopK::new(&mut scratch.candidates, k as usize);
        top.extend(logits);
        top.finish();
        let top = scratch.candidates.iter().map(|&key| (id_of(key), logprob(id_of(key)))).collect();
        TokenLogprobs { logprob: logprob(token), rank: (better + tied) as u32 + 1, top }
    }
}

/// The three penalties on the logit of a token that occurred, `output` times in the output.
fn penalized(mut logit: f32, params: &SamplingParams, output: u32) -> f32 {
    let r = params.repetition_penalty;
    if r != 1.0 {
        logit = if logit > 0.0 { logit / r } else { logit * r };
    }
    if output > 0 {
        logit -= params.presence_penalty;
        logit -= params.frequency_penalty * output as f32;
    }
    sanitized(logit)
}

fn apply_mask(logits: &mut [f32], mask: &[u32]) {
    for (word, logits) in logits.chunks_mut(32).enumerate() {
        let bits = mask.get(word).copied().unwrap_or(0);
        if bits == u32::MAX {
            continue;
        }
        for (bit, logit) in logits.iter_mut().enumerate() {
            if bits >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// The reference's probability, up to the common factor.
fn p_of(logits: &[f32], max: f32, id: TokenId) -> f64 {
    (f64::from(logits[id as usize]) - f64::from(max)).exp()
}

/// Collects the tokens with a logit of at least `bound`.
fn at_least(candidates: &mut Vec<u64>, logits: &[f32], bound: f32) {
    candidates.clear();
    let ids = logits.iter().enumerate().filter(|(_, l)| **l >= bound);
    candidates.extend(ids.map(|(id, &l)| key(l, id as TokenId)));
}

/// `top_p` (after `top_k`) and `min_p` on candidates, then the draw.
fn draw_from_candidates(
    logits: &[f32],
    max: f32,
    params: &SamplingParams,
    u: f64,
    candidates: &mut Vec<u64>,
) -> TokenId {
    let p = |key: u64| p_of(logits, max, id_of(key));
    if params.top_k > 0 && params.top_p < 1.0 {
        sort_best_first(candidates);
        let limit = f64::from(params.top_p) * candidates.iter().map(|&key| p(key)).sum::<f64>();
        let mut before = 0.0;
        let reached = candidates.iter().position(|&key| {
            let reached = before >= limit;
            before += p(key);
            reached
        });
        candidates.truncate(reached.unwrap_or(candidates.len()));
    }
    if params.min_p > 0.0 {
        candidates.retain(|&key| p(key) >= f64::from(params.min_p));
    }
    candidates.sort_unstable_by_key(|&key| id_of(key));
    let target = u * candidates.iter().map(|&key| p(key)).sum::<f64>();
    let mut sum = 0.0;
    let drawn = candidates.iter().find(|&&key| {
        sum += p(key);
        sum > target
    });
    drawn.or(candidates.last()).map_or(0, |&key| id_of(key))
}

struct Exponentials<'a> {
    logits: &'a [f32],
    max: f32,
    p: &'a mut [f32],
    block_sums: &'a mut Vec<f64>,
}

impl Kernel for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (logits, p) in self.logits.chunks(BLOCK).zip(self.p.chunks_mut(BLOCK)) {
            let mut block = [f32::NEG_INFINITY; BLOCK];
            block[..logits.len()].copy_from_slice(logits);
            let mut sums = [0f64; LANES];
            for v in block.as_chunks_mut::<LANES>().0 {
                // SAFETY: `v` holds LANES elements; the rest is the caller's.
                unsafe {
                    let x = S::add(S::load(v.as_ptr()), S::splat(-self.max));
                    S::store(v.as_mut_ptr(), exp::<S>(x));
                }
                sums.iter_mut().zip(&*v).for_each(|(sum, p)| *sum += f64::from(*p));
            }
            p.copy_from_slice(&block[..p.len()]);
            self.block_sums.push(sums.iter().sum());
        }
    }
}
