//! TLS for both front ends: certificate and key from PEM files, taken anew when they change, client certificates if
//! wanted, handshakes that end. No cipher, no version and no curve is ours to choose: rustls and ring decide.
//!
//! Reading order: [`Tls`] here (a handshake), `files` (what a listener is made of), `watch` (changes), `stream`.

#![forbid(unsafe_code)]

mod files;
mod stream;
mod watch;

use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

pub use files::{TlsError, TlsFiles};
pub use stream::Stream;

/// A client that has not finished its handshake by then is cut off, as is one whose first request does not come.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a listener offers by ALPN (RFC 7301), best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// `h2` and `http/1.1`.
    Http,
    /// `h2` alone, as gRPC asks for.
    Grpc,
}

impl Alpn {
    fn protocols(self) -> Vec<Vec<u8>> {
        match self {
            Self::Http => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            Self::Grpc => vec![b"h2".to_vec()],
        }
    }
}

/// The two configurations of one set of files.
#[derive(Debug)]
struct Configs {
    http: Arc<ServerConfig>,
    grpc: Arc<ServerConfig>,
}

/// Certificate, key and rules, shared by all listeners; a clone is the same one.
#[derive(Clone, Debug)]
pub struct Tls {
    files: TlsFiles,
    configs: Arc<RwLock<Configs>>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// One of them cannot be used; the message names it.
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let configs = files.read()?.configs()?;
        Ok(Self { files, configs: Arc::new(RwLock::new(configs)) })
    }

    /// The same with encryption for those who come; connections keep what they began with.
    fn replace(&self, configs: Configs) {
        *self.configs.write().unwrap_or_else(PoisonError::into_inner) = configs;
    }

    fn config(&self, alpn: Alpn) -> Arc<ServerConfig> {
        let configs = self.configs.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(match alpn {
            Alpn::Http => &configs.http,
            Alpn::Grpc => &configs.grpc,
        })
    }

    /// Whether clients must show a certificate.
    pub fn asks_for_certificates(&self) -> bool {
        self.files.client_ca.is_some()
    }

    /// The server's side of a handshake.
    ///
    /// # Errors
    /// The client does not speak TLS, has no certificate that will do, went away, or took ten seconds.
    pub async fn accept(&self, stream: TcpStream, alpn: Alpn) -> io::Result<Stream> {
        let handshake = TlsAcceptor::from(self.config(alpn)).accept(stream);
        let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
        let stream =
            stream.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long"))?;
        Ok(Stream::Tls(Box::new(stream?)))
    }
}
