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

/// `names`: those that exist for the caller. What an adapter is put on is its parent, if he may know of it.
fn model(llm: &Llm, names: &[&str], id: &str) -> Model {
    let is_adapter = llm.adapter(id).is_some();
    let base = names.first().copied().filter(|name| llm.adapter(name).is_none());
    Model {
        id: id.to_owned(),
        object: "model",
        created: llm.created(),
        owned_by: "quire",
        root: base.filter(|_| !is_adapter).unwrap_or(id).to_owned(),
        parent: base.filter(|_| is_adapter).map(str::to_owned),
        max_model_len: llm.max_model_len(),
    }
}

/// Every name under which the model is served to the caller.
pub(crate) async fn list(State(state): State<AppState>, caller: Caller) -> Result<Json<ModelList>, ApiError> {
    let llm = state.llm()?;
    let names = caller.models(llm);
    let data = names.iter().map(|name| model(llm, &names, name)).collect();
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
        Ok(Json(model(llm, &names, &id)))
    } else {
        Err(ApiError::model_not_found(&id, &names))
    }
}
