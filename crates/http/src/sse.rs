//! Server-sent events: a body that is pulled by its socket.
//!
//! Nothing is buffered here: when the socket takes more, whatever is ready is rendered into one frame. So a slow client
//! coalesces, and the only memory it holds is what its own request may generate.

use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http_body::{Body as HttpBody, Frame};
use tokio::time::{Instant, Sleep};

use crate::error::ApiError;
use crate::observe::{CountedUnless, Inflight, KeepsCount, after_panic};

/// Most frames hold one event and fit.
pub(crate) const COMMON_FRAME_BYTES: usize = 512;

/// A frame is not made larger than about this.
pub(crate) const FRAME_BYTES: usize = 16 << 10;

const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// Where events come from.
pub(crate) trait Events: Send + Unpin + 'static {
    /// Appends events that are ready to `out` and stops at about [`FRAME_BYTES`]. Ready: that was all. Pending with
    /// nothing appended: the task is woken when there is more.
    fn poll_events(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<()>;
}

/// A streaming answer.
pub(crate) fn response(events: impl Events, keep_alive: Duration) -> Response {
    let count = Arc::new(OnceLock::new());
    let stream = EventStream {
        _inflight: Arc::clone(&count),
        events: Some(events),
        keep_alive,
        last_write: Instant::now(),
        timer: Box::pin(tokio::time::sleep(keep_alive)),
        timer_due: Instant::now(),
        timer_wakes: None,
        disconnected: CountedUnless::new(),
    };
    let mut response = Body::new(stream).into_response();
    response.extensions_mut().insert(KeepsCount(count));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Else nginx collects events before it passes them on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Writes one event that says what went wrong.
pub(crate) fn write_error(error: &ApiError, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(error.body().to_string().as_bytes());
    out.extend_from_slice(b"\n\n");
}

struct EventStream<E> {
    /// `None` after the last event.
    events: Option<E>,
    keep_alive: Duration,
    last_write: Instant,
    timer: Pin<Box<Sleep>>,
    /// When the timer fires; it lies elsewhere, and is not to be fetched for every event.
    timer_due: Instant,
    /// Whom it wakes then.
    timer_wakes: Option<Waker>,
    disconnected: CountedUnless,
    _inflight: Arc<OnceLock<Inflight>>,
}

impl<E: Events> EventStream<E> {
    /// Drops the source, which cancels what is unfinished.
    fn end(&mut self) {
        self.events = None;
        self.disconnected.disarm();
    }

    fn poll_events(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) {
        let Some(events) = &mut self.events else { return };
        match catch_unwind(AssertUnwindSafe(|| events.poll_events(cx, out))) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(())) => self.end(),
            Err(panic) => {
                write_error(&after_panic(panic.as_ref()), out);
                self.end();
            }
        }
    }

    /// Whether the stream has been silent for too long. The timer is moved only when it fires, not at every event, and
    /// asked only when it may have fired or would wake somebody else.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> bool {
        let now = Instant::now();
        let wakes_us = self.timer_wakes.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if wakes_us && now < self.timer_due {
            return false;
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let due = self.last_write + self.keep_alive;
            if due <= now {
                self.timer.as_mut().reset(now + self.keep_alive);
                return true;
            }
            self.timer.as_mut().reset(due);
        }
        self.timer_due = self.timer.deadline();
        self.timer_wakes = Some(cx.waker().clone());
        false
    }
}

impl<E: Events> HttpBody for EventStream<E> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.events.is_none() {
            return Poll::Ready(None);
        }
        let mut out = Vec::new();
        self.poll_events(cx, &mut out);
        if out.is_empty() && self.events.is_none() {
            return Poll::Ready(None);
        }
        if out.is_empty() && self.poll_silence(cx) {
            out.extend_from_slice(KEEP_ALIVE);
        }
        if out.is_empty() {
            return Poll::Pending;
        }
        self.last_write = Instant::now();
        Poll::Ready(Some(Ok(Frame::data(out.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.events.is_none()
    }
}
