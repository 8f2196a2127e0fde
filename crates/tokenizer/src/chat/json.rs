//! `tojson` as Hugging Face defines it: Python's `json.dumps`, without HTML escapes, non-ASCII characters kept.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::python::{Generator, float_repr};

/// How deep a value may nest.
const MAX_DEPTH: usize = 128;

/// Adds the `tojson` filter: `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn install(env: &mut Environment<'static>) {
    env.add_filter("tojson", tojson);
}

#[expect(clippy::needless_pass_by_value, reason = "the types that minijinja hands to a filter")]
fn tojson(state: &State, value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    if args.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let argument = |position: usize, name: &str| -> Result<Value, Error> {
        match args.get(position) {
            Some(value) => Ok(value.clone()),
            None => Ok(kwargs.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_true();
    let indent = argument(1, "indent")?;
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_true();
    kwargs.assert_all_used()?;

    let indent = indent_unit(&indent)?;
    let item_separator = if indent.is_some() { "," } else { ", " };
    let (mut item, mut key) = (item_separator.to_owned(), ": ".to_owned());
    if !separators.is_none() && !separators.is_undefined() {
        let pair: Vec<Value> = separators.try_iter()?.collect();
        let [first, second] = pair.as_slice() else {
            return Err(type_error("tojson: separators needs two strings"));
        };
        (item, key) = (first.to_string(), second.to_string());
    }
    let mut writer = Writer { out: String::new(), ensure_ascii, indent, item, key, sort_keys };
    writer.value(value, 0)?;
    state.consume_fuel(writer.out.len() as u64 / 16)?;
    Ok(Value::from(writer.out))
}

/// `indent=2` is two spaces a level, `indent="\t"` is that string.
fn indent_unit(indent: &Value) -> Result<Option<String>, Error> {
    if indent.is_none() || indent.is_undefined() {
        Ok(None)
    } else if let Some(unit) = indent.as_str() {
        Ok(Some(unit.to_owned()))
    } else {
        let width = indent.as_i64().filter(|&width| width <= 64);
        let width = width.ok_or_else(|| type_error("tojson: indent is a number up to 64 or a string"))?;
        Ok(Some(" ".repeat(usize::try_from(width).unwrap_or(0))))
    }
}

fn type_error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadSerialization, message.into())
}

struct Writer {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(type_error(format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => self.map(value, depth)?,
            ValueKind::Seq | ValueKind::Iterable if value.downcast_object_ref::<Generator>().is_none() => {
                self.list(value, depth)?;
            }
            kind => return Err(type_error(format!("object of type {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn number(&mut self, value: &Value) {
        match f64::try_from(value.clone()) {
            Ok(float) if !value.is_integer() => match float {
                _ if float.is_nan() => self.out.push_str("NaN"),
                _ if float.is_infinite() => {
                    self.out.push_str(if float > 0.0 { "Infinity" } else { "-Infinity" });
                }
                _ => self.out.push_str(&float_repr(float)),
            },
            _ => self.out.push_str(&value.to_string()),
        }
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for item in value.try_iter()? {
            self.separate(empty, depth);
            empty = false;
            self.value(&item, depth + 1)?;
        }
        self.close(']', empty, depth);
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let pairs = value.as_object().and_then(|object| object.try_iter_pairs());
        let mut pairs: Vec<(Value, Value)> = pairs.into_iter().flatten().collect();
        if self.sort_keys {
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.out.push('{');
        for (i, (name, item)) in pairs.iter().enumerate() {
            self.separate(i == 0, depth);
            match name.kind() {
                ValueKind::String => self.string(name.as_str().unwrap_or_default()),
                ValueKind::Number | ValueKind::Bool | ValueKind::None => {
                    self.out.push('"');
                    self.value(name, depth)?;
                    self.out.push('"');
                }
                kind => return Err(type_error(format!("keys must be strings or numbers, not {kind}"))),
            }
            self.out.push_str(&self.key);
            self.value(item, depth + 1)?;
        }
        self.close('}', pairs.is_empty(), depth);
        Ok(())
    }

    fn separate(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.item);
        }
        self.new_line(depth + 1);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(unit) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(unit));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c >= '\u{7f}') => self.escape(c),
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    /// `\uXXXX`, two of them beyond the basic plane.
    fn escape(&mut self, c: char) {
        if c == '\u{7f}' {
            // Python counts DEL as ASCII.
            return self.out.push(c);
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a string cannot fail.
            let _ = write!(self.out, "\\u{unit:04x}");
        }
    }
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    fn render(template: &str) -> String {
        let mut env = minijinja::Environment::new();
        super::install(&mut env);
        let x = crate::chat::template::from_json(&serde_json::json!({
            "b": [1, 2.0, 1e-7, 1e22, true, null], "a": {"<é🙂>": "\"\n\u{1}\u{7f}"}, "e": [], "f": {}
        }));
        env.render_str(template, context! { x }).unwrap()
    }

    // The expected texts are those of Python's json.dumps with the same arguments.
    #[test]
    fn as_python_writes_it() {
        assert_eq!(
            render("{{ x|tojson }}"),
            "{\"b\": [1, 2.0, 1e-07, 1e+22, true, null], \"a\": {\"<é🙂>\": \"\\\"\\n\\u0001\u{7f}\"}, \"e\": [], \"f\": {}}"
        );
        assert_eq!(
            render("{{ x|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}"),
            "{\"a\":{\"<\\u00e9\\ud83d\\ude42>\":\"\\\"\\n\\u0001\u{7f}\"},\"b\":[1,2.0,1e-07,1e+22,true,null],\"e\":[],\"f\":{}}"
        );
        assert_eq!(
            render("{{ x|tojson(indent=1) }}"),
            "{\n \"b\": [\n  1,\n  2.0,\n  1e-07,\n  1e+22,\n  true,\n  null\n ],\n \"a\": {\n  \"<é🙂>\": \"\\\"\\n\\u0001\u{7f}\"\n },\n \"e\": [],\n \"f\": {}\n}"
        );
        assert_eq!(render("{{ {1: 2, true: none}|tojson }}"), "{\"1\": null}");
        assert_eq!(render("{{ x.b[:2]|tojson }}"), "[1, 2.0]");
    }

    #[test]
    fn undefined_is_an_error() {
        let mut env = minijinja::Environment::new();
        super::install(&mut env);
        assert!(env.render_str("{{ y|tojson }}", context! {}).is_err());
    }
}
