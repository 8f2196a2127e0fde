//! `/v1/models`.

use axum::Json;
use axum::extract::{Path, State};
use quire_llm::Llm;
use serde::Serialize;

use crate::error::ApiError;
use crate::openai::caller::Caller;
use crate::state::AppState;

#[derive(Serialize)]
pub(crate) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: u32,
}

#[derive(Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

fn model(llm: &Llm, root: &str, id: &str) -> Model {
    Model {
        id: id.to_owned(),
        object: "model",
        created: llm.created(),
        owned_by: "quire",
        root: root.to_owned(),
        parent: None,
        max_model_len: llm.max_model_len(),
    }
}

/// Every name under which the model is served to the caller.
pub(crate) async fn list(State(state): State<AppState>, caller: Caller) -> Result<Json<ModelList>, ApiError> {
    let llm = state.llm()?;
    let names = caller.models(llm);
    let data = names.iter().map(|name| model(llm, names[0], name)).collect();
    Ok(Json(ModelList { object: "list", data }))
}

/// One of them. An id may contain slashes.
pub(crate) async fn retrieve(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let llm = state.llm()?;
    let names = caller.models(llm);
    if names.contains(&id.as_str()) {
        Ok(Json(model(llm, names[0], &id)))
    } else {
        Err(ApiError::model_not_found(&id, &names))
    }
}
