//! A JSON object that is taken apart field by field, so that every error names its field and nothing is overlooked.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// The fields that have not been taken yet. `null` is the same as absent.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Where the object is, for errors: empty for the body itself, else for example `stream_options.`.
    path: String,
}

/// A field that asks for something this server does not do, unless it has a value that asks for nothing.
pub(crate) struct Unsupported {
    pub(crate) name: &'static str,
    /// With a verb: "tools are".
    pub(crate) feature: &'static str,
    /// Values that ask for nothing.
    pub(crate) harmless: fn(&Value) -> bool,
}

impl Fields {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map, path: String::new() }),
            Ok(_) => Err(ApiError::malformed("the body must be a JSON object")),
            Err(error) => Err(ApiError::malformed(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// The fields of an object inside another.
    pub(crate) fn nested(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, path: format!("{path}.") }),
            other => {
                Err(ApiError::invalid(path.to_owned(), format!("must be an object, got {}", kind_of(&other))))
            }
        }
    }

    /// The full name of a field.
    pub(crate) fn name_of(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    pub(crate) fn take_value(&mut self, name: &str) -> Option<Value> {
        // The order of the rest does not matter.
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn take<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take_value(name) else { return Ok(None) };
        match serde_json::from_value(value) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(ApiError::invalid(self.name_of(name), error.to_string())),
        }
    }

    /// Whether a field is there with this value.
    pub(crate) fn is(&self, name: &str, value: &Value) -> bool {
        self.map.get(name) == Some(value)
    }

    pub(crate) fn flag(&mut self, name: &str, default: bool) -> Result<bool, ApiError> {
        Ok(self.take(name)?.unwrap_or(default))
    }

    /// Refuses what is left, unless it asks for nothing (`unsupported`) or never changes an answer (`ignored`).
    pub(crate) fn finish(mut self, unsupported: &[Unsupported], ignored: &[&str]) -> Result<(), ApiError> {
        for field in unsupported {
            if self.take_value(field.name).is_some_and(|value| !(field.harmless)(&value)) {
                return Err(ApiError::unsupported(self.name_of(field.name), field.feature));
            }
        }
        match self.map.iter().find(|(name, value)| !value.is_null() && !ignored.contains(&name.as_str())) {
            Some((name, _)) => Err(ApiError::unknown_field(&self.name_of(name))),
            None => Ok(()),
        }
    }
}

/// The JSON type of a value, for messages.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(error: &ApiError) -> String {
        error.body()["error"]["message"].as_str().unwrap().to_owned()
    }

    #[test]
    fn a_body_must_be_an_object() {
        for (body, part) in
            [("[1]", "must be a JSON object"), ("{", "EOF"), ("{\"a\": NaN}", "line 1"), ("", "EOF")]
        {
            let error = Fields::parse(body.as_bytes()).err().unwrap();
            assert!(message(&error).contains(part), "{body}: {}", message(&error));
        }
        assert!(Fields::parse(&b"[".repeat(100_000)).is_err(), "depth is bounded");
    }

    #[test]
    fn wrong_types_name_the_field() {
        let mut fields = Fields::parse(br#"{"n": -1, "t": "hot", "ok": null}"#).unwrap();
        assert_eq!(fields.take::<u32>("ok").unwrap(), None);
        let error = fields.take::<u32>("n").unwrap_err();
        assert_eq!((error.body()["error"]["param"].as_str(), error.status().as_u16()), (Some("n"), 400));
        assert_eq!(
            message(&fields.take::<f32>("t").unwrap_err()),
            r#"t: invalid type: string "hot", expected f32"#
        );
    }

    #[test]
    fn the_rest_is_refused_by_name() {
        let unsupported =
            [Unsupported { name: "tools", feature: "tools are", harmless: |v| v == &serde_json::json!([]) }];
        let finish = |body: &str| Fields::parse(body.as_bytes()).unwrap().finish(&unsupported, &["user"]);
        finish(r#"{"tools": [], "user": "x", "other": null}"#).unwrap();
        assert!(message(&finish(r#"{"tools": [1]}"#).unwrap_err()).contains("tools are not supported"));
        assert!(message(&finish(r#"{"colour": 1}"#).unwrap_err()).ends_with(": colour"));
    }
}
