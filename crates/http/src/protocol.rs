//! Which protocol a connection speaks, told from its first bytes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use quire_tls::Stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// What an HTTP/2 client says first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Most requests are smaller, and so are read at once.
const START_BYTES: usize = 2 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// Waits until the two can be told apart. What was read for that will be read again.
pub(crate) async fn recognize(mut stream: Stream) -> io::Result<(Protocol, Rewound)> {
    let mut start = BytesMut::with_capacity(START_BYTES);
    loop {
        let count = stream.read_buf(&mut start).await?;
        let same = start.iter().zip(PREFACE).take_while(|(byte, expected)| byte == expected).count();
        let protocol = match same {
            _ if same == PREFACE.len() => Protocol::Http2,
            // All that there is agrees, so more may decide; unless no more comes.
            _ if same == start.len() && count > 0 => continue,
            _ => Protocol::Http1,
        };
        return Ok((protocol, Rewound { start, stream }));
    }
}

/// A connection from its beginning on, of which something was read already.
pub(crate) struct Rewound {
    start: BytesMut,
    stream: Stream,
}

impl AsyncRead for Rewound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.start.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let count = self.start.len().min(buf.remaining());
        buf.put_slice(&self.start[..count]);
        self.start.advance(count);
        if self.start.is_empty() {
            // Its memory, too: a connection may last.
            self.start = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
