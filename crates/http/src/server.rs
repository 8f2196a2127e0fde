//! The accept loop: HTTP/1.1 and HTTP/2 on one port, bounded, and ended with care.

use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use axum::Router;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use quire_tls::{Alpn, Stream, Tls};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tower::Service;

use crate::auth::Peer;
use crate::protocol::{Protocol, Rewound, recognize};
use crate::router::router;
use crate::state::AppState;

/// Connections at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 10_000;

/// Header lines of a request.
const MAX_HEADERS: usize = 100;

/// Bytes of a request's head.
const MAX_HEADER_BYTES: usize = 32 << 10;

/// Bytes of a connection's input, and of its output, that are held at most; both begin with 8 KiB, and a long prompt makes
/// one of them grow.
const MAX_BUFFER_BYTES: usize = 128 << 10;

/// How long a connection may be silent.
#[derive(Clone, Copy)]
pub(crate) struct Patience {
    /// Until its first request's head is whole.
    first: Duration,
    /// Between an answer and the head of the next request.
    idle: Duration,
}

/// Common proxies and client pools keep idle connections for a minute; they, not we, should close first, because a
/// request that meets a closing connection is lost.
pub(crate) const PATIENCE: Patience =
    Patience { first: Duration::from_secs(10), idle: Duration::from_secs(75) };

/// Streams of one HTTP/2 connection.
const MAX_HTTP2_STREAMS: u32 = 128;

/// Reset streams that an HTTP/2 client may leave behind faster than we notice.
const MAX_PENDING_RESETS: usize = 200;

/// After an accept error (usually: no file descriptors left) others get time to close theirs.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// After the shutdown signal, connections have this long to send what they still hold.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves until `shutdown` resolves, then lets open connections finish their answers and returns.
///
/// A drain happens before that: [`quire_llm::Lifecycle::drain`] refuses inference while health and metrics go on
/// answering; resolve `shutdown` when the last stream has ended.
pub async fn serve(listener: TcpListener, state: AppState, shutdown: impl Future<Output = ()>) {
    let tls = state.config().tls.clone();
    accept(listener, tls, router(state), PATIENCE, shutdown).await;
}

/// The loop, for any router; every connection encrypted, if there is a certificate.
pub(crate) async fn accept(
    listener: TcpListener,
    tls: Option<Tls>,
    app: Router,
    patience: Patience,
    shutdown: impl Future<Output = ()>,
) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (closing, _) = watch::channel(());
    let door = Arc::new(Door { app, tls, patience, http1: http1(patience.idle), http2: http2() });
    let mut shutdown = pin!(shutdown);
    loop {
        let next = async {
            let permit =
                Arc::clone(&connections).acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, permit)
        };
        tokio::select! {
            (accepted, permit) = next => match accepted {
                Ok((stream, peer)) => {
                    tokio::spawn(connection(stream, peer.ip(), Arc::clone(&door), closing.subscribe(), permit));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    // Nobody listens if there is no connection; else each ends after its answer.
    let _ = closing.send(());
    if tokio::time::timeout(CLOSE_TIMEOUT, closing.closed()).await.is_err() {
        tracing::warn!("connections were still open after {CLOSE_TIMEOUT:?}");
    }
}

/// What all connections share.
struct Door {
    app: Router,
    tls: Option<Tls>,
    patience: Patience,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
}

impl Door {
    /// Shakes hands, if that is to be done, and waits for the beginning of the first request.
    async fn open(&self, stream: TcpStream) -> io::Result<(Protocol, Rewound)> {
        let stream = match &self.tls {
            // On the heap: most connections need no room for it.
            Some(tls) => Box::pin(tls.accept(stream, Alpn::Http)).await?,
            None => Stream::Plain(stream),
        };
        recognize(stream).await
    }
}

async fn connection(
    stream: TcpStream,
    peer: IpAddr,
    door: Arc<Door>,
    mut closing: watch::Receiver<()>,
    _permit: OwnedSemaphorePermit,
) {
    // Tokens are small writes; each is to leave at once.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let first_request = Instant::now() + door.patience.first;
    let recognized = tokio::select! {
        recognized = door.open(stream) => recognized,
        () = tokio::time::sleep_until(first_request) => return,
        _ = closing.changed() => return,
    };
    let (protocol, stream) = match recognized {
        Ok(recognized) => recognized,
        Err(error) => return tracing::debug!(%error, "a connection ended before it said anything"),
    };
    let watched = Watched { closing, first_request, spoke: Arc::default() };
    let service = {
        let (app, spoke) = (door.app.clone(), Arc::clone(&watched.spoke));
        service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            spoke.store(true, Ordering::Relaxed);
            // On the heap, too, and only until the answer begins.
            Box::pin(app.clone().call(request))
        })
    };
    let stream = TokioIo::new(stream);
    // On the heap: a task has room for the larger of the two, and most connections are of the smaller kind.
    let outcome = match protocol {
        Protocol::Http1 => {
            let connection = Box::pin(door.http1.serve_connection(stream, service));
            watched.drive(connection, http1::Connection::graceful_shutdown).await
        }
        Protocol::Http2 => {
            let connection = Box::pin(door.http2.serve_connection(stream, service));
            watched.drive(connection, http2::Connection::graceful_shutdown).await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

/// What may end a connection from outside.
struct Watched {
    closing: watch::Receiver<()>,
    /// When its first request's head must be whole.
    first_request: Instant,
    /// Whether it was.
    spoke: Arc<AtomicBool>,
}

impl Watched {
    async fn drive<C: Future<Output = hyper::Result<()>>>(
        mut self,
        mut connection: Pin<Box<C>>,
        shut_down: fn(Pin<&mut C>),
    ) -> hyper::Result<()> {
        let is_closing = self.closing.clone();
        let mut close = pin!(self.closing.changed());
        let mut first_request = pin!(tokio::time::sleep_until(self.first_request));
        let (mut closed, mut waits) = (false, true);
        let mut registered: Option<Waker> = None;
        // Called for every event of a stream. Signal and timer stay registered, so they are asked only when they may have
        // something to say: what is not touched need not be fetched from memory.
        poll_fn(|cx| {
            let is_known = registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            let may_close = !closed && (!is_known || is_closing.has_changed().unwrap_or(true));
            if may_close && close.as_mut().poll(cx).is_ready() {
                closed = true;
                shut_down(connection.as_mut());
            }
            waits = waits && !self.spoke.load(Ordering::Relaxed);
            // Not one whole request yet.
            if waits && first_request.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if !is_known {
                registered = Some(cx.waker().clone());
            }
            connection.as_mut().poll(cx)
        })
        .await
    }
}

fn http1(idle: Duration) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEADER_BYTES)
        .max_buf_size(MAX_BUFFER_BYTES)
        .header_read_timeout(idle);
    builder
}

fn http2() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_HTTP2_STREAMS)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_header_list_size(MAX_HEADER_BYTES as u32)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::{sleep, timeout};

    use super::*;

    /// What comes back, until the server closes.
    async fn read_all(stream: &mut TcpStream) -> String {
        let mut answer = Vec::new();
        let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.expect("it closes");
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn whoever_sends_no_whole_request_in_time_is_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let slow = async || {
            sleep(Duration::from_millis(600)).await;
            "done"
        };
        let app = Router::new().route("/slow", get(slow));
        let patience = Patience { first: Duration::from_millis(200), idle: Duration::from_millis(900) };
        tokio::spawn(accept(listener, None, app, patience, std::future::pending()));
        // Silence; the beginning of either protocol; a head that never ends.
        for start in ["", "P", "GET /slow HTTP/1.1\r\nhost: x\r\n"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(start.as_bytes()).await.unwrap();
            assert!(!read_all(&mut stream).await.starts_with("HTTP/1.1 200"), "{start:?}");
        }
        // An answer may take longer than a head, and so may the pause before the next request.
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n";
        stream.write_all(request).await.unwrap();
        sleep(Duration::from_millis(1100)).await;
        stream.write_all(request).await.unwrap();
        let answers = read_all(&mut stream).await;
        assert!(answers.starts_with("HTTP/1.1 200") && answers.ends_with("done"), "{answers}");
        assert_eq!(answers.matches("done").count(), 2, "{answers}");
    }
}
