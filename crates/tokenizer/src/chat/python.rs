//! What Python has and minijinja lacks: methods of strings, lists and dicts; generators; wider tests.

use std::sync::{Arc, Mutex};

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;

/// Adds all of it to an environment.
pub(super) fn install(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(call_method);
    install_generators(env);
    env.add_filter("string", |value: &Value| match value.kind() {
        ValueKind::String => value.clone(),
        _ => Value::from(to_str(value)),
    });
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    // Python's bool is a number; its strings and dicts have a length and can be indexed.
    env.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    env.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Seq | ValueKind::String | ValueKind::Map => true,
        ValueKind::Iterable => value.downcast_object_ref::<Generator>().is_none(),
        _ => false,
    });
}

/// The result of a lazy filter (`map`, `select`, …): it can be iterated once and has no length, and neither `tojson`
/// nor indexing takes it, as with Python's generators.
#[derive(Debug)]
pub(super) struct Generator(Mutex<std::vec::IntoIter<Value>>);

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let generator = self.clone();
        Enumerator::Iter(Box::new(std::iter::from_fn(move || generator.0.lock().ok()?.next())))
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

fn generator(items: Vec<Value>) -> Value {
    Value::from_object(Generator(Mutex::new(items.into_iter())))
}

/// The lazy filters of Jinja2, evaluated at once and handed out as generators.
fn install_generators(env: &mut Environment<'static>) {
    type Args = Rest<ValueOrKwargs>;
    env.add_filter("map", |state: &mut State, value: Value, args: Args| {
        filters::map(state, value, args).map(generator)
    });
    env.add_filter("select", |state: &mut State, value: Value, test: Option<String>, args: Args| {
        filters::select(state, value, test.map(Into::into), args).map(generator)
    });
    env.add_filter("reject", |state: &mut State, value: Value, test: Option<String>, args: Args| {
        filters::reject(state, value, test.map(Into::into), args).map(generator)
    });
    env.add_filter(
        "selectattr",
        |state: &mut State, value: Value, attr: String, test: Option<String>, args: Args| {
            filters::selectattr(state, value, attr.into(), test.map(Into::into), args).map(generator)
        },
    );
    env.add_filter(
        "rejectattr",
        |state: &mut State, value: Value, attr: String, test: Option<String>, args: Args| {
            filters::rejectattr(state, value, attr.into(), test.map(Into::into), args).map(generator)
        },
    );
}

/// Python methods: the ones below, then those that minijinja-contrib knows.
fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Map if method == "copy" => Some(value.clone()),
        ValueKind::Seq | ValueKind::Iterable => list_method(value, method, args)?,
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "copy" => Ok(Some(value.clone())),
        "index" => {
            let (item,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|candidate| candidate == *item);
            found.map(|at| Some(Value::from(at))).ok_or_else(|| value_error("item is not in list"))
        }
        _ => Ok(None),
    }
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let result = match method {
        "split" | "rsplit" => split(text, args, method == "rsplit")?,
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let last = method == "rpartition";
            let parts = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
            let (before, middle, after) = match parts {
                Some((before, after)) => (before, separator, after),
                None if last => ("", "", text),
                None => (text, "", ""),
            };
            Value::from((before, middle, after))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            Value::from(justify(text, width, fill.unwrap_or(" "), method)?)
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let digits = justify(digits, width.saturating_sub(sign.len()), "0", "rjust")?;
            Value::from(format!("{sign}{digits}"))
        }
        "index" | "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            let at = if method == "index" { text.find(what) } else { text.rfind(what) };
            let at = at.ok_or_else(|| value_error("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        _ => return Ok(None),
    };
    Ok(Some(result))
}

/// `str.split(sep=None, maxsplit=-1)` and `rsplit`.
fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, max, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => separator,
        None => kwargs.get::<Option<Value>>("sep")?.unwrap_or_default(),
    };
    let max = match max {
        Some(max) => max,
        None => kwargs.get::<Option<i64>>("maxsplit")?.unwrap_or(-1),
    };
    kwargs.assert_all_used()?;
    let pieces = usize::try_from(max).map_or(usize::MAX, |max| max.saturating_add(1));
    let mut parts: Vec<&str> = match separator.as_str() {
        Some("") => return Err(value_error("empty separator")),
        Some(separator) if from_right => text.rsplitn(pieces, separator).collect(),
        Some(separator) => text.splitn(pieces, separator).collect(),
        None if separator.is_none() || separator.is_undefined() => split_space(text, pieces, from_right),
        None => return Err(value_error("split needs a string")),
    };
    if from_right {
        parts.reverse();
    }
    Ok(Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>()))
}

/// Splits at runs of white space, at most into `pieces`; for `from_right` the last part comes first.
fn split_space(text: &str, pieces: usize, from_right: bool) -> Vec<&str> {
    let mut rest = text.trim();
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(char::is_whitespace) } else { rest.find(char::is_whitespace) };
        let Some(at) = cut.filter(|_| parts.len() + 1 < pieces) else {
            parts.push(rest);
            break;
        };
        let (before, after) = (rest[..at].trim_end(), rest[at..].trim_start());
        let (part, remaining) = if from_right { (after, before) } else { (before, after) };
        parts.push(part);
        rest = remaining;
    }
    parts
}

fn justify(text: &str, width: usize, fill: &str, how: &str) -> Result<String, Error> {
    /// Wider than any prompt needs.
    const MAX_WIDTH: usize = 1 << 16;
    if width > MAX_WIDTH || fill.chars().count() != 1 {
        return Err(value_error("width is too large or the fill is not one character"));
    }
    let missing = width.saturating_sub(text.chars().count());
    let left = match how {
        "ljust" => 0,
        "rjust" => missing,
        // CPython puts the odd character left when both the gap and the width are odd.
        _ => missing / 2 + (missing & width & 1),
    };
    Ok(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

fn value_error(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Python's `str` of a value.
pub(super) fn to_str(value: &Value) -> String {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => repr(value, 0, &mut out),
        _ => out = value.to_string(),
    }
    out
}

/// Python's `repr` of a value; minijinja's own differs in floats only.
fn repr(value: &Value, depth: usize, out: &mut String) {
    /// Deeper values are left to minijinja.
    const MAX_DEPTH: usize = 64;
    match value.kind() {
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(float) => out.push_str(&float_repr(float)),
            Err(_) => out.push_str(&value.to_string()),
        },
        ValueKind::Seq if depth < MAX_DEPTH && !value.is_tuple() => {
            out.push('[');
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&item, depth + 1, out);
            }
            out.push(']');
        }
        ValueKind::Map if depth < MAX_DEPTH => {
            out.push('{');
            let pairs = value.as_object().and_then(|object| object.try_iter_pairs());
            for (i, (key, item)) in pairs.into_iter().flatten().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&key, depth + 1, out);
                out.push_str(": ");
                repr(&item, depth + 1, out);
            }
            out.push('}');
        }
        _ => out.push_str(&format!("{value:?}")),
    }
}

/// Python's `repr` of a float: the shortest digits that read back the same, scientific from 1e16 and below 1e-4.
pub(super) fn float_repr(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string().to_lowercase();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    fn render(template: &str) -> Result<String, Error> {
        let mut env = Environment::new();
        install(&mut env);
        env.render_str(template, context! { s => "a,b,,c", w => "  one two  three ", l => [1, 2, 3] })
    }

    #[test]
    fn string_methods_as_in_python() {
        for (template, expected) in [
            ("{{ s.split(',') }}", "['a', 'b', '', 'c']"),
            ("{{ s.split(',', 1) }}", "['a', 'b,,c']"),
            ("{{ s.split(',', maxsplit=2) }}", "['a', 'b', ',c']"),
            ("{{ s.rsplit(',', 1) }}", "['a,b,', 'c']"),
            ("{{ w.split() }}", "['one', 'two', 'three']"),
            ("{{ w.split(none, 1) }}", "['one', 'two  three']"),
            ("{{ w.rsplit(maxsplit=1) }}", "['one two', 'three']"),
            ("{{ s.split('</think>')[-1] }}", "a,b,,c"),
            ("{{ s.partition(',') }}", "('a', ',', 'b,,c')"),
            ("{{ s.rpartition(';') }}", "('', '', 'a,b,,c')"),
            ("{{ s.removeprefix('a,').removesuffix('c') }}", "b,,"),
            ("{{ '-7'.zfill(4) }}|{{ 'ab'.center(5, '*') }}|{{ 'ab'.ljust(3) }}|", "-007|**ab*|ab |"),
            ("{{ s.index('b') }}{{ l.index(3) }}", "22"),
            ("{{ s.upper().lower().startswith('a') }}", "True"),
            ("{{ {'a': 1}.items()|list }}{{ {'a': none}.get('b', 2) }}", "[('a', 1)]2"),
        ] {
            assert_eq!(render(template).unwrap(), expected, "{template}");
        }
        assert!(render("{{ s.split('') }}").is_err());
        assert!(render("{{ l.append(4) }}").is_err());
        assert!(render("{{ s.index('z') }}").is_err());
    }

    #[test]
    fn lazy_filters_give_generators() {
        assert_eq!(render("{% set g = l|select('odd') %}{{ g|list }}{{ g|list }}").unwrap(), "[1, 3][]");
        assert_eq!(render("{{ 'yes' if l|reject('odd')|map('string') else 'no' }}").unwrap(), "yes");
        assert_eq!(render("{{ l|map('string')|join('+') }}").unwrap(), "1+2+3");
        assert!(render("{{ l|map('string')|length }}").is_err());
    }

    #[test]
    fn tests_count_as_in_python() {
        let kinds = "{{ s is sequence }} {{ l[1:] is sequence }} {{ l|map('string') is sequence }} {{ true is number }}";
        assert_eq!(render(kinds).unwrap(), "True True False True");
        assert_eq!(
            render("{{ none is iterable }} {{ s is iterable }} {{ y is iterable }}").unwrap(),
            "False True True"
        );
    }

    #[test]
    fn floats_as_python_prints_them() {
        for (value, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (-2.5e300, "-2.5e+300"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float_repr(value), text);
        }
        assert_eq!(
            render("{{ {'a': [1e-7, (1, 'b'), none]}|string }}").unwrap(),
            "{'a': [1e-07, (1, 'b'), None]}"
        );
    }
}
