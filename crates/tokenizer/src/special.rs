//! The tokens with a role (`bos_token`, `eos_token`, …) as a checkpoint's configuration files name them.

use std::collections::BTreeMap;

use serde_json::Value;

/// Role (`"bos_token"`, `"eos_token"`, `"pad_token"`, …) to token text.
///
/// These are the variables that a chat template sees under the same names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    roles: BTreeMap<String, String>,
}

impl SpecialTokens {
    /// The two tokens that nearly every chat template needs.
    pub fn from_bos_eos(bos: Option<&str>, eos: Option<&str>) -> Self {
        let roles = [("bos_token", bos), ("eos_token", eos)];
        Self { roles: roles.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v?.to_owned()))).collect() }
    }

    /// Text of the token with this role, if the model has one.
    pub fn get(&self, role: &str) -> Option<&str> {
        self.roles.get(role).map(String::as_str)
    }

    /// Text of the beginning-of-sequence token.
    pub fn bos(&self) -> Option<&str> {
        self.get("bos_token")
    }

    /// Text of the end-of-sequence token.
    pub fn eos(&self) -> Option<&str> {
        self.get("eos_token")
    }

    /// All roles with their token texts.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.roles.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// Takes over the roles of a `tokenizer_config.json` or `special_tokens_map.json`; roles already known stay.
    ///
    /// A token is written as a string or as an object with a `content` string.
    pub(crate) fn merge_config(&mut self, config: &Value) {
        for (role, token) in config.as_object().into_iter().flatten() {
            let text = token.as_str().or_else(|| token.get("content")?.as_str());
            if let (true, Some(text)) = (role.ends_with("_token"), text) {
                self.roles.entry(role.clone()).or_insert_with(|| text.to_owned());
            }
        }
    }

    /// Names a role whose token is known only by its id, unless the role is taken.
    pub(crate) fn merge_role(&mut self, role: &str, text: String) {
        self.roles.entry(role.to_owned()).or_insert(text);
    }
}

/// The ids under `key` of a `config.json` or `generation_config.json`: one number or a list.
pub(crate) fn ids_of(config: &Value, key: &str) -> Vec<u32> {
    let as_id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get(key) {
        Some(Value::Array(ids)) => ids.iter().filter_map(as_id).collect(),
        Some(id) => as_id(id).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn roles_come_as_strings_or_objects_and_the_first_file_wins() {
        let mut special = SpecialTokens::default();
        special.merge_config(
            &json!({"bos_token": {"content": "<s>"}, "pad_token": null, "add_bos_token": true, "x": "y"}),
        );
        special.merge_config(&json!({"bos_token": "other", "eos_token": "</s>"}));
        assert_eq!((special.bos(), special.eos()), (Some("<s>"), Some("</s>")));
        assert_eq!(special.iter().count(), 2);
    }

    #[test]
    fn ids_are_a_number_or_a_list() {
        let config = json!({"a": 2, "b": [3, 4], "c": null, "d": -1});
        assert_eq!(ids_of(&config, "a"), [2]);
        assert_eq!(ids_of(&config, "b"), [3, 4]);
        assert!(ids_of(&config, "c").is_empty() && ids_of(&config, "d").is_empty());
    }
}
