//! `/admin/v1/tenants`: the tenants file, and what is used of the limits.

use std::time::Duration;

use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use http::header::{ETAG, IF_MATCH, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use quire_core::calendar::rfc3339;
use quire_tenancy::{
    Change, EditError, Expected, KeyView, MAX_WINDOW, TenantView, TenantsEditor, Trail, Usage,
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::Admin;
use super::body::Object;
use crate::error::ApiError;

pub(super) async fn list(State(admin): State<Admin>) -> Result<Response, ApiError> {
    let tenants = edit(&admin, TenantsEditor::list).await?;
    let tenants: Vec<Value> = tenants.iter().map(render).collect();
    Ok(Json(json!({ "object": "list", "data": tenants })).into_response())
}

pub(super) async fn show(State(admin): State<Admin>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let tenant = edit(&admin, move |editor| editor.get(&id)).await?;
    Ok(answer(StatusCode::OK, &tenant))
}

pub(super) async fn put(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Extension(trail): Extension<Trail>,
    headers: HeaderMap,
    Object(settings): Object,
) -> Result<Response, ApiError> {
    let expected = expected(&headers)?;
    let change = edit(&admin, move |editor| editor.put(&id, settings, &expected)).await?;
    Ok(changed(&trail, "tenant.put", &change))
}

pub(super) async fn patch(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Extension(trail): Extension<Trail>,
    headers: HeaderMap,
    Object(patch): Object,
) -> Result<Response, ApiError> {
    let expected = expected(&headers)?;
    let change = edit(&admin, move |editor| editor.patch(&id, patch, &expected)).await?;
    Ok(changed(&trail, "tenant.patch", &change))
}

pub(super) async fn remove(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Extension(trail): Extension<Trail>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let expected = expected(&headers)?;
    let change = edit(&admin, move |editor| editor.delete(&id, &expected)).await?;
    Ok(changed(&trail, "tenant.delete", &change))
}

/// The one time that anybody sees the key.
pub(super) async fn add_key(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    Extension(trail): Extension<Trail>,
    headers: HeaderMap,
    Object(mut body): Object,
) -> Result<Response, ApiError> {
    let expected = expected(&headers)?;
    let key = KeyView {
        id: take(&mut body, "id")?.ok_or_else(|| ApiError::invalid("id", "is required"))?,
        expires: take(&mut body, "expires")?,
        scopes: take(&mut body, "scopes")?,
    };
    if let Some(name) = body.keys().next() {
        return Err(ApiError::unknown_field(name));
    }
    let (tenant, key_id) = (id.clone(), key.id.clone());
    let (change, secret) = edit(&admin, move |editor| editor.add_key(&id, key, &expected)).await?;
    note(&trail, "key.add", &change);
    let body = json!({ "tenant": tenant, "id": key_id, "key": secret });
    let mut response = (StatusCode::CREATED, Json(body)).into_response();
    change.after.iter().for_each(|tenant| tag(&mut response, tenant));
    Ok(response)
}

pub(super) async fn remove_key(
    State(admin): State<Admin>,
    Path((id, key)): Path<(String, String)>,
    Extension(trail): Extension<Trail>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let expected = expected(&headers)?;
    let change = edit(&admin, move |editor| editor.remove_key(&id, &key, &expected)).await?;
    Ok(changed(&trail, "key.delete", &change))
}

pub(super) async fn usage(
    State(admin): State<Admin>,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let window = window(query.as_deref().unwrap_or_default())?;
    let usage = admin.tenancy.usage(&id, window).ok_or_else(|| refusal(EditError::NoTenant(id)))?;
    Ok(Json(render_usage(&usage)).into_response())
}

/// `window=1h`, as whole minutes or hours; nothing: since the start.
fn window(query: &str) -> Result<Option<Duration>, ApiError> {
    let wrong = |name: &str, message: &str| Err(ApiError::invalid(name.to_owned(), message));
    let mut window = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if name != "window" {
            return wrong(name, "is not known here; there is window");
        }
        if window.is_some() {
            return wrong("window", "is there twice");
        }
        let parsed = value.strip_suffix('m').map(|number| (number, 60));
        let parsed = parsed.or_else(|| value.strip_suffix('h').map(|number| (number, 3600)));
        let seconds = parsed.and_then(|(number, unit)| number.parse::<u64>().ok()?.checked_mul(unit));
        match seconds.filter(|seconds| (60..=MAX_WINDOW).contains(seconds)) {
            Some(seconds) => window = Some(Duration::from_secs(seconds)),
            None => {
                return wrong("window", "must be between 1m and 24h, in minutes or hours, such as 15m or 1h");
            }
        }
    }
    Ok(window)
}

/// Runs a call of the editor where it may wait for files.
async fn edit<T: Send + 'static>(
    admin: &Admin,
    call: impl FnOnce(&TenantsEditor) -> Result<T, EditError> + Send + 'static,
) -> Result<T, ApiError> {
    let admin = admin.clone();
    let call = move || match &admin.tenants {
        Some(editor) => call(editor).map_err(refusal),
        None => {
            let message = "this server has no tenants file; start it with --tenants FILE";
            Err(ApiError::admin(StatusCode::NOT_FOUND, "no_tenants_file", message.to_owned()))
        }
    };
    let outcome = tokio::task::spawn_blocking(call).await;
    outcome.unwrap_or_else(|panic| Err(crate::observe::after_panic(&panic.to_string())))
}

fn refusal(error: EditError) -> ApiError {
    let message = error.to_string();
    let (status, code) = match error {
        EditError::Invalid { field, message } => return ApiError::invalid(field, message),
        EditError::NoTenant(_) => (StatusCode::NOT_FOUND, "tenant_not_found"),
        EditError::NoKey { .. } => (StatusCode::NOT_FOUND, "key_not_found"),
        EditError::Changed(_) => (StatusCode::PRECONDITION_FAILED, "precondition_failed"),
        EditError::Refused(_) => (StatusCode::CONFLICT, "conflict"),
        EditError::File(_) => (StatusCode::CONFLICT, "tenants_file_unusable"),
        EditError::Write { .. } => {
            tracing::error!(message, "the tenants file cannot be changed");
            (StatusCode::INTERNAL_SERVER_ERROR, "write_failed")
        }
    };
    ApiError::admin(status, code, message)
}

/// `If-Match` and `If-None-Match` (RFC 9110, sections 13.1.1 and 13.1.2).
fn expected(headers: &HeaderMap) -> Result<Expected, ApiError> {
    let value = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or_default().trim());
    match (value(IF_MATCH), value(IF_NONE_MATCH)) {
        (None, None) => Ok(Expected::Anything),
        (Some("*"), None) => Ok(Expected::Something),
        (None, Some("*")) => Ok(Expected::Nothing),
        (Some(tags), None) => {
            // A weak tag never matches here.
            let strong = |tag: &str| tag.trim().strip_prefix('"')?.strip_suffix('"').map(str::to_owned);
            Ok(Expected::Tags(tags.split(',').filter_map(strong).collect()))
        }
        (None, Some(_)) => Err(ApiError::invalid("if-none-match", "must be *")),
        (Some(_), Some(_)) => Err(ApiError::invalid("if-none-match", "cannot be combined with If-Match")),
    }
}

fn take<T: DeserializeOwned>(body: &mut Map<String, Value>, name: &str) -> Result<Option<T>, ApiError> {
    let value = body.remove(name).filter(|value| !value.is_null());
    let value = value.map(serde_json::from_value).transpose();
    value.map_err(|error| ApiError::invalid(name.to_owned(), error.to_string()))
}

fn note(trail: &Trail, action: &str, change: &Change) {
    let side = |tenant: &Option<TenantView>| tenant.as_ref().map(render);
    trail.changed(json!({ "action": action, "before": side(&change.before), "after": side(&change.after) }));
}

/// Notes the change, and answers with what is there now.
fn changed(trail: &Trail, action: &str, change: &Change) -> Response {
    note(trail, action, change);
    let status = if change.before.is_none() { StatusCode::CREATED } else { StatusCode::OK };
    match &change.after {
        Some(tenant) => answer(status, tenant),
        None => StatusCode::NO_CONTENT.into_response(),
    }
}

fn answer(status: StatusCode, tenant: &TenantView) -> Response {
    let mut response = (status, Json(render(tenant))).into_response();
    tag(&mut response, tenant);
    response
}

fn tag(response: &mut Response, tenant: &TenantView) {
    if let Ok(value) = HeaderValue::from_str(&format!("\"{}\"", tenant.tag)) {
        response.headers_mut().insert(ETAG, value);
    }
}

fn render(tenant: &TenantView) -> Value {
    let key = |key: &KeyView| json!({ "id": key.id, "expires": key.expires, "scopes": key.scopes });
    let mut fields = Map::new();
    fields.insert("id".into(), tenant.id.clone().into());
    fields.extend(tenant.settings.clone());
    fields.insert("keys".into(), tenant.keys.iter().map(key).collect());
    Value::Object(fields)
}

fn render_usage(usage: &Usage) -> Value {
    let budget = usage.budget.as_ref().map(|(budget, window, used)| {
        json!({
            "tokens": budget.tokens,
            "period": budget.period.name(),
            "action": budget.action.name(),
            "used": used,
            "left": budget.tokens.saturating_sub(*used),
            "ends": rfc3339(window.end.saturating_mul(1000)),
        })
    });
    json!({
        "tenant": usage.tenant,
        "from": rfc3339(usage.from.saturating_mul(1000)),
        "to": rfc3339(usage.to.saturating_mul(1000)),
        "requests": usage.counts.requests,
        "prompt_tokens": usage.counts.prompt_tokens,
        "cached_tokens": usage.counts.cached_tokens,
        "completion_tokens": usage.counts.completion_tokens,
        "in_flight": usage.in_flight,
        "waiting": usage.waiting,
        "budget": budget,
    })
}
