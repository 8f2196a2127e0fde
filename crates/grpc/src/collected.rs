//! Writes that wait for company.
//!
//! A step of the engine wakes every stream, and the first one that has a frame wakes its connection, which would write that
//! frame alone, then the next one alone. A write costs more than all the rest of a token, so a connection that has something
//! to write lets those tasks go first that are ready now, and writes what they add as well.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// A connection whose first write after a flush yields once.
pub(crate) struct Collected<S> {
    stream: S,
    /// Since the last flush.
    has_yielded: bool,
}

impl<S> Collected<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, has_yielded: false }
    }

    /// Pending once: a task that wakes itself goes to the end of the queue.
    fn poll_turn(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.has_yielded {
            return Poll::Ready(());
        }
        self.has_yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<S: Connected> Connected for Collected<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> S::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Collected<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Collected<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx));
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx));
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.has_yielded = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use tokio::sync::Notify;

    use super::*;

    /// Counts its writes.
    struct Socket(Arc<AtomicUsize>);

    impl AsyncWrite for Socket {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    type Buffer = Arc<Mutex<Vec<u8>>>;

    /// Writes all that is there each time it is told that there is something.
    async fn connection(mut socket: Collected<Socket>, buffer: Buffer, filled: Arc<Notify>) {
        loop {
            filled.notified().await;
            let write = poll_fn(|cx| {
                let mut frames = buffer.lock().unwrap();
                if !frames.is_empty() {
                    ready!(Pin::new(&mut socket).poll_write(cx, &frames))?;
                    frames.clear();
                }
                Pin::new(&mut socket).poll_flush(cx)
            });
            write.await.unwrap();
        }
    }

    // Of the runtimes, this one lets a task that was woken go before those that were ready.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_is_ready_in_one_round_leaves_in_one_write() {
        let (writes, buffer, filled) =
            (Arc::<AtomicUsize>::default(), Buffer::default(), Arc::<Notify>::default());
        let socket = Collected::new(Socket(Arc::clone(&writes)));
        tokio::spawn(connection(socket, Arc::clone(&buffer), Arc::clone(&filled)));
        let step = async move {
            for step in 1..=3 {
                let streams = (0..100).map(|byte| {
                    let (buffer, filled) = (Arc::clone(&buffer), Arc::clone(&filled));
                    tokio::spawn(async move {
                        buffer.lock().unwrap().push(byte);
                        filled.notify_one();
                    })
                });
                for stream in streams.collect::<Vec<_>>() {
                    stream.await.unwrap();
                }
                while !buffer.lock().unwrap().is_empty() {
                    tokio::task::yield_now().await;
                }
                assert_eq!(writes.load(Ordering::Relaxed), step);
            }
        };
        tokio::spawn(step).await.unwrap();
    }
}
