//! Encrypted connections for tonic. Each shakes hands by itself: a client that is slow, or silent, keeps nobody waiting.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use quire_tls::{Alpn, Stream, Tls};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{Sender, channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// Handshakes at once; more clients wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 1024;
/// Connections that are ready and not taken yet.
const MAX_READY: usize = 64;
/// After an accept error (usually: no file descriptors left) others get time to close theirs.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections as they are ready, until nobody takes them any more.
pub(crate) fn encrypted(listener: TcpListener, tls: Tls) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = channel(MAX_READY);
    tokio::spawn(async move {
        tokio::select! {
            () = accept(&listener, &tls, &ready) => {}
            () = ready.closed() => {}
        }
    });
    ReceiverStream::new(connections)
}

/// Never ends.
async fn accept(listener: &TcpListener, tls: &Tls, ready: &Sender<io::Result<Connection>>) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let permit = Arc::clone(&handshakes).acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(shake_hands(stream, tls.clone(), ready.clone(), permit));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a gRPC connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn shake_hands(
    stream: TcpStream,
    tls: Tls,
    ready: Sender<io::Result<Connection>>,
    _permit: OwnedSemaphorePermit,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let accepted = tokio::select! {
        accepted = tls.accept(stream, Alpn::Grpc) => accepted,
        () = ready.closed() => return,
    };
    match accepted {
        // An error means that the server has ended.
        Ok(stream) => drop(ready.send(Ok(Connection(stream))).await),
        Err(error) => tracing::debug!(%error, "a gRPC connection ended before it said anything"),
    }
}

/// One of them.
pub(crate) struct Connection(Stream);

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo { local_addr: None, remote_addr: self.0.peer_addr().ok() }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
