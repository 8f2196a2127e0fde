//! The pretended model, in closed form: what any correct schedule must produce.
//!
//! A prefix is summed up in one number; the KV entry of position `p` is the number of the tokens `0..=p`, and the next
//! token is a function of that number and the sequence's seed alone.

use quire_core::{CacheSalt, SamplingParams, TokenId, TokenLogprobs};

use crate::rng::mix;

/// The empty prefix under a salt. Different salts give different numbers, so that sharing across salts is noticed.
pub fn root(salt: CacheSalt) -> u64 {
    mix(salt.0 as u64 ^ mix((salt.0 >> 64) as u64 ^ 1)).max(1)
}

/// The prefix that is one token longer. Never 0, which stands for an unwritten entry.
pub fn extend(prefix: u64, token: TokenId) -> u64 {
    mix(prefix ^ mix(u64::from(token) + 2)).max(1)
}

/// The token after a prefix whose last KV entry is `prefix`, as number `num_generated` of the output.
pub fn sample(
    prefix: u64,
    seed: u64,
    num_generated: u32,
    params: &SamplingParams,
    vocab_size: u32,
) -> TokenId {
    let mut token = (mix(prefix ^ mix(seed)) % u64::from(vocab_size)) as TokenId;
    if num_generated < params.min_tokens {
        for _ in 0..vocab_size {
            if !params.stop_token_ids.contains(&token) {
                break;
            }
            token = (token + 1) % vocab_size;
        }
    }
    token
}

/// The log-probability of `token` after `prefix`.
pub fn logprobs(prefix: u64, token: TokenId) -> TokenLogprobs {
    let scattered = extend(prefix, token);
    TokenLogprobs {
        logprob: -((scattered % 4096) as f32) / 256.0,
        rank: (scattered % 7) as u32 + 1,
        top: Vec::new(),
    }
}
