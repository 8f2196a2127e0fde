//! The fields that `/v1/chat/completions` and `/v1/completions` share.

use std::collections::BTreeMap;

use quire_llm::{GenerateRequest, SamplingOptions, TokenId};
use serde::Deserialize;

use crate::error::ApiError;
use crate::fields::Fields;

/// `stop`: one string or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "must be a string or a list of strings")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

/// Whether and how to stream.
pub(crate) struct StreamOptions {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// Takes `stream` and `stream_options`.
pub(crate) fn take_stream(fields: &mut Fields) -> Result<StreamOptions, ApiError> {
    let stream = fields.flag("stream", false)?;
    let mut include_usage = false;
    if let Some(options) = fields.take_value("stream_options") {
        if !stream {
            return Err(ApiError::invalid("stream_options", "is only allowed together with `stream: true`"));
        }
        let mut options = Fields::nested(options, "stream_options")?;
        include_usage = options.flag("include_usage", false)?;
        if options.flag("continuous_usage_stats", false)? {
            return Err(ApiError::unsupported(
                "stream_options.continuous_usage_stats",
                "usage in every chunk is",
            ));
        }
        options.finish(&[], &["include_obfuscation"])?;
    }
    Ok(StreamOptions { stream, include_usage })
}

/// Takes everything about sampling, stopping and scheduling into `request`.
pub(crate) fn take_common(fields: &mut Fields, request: &mut GenerateRequest) -> Result<(), ApiError> {
    request.sampling = take_sampling(fields)?;
    request.stop = match fields.take("stop")? {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop],
        Some(Stop::Several(stop)) => stop,
    };
    request.stop_token_ids = fields.take("stop_token_ids")?.unwrap_or_default();
    request.include_stop_str_in_output = fields.flag("include_stop_str_in_output", false)?;
    request.ignore_eos = fields.flag("ignore_eos", false)?;
    request.skip_special_tokens = fields.flag("skip_special_tokens", true)?;
    request.add_special_tokens = fields.take("add_special_tokens")?;
    request.prompt_logprobs = fields.take("prompt_logprobs")?;
    request.return_token_ids = fields.flag("return_token_ids", false)?;
    request.priority = fields.take("priority")?.unwrap_or(0);
    request.cache_salt = fields.take("cache_salt")?;
    let (session, cache_key) = (fields.take("session_id")?, fields.take("prompt_cache_key")?);
    request.session = session.or(cache_key);
    Ok(())
}

fn take_sampling(fields: &mut Fields) -> Result<SamplingOptions, ApiError> {
    let n = fields.take("n")?;
    if let Some(best_of) = fields.take::<u32>("best_of")?
        && best_of != n.unwrap_or(1)
    {
        return Err(ApiError::unsupported("best_of", "choosing the best of more answers than `n` is"));
    }
    Ok(SamplingOptions {
        temperature: fields.take("temperature")?,
        top_p: fields.take("top_p")?,
        top_k: fields.take::<i64>("top_k")?.map(top_k).transpose()?,
        min_p: fields.take("min_p")?,
        presence_penalty: fields.take("presence_penalty")?,
        frequency_penalty: fields.take("frequency_penalty")?,
        repetition_penalty: fields.take("repetition_penalty")?,
        seed: take_seed(fields)?,
        n,
        max_tokens: take_max_tokens(fields)?,
        min_tokens: fields.take("min_tokens")?,
        logit_bias: take_logit_bias(fields)?,
    })
}

/// -1 and 0 are both in use for "off".
fn top_k(value: i64) -> Result<u32, ApiError> {
    match value {
        -1 => Ok(0),
        _ => u32::try_from(value)
            .map_err(|_| ApiError::invalid("top_k", format!("must be -1 (off) or at least 0, got {value}"))),
    }
}

/// Any 64-bit integer; a negative one is as good a key as its two's complement.
fn take_seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take::<serde_json::Number>("seed")? else { return Ok(None) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    seed.map(Some).ok_or_else(|| ApiError::invalid("seed", format!("must be a 64-bit integer, got {value}")))
}

/// `max_completion_tokens` is the newer name of `max_tokens`.
fn take_max_tokens(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let old: Option<u32> = fields.take("max_tokens")?;
    let new: Option<u32> = fields.take("max_completion_tokens")?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::invalid(
            "max_completion_tokens",
            format!("is another name of `max_tokens`, which is {old}, but got {new}"),
        )),
        _ => Ok(new.or(old)),
    }
}

/// An object from token ids, written as strings, to numbers.
fn take_logit_bias(fields: &mut Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let map: BTreeMap<String, f32> = fields.take("logit_bias")?.unwrap_or_default();
    let entry = |(id, bias): (String, f32)| match id.parse() {
        Ok(id) => Ok((id, bias)),
        Err(_) => Err(ApiError::invalid("logit_bias", format!("keys must be token ids, got {id:?}"))),
    };
    map.into_iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(body: &str) -> Result<SamplingOptions, ApiError> {
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        let options = take_sampling(&mut fields)?;
        fields.finish(&[], &[]).map(|()| options)
    }

    fn bad_param(body: &str) -> String {
        let error = sampling(body).unwrap_err();
        error.body()["error"]["param"].as_str().unwrap().to_owned()
    }

    #[test]
    fn every_field_is_read() {
        let options = sampling(
            r#"{"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": 1,
                "frequency_penalty": -1, "repetition_penalty": 1.1, "seed": -1, "n": 2, "best_of": 2,
                "max_tokens": 7, "max_completion_tokens": 7, "min_tokens": 3, "logit_bias": {"5": -100, "4": 1.5}}"#,
        );
        let expected = SamplingOptions {
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(0),
            min_p: Some(0.1),
            presence_penalty: Some(1.0),
            frequency_penalty: Some(-1.0),
            repetition_penalty: Some(1.1),
            seed: Some(u64::MAX),
            n: Some(2),
            max_tokens: Some(7),
            min_tokens: Some(3),
            logit_bias: vec![(4, 1.5), (5, -100.0)],
        };
        assert_eq!(options.unwrap(), expected);
        assert_eq!(sampling("{}").unwrap(), SamplingOptions::default());
    }

    #[test]
    fn wrong_values_name_their_field() {
        for (body, param) in [
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"top_k": -2}"#, "top_k"),
            (r#"{"top_k": 1.5}"#, "top_k"),
            (r#"{"seed": 1.5}"#, "seed"),
            (r#"{"n": -1}"#, "n"),
            (r#"{"n": 4294967296}"#, "n"),
            (r#"{"best_of": 3}"#, "best_of"),
            (r#"{"max_tokens": 1, "max_completion_tokens": 2}"#, "max_completion_tokens"),
            (r#"{"max_tokens": -5}"#, "max_tokens"),
            (r#"{"logit_bias": {"a": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"-1": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": [1]}"#, "logit_bias"),
        ] {
            assert_eq!(bad_param(body), param, "{body}");
        }
    }
}
