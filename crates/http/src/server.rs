//! The accept loop: HTTP/1.1 and HTTP/2 on one port, bounded, and ended with care.

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use axum::Router;
use http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tower::Service;

use crate::auth::Peer;
use crate::router::router;
use crate::state::AppState;

/// Connections at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 10_000;

/// Header lines of a request.
const MAX_HEADERS: usize = 100;

/// Bytes of a request's head.
const MAX_HEADER_BYTES: usize = 32 << 10;

/// How long a connection may be silent.
#[derive(Clone, Copy)]
struct Patience {
    /// Until its first request's head is whole.
    first: Duration,
    /// Between an answer and the head of the next request.
    idle: Duration,
}

/// Common proxies and client pools keep idle connections for a minute; they, not we, should close first, because a
/// request that meets a closing connection is lost.
const PATIENCE: Patience = Patience { first: Duration::from_secs(10), idle: Duration::from_secs(75) };

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
    accept(listener, router(state), PATIENCE, shutdown).await;
}

async fn accept(listener: TcpListener, app: Router, patience: Patience, shutdown: impl Future<Output = ()>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (closing, _) = watch::channel(());
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
                    let connection = connection(stream, peer.ip(), app.clone(), patience, closing.subscribe());
                    tokio::spawn(async move {
                        connection.await;
                        drop(permit);
                    });
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

async fn connection(
    stream: TcpStream,
    peer: IpAddr,
    app: Router,
    patience: Patience,
    mut closing: watch::Receiver<()>,
) {
    // Tokens are small writes; each is to leave at once.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let spoke = Arc::new(AtomicBool::new(false));
    let service = {
        let spoke = Arc::clone(&spoke);
        tower::util::service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            spoke.store(true, Ordering::Relaxed);
            app.clone().call(request)
        })
    };
    let builder = builder(patience.idle);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut connection = pin!(connection.into_owned());
    let is_closing = closing.clone();
    let mut close = pin!(closing.changed());
    let mut first_request = pin!(tokio::time::sleep(patience.first));
    let (mut closed, mut waits) = (false, true);
    let mut registered: Option<Waker> = None;
    // Called for every event of a stream. Signal and timer stay registered, so they are asked only when they may have
    // something to say: what is not touched need not be fetched from memory.
    let outcome = poll_fn(|cx| {
        let is_known = registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        let may_close = !closed && (!is_known || is_closing.has_changed().unwrap_or(true));
        if may_close && close.as_mut().poll(cx).is_ready() {
            closed = true;
            connection.as_mut().graceful_shutdown();
        }
        waits = waits && !spoke.load(Ordering::Relaxed);
        // Not one whole request yet, not even enough to tell the protocol.
        if waits && first_request.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        if !is_known {
            registered = Some(cx.waker().clone());
        }
        connection.as_mut().poll(cx)
    });
    let outcome = outcome.await;
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

fn builder(idle: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES)
        .header_read_timeout(idle);
    builder
        .http2()
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
        tokio::spawn(accept(listener, app, patience, std::future::pending()));
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
