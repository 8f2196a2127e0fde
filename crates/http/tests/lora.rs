//! Adapters by their names: who sees them, what a request gets, and whose cached prefixes it may use.

use quire_core::AdapterId;
use quire_tenancy::{Keys, Tenancy, TenantsFile};
use serde_json::{Value, json};

use crate::harness::{MODEL, Server, Setup};

const SETUP: fn() -> Setup = || Setup { adapters: &["robot", "rhyme"], ..Setup::default() };

/// `(id, root, parent)` of every model in the list.
fn cards(list: &Value) -> Vec<[Value; 3]> {
    let models = list["data"].as_array().unwrap().iter();
    models.map(|model| ["id", "root", "parent"].map(|field| model[field].clone())).collect()
}

#[tokio::test]
async fn adapters_are_models_with_a_parent() {
    let server = Server::start(&SETUP());
    let list = cards(&server.get("/v1/models").await.ok());
    let want = [
        [json!(MODEL), json!(MODEL), Value::Null],
        [json!("org/alias"), json!(MODEL), Value::Null],
        [json!("robot"), json!("robot"), json!(MODEL)],
        [json!("rhyme"), json!("rhyme"), json!(MODEL)],
    ];
    assert_eq!(list, want);
    assert_eq!(server.get("/v1/models/rhyme").await.ok()["parent"], MODEL);
    for model in ["robots", "Robot", "../robot", "robot/adapter_config.json"] {
        let answer = server.complete(json!({ "model": model, "prompt": "x" })).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (404, &json!("model_not_found"))
        );
    }
}

#[tokio::test]
async fn a_name_puts_its_adapter_on_the_request() {
    let server = Server::start(&SETUP());
    let body = |model: &str| json!({ "model": model, "prompt": "x", "max_tokens": 1, "n": 2 });
    for model in ["rhyme", MODEL, "robot"] {
        assert_eq!(server.complete(body(model)).await.ok()["model"], model);
    }
    let chat = json!({ "model": "rhyme", "messages": [{ "role": "user", "content": "x" }], "max_tokens": 1 });
    assert_eq!(server.chat(chat).await.ok()["model"], "rhyme");
    let (robot, rhyme) = (Some(AdapterId(0)), Some(AdapterId(1)));
    assert_eq!(*server.seen_adapters.lock().unwrap(), [rhyme, rhyme, None, None, robot, robot, rhyme]);
}

#[tokio::test]
async fn cached_prefixes_are_of_one_adapter() {
    let server = Server::start(&SETUP());
    let ids: Vec<u32> = (0..100).collect();
    let mut cached = Vec::new();
    for model in [MODEL, "robot", "rhyme", MODEL, "rhyme", "robot", "org/alias"] {
        let answer = server.complete(json!({ "model": model, "prompt": ids, "max_tokens": 1 })).await.ok();
        cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap());
    }
    assert_eq!(cached, [0, 0, 0, 96, 96, 96, 96]);
}

#[tokio::test]
async fn tenants_see_the_adapters_that_they_may_use() {
    let tenants = r#"
[[tenants]]
id = "rhymer"
models = ["rhyme"]
[[tenants.keys]]
id = "k1"          # sk-small
sha256 = "0e1e7070976c78df9c4611e515b270eaa83c91125567d008c7e4aa38c76efafc"
"#;
    let file = TenantsFile::parse(tenants, "tenants.toml").unwrap();
    let server = Server::with(&SETUP(), Tenancy::new(Keys::default(), file, None).unwrap());
    let key = [("authorization", "Bearer sk-small")];
    let get = async |path: &str| crate::harness::ask(&server.app, http::Method::GET, path, &key, "").await;
    assert_eq!(cards(&get("/v1/models").await.ok()), [[json!("rhyme"), json!("rhyme"), Value::Null]]);
    assert_eq!(get("/v1/models/robot").await.status.as_u16(), 404);
    let post = async |body: Value| server.post_with("/v1/completions", &key, &body).await;
    for model in ["robot", MODEL] {
        assert_eq!(post(json!({ "model": model, "prompt": "x" })).await.status.as_u16(), 404);
    }
    // Who may use one thing gets it without naming it.
    assert_eq!(post(json!({ "prompt": "x", "max_tokens": 1 })).await.ok()["model"], "rhyme");
    assert_eq!(*server.seen_adapters.lock().unwrap(), [Some(AdapterId(1))]);
}
