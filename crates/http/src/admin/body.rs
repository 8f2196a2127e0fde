//! Bodies of the admin API: JSON objects in which no field is named twice. What two values of one name mean, readers of
//! JSON do not agree on, and here it would be a limit.

use std::fmt;

use axum::extract::{FromRequest, Request};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::body::read_json;
use crate::error::ApiError;

/// Bytes of a body.
const MAX_BODY_BYTES: usize = 64 << 10;
/// How an error begins that names a field.
const DUPLICATE: &str = "duplicate field `";

/// An extractor: the fields of the body.
pub(super) struct Object(pub(super) Map<String, Value>);

impl<S: Send + Sync> FromRequest<S> for Object {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = read_json(request, MAX_BODY_BYTES).await?;
        parse(&bytes).map(Self)
    }
}

fn parse(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(Unique(Value::Object(map))) => Ok(map),
        Ok(_) => Err(ApiError::malformed("the body must be a JSON object")),
        Err(error) => {
            let message = error.to_string();
            match message.strip_prefix(DUPLICATE).and_then(|rest| rest.split_once('`')) {
                Some((field, _)) => Err(ApiError::invalid(field.to_owned(), "is there twice")),
                None => Err(ApiError::malformed(format!("the body is not valid JSON: {message}"))),
            }
        }
    }
}

/// A value in which no object names a field twice.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Unique;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Unique, E> {
        Ok(Unique(Value::Null))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Unique, E> {
        Ok(Unique(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Unique, E> {
        Ok(Unique(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Unique, A::Error> {
        let mut values = Vec::new();
        while let Some(Unique(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(Unique(Value::Array(values)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Unique, A::Error> {
        let mut map = Map::new();
        while let Some((name, Unique(value))) = entries.next_entry::<String, _>()? {
            if map.contains_key(&name) {
                return Err(A::Error::custom(format_args!("{DUPLICATE}{name}`")));
            }
            map.insert(name, value);
        }
        Ok(Unique(Value::Object(map)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_json_and_names_come_once() {
        let text = r#"{"a": [1, -2, 1.5, "x", null, true, {"b": {}}], "c": {"a": 1}}"#;
        let parsed = parse(text.as_bytes()).unwrap();
        assert_eq!(Value::Object(parsed), serde_json::from_str::<Value>(text).unwrap());
        for (text, param) in [
            (r#"{"weight": 1, "weight": 2}"#, "weight"),
            (r#"{"limits": {"rpm": 1, "n": 1, "rpm": 1}}"#, "rpm"),
            (r#"{"a": [{"b": 1, "b": 1}]}"#, "b"),
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap_err().body()["error"]["param"], param, "{text}");
        }
        for bad in ["", "{", "[1]", "1", "{\"a\": 1} x"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(&b"[".repeat(60_000)).is_err(), "depth is bounded");
    }
}
