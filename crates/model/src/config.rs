//! A JSON object read field by field, where every error names the file, the field, its value and what is allowed.

use std::borrow::Cow;
use std::fmt::Display;
use std::ops::RangeInclusive;

use quire_core::TokenId;
use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// The largest vocabulary accepted; ids above it are mistakes.
pub(crate) const MAX_VOCAB: u64 = 1 << 24;

/// A JSON object. A field that is `null` counts as absent, as in Python's `config.field is None`.
pub(crate) struct Config<'a> {
    file: &'static str,
    /// Where the object lies in its file: empty, or `rope_scaling.` and the like.
    prefix: String,
    map: Cow<'a, Map<String, Value>>,
}

impl Config<'_> {
    /// Reads the text of `file`, which must be one JSON object.
    pub fn parse(file: &'static str, json: &str) -> Result<Config<'static>> {
        let value: Value = serde_json::from_str(json)
            .map_err(|error| ModelError::Config { file, detail: format!("not valid JSON: {error}") })?;
        match value {
            Value::Object(map) => Ok(Config { file, prefix: String::new(), map: Cow::Owned(map) }),
            other => Err(ModelError::Config {
                file,
                detail: format!("must be a JSON object, but is {}", kind(&other)),
            }),
        }
    }

    /// The value of a field, unless it is absent or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the file mentions the field at all, be it as null.
    pub fn mentions(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    /// The names of all fields.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// An error about `field`.
    pub fn error(&self, field: &str, rule: impl Display) -> ModelError {
        let value = match self.map.get(field) {
            None => "is missing".to_owned(),
            Some(value) => format!("is {}", shorten(&value.to_string())),
        };
        ModelError::Config {
            file: self.file,
            detail: format!("field `{}{field}` {value}: {rule}", self.prefix),
        }
    }

    /// A required integer.
    pub fn int(&self, field: &str, range: RangeInclusive<u64>) -> Result<usize> {
        let rule = rule("an integer", &range);
        self.opt_int(field, range)?.ok_or_else(|| self.error(field, rule))
    }

    /// An integer, or `None` if absent.
    pub fn opt_int(&self, field: &str, range: RangeInclusive<u64>) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64().filter(|value| range.contains(value)).and_then(|value| value.try_into().ok()) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(field, rule("an integer", &range))),
        }
    }

    /// A list of integers; empty if absent.
    pub fn ints(&self, field: &str, range: RangeInclusive<u64>) -> Result<Vec<usize>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let int =
            |value: &Value| value.as_u64().filter(|value| range.contains(value)).map(|value| value as usize);
        let ints = value.as_array().and_then(|list| list.iter().map(int).collect());
        ints.ok_or_else(|| self.error(field, format!("must be a list; each {}", rule("an integer", &range))))
    }

    /// A required number.
    pub fn float(&self, field: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let rule = rule("a number", &range);
        self.opt_float(field, range)?.ok_or_else(|| self.error(field, rule))
    }

    /// A number, or `None` if absent. Infinities and NaN are never in a range.
    pub fn opt_float(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|value| range.contains(value)) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(field, rule("a number", &range))),
        }
    }

    /// A boolean, or `None` if absent.
    pub fn opt_bool(&self, field: &str) -> Result<Option<bool>> {
        self.get(field)
            .map(|value| value.as_bool().ok_or_else(|| self.error(field, "must be true or false")))
            .transpose()
    }

    /// A boolean with a default.
    pub fn bool_or(&self, field: &str, default: bool) -> Result<bool> {
        Ok(self.opt_bool(field)?.unwrap_or(default))
    }

    /// A string, or `None` if absent.
    pub fn opt_str(&self, field: &str) -> Result<Option<&str>> {
        self.get(field)
            .map(|value| value.as_str().ok_or_else(|| self.error(field, "must be a string")))
            .transpose()
    }

    /// A list of strings, or `None` if absent.
    pub fn opt_strings(&self, field: &str) -> Result<Option<Vec<&str>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let strings = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        strings.map(Some).ok_or_else(|| self.error(field, "must be a list of strings"))
    }

    /// An object inside this one, or `None` if absent.
    pub fn opt_object(&self, field: &str) -> Result<Option<Config<'_>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.error(field, "must be an object"))?;
        let prefix = format!("{}{field}.", self.prefix);
        Ok(Some(Config { file: self.file, prefix, map: Cow::Borrowed(map) }))
    }

    /// A token id or a list of them; empty if absent. Hugging Face files use -1 for "none".
    pub fn token_ids(&self, field: &str) -> Result<Vec<TokenId>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let id = |value: &Value| match value.as_i64() {
            Some(-1) => Some(None),
            Some(id) if (0..MAX_VOCAB as i64).contains(&id) => Some(Some(id as TokenId)),
            _ => None,
        };
        let ids: Option<Vec<_>> = value.as_array().map_or(one, Vec::as_slice).iter().map(id).collect();
        match ids {
            Some(ids) => Ok(ids.into_iter().flatten().collect()),
            None => Err(self.error(field, "must be a token id or a list of token ids")),
        }
    }
}

fn rule<T: Display>(kind: &str, range: &RangeInclusive<T>) -> String {
    format!("must be {kind} between {} and {}", range.start(), range.end())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value as shown in a message: whole if short.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(80) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
