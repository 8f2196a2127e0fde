//! Two things that only Python's Jinja2 does, written in terms of what minijinja has.
//!
//! * `{% generation %}` blocks: Hugging Face marks with them what the assistant said, to mask a training loss. They
//!   render their content in a scope of their own, which is what `{% with %}` does.
//! * `+` with a string from `|safe`: in Python such a string is `Markup`, and adding to it escapes the other side for
//!   HTML, auto-escaping or not. minijinja does that under auto-escaping, so such an output is put under it.

/// The template source for minijinja.
pub(super) fn for_minijinja(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%").into_iter().chain(rest.find("{{")).chain(rest.find("{#")).min() {
        let (text, tag) = rest.split_at(at);
        out.push_str(text);
        let close = match &tag[..2] {
            "{#" => "#}",
            "{{" => "}}",
            _ => "%}",
        };
        let Some(end) = tag_end(tag, close) else {
            // Left to minijinja, which says what is wrong.
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        match close {
            "%}" => {
                push_block_tag(tag, &mut out);
                if tag_name(tag) == "raw" {
                    let end = rest.find("endraw").unwrap_or(rest.len());
                    out.push_str(&rest[..end]);
                    rest = &rest[end..];
                }
            }
            "}}" if adds_markup(tag) => push_under_autoescape(tag, &mut out),
            _ => out.push_str(tag),
        }
    }
    out.push_str(rest);
    out
}

/// Where the tag that begins here ends; what looks like an end inside a string literal is none.
fn tag_end(tag: &str, close: &str) -> Option<usize> {
    if close == "#}" {
        return tag.find(close).map(|at| at + 2);
    }
    let mut quote = None;
    let mut chars = tag.char_indices().skip(2);
    while let Some((at, c)) = chars.next() {
        match (quote, c) {
            (Some(_), '\\') => drop(chars.next()),
            (Some(open), _) if open == c => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, _) if tag[at..].starts_with(close) => return Some(at + 2),
            _ => {}
        }
    }
    None
}

/// The first word of a `{% … %}` tag.
fn tag_name(tag: &str) -> &str {
    let inner = tag[2..].trim_start_matches(['-', '+']).trim_start();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    &inner[..end]
}

fn push_block_tag(tag: &str, out: &mut String) {
    let renamed = match tag_name(tag) {
        "generation" => tag.replacen("generation", "with", 1),
        "endgeneration" => tag.replacen("endgeneration", "endwith", 1),
        _ => return out.push_str(tag),
    };
    out.push_str(&renamed);
}

/// Whether this `{{ … }}` adds to a safe string. With `~`, which does not escape, it is left alone.
fn adds_markup(tag: &str) -> bool {
    let mut code = String::new();
    let mut quote = None;
    let mut chars = tag.chars();
    while let Some(c) = chars.next() {
        match quote {
            Some(_) if c == '\\' => drop(chars.next()),
            Some(open) if open == c => quote = None,
            Some(_) => {}
            None if c == '"' || c == '\'' => quote = Some(c),
            None => code.push(c),
        }
    }
    let is_safe = |filter: &str| {
        let rest = filter.trim_start().strip_prefix("safe");
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
    };
    code.contains('+') && !code.contains('~') && code.split('|').skip(1).any(is_safe)
}

/// `{{- x -}}` becomes an auto-escape block around `{{ (x)|safe }}`: the block's own tags take over the trimming of
/// white space, and their `+` signs stop the trimming that block tags would do by themselves.
fn push_under_autoescape(tag: &str, out: &mut String) {
    let inner = &tag[2..tag.len() - 2];
    let (before, inner) = inner.strip_prefix('-').map_or(("+", inner), |inner| ("-", inner));
    let (inner, after) = inner.strip_suffix('-').map_or((inner, "+"), |inner| (inner, "-"));
    let block =
        ["{%", before, " autoescape 'html' +%}{{ (", inner, ")|safe }}{%+ endautoescape ", after, "%}"];
    out.push_str(&block.concat());
}

#[cfg(test)]
mod tests {
    use super::for_minijinja;

    #[test]
    fn generation_tags_are_renamed_and_nothing_else() {
        assert_eq!(
            for_minijinja("a{%- generation -%}b{% endgeneration %}c{# {% generation %} #}"),
            "a{%- with -%}b{% endwith %}c{# {% generation %} #}"
        );
        for same in [
            "{% generation_x %}",
            "{% set generation = '%}' %}",
            "generation",
            "{%",
            "{# {% generation %}",
            "{% raw %}{% generation %}{% endraw %}",
            "{{ '{% generation %}' }}",
            "",
        ] {
            assert_eq!(for_minijinja(same), same);
        }
    }

    #[test]
    fn only_addition_to_safe_strings_is_put_under_auto_escaping() {
        assert_eq!(
            for_minijinja("x {{- a|safe + b }} y"),
            "x {%- autoescape 'html' +%}{{ ( a|safe + b )|safe }}{%+ endautoescape +%} y"
        );
        for same in
            ["{{ a|safe ~ b + c }}", "{{ a + b }}", "{{ a|safely + b }}", "{{ '|safe' + b }}", "{{ a|safe }}"]
        {
            assert_eq!(for_minijinja(same), same);
        }
    }
}
