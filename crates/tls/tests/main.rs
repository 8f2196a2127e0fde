//! Handshakes with a rustls client, over loopback.
#![allow(clippy::unwrap_used)]

#[path = "support/certs.rs"]
mod certs;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use certs::{Authority, Folder};
use quire_tls::{Alpn, Tls, TlsError, TlsFiles};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

fn files(folder: &Folder, authority: &Authority) -> TlsFiles {
    let (cert, key) = folder.write_pair(&authority.sign("server"));
    TlsFiles { cert, key, client_ca: None }
}

/// Echoes what each client says.
async fn listen(tls: Tls, alpn: Alpn) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = tls.accept(stream, alpn).await else { return };
                let mut word = [0; 4];
                while stream.read_exact(&mut word).await.is_ok() && stream.write_all(&word).await.is_ok() {
                    let _ = stream.flush().await;
                }
            });
        }
    });
    address
}

struct Client<'a> {
    trusts: &'a str,
    shows: Option<&'a (String, String)>,
    alpn: &'a [&'a [u8]],
    versions: &'a [&'static SupportedProtocolVersion],
}

impl<'a> Client<'a> {
    fn of(authority: &'a Authority) -> Self {
        Self { trusts: &authority.pem, shows: None, alpn: &[b"h2"], versions: rustls::ALL_VERSIONS }
    }

    async fn connect(&self, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.trusts.as_bytes()).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let builder = builder.with_protocol_versions(self.versions).unwrap().with_root_certificates(roots);
        let mut config = match self.shows {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
                builder
                    .with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap())
                    .unwrap()
            }
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.to_vec()).collect();
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    /// Whether the server lets it in. In TLS 1.3 a client hears of a refusal only when it reads.
    async fn is_served(&self, address: SocketAddr) -> bool {
        match self.connect(address).await {
            Ok(mut stream) => echoes(&mut stream).await,
            Err(_) => false,
        }
    }
}

async fn echoes(stream: &mut TlsStream<TcpStream>) -> bool {
    let mut word = [0; 4];
    stream.write_all(b"ping").await.is_ok() && stream.read_exact(&mut word).await.is_ok() && &word == b"ping"
}

#[tokio::test]
async fn both_versions_and_the_best_protocol_that_the_client_knows() {
    let (folder, authority) = (Folder::new("alpn"), Authority::new("ca"));
    let tls = Tls::open(files(&folder, &authority)).unwrap();
    let http = listen(tls.clone(), Alpn::Http).await;
    let grpc = listen(tls, Alpn::Grpc).await;
    for version in rustls::ALL_VERSIONS {
        for (address, alpn, chosen) in [
            (http, &[&b"http/1.1"[..], b"h2"][..], Some(&b"h2"[..])),
            (http, &[b"http/1.1"], Some(b"http/1.1")),
            (http, &[], None),
            (grpc, &[b"h2"], Some(b"h2")),
        ] {
            let client = Client { alpn, versions: &[*version], ..Client::of(&authority) };
            let mut stream = client.connect(address).await.unwrap();
            assert_eq!(stream.get_ref().1.protocol_version(), Some(version.version));
            assert_eq!(stream.get_ref().1.alpn_protocol(), chosen);
            assert!(echoes(&mut stream).await);
        }
    }
    let old = Client { alpn: &[b"http/1.1"], ..Client::of(&authority) };
    assert!(!old.is_served(grpc).await, "gRPC is HTTP/2");
    let stranger = Authority::new("stranger");
    assert!(!Client::of(&stranger).is_served(http).await, "a client that trusts somebody else goes away");
}

#[tokio::test]
async fn clients_show_a_certificate_of_the_right_authority_if_they_must() {
    let (folder, authority, clients) =
        (Folder::new("mutual"), Authority::new("ca"), Authority::new("clients"));
    let client_ca = Some(folder.write("clients.pem", &clients.pem));
    let tls = Tls::open(TlsFiles { client_ca, ..files(&folder, &authority) }).unwrap();
    let address = listen(tls, Alpn::Http).await;
    let (known, unknown) = (clients.sign("known"), authority.sign("unknown"));
    for (shows, is_served) in [(None, false), (Some(&unknown), false), (Some(&known), true)] {
        let client = Client { shows, ..Client::of(&authority) };
        assert_eq!(client.is_served(address).await, is_served);
    }
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_the_reason() {
    let (folder, authority) = (Folder::new("bad"), Authority::new("ca"));
    let good = files(&folder, &authority);
    let other_key = folder.write("other-key.pem", &authority.sign("other").1);
    let text = folder.write("text.pem", "hello");
    let cut = folder.write("cut.pem", "-----BEGIN CERTIFICATE-----\nMIIB\n");
    let garbage =
        folder.write("garbage.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let locked =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n".to_owned();
    let locked = folder.write("locked.pem", &locked);
    let (missing, cert, key) = (folder.path("missing.pem"), good.cert.clone(), good.key.clone());
    let with = |cert: &std::path::Path, key: &std::path::Path, client_ca: Option<&std::path::Path>| {
        let client_ca = client_ca.map(std::path::Path::to_owned);
        let files = TlsFiles { cert: cert.to_owned(), key: key.to_owned(), client_ca };
        Tls::open(files).unwrap_err()
    };
    for (error, part) in [
        (with(&missing, &key, None), "missing.pem: No such file"),
        (with(&text, &key, None), "text.pem: no certificate in it"),
        (with(&key, &key, None), "key.pem: no certificate in it"),
        (with(&cut, &key, None), "cut.pem: not valid PEM"),
        (with(&garbage, &key, None), "garbage.pem with "),
        (with(&cert, &cert, None), "cert.pem: no private key without a passphrase in it"),
        (with(&cert, &locked, None), "locked.pem: no private key without a passphrase in it"),
        (with(&cert, &other_key, None), "other-key.pem: "),
        (with(&cert, &key, Some(&missing)), "missing.pem: No such file"),
        (with(&cert, &key, Some(&text)), "text.pem: no certificate in it"),
        (with(&cert, &key, Some(&garbage)), "garbage.pem: "),
    ] {
        assert!(error.to_string().contains(part), "{part:?} is not in: {error}");
    }
    assert!(matches!(with(&cert, &other_key, None), TlsError::Pair { .. }));
    Tls::open(good).unwrap();
}

/// The certificate that a new client is shown.
async fn shown(authority: &Authority, address: SocketAddr) -> Vec<u8> {
    let stream = Client::of(authority).connect(address).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test]
async fn changed_files_are_taken_and_broken_ones_are_not() {
    let (folder, authority) = (Folder::new("watch"), Authority::new("ca"));
    let tls = Tls::open(files(&folder, &authority)).unwrap();
    let address = listen(tls.clone(), Alpn::Http).await;
    tokio::spawn(tls.watch(Duration::from_millis(20)));
    let before = shown(&authority, address).await;
    let mut open = Client::of(&authority).connect(address).await.unwrap();

    // Half of a change: the key is still the other one's.
    let renewed = authority.sign("renewed");
    folder.write("cert.pem", &renewed.0);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(shown(&authority, address).await, before);
    folder.write("key.pem", &renewed.1);
    let deadline = Instant::now() + Duration::from_secs(10);
    while shown(&authority, address).await == before {
        assert!(Instant::now() < deadline, "the new certificate was not taken");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let after = shown(&authority, address).await;
    assert_eq!(after, CertificateDer::from_pem_slice(renewed.0.as_bytes()).unwrap().to_vec());
    assert!(echoes(&mut open).await, "a connection goes on with what it began with");

    std::fs::remove_file(folder.path("key.pem")).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(shown(&authority, address).await, after);
}

#[tokio::test]
async fn whoever_does_not_shake_hands_keeps_nobody_waiting() {
    let (folder, authority) = (Folder::new("silent"), Authority::new("ca"));
    let tls = Tls::open(files(&folder, &authority)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    tokio::time::pause();
    let began = tokio::time::Instant::now();
    let error = tls.accept(stream, Alpn::Http).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    assert!(began.elapsed() < Duration::from_secs(11));
    drop(client);
    // Somebody who speaks something else is told at once.
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    assert_eq!(tls.accept(stream, Alpn::Http).await.unwrap_err().kind(), std::io::ErrorKind::InvalidData);
}
