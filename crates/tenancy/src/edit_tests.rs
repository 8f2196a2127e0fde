use serde_json::json;

use super::*;
use crate::credential::Keys;

/// A tenants file of its own.
struct Edited {
    editor: TenantsEditor,
    tenancy: Tenancy,
}

impl Edited {
    fn new(name: &str, api_keys: &[&str], text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("quire-edit-{name}-{}.toml", std::process::id()));
        fs::write(&path, text).unwrap();
        let file = TenantsFile::parse(text, "t.toml").unwrap();
        let tenancy = Tenancy::new(Keys::new(api_keys).unwrap(), file, None).unwrap();
        Self { editor: TenantsEditor::new(path, tenancy.clone()), tenancy }
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.editor.path).unwrap()
    }

    fn put(&self, id: &str, settings: Json) -> Result<Change, EditError> {
        self.editor.put(id, object(settings), &Expected::Anything)
    }

    fn patch(&self, id: &str, patch: Json) -> Result<Change, EditError> {
        self.editor.patch(id, object(patch), &Expected::Anything)
    }
}

impl Drop for Edited {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.editor.path);
    }
}

fn object(value: Json) -> Map<String, Json> {
    match value {
        Json::Object(map) => map,
        other => panic!("an object, not {other}"),
    }
}

fn invalid_field(outcome: Result<Change, EditError>) -> String {
    match outcome {
        Err(EditError::Invalid { field, .. }) => field,
        other => panic!("expected a wrong field, got {other:?}"),
    }
}

const ONE: &str = "[defaults]\nweight = 2\n\n[[tenants]]\nid = 'a' # a comment\npriority = 1\n[tenants.limits]\nrpm = 60\n\
    [[tenants.keys]]\nid = 'k'\nsha256 = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'\n\
    expires = 2127-01-01T00:00:00Z\n";

#[test]
fn changes_are_in_the_file_and_in_effect_at_once() {
    let edited = Edited::new("changes", &[], ONE);
    let change = edited
        .put("b", json!({ "weight": 3, "limits": { "n": 2 }, "budget": { "tokens": 9, "period": "day" } }));
    let change = change.unwrap();
    assert_eq!((change.before, change.after.unwrap().settings["limits"].clone()), (None, json!({ "n": 2 })));
    let (_, secret) = edited
        .editor
        .add_key("b", KeyView { id: "new".into(), ..KeyView::default() }, &Expected::Anything)
        .unwrap();
    assert!(secret.starts_with("sk-") && secret.len() == 51, "{secret}");
    let access = edited.tenancy.authenticate(Some(&secret), None).unwrap();
    assert_eq!((access.tenant().name(), access.key_id(), access.tenant().share().weight), ("b", "new", 3.0));
    assert!(!edited.text().contains(&secret), "only its digest is kept");
    edited.patch("b", json!({ "limits": { "n": null, "rpm": 6 }, "weight": null })).unwrap();
    let access = edited.tenancy.authenticate(Some(&secret), None).unwrap();
    assert_eq!(
        (access.tenant().limits().n, access.tenant().limits().rpm.map(|rate| rate.limit())),
        (None, Some(6))
    );
    assert_eq!(access.tenant().share().weight, 2.0, "the default");
    let seen = edited.editor.get("a").unwrap();
    assert_eq!(
        seen.keys,
        [KeyView { id: "k".into(), expires: Some("2127-01-01T00:00:00Z".into()), scopes: None }]
    );
    assert!(edited.tenancy.authenticate(Some("abc"), None).is_ok(), "others keep their keys");
    // Written as a file that a person could have written.
    let read = TenantsFile::read(&edited.editor.path).unwrap();
    assert_eq!(read.tenants.iter().map(|tenant| tenant.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    edited.editor.remove_key("b", "new", &Expected::Anything).unwrap();
    assert!(edited.tenancy.authenticate(Some(&secret), None).is_err());
    edited.editor.delete("b", &Expected::Anything).unwrap();
    assert_eq!(edited.editor.list().unwrap().len(), 1);
    let again = edited.put("a", json!({ "weight": 1 })).unwrap();
    assert_eq!(again.before.unwrap().settings["priority"], 1);
    let after = again.after.unwrap();
    assert_eq!((after.settings.len(), after.keys.len()), (1, 1), "replaced but for the keys");
}

#[test]
fn what_is_wrong_changes_nothing() {
    let edited = Edited::new("wrong", &["sk-api"], ONE);
    let before = edited.text();
    for (settings, field) in [
        (json!({ "rpm": 1 }), "rpm"),
        (json!({ "limits": { "rpm": 0 } }), "rpm"),
        (json!({ "limits": { "tpm": 1 } }), "tpm"),
        (json!({ "weight": "x" }), "weight"),
        (json!({ "weight": 1e9 }), "weight"),
        (json!({ "limits": { "rpm": 18_446_744_073_709_551_615_u64 } }), "limits.rpm"),
        (json!({ "id": "other" }), "id"),
        (json!({ "keys": [] }), "keys"),
        (json!({ "budget": { "tokens": 1, "period": "year" } }), "period"),
        (json!({ "logging": { "content": "full" } }), "logging"),
    ] {
        let got = invalid_field(edited.patch("a", settings.clone()));
        assert!(got.ends_with(field), "{settings}: {got}");
        invalid_field(edited.put("a", settings));
    }
    assert_eq!(invalid_field(edited.put("Bad Name", json!({}))), "id");
    assert_eq!(invalid_field(edited.put("default", json!({}))), "id");
    let key = |id: &str, expires: Option<&str>, scopes: &[&str]| {
        let scopes = (!scopes.is_empty()).then(|| scopes.iter().map(|&scope| scope.to_owned()).collect());
        let key = KeyView { id: id.into(), expires: expires.map(str::to_owned), scopes };
        invalid_field(edited.editor.add_key("a", key, &Expected::Anything).map(|(change, _)| change))
    };
    assert_eq!(key("k", None, &[]), "id", "there is one of this name");
    assert_eq!(key("l", Some("tomorrow"), &[]), "expires");
    assert_eq!(key("l", Some("2030-01-01"), &[]), "expires", "without an offset");
    assert_eq!(key("l", None, &["root"]), "scopes");
    assert!(matches!(edited.patch("c", json!({})), Err(EditError::NoTenant(_))));
    assert!(matches!(edited.editor.remove_key("a", "x", &Expected::Anything), Err(EditError::NoKey { .. })));
    assert_eq!(edited.text(), before);
}

#[test]
fn tags_tell_what_was_seen() {
    let edited = Edited::new("tags", &["sk-api"], ONE);
    let seen = Expected::Tags(vec![edited.editor.get("a").unwrap().tag]);
    let changed = |outcome: Result<Change, EditError>| assert!(matches!(outcome, Err(EditError::Changed(_))));
    edited.editor.patch("a", object(json!({ "weight": 3 })), &seen).unwrap();
    changed(edited.editor.patch("a", object(json!({ "weight": 4 })), &seen));
    changed(edited.editor.delete("a", &seen));
    changed(edited.editor.put("a", Map::new(), &Expected::Nothing));
    changed(edited.editor.put("b", Map::new(), &Expected::Something));
    let tag = edited.editor.get("a").unwrap().tag;
    edited.put("b", json!({})).unwrap();
    assert_eq!(edited.editor.get("a").unwrap().tag, tag, "another tenant's changes are not its own");
    edited.editor.delete("a", &Expected::Tags(vec!["other".into(), tag])).unwrap();
}

#[test]
fn the_last_tenant_stays_where_the_server_would_open() {
    let edited = Edited::new("last", &[], ONE);
    let outcome = edited.editor.delete("a", &Expected::Anything);
    assert!(matches!(outcome, Err(EditError::Refused(TableError::WouldOpen))), "{outcome:?}");
    assert_eq!(edited.text(), ONE);
    fs::write(&edited.editor.path, "[[tenants]]\nid = 'a'\nrpm = 1").unwrap();
    assert!(
        matches!(edited.patch("a", json!({})), Err(EditError::File(_))),
        "somebody's half-done edit stays"
    );
}
