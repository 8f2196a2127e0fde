//! Real chat templates against Python's renderings of them.

use std::sync::Arc;

use quire_tokenizer::{ChatInput, ChatTemplate, SpecialTokens, TemplateError};
use serde_json::Value;

use crate::shared::path;

/// Noon of 2024-07-26, the day to which the expected renderings were frozen.
const FROZEN: i64 = 1_721_995_200;

fn load(name: &str) -> Option<ChatTemplate> {
    let file = path(&format!("chat-templates/{name}"))?;
    let text = std::fs::read(file).unwrap();
    let template = if name.ends_with(".json") {
        ChatTemplate::from_config(&text).unwrap().unwrap()
    } else {
        ChatTemplate::new(std::str::from_utf8(&text).unwrap())
    };
    Some(template.unwrap_or_else(|e| panic!("{name}: {e}")).with_clock(Arc::new(|| FROZEN)))
}

fn input(case: &Value) -> ChatInput {
    ChatInput {
        messages: case["messages"].clone(),
        tools: case.get("tools").cloned(),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
        ..ChatInput::default()
    }
}

/// All 497 renderings byte for byte. Where Python raised an error, so must we; where the template itself raised it,
/// with the same message.
#[test]
fn all_renderings() {
    let Some(file) = path("chat-templates/expected.json") else { return };
    let data: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let special = SpecialTokens::from_bos_eos(Some("<s>"), Some("</s>"));
    let (mut texts, mut errors, mut failures) = (0, 0, Vec::new());
    for (name, cases) in data["expected"].as_object().unwrap() {
        let template = load(name).unwrap();
        for (case, expected) in cases.as_object().unwrap() {
            let outcome = template.render(&input(&data["cases"][case]), &special);
            let same = match (expected["text"].as_str(), expected["error"].as_str(), &outcome) {
                (Some(text), _, Ok(rendered)) => {
                    texts += 1;
                    text == rendered
                }
                (_, Some(error), Err(TemplateError::Raised(message))) => {
                    errors += 1;
                    error.strip_prefix("TemplateError: ") == Some(message)
                }
                (_, Some(error), Err(TemplateError::Render(_))) => {
                    errors += 1;
                    !error.starts_with("TemplateError: ")
                }
                _ => false,
            };
            if !same {
                failures.push(format!("{name} / {case}\n  want {expected}\n  have {outcome:?}"));
            }
        }
    }
    println!("chat templates: {texts} texts and {errors} errors, {} differ", failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!((texts, errors), (468, 29));
}
