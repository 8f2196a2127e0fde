//! `prompt`: a text, token ids, or a list of either.

use quire_llm::{Prompt, TokenId};
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{Fields, kind_of};

/// Prompts of one request.
const MAX_PROMPTS: usize = 64;

/// Takes the field `prompt`. Every prompt is non-empty.
pub(crate) fn take_prompts(fields: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    let invalid = |message: String| ApiError::invalid("prompt", message);
    if let Some(ids) = fields.take_ids("prompt") {
        return Ok(vec![Prompt::Tokens(ids)]);
    }
    let list = match fields.take_value("prompt") {
        None => return Err(invalid("is required".into())),
        Some(Value::Array(list)) => list,
        Some(text) => return Ok(vec![one("prompt".into(), text)?]),
    };
    match list.first() {
        None => Err(invalid("must not be empty".into())),
        Some(Value::Number(_)) => Ok(vec![one("prompt".into(), Value::Array(list))?]),
        Some(_) if list.len() > MAX_PROMPTS => {
            Err(invalid(format!("at most {MAX_PROMPTS} prompts in one request, got {}", list.len())))
        }
        Some(_) => {
            list.into_iter().enumerate().map(|(at, value)| one(format!("prompt[{at}]"), value)).collect()
        }
    }
}

fn one(path: String, value: Value) -> Result<Prompt, ApiError> {
    match value {
        Value::String(text) if text.is_empty() => Err(ApiError::invalid(path, "must not be empty")),
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(ids) if ids.is_empty() => Err(ApiError::invalid(path, "must not be empty")),
        Value::Array(ids) => token_ids(&path, &ids).map(Prompt::Tokens),
        other => {
            let message =
                format!("must be a string, a list of token ids, or a list of these; got {}", kind_of(&other));
            Err(ApiError::invalid(path, message))
        }
    }
}

/// Checked narrowing; whether an id is in the vocabulary is the engine's to say.
pub(crate) fn token_ids(path: &str, values: &[Value]) -> Result<Vec<TokenId>, ApiError> {
    let id = |(at, value): (usize, &Value)| {
        value.as_u64().and_then(|id| TokenId::try_from(id).ok()).ok_or_else(|| {
            ApiError::invalid(format!("{path}[{at}]"), format!("must be a token id, got {value}"))
        })
    };
    values.iter().enumerate().map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(prompt: &str) -> Result<Vec<Prompt>, ApiError> {
        take_prompts(&mut Fields::parse(format!(r#"{{"prompt": {prompt}}}"#).as_bytes()).unwrap())
    }

    #[test]
    fn all_four_shapes() {
        let shapes = |prompt| {
            let one = |prompt: &Prompt| match prompt {
                Prompt::Text(text) => text.clone(),
                Prompt::Tokens(ids) => format!("{ids:?}"),
                Prompt::Chat(_) => unreachable!("not from a prompt field"),
            };
            parse(prompt).unwrap().iter().map(one).collect::<Vec<_>>()
        };
        assert_eq!(shapes("\"a\""), ["a"]);
        assert_eq!(shapes("[1, 2]"), ["[1, 2]"]);
        assert_eq!(shapes("[\"a\", \"b\"]"), ["a", "b"]);
        assert_eq!(shapes("[[1], [2, 3]]"), ["[1]", "[2, 3]"]);
    }

    #[test]
    fn errors_name_the_element() {
        let many = format!("[{}]", vec!["\"a\""; 65].join(","));
        for (prompt, param) in [
            ("null", "prompt"),
            ("\"\"", "prompt"),
            ("[]", "prompt"),
            ("5", "prompt"),
            ("{}", "prompt"),
            (many.as_str(), "prompt"),
            ("[\"a\", \"\"]", "prompt[1]"),
            ("[[1], []]", "prompt[1]"),
            ("[\"a\", 1]", "prompt[1]"),
            ("[1, \"a\"]", "prompt[1]"),
            ("[1, -1]", "prompt[1]"),
            ("[1, 1.5]", "prompt[1]"),
            ("[4294967296]", "prompt[0]"),
            ("[[1], [2, true]]", "prompt[1][1]"),
        ] {
            assert_eq!(parse(prompt).unwrap_err().body()["error"]["param"], param, "{prompt}");
        }
    }
}
