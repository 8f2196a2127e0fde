//! A JSON object that is taken apart field by field, so that every error names its field and nothing is overlooked.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::ApiError;
use crate::id_list;

/// The fields that have not been taken yet. `null` is the same as absent.
pub(crate) struct Fields {
    map: HashMap<String, Field>,
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
        // A body that it cannot take apart is read again, for what is wrong with it.
        if let Some(map) = split(body) {
            return Ok(Self { map, path: String::new() });
        }
        match serde_json::from_slice(body) {
            Ok(Object(map)) => Ok(Self { map, path: String::new() }),
            // Every value is taken as it is, so only the body itself can be of a wrong type.
            Err(error) if error.is_data() => Err(ApiError::malformed("the body must be a JSON object")),
            Err(error) => Err(ApiError::malformed(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// The fields of an object inside another.
    pub(crate) fn nested(value: Value, path: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => {
                let map = map.into_iter().map(|(name, value)| (name, Field::Value(value))).collect();
                Ok(Self { map, path: format!("{path}.") })
            }
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
        self.map.remove(name).map(Field::into_value).filter(|value| !value.is_null())
    }

    /// A field that is a list of whole numbers; anything else stays.
    pub(crate) fn take_ids(&mut self, name: &str) -> Option<Vec<u32>> {
        match self.map.remove(name)? {
            Field::Ids(ids) => Some(ids),
            Field::Value(value) => {
                self.map.insert(name.to_owned(), Field::Value(value));
                None
            }
        }
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
        matches!(self.map.get(name), Some(Field::Value(given)) if given == value)
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
        let is_null = |field: &Field| matches!(field, Field::Value(Value::Null));
        let left =
            self.map.iter().filter(|(name, field)| !is_null(field) && !ignored.contains(&name.as_str()));
        match left.map(|(name, _)| name).min() {
            Some(name) => Err(ApiError::unknown_field(&self.name_of(name))),
            None => Ok(()),
        }
    }
}

/// The value of a field.
enum Field {
    /// A list of whole numbers, with at least one: prompts of tens of thousands of token ids come so, and a [`Value`] for
    /// each of them would cost more than everything else on the way of a request to the engine.
    Ids(Vec<u32>),
    /// Anything else.
    Value(Value),
}

impl Field {
    fn into_value(self) -> Value {
        match self {
            Self::Ids(ids) => Value::Array(ids.into_iter().map(Value::from).collect()),
            Self::Value(value) => value,
        }
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FieldVisitor)
    }
}

struct FieldVisitor;

impl<'de> Visitor<'de> for FieldVisitor {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Field, E> {
        Ok(Field::Value(Value::Null))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Field, E> {
        Ok(Field::Value(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Field, E> {
        Ok(Field::Value(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Field, E> {
        Ok(Field::Value(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Field, E> {
        Ok(Field::Value(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Field, E> {
        Ok(Field::Value(value.into()))
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Field, E> {
        Ok(Field::Value(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Field, A::Error> {
        let mut ids = Vec::new();
        let other = loop {
            match list.next_element()? {
                Some(Element::Id(id)) => ids.push(id),
                Some(Element::Other(value)) => break value,
                None if ids.is_empty() => return Ok(Field::Value(Value::Array(Vec::new()))),
                None => return Ok(Field::Ids(ids)),
            }
        };
        let mut values: Vec<Value> = ids.into_iter().map(Value::from).collect();
        values.push(other);
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Field::Value(Value::Array(values)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Field, A::Error> {
        let mut map = Map::new();
        while let Some((name, value)) = entries.next_entry()? {
            map.insert(name, value);
        }
        Ok(Field::Value(Value::Object(map)))
    }
}

/// An element of a list.
enum Element {
    Id(u32),
    Other(Value),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Field::deserialize(deserializer)?.into_value() {
            Value::Number(number) => match number.as_u64().and_then(|id| u32::try_from(id).ok()) {
                Some(id) => Self::Id(id),
                None => Self::Other(Value::Number(number)),
            },
            value => Self::Other(value),
        })
    }
}

/// Takes an object apart, its lists of token ids by a reader of their own. `None`: it is not a whole JSON object, or an
/// empty one.
fn split(body: &[u8]) -> Option<HashMap<String, Field>> {
    let mut map = HashMap::new();
    let mut rest = skip_blanks(body).strip_prefix(b"{")?;
    loop {
        let name = value(&mut rest)?;
        rest = skip_blanks(skip_blanks(rest).strip_prefix(b":")?);
        let list = if rest.starts_with(b"[") { id_list::parse(rest) } else { None };
        let field = match list {
            Some((ids, length)) => {
                rest = &rest[length..];
                Field::Ids(ids)
            }
            None => value(&mut rest)?,
        };
        map.insert(name, field);
        rest = skip_blanks(rest);
        match rest.strip_prefix(b",") {
            Some(next) => rest = next,
            None => return skip_blanks(rest.strip_prefix(b"}")?).is_empty().then_some(map),
        }
    }
}

fn skip_blanks(json: &[u8]) -> &[u8] {
    &json[id_list::blanks(json)..]
}

/// The value at the start of `json`, which is taken off it.
fn value<'de, T: Deserialize<'de>>(json: &mut &'de [u8]) -> Option<T> {
    let mut values = serde_json::Deserializer::from_slice(json).into_iter();
    let value = values.next()?.ok()?;
    *json = &json[values.byte_offset()..];
    Some(value)
}

/// The fields of an object.
struct Object(HashMap<String, Field>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ObjectVisitor)
    }
}

struct ObjectVisitor;

impl<'de> Visitor<'de> for ObjectVisitor {
    type Value = Object;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Object, A::Error> {
        let mut map = HashMap::new();
        while let Some((name, field)) = entries.next_entry()? {
            map.insert(name, field);
        }
        Ok(Object(map))
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
    fn values_are_those_of_the_json_whatever_form_they_are_kept_in() {
        for value in [
            "[1, 2, 4294967295]",
            "[]",
            "[1, 2, -3]",
            "[1, 4294967296, 2]",
            "[1, 2.5]",
            "[[1], [2, \"x\"], null]",
            "{\"a\": [1, 2], \"b\": {\"c\": null}}",
            "\"\\u00e9\\n\"",
            "true",
            "-7",
            "1e300",
            "18446744073709551615",
        ] {
            let mut fields = Fields::parse(format!("{{\"v\": {value}, \"v\": {value}}}").as_bytes()).unwrap();
            let ids = fields.take_ids("v");
            assert_eq!(ids.is_some(), value == "[1, 2, 4294967295]", "{value}");
            let back = ids.map(|ids| serde_json::json!(ids)).or_else(|| fields.take_value("v"));
            assert_eq!(back, Some(serde_json::from_str(value).unwrap()));
        }
    }

    #[test]
    fn bodies_are_taken_apart_as_by_a_json_parser() {
        for body in [
            " {\"a\":1,\"b\" : [1, 2],\n\"c\":{\"d\":[3]},\"e\\n\":\"x\"}\t",
            "{\"a\":[1,2],\"a\":null}",
            "{\"a\":[1,[2]],\"b\":[1,2.5],\"c\":-3,\"d\":1e3}",
            "{}",
            "{",
            "",
            "[1]",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":1 2}",
            "{\"a\":[1,2}",
            "{\"a\":1}}",
            "{\"a\":1} x",
            "{a:1}",
            "{\"a\":01}",
            "{\"a\":1x}",
            "{\"a\":tru}",
            "{\"a\":[1,2]x}",
            "{,\"a\":1}",
            "{\"a\":1\u{c}}",
            "{1:2}",
            "{null:2}",
            "{\"a\":\"\u{1}\"}",
            "{\"a\":1e999}",
        ] {
            let json = |map: HashMap<String, Field>| {
                map.into_iter().map(|(name, field)| (name, field.into_value())).collect::<Map<_, _>>()
            };
            let expected = serde_json::from_str(body).ok().map(|Object(map)| json(map));
            // An empty object is left to the parser.
            let expected = expected.filter(|map| !map.is_empty());
            assert_eq!(split(body.as_bytes()).map(json), expected, "{body:?}");
        }
        assert!(split(b"{\"a\":\"\xff\"}").is_none(), "text is UTF-8");
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
