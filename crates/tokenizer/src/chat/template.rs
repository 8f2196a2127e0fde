//! The template of one model.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde_json::Value as Json;

use super::{Clock, MAX_FUEL, MAX_OUTPUT_BYTES, MAX_RECURSION, clock, files, json, markup, python, rewrite};
use crate::error::Result;
use crate::special::SpecialTokens;

/// The template used when no other is asked for.
pub(super) const DEFAULT: &str = "default";

/// The template that some models have for requests with tools.
const TOOL_USE: &str = "tool_use";

/// The chat template of a model, or several by name. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    sources: Arc<BTreeMap<String, String>>,
}

/// What a template renders. Only `messages` is needed; the rest has the defaults of Hugging Face.
#[derive(Clone, Debug, Default)]
pub struct ChatInput {
    /// A list of message objects: `role`, `content`, perhaps `tool_calls` and others, as the API's body has them.
    pub messages: Json,
    /// A list of tool objects (JSON schema functions), if the request has tools.
    pub tools: Option<Json>,
    /// Documents for retrieval-augmented templates.
    pub documents: Option<Json>,
    /// Whether to end with the opening of an assistant's turn.
    pub add_generation_prompt: bool,
    /// Whether to end inside the last message, so that the model goes on writing it.
    pub continue_final_message: bool,
    /// Further variables (`chat_template_kwargs`, such as `enable_thinking`). The fields above win.
    pub kwargs: serde_json::Map<String, Json>,
}

/// A template that cannot be compiled or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template refused this conversation with `raise_exception`; the text is its own.
    #[error("{0}")]
    Raised(String),
    /// The template is not valid Jinja.
    #[error("chat template `{name}` is malformed: {message}")]
    Syntax {
        /// Which of the model's templates.
        name: String,
        /// What and where.
        message: String,
    },
    /// Rendering failed.
    #[error("chat template failed: {0}")]
    Render(String),
    /// The prompt would be longer than [`MAX_OUTPUT_BYTES`], or rendering took more than [`MAX_FUEL`].
    #[error("chat template gave up: {0}")]
    LimitExceeded(String),
    /// The model has several templates and none fits.
    #[error("no chat template `default`; this model has {0}")]
    NoDefault(String),
    /// `continue_final_message` cannot be done for this conversation.
    #[error("continue_final_message: {0}")]
    Continue(&'static str),
}

/// The error behind `raise_exception`, carried through minijinja.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RaisedByTemplate(String);

impl ChatTemplate {
    /// Compiles one template.
    ///
    /// # Errors
    /// When it is not valid Jinja.
    pub fn new(source: &str) -> std::result::Result<Self, TemplateError> {
        Self::from_named(BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]))
    }

    /// Compiles several templates by name (`default`, `tool_use`, `rag`, …).
    ///
    /// # Errors
    /// When one is not valid Jinja, naming it.
    pub fn from_named(sources: BTreeMap<String, String>) -> std::result::Result<Self, TemplateError> {
        let mut env = environment();
        for (name, source) in &sources {
            env.add_template_owned(name.clone(), rewrite::for_minijinja(source))
                .map_err(|e| TemplateError::Syntax { name: name.clone(), message: describe(&e) })?;
        }
        Ok(Self { env: Arc::new(env), sources: Arc::new(sources) })
    }

    /// The templates of a checkpoint directory; `None` when it has none.
    ///
    /// `chat_template.jinja` comes before `chat_template.json` and the `chat_template` of `tokenizer_config.json` (a
    /// string, or a list of `{name, template}`); `additional_chat_templates/NAME.jinja` add named ones.
    ///
    /// # Errors
    /// When a file cannot be read or parsed. The inner result is the outcome of compiling what was found, so that a
    /// server may go on without a template that it cannot compile.
    pub fn from_dir(dir: &Path) -> Result<Option<std::result::Result<Self, TemplateError>>> {
        let sources = files::from_dir(dir)?;
        Ok((!sources.is_empty()).then(|| Self::from_named(sources)))
    }

    /// The templates in the bytes of a `tokenizer_config.json`; `None` when it has none.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_dir`].
    pub fn from_config(
        tokenizer_config_json: &[u8],
    ) -> Result<Option<std::result::Result<Self, TemplateError>>> {
        let sources = files::from_config_bytes(tokenizer_config_json)?;
        Ok((!sources.is_empty()).then(|| Self::from_named(sources)))
    }

    /// The same templates with another clock behind `strftime_now`.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        clock::install(Arc::make_mut(&mut self.env), clock);
        self
    }

    /// The source of the template that plain conversations are rendered with.
    pub fn source(&self) -> Option<&str> {
        self.sources.get(DEFAULT).or_else(|| self.only()).map(String::as_str)
    }

    /// Renders a conversation. `special` holds `bos_token` and the like for the template.
    ///
    /// # Errors
    /// [`TemplateError::Raised`] when the template refuses the conversation, others when it fails.
    pub fn render(
        &self,
        input: &ChatInput,
        special: &SpecialTokens,
    ) -> std::result::Result<String, TemplateError> {
        if input.continue_final_message && input.add_generation_prompt {
            return Err(TemplateError::Continue("not together with add_generation_prompt"));
        }
        let name = self.name_for(input)?;
        let template = self.env.get_template(name).map_err(|e| render_error(&e))?;
        let mut writer = CappedWriter { bytes: Vec::new(), exceeded: false };
        let outcome = template.render_captured_to(context(input, special), &mut writer).map(drop);
        if writer.exceeded {
            let limit = format!("the prompt is longer than {MAX_OUTPUT_BYTES} bytes");
            return Err(TemplateError::LimitExceeded(limit));
        }
        outcome.map_err(|e| render_error(&e))?;
        let text = String::from_utf8(writer.bytes).map_err(|e| TemplateError::Render(e.to_string()))?;
        if input.continue_final_message { cut_after_final_message(text, &input.messages) } else { Ok(text) }
    }

    fn name_for(&self, input: &ChatInput) -> std::result::Result<&str, TemplateError> {
        let named = |name: &str| self.sources.get_key_value(name).map(|(name, _)| name.as_str());
        let tool_use = if input.tools.is_some() { named(TOOL_USE) } else { None };
        let only = || self.only().and(self.sources.keys().next()).map(String::as_str);
        tool_use.or_else(|| named(DEFAULT)).or_else(only).ok_or_else(|| {
            TemplateError::NoDefault(self.sources.keys().cloned().collect::<Vec<_>>().join(", "))
        })
    }

    fn only(&self) -> Option<&String> {
        self.sources.values().next().filter(|_| self.sources.len() == 1)
    }
}

/// Jinja as Hugging Face transformers sets it up.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the default delimiters are valid"));
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(MAX_FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.add_function("raise_exception", |message: String| -> std::result::Result<Value, Error> {
        let raised = RaisedByTemplate(message);
        Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(raised))
    });
    json::install(&mut env);
    python::install(&mut env);
    markup::install(&mut env);
    clock::install(&mut env, clock::system());
    env
}

/// The variables of a rendering. Absent tools and documents are `none`, as Hugging Face passes them.
fn context(input: &ChatInput, special: &SpecialTokens) -> Value {
    let optional = |value: &Option<Json>| value.as_ref().map_or(Value::from(()), from_json);
    let special = special.iter().map(|(role, text)| (role.to_owned(), Value::from(text)));
    let kwargs = input.kwargs.iter().map(|(name, value)| (name.clone(), from_json(value)));
    let fields = [
        ("messages", from_json(&input.messages)),
        ("tools", optional(&input.tools)),
        ("documents", optional(&input.documents)),
        ("add_generation_prompt", Value::from(input.add_generation_prompt)),
    ];
    let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value));
    special.chain(kwargs).chain(fields).collect::<BTreeMap<_, _>>().into()
}

/// JSON as the template's own values; the order of keys stays.
pub(super) fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect::<Vec<_>>().into(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), from_json(item)))),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (_, Some(integer)) => Value::from(integer),
            _ => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
    }
}

/// Cuts the prompt behind the text of the last message, by the rule of Hugging Face.
fn cut_after_final_message(
    mut prompt: String,
    messages: &Json,
) -> std::result::Result<String, TemplateError> {
    let content = messages.as_array().and_then(|list| list.last()).map(|message| &message["content"]);
    let text = match content {
        Some(Json::Array(parts)) => parts.iter().rev().find_map(|part| part["text"].as_str()),
        Some(content) => content.as_str(),
        None => None,
    };
    let text = text.ok_or(TemplateError::Continue("the last message has no text"))?;
    let trimmed = text.trim();
    let start = prompt
        .rfind(trimmed)
        .ok_or(TemplateError::Continue("the template does not write the last message as it is"))?;
    // Trailing space is kept where the template kept it.
    let full = text.trim_start();
    let kept = if prompt[start..].starts_with(full) { full.len() } else { trimmed.len() };
    prompt.truncate(start + kept);
    Ok(prompt)
}

/// The whole chain of causes in one line, with the place in the template.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

fn render_error(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(RaisedByTemplate(message)) = inner.downcast_ref() {
            return TemplateError::Raised(message.clone());
        }
        if inner.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::LimitExceeded(format!("more than {MAX_FUEL} steps of work"));
        }
        cause = inner.source();
    }
    TemplateError::Render(describe(error))
}

/// Collects output up to [`MAX_OUTPUT_BYTES`].
struct CappedWriter {
    bytes: Vec<u8>,
    exceeded: bool,
}

impl io::Write for CappedWriter {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buffer.len() > MAX_OUTPUT_BYTES {
            self.exceeded = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn input(messages: Json) -> ChatInput {
        ChatInput { messages, ..ChatInput::default() }
    }

    fn render(source: &str, input: &ChatInput) -> std::result::Result<String, TemplateError> {
        ChatTemplate::new(source)?.render(input, &SpecialTokens::from_bos_eos(Some("<s>"), None))
    }

    #[test]
    fn an_exception_carries_its_message() {
        let in_macro = "{% macro m() %}{{ raise_exception('no ' ~ 1) }}{% endmacro %}{{ m() }}";
        for source in ["{{ raise_exception('no 1') }}", in_macro] {
            let error = render(source, &ChatInput::default()).unwrap_err();
            assert!(matches!(&error, TemplateError::Raised(message) if message == "no 1"), "{error:?}");
        }
        let error = render("{% if %}", &ChatInput::default()).unwrap_err();
        assert!(matches!(error, TemplateError::Syntax { ref name, .. } if name == "default"), "{error}");
        let error = render("line\n{{ x.y }}", &ChatInput::default()).unwrap_err();
        assert!(matches!(error, TemplateError::Render(_)) && error.to_string().contains(":2)"), "{error}");
    }

    #[test]
    fn variables_and_who_wins() {
        let mut input = input(json!([{"role": "user", "content": 1.5}]));
        input.kwargs.insert("enable_thinking".to_owned(), json!(false));
        input.kwargs.insert("messages".to_owned(), json!("ignored"));
        let source = "{{ bos_token }}{{ eos_token }}{{ messages }}{{ enable_thinking }}{{ tools is none }}";
        assert_eq!(render(source, &input).unwrap(), "<s>[{'role': 'user', 'content': 1.5}]FalseTrue");
    }

    #[test]
    fn the_template_is_chosen_by_the_request() {
        let sources = |names: &[&str]| names.iter().map(|n| ((*n).to_owned(), (*n).to_owned())).collect();
        let plain = input(json!([]));
        let tools = ChatInput { tools: Some(json!([])), ..plain.clone() };
        let special = SpecialTokens::default();
        let both = ChatTemplate::from_named(sources(&["default", "rag", "tool_use"])).unwrap();
        assert_eq!(both.render(&plain, &special).unwrap(), "default");
        assert_eq!(both.render(&tools, &special).unwrap(), "tool_use");
        let only = ChatTemplate::from_named(sources(&["rag"])).unwrap();
        assert_eq!(only.render(&tools, &special).unwrap(), "rag");
        let neither = ChatTemplate::from_named(sources(&["rag", "tool_use"])).unwrap();
        let error = neither.render(&plain, &special).unwrap_err();
        assert!(matches!(error, TemplateError::NoDefault(ref names) if names == "rag, tool_use"));
    }

    #[test]
    fn the_final_message_is_continued() {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}";
        let messages =
            json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Sure, "}]);
        let mut input = ChatInput { continue_final_message: true, ..input(messages) };
        assert_eq!(render(source, &input).unwrap(), "<user>Hi<end><assistant>Sure,");
        let kept = source.replace(" | trim", "");
        assert_eq!(render(&kept, &input).unwrap(), "<user>Hi<end><assistant> Sure, ");
        input.add_generation_prompt = true;
        assert!(matches!(render(source, &input), Err(TemplateError::Continue(_))));
        input.add_generation_prompt = false;
        input.messages = json!([]);
        assert!(matches!(render(source, &input), Err(TemplateError::Continue(_))));
    }

    #[test]
    fn no_template_runs_for_ever_or_writes_without_bound() {
        let loops = "{% for i in range(9999) %}{% for j in range(9999) %}";
        for body in ["", "0123456789012345678901234567890123456789"] {
            let source = format!("{loops}{body}{{% endfor %}}{{% endfor %}}");
            let error = render(&source, &ChatInput::default()).unwrap_err();
            assert!(matches!(error, TemplateError::LimitExceeded(_)), "{error:?}");
        }
        let recursion = "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}";
        assert!(matches!(render(recursion, &ChatInput::default()), Err(TemplateError::Render(_))));
    }
}
