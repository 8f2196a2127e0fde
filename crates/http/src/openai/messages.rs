//! `messages`: roles and text; whatever is not text is refused by its place.

use quire_llm::ChatMessage;
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{Fields, Unsupported, kind_of};

/// Fields of a message that ask for something this server does not do.
const UNSUPPORTED: &[Unsupported] = &[
    Unsupported { name: "tool_calls", feature: "tool calls are", harmless: is_empty_list },
    Unsupported { name: "tool_call_id", feature: "tool calls are", harmless: |_| false },
    Unsupported { name: "function_call", feature: "tool calls are", harmless: |_| false },
    Unsupported { name: "audio", feature: "audio is", harmless: |_| false },
    Unsupported { name: "refusal", feature: "refusals in a history are", harmless: |_| false },
    Unsupported { name: "reasoning", feature: "reasoning in a history is", harmless: |value| value == "" },
    Unsupported {
        name: "reasoning_content",
        feature: "reasoning in a history is",
        harmless: |value| value == "",
    },
    Unsupported { name: "annotations", feature: "annotations are", harmless: is_empty_list },
];

fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

/// Takes the field `messages`.
pub(crate) fn take_messages(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let list = match fields.take_value("messages") {
        None => return Err(ApiError::invalid("messages", "is required")),
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(ApiError::invalid("messages", format!("must be a list, got {}", kind_of(&other))));
        }
    };
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "must hold at least one message"));
    }
    list.into_iter().enumerate().map(|(at, value)| message(at, value)).collect()
}

fn message(at: usize, value: Value) -> Result<ChatMessage, ApiError> {
    let path = format!("messages[{at}]");
    let mut fields = Fields::nested(value, &path)?;
    let role_name = fields.name_of("role");
    let role: String =
        fields.take("role")?.ok_or_else(|| ApiError::invalid(role_name.clone(), "is required"))?;
    let role = match role.as_str() {
        // The newer name of the same role, which templates do not know.
        "developer" => "system".to_owned(),
        "system" | "user" | "assistant" => role,
        "tool" | "function" => return Err(ApiError::unsupported(role_name, "tool calls are")),
        _ => {
            let message = format!("must be system, developer, user or assistant, got {role:?}");
            return Err(ApiError::invalid(role_name, message));
        }
    };
    let content = content(&fields.name_of("content"), fields.take_value("content"));
    let name = fields.take("name")?;
    // Before a missing content: a message of tool calls has none.
    fields.finish(UNSUPPORTED, &[])?;
    Ok(ChatMessage { role, content: content?, name })
}

/// A string, or a list of text parts, which are joined by line ends.
fn content(path: &str, value: Option<Value>) -> Result<String, ApiError> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let parts =
                parts.into_iter().enumerate().map(|(at, part)| text_part(&format!("{path}[{at}]"), part));
            Ok(parts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        Some(other) => {
            let message = format!("must be a string or a list of parts, got {}", kind_of(&other));
            Err(ApiError::invalid(path.to_owned(), message))
        }
        None => Err(ApiError::invalid(path.to_owned(), "is required")),
    }
}

fn text_part(path: &str, part: Value) -> Result<String, ApiError> {
    let mut fields = Fields::nested(part, path)?;
    let type_name = fields.name_of("type");
    match fields.take::<String>("type")?.as_deref() {
        Some("text") => {}
        Some(other) => {
            return Err(ApiError::unsupported(type_name, &format!("content of type {other:?} is")));
        }
        None => return Err(ApiError::invalid(type_name, "is required")),
    }
    let text_name = fields.name_of("text");
    let text = fields.take("text")?.ok_or_else(|| ApiError::invalid(text_name, "is required"))?;
    fields.finish(&[], &["cache_control"])?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(messages: &str) -> Result<Vec<ChatMessage>, ApiError> {
        take_messages(&mut Fields::parse(format!(r#"{{"messages": {messages}}}"#).as_bytes()).unwrap())
    }

    #[test]
    fn text_comes_as_a_string_or_as_parts() {
        let messages = parse(
            r#"[{"role": "developer", "content": "be kind"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "eve"},
                {"role": "assistant", "content": "", "refusal": null, "tool_calls": null, "annotations": []}]"#,
        );
        let named = ChatMessage { name: Some("eve".into()), ..ChatMessage::new("user", "a\nb") };
        let expected = vec![ChatMessage::new("system", "be kind"), named, ChatMessage::new("assistant", "")];
        assert_eq!(messages.unwrap(), expected);
    }

    #[test]
    fn errors_name_the_place() {
        for (messages, param) in [
            ("null", "messages"),
            ("[]", "messages"),
            ("\"hi\"", "messages"),
            ("[1]", "messages[0]"),
            (r#"[{"content": "x"}]"#, "messages[0].role"),
            (r#"[{"role": "wizard", "content": "x"}]"#, "messages[0].role"),
            (r#"[{"role": 3, "content": "x"}]"#, "messages[0].role"),
            (r#"[{"role": "tool", "content": "x", "tool_call_id": "1"}]"#, "messages[0].role"),
            (r#"[{"role": "user"}]"#, "messages[0].content"),
            (r#"[{"role": "user", "content": 5}]"#, "messages[0].content"),
            (r#"[{"role": "user", "content": "x", "colour": 1}]"#, "messages[0].colour"),
            (r#"[{"role": "assistant", "tool_calls": [{}]}]"#, "messages[0].tool_calls"),
            (r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#, "messages[0].content[0].type"),
            (r#"[{"role": "user", "content": [{"type": "text"}]}]"#, "messages[0].content[0].text"),
            (r#"[{"role": "user", "content": ["x"]}]"#, "messages[0].content[0]"),
        ] {
            let error = parse(messages).expect_err(messages);
            assert_eq!(error.body()["error"]["param"], param, "{messages}: {error:?}");
        }
    }
}
