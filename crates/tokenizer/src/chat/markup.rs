//! HTML escaping as Python's markupsafe does it.

use minijinja::{AutoEscape, Environment, Value};

use super::python;

/// Adds the `escape` filter, and the formatter that escapes inside auto-escape blocks (see `rewrite`).
pub(super) fn install(env: &mut Environment<'static>) {
    env.add_filter("escape", escape_filter);
    env.add_filter("e", escape_filter);
    env.set_formatter(|out, state, value| {
        if matches!(state.auto_escape(), AutoEscape::Html) && !value.is_safe() {
            return Ok(out.write_str(&escape(&python::to_str(value)))?);
        }
        match value.as_str() {
            Some(text) => Ok(out.write_str(text)?),
            None => Ok(out.write_str(&python::to_str(value))?),
        }
    });
}

fn escape_filter(value: &Value) -> Value {
    if value.is_safe() { value.clone() } else { Value::from_safe_string(escape(&value.to_string())) }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 8);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn safe_strings_escape_what_is_added_to_them() {
        let mut env = minijinja::Environment::new();
        super::install(&mut env);
        let render = |template: &str| {
            env.render_str(
                &super::super::rewrite::for_minijinja(template),
                minijinja::context! { x => "<\"'&>" },
            )
        };
        assert_eq!(render("{{ '<a>'|safe + x + '<b>'|safe }}").unwrap(), "<a>&lt;&#34;&#39;&amp;&gt;<b>");
        assert_eq!(render("{{ '<a>'|safe ~ x }}{{ x }}").unwrap(), "<a><\"'&><\"'&>");
        assert_eq!(render("{{ x|e }}{{ '<'|safe|e }}").unwrap(), "&lt;&#34;&#39;&amp;&gt;<");
        assert_eq!(render(" a \n {{- x + ''|safe -}} \n b ").unwrap(), " a&lt;&#34;&#39;&amp;&gt;b ");
        assert_eq!(render("a {{ ''|safe + x }}\n b").unwrap(), "a &lt;&#34;&#39;&amp;&gt;\n b");
    }
}
