//! What happens around every request: an id, counters, and a net under panics.

use std::any::Any;
use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderName, HeaderValue, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use quire_core::metric_names::{CLIENT_DISCONNECTS, HTTP_INFLIGHT, HTTP_REQUESTS};

use crate::error::ApiError;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id that is taken from a client.
const MAX_REQUEST_ID: usize = 128;

/// The id of a request: the client's, if it is fit for logs and headers, else one of ours.
#[derive(Clone, Debug)]
pub(crate) struct RequestId(pub(crate) Arc<str>);

impl RequestId {
    fn of(header: Option<&HeaderValue>) -> Self {
        let plain = |id: &&str| {
            let fit = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            !id.is_empty() && id.len() <= MAX_REQUEST_ID && id.bytes().all(fit)
        };
        let given = header.and_then(|value| value.to_str().ok()).filter(plain);
        Self(given.map_or_else(random_id, Arc::from))
    }
}

/// 128 bits that nobody can foresee, from the keys the standard library draws at start.
fn random_id() -> Arc<str> {
    static KEYS: LazyLock<[RandomState; 2]> = LazyLock::new(Default::default);
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let [high, low] = KEYS.each_ref().map(|key| key.hash_one(count));
    format!("{high:016x}{low:016x}").into()
}

/// The outermost layer.
pub(crate) async fn observe(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers().get(X_REQUEST_ID));
    request.extensions_mut().insert(id.clone());
    let route = request.extensions().get::<MatchedPath>().map(|path| Arc::<str>::from(path.as_str()));
    let (version, method) = (request.version(), request.method().clone());

    let inflight = Inflight::new();
    let mut disconnected = CountedUnless::new();
    let mut response = catch_panic(next.run(request)).await;
    disconnected.disarm();

    let labels = [
        ("route", route.as_deref().unwrap_or("other").to_owned()),
        ("method", known_method(&method).to_owned()),
        ("code", response.status().as_str().to_owned()),
    ];
    metrics::counter!(HTTP_REQUESTS.name, &labels).increment(1);
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    if version > Version::HTTP_11 {
        response.headers_mut().remove(CONNECTION);
    }
    if let Some(KeepsCount(keeper)) = response.extensions_mut().remove() {
        // It is set here only, and once.
        let _ = keeper.set(inflight);
        return response;
    }
    response.map(|body| Body::new(Counted { body, _inflight: inflight }))
}

/// In a response's extensions: its body keeps what counts the request for as long as it lives, so that no other body need
/// be wrapped around it, through which every event would have to pass.
#[derive(Clone)]
pub(crate) struct KeepsCount(pub(crate) Arc<OnceLock<Inflight>>);

/// Methods are the client's words; labels must be bounded.
pub(crate) fn known_method(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        _ => "other",
    }
}

async fn catch_panic(response: impl Future<Output = Response>) -> Response {
    let mut response = pin!(response);
    let outcome = poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| response.as_mut().poll(cx))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(response)) => Poll::Ready(Ok(response)),
        Err(panic) => Poll::Ready(Err(panic)),
    });
    outcome.await.unwrap_or_else(|panic| after_panic(panic.as_ref()).into_response())
}

/// Logs a panic and gives the error that its request is answered with, which tells nothing of it.
pub(crate) fn after_panic(panic: &(dyn Any + Send)) -> ApiError {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    tracing::error!(panic = text, "a request panicked");
    ApiError::internal("the request could not be completed")
}

/// Counts a client that went away, unless disarmed before it is dropped.
pub(crate) struct CountedUnless {
    armed: bool,
}

impl CountedUnless {
    pub(crate) fn new() -> Self {
        Self { armed: true }
    }

    pub(crate) fn disarm(&mut self) {
        self.armed = false;
    }
}

impl Drop for CountedUnless {
    fn drop(&mut self) {
        if self.armed {
            metrics::counter!(CLIENT_DISCONNECTS.name).increment(1);
        }
    }
}

/// One request being answered, until its body is gone.
pub(crate) struct Inflight;

impl Inflight {
    fn new() -> Self {
        metrics::gauge!(HTTP_INFLIGHT.name).increment(1.0);
        Self
    }
}

impl Drop for Inflight {
    fn drop(&mut self) {
        metrics::gauge!(HTTP_INFLIGHT.name).decrement(1.0);
    }
}

struct Counted {
    body: Body,
    _inflight: Inflight,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_fit_for_a_header_are_kept_and_others_replaced() {
        let of = |id: &str| RequestId::of(Some(&HeaderValue::from_str(id).unwrap())).0;
        assert_eq!(&*of("aZ0._-"), "aZ0._-");
        assert_eq!(of(&"x".repeat(128)).len(), 128);
        for unfit in [&"x".repeat(129), "a b", "a/b", "", "\"quoted\""] {
            assert_eq!(of(unfit).len(), 32, "{unfit:?}");
        }
        assert_ne!(RequestId::of(None).0, RequestId::of(None).0);
    }
}
