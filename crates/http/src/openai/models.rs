//! `/v1/models`.

use axum::Json;
use axum::extract::{Path, State};
use quire_llm::Llm;
use serde::Serialize;

use crate::error::ApiError;
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

fn model(llm: &Llm, id: &str) -> Model {
    Model {
        id: id.to_owned(),
        object: "model",
        created: llm.created(),
        owned_by: "quire",
        root: llm.name().to_owned(),
        parent: None,
        max_model_len: llm.max_model_len(),
    }
}

/// Every name under which the model is served.
pub(crate) async fn list(State(state): State<AppState>) -> Result<Json<ModelList>, ApiError> {
    let llm = state.llm()?;
    let data = llm.names().iter().map(|name| model(llm, name)).collect();
    Ok(Json(ModelList { object: "list", data }))
}

/// One of them. An id may contain slashes.
pub(crate) async fn retrieve(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    let llm = state.llm()?;
    if llm.serves(&id) { Ok(Json(model(llm, &id))) } else { Err(ApiError::model_not_found(&id, llm.names())) }
}
