//! `generation_config.json`: the sampling a model's authors recommend.

use quire_core::TokenId;

use crate::config::Config;
use crate::error::Result;

/// Defaults for requests that leave a parameter out. `None`: the file does not say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// `Some(false)`: the authors recommend greedy decoding.
    pub do_sample: Option<bool>,
    /// At least 0.
    pub temperature: Option<f32>,
    /// In `0..=1`.
    pub top_p: Option<f32>,
    /// 0 means all tokens.
    pub top_k: Option<u32>,
    /// In `0..=1`.
    pub min_p: Option<f32>,
    /// Above 0; 1 means none.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a generation, as a list even when the file has one number.
    pub eos_token_ids: Vec<TokenId>,
    /// Token put before a prompt.
    pub bos_token_id: Option<TokenId>,
    /// Longest answer.
    pub max_new_tokens: Option<u32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json`. Unknown fields are ignored, as they mostly concern other decoders.
    ///
    /// # Errors
    /// The text is not a JSON object, or a field read here is out of its range.
    pub fn parse(json: &str) -> Result<Self> {
        let config = Config::parse("generation_config.json", json)?;
        let float = |field, min, max| -> Result<Option<f32>> {
            Ok(config.opt_float(field, min..=max)?.map(|value| value as f32))
        };
        Ok(Self {
            do_sample: config.opt_bool("do_sample")?,
            temperature: float("temperature", 0.0, 1e6)?,
            top_p: float("top_p", 0.0, 1.0)?,
            top_k: config.opt_int("top_k", 0..=1 << 30)?.map(|value| value as u32),
            min_p: float("min_p", 0.0, 1.0)?,
            repetition_penalty: float("repetition_penalty", 1e-6, 1e6)?,
            eos_token_ids: config.token_ids("eos_token_id")?,
            bos_token_id: config.token_ids("bos_token_id")?.first().copied(),
            max_new_tokens: config.opt_int("max_new_tokens", 1..=1 << 30)?.map(|value| value as u32),
        })
    }
}
