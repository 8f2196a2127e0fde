//! One table from errors to HTTP statuses and OpenAI's error bodies.

use std::borrow::Cow;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use quire_core::RequestError;
use quire_tenancy::{AuthError, Denied, Standing};
use serde_json::{Value, json};

/// An answer that is an error: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<Cow<'static, str>>,
    code: Option<&'static str>,
    /// Seconds.
    retry_after: Option<u64>,
    /// How it stands with the caller's limits, where one of them is the reason.
    standing: Option<Box<Standing>>,
    /// Whether the client should open a new connection next time: another server may be behind the address.
    close: bool,
}

/// In the extensions of an answer that is an error: its code, for the audit log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ErrorCode(pub(crate) &'static str);

const INVALID: &str = "invalid_request_error";

/// Paths of APIs that clients may expect here, and what they are for.
const ABSENT_APIS: [(&str, &str); 10] = [
    ("/v1/embeddings", "embeddings are"),
    ("/v1/messages", "the Anthropic API is"),
    ("/api/", "the Ollama API is"),
    ("/v1/responses", "the Responses API is"),
    ("/v1/rerank", "reranking is"),
    ("/v1/score", "scoring is"),
    ("/v1/audio", "audio is"),
    ("/v1/images", "image generation is"),
    ("/v1/batches", "the Batches API is"),
    ("/v1/load_lora_adapter", "loading LoRA adapters while the server runs is"),
];

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, message, kind, param: None, code, retry_after: None, standing: None, close: false }
    }

    fn about(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// 400: `param` has a wrong value.
    pub(crate) fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.into());
        Self::new(StatusCode::BAD_REQUEST, INVALID, None, message).about(param)
    }

    /// 400: `param` asks for something that this server does not do.
    pub(crate) fn unsupported(param: impl Into<Cow<'static, str>>, feature: &str) -> Self {
        let param = param.into();
        let message = format!("{param}: {feature} not supported by this server; leave it out");
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("unsupported_parameter"), message).about(param)
    }

    /// 400: the body as a whole is no request.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, None, message.into())
    }

    /// 400: a field that nobody knows.
    pub(crate) fn unknown_field(name: &str) -> Self {
        let message = format!("unrecognized request argument supplied: {name}");
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("unknown_parameter"), message).about(name.to_owned())
    }

    /// `served` holds what exists for the caller: nothing tells a hidden model from one that is not there.
    pub(crate) fn model_not_found(model: &str, served: &[&str]) -> Self {
        let served = if served.is_empty() { "no model for this key".to_owned() } else { served.join(", ") };
        let message = format!("the model `{model}` does not exist; this server has {served}");
        Self::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), message).about("model")
    }

    /// The same for what never was, what is forgotten, and what is somebody else's.
    pub(crate) fn request_not_found(id: &str) -> Self {
        let message =
            format!("no request `{id}` of yours is known here; those that ended long ago are forgotten");
        Self::new(StatusCode::NOT_FOUND, INVALID, Some("request_not_found"), message)
    }

    pub(crate) fn route_not_found(path: &str) -> Self {
        let of = |(prefix, _): &&(&str, &str)| path.starts_with(prefix);
        let message = match ABSENT_APIS.iter().find(of) {
            Some((_, feature)) => format!("{feature} not supported yet, so there is no {path}"),
            None => format!("unknown path {path}"),
        };
        Self::new(StatusCode::NOT_FOUND, INVALID, Some("unknown_url"), message)
    }

    pub(crate) fn method_not_allowed(method: &http::Method) -> Self {
        let message = format!("this path does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"), message)
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("the body is larger than the limit of {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large"), message)
    }

    pub(crate) fn body_too_slow() -> Self {
        let message = "the body did not come in time".to_owned();
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, Some("request_timeout"), message)
    }

    pub(crate) fn unsupported_media_type(got: &str) -> Self {
        let message = format!("the content type must be application/json, got {got}");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, Some("unsupported_media_type"), message)
    }

    pub(crate) fn internal(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message.to_owned())
    }

    /// What the admin API refuses for reasons of its own.
    pub(crate) fn admin(status: StatusCode, code: &'static str, message: String) -> Self {
        let kind = if status.is_server_error() { "server_error" } else { INVALID };
        Self::new(status, kind, Some(code), message)
    }

    /// Names a field as this route's clients know it, where the engine knows it by another name.
    pub(crate) fn with_param(mut self, engine: &str, client: &'static str) -> Self {
        if self.param.as_deref() == Some(engine) {
            if let Some(rest) = self.message.strip_prefix(engine) {
                self.message = format!("{client}{rest}");
            }
            self.param = Some(client.into());
        }
        self
    }

    /// Names the element of a list that is wrong.
    pub(crate) fn in_element(self, list: &str, index: usize) -> Self {
        if self.param.as_deref() != Some(list) {
            return self;
        }
        let message = self.message.replacen(list, &format!("{list}[{index}]"), 1);
        Self { message, ..self }.about(format!("{list}[{index}]"))
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Code and message, if it says that a request was not let in: over a limit, too late, or nobody there to serve it.
    /// What is wrong with a request itself is no refusal.
    pub(crate) fn refusal(&self) -> Option<(&'static str, &str)> {
        let refuses = [
            StatusCode::PAYLOAD_TOO_LARGE,
            StatusCode::TOO_MANY_REQUESTS,
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::GATEWAY_TIMEOUT,
        ];
        let code = self.code.filter(|_| refuses.contains(&self.status))?;
        Some((code, &self.message))
    }

    /// After how long the same request may be let in.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        self.retry_after.map(Duration::from_secs)
    }

    /// The JSON body, which is also the final event of a stream that fails.
    pub fn body(&self) -> Value {
        let Self { message, kind, param, code, .. } = self;
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let message = error.to_string();
        match error {
            RequestError::Invalid { field, .. } => {
                Self::new(StatusCode::BAD_REQUEST, INVALID, None, message).about(field)
            }
            RequestError::TooLong { .. } => {
                Self::new(StatusCode::BAD_REQUEST, INVALID, Some("context_length_exceeded"), message)
                    .about("prompt")
            }
            RequestError::Overloaded { retry_after, .. } | RequestError::Late { retry_after } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                let error = Self::new(status, "rate_limit_error", Some("rate_limit_exceeded"), message);
                Self { retry_after: Some(retry_after.as_secs().max(1)), ..error }
            }
            RequestError::DeadlineExceeded => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", Some("deadline_exceeded"), message)
            }
            RequestError::Unavailable { state } => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                let error = Self::new(status, "service_unavailable_error", Some("unavailable"), message);
                let seconds = if state == "loading" { 1 } else { 5 };
                Self { retry_after: Some(seconds), close: state != "loading", ..error }
            }
            RequestError::Cancelled => {
                let status = StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST);
                Self::new(status, INVALID, Some("cancelled"), message)
            }
            RequestError::Internal(_) => Self::internal(&message),
        }
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        if error == AuthError::Address {
            let code = Some("forbidden_address");
            return Self::new(StatusCode::FORBIDDEN, "permission_error", code, error.to_string());
        }
        Self::new(StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key"), error.to_string())
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        let message = denied.to_string();
        match denied {
            Denied::Scope(_) => {
                Self::new(StatusCode::FORBIDDEN, "permission_error", Some("insufficient_scope"), message)
            }
            Denied::TooLarge { field, .. } => {
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                Self::new(status, INVALID, Some("limit_exceeded"), message).about(field)
            }
            Denied::Limited { quota, retry_after, standing, .. } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                let error = Self::new(status, "rate_limit_error", Some("rate_limit_exceeded"), message);
                let seconds = retry_after.as_nanos().div_ceil(1_000_000_000);
                Self {
                    retry_after: Some(u64::try_from(seconds).unwrap_or(u64::MAX).max(1)),
                    standing: Some(Box::new(standing)),
                    ..error.about(quota.name())
                }
            }
        }
    }
}

/// Adds the headers that say how it stands with the caller's limits.
pub(crate) fn with_standing(mut response: Response, standing: &Standing) -> Response {
    for (name, value) in standing.headers() {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body().to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(code) = self.code {
            response.extensions_mut().insert(ErrorCode(code));
        }
        match &self.standing {
            Some(standing) => with_standing(response, standing),
            None => response,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_openais_shape() {
        let body = ApiError::from(RequestError::invalid("top_p", "must be in (0, 1], got 2")).body();
        let expected = json!({ "error": {
            "message": "top_p: must be in (0, 1], got 2",
            "type": "invalid_request_error", "param": "top_p", "code": null,
        }});
        assert_eq!(body, expected);
    }

    #[test]
    fn fields_get_the_names_of_their_route() {
        let error = ApiError::from(RequestError::invalid("logprobs", "must be at most 20"));
        let error = error.with_param("logprobs", "top_logprobs");
        assert_eq!(error.body()["error"]["param"], "top_logprobs");
        assert_eq!(error.body()["error"]["message"], "top_logprobs: must be at most 20");
        let element = ApiError::invalid("prompt", "is empty").in_element("prompt", 3);
        assert_eq!(element.body()["error"]["message"], "prompt[3]: is empty");
        assert_eq!(element.body()["error"]["param"], "prompt[3]");
    }

    #[test]
    fn refusals_that_will_pass_say_when() {
        let busy = RequestError::Overloaded { queued: 3, limit: 3, retry_after: Duration::from_millis(10) };
        let busy = ApiError::from(busy).into_response();
        assert_eq!(
            (busy.status().as_u16(), &busy.headers()[RETRY_AFTER]),
            (429, &HeaderValue::from_static("1"))
        );
        assert!(!busy.headers().contains_key(CONNECTION));
        let draining = ApiError::from(RequestError::Unavailable { state: "draining" }).into_response();
        assert_eq!(
            (draining.status().as_u16(), &draining.headers()[CONNECTION]),
            (503, &HeaderValue::from_static("close"))
        );
    }
}
