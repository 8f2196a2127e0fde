//! A whole server under TLS, by clients that this project did not write: curl, and rustls under tonic.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_grpc::proto::inference_client::InferenceClient;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};
use tonic::transport::{Channel, Endpoint};

use crate::certs::{Authority, Folder};
use crate::process::{Server, completion};
use crate::tenants::generate;

struct World {
    folder: Folder,
    authority: Authority,
    client: (String, String),
    server: Server,
}

impl World {
    /// A server that asks clients for a certificate, if `mutual`; `more`: its other arguments.
    fn new(name: &str, mutual: bool, more: &[&str]) -> Self {
        let (folder, authority, clients) =
            (Folder::new(name), Authority::new("servers"), Authority::new("clients"));
        folder.write_pair(&authority.sign("server"));
        folder.write("ca.pem", &authority.pem);
        let client = clients.sign("client");
        folder.write("client.pem", &client.0);
        folder.write("client-key.pem", &client.1);
        folder.write("clients.pem", &clients.pem);
        let path = |name: &str| folder.path(name).to_str().unwrap().to_owned();
        let (cert, key, client_ca) = (path("cert.pem"), path("key.pem"), path("clients.pem"));
        let mut args = vec!["--tls-cert", &cert, "--tls-key", &key];
        if mutual {
            args.extend(["--tls-client-ca", &client_ca]);
        }
        args.extend(more);
        let server = Server::start(&args);
        assert!(server.announced.contains("http     https://127.0.0.1:"), "{}", server.announced);
        Self { folder, authority, client, server }
    }

    /// curl on a path, with the server's authority; `None` where there is no curl.
    fn curl(&self, args: &[&str], path: &str) -> Option<Command> {
        let is_there = Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_ok();
        if !is_there {
            println!("skipped: there is no curl");
            return None;
        }
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", "--cacert"]).arg(self.folder.path("ca.pem")).args(args);
        curl.arg(format!("https://{}{path}", self.server.http()));
        curl.stdout(Stdio::piped()).stderr(Stdio::piped());
        Some(curl)
    }

    fn config(&self, shows: bool) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.pem.as_bytes()).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = if shows {
            let chain = vec![CertificateDer::from_pem_slice(self.client.0.as_bytes()).unwrap()];
            let key = PrivateKeyDer::from_pem_slice(self.client.1.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }

    /// A gRPC client over TLS, with a certificate or without.
    async fn grpc(&self, shows: bool) -> Result<InferenceClient<Channel>, tonic::transport::Error> {
        let connector = TlsConnector::from(Arc::new(self.config(shows)));
        let connect = tower::service_fn(move |uri: http::Uri| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(uri.authority().unwrap().as_str()).await?;
                let name = ServerName::try_from("localhost").unwrap();
                let stream: TlsStream<TcpStream> = connector.connect(name, stream).await?;
                std::io::Result::Ok(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_shared(self.server.grpc_url()).unwrap();
        Ok(InferenceClient::new(endpoint.connect_with_connector(connect).await?))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_and_grpc_answer_alike_and_silence_keeps_nobody_waiting() {
    let world = World::new("tls", false, &[]);
    let grpc = world.server.grpc_url();
    let grpc = grpc.trim_start_matches("http://");
    let silent: Vec<_> = (0..64)
        .map(|at| std::net::TcpStream::connect(if at % 2 == 0 { world.server.http() } else { grpc }).unwrap())
        .collect();
    let began = Instant::now();
    let mut client = world.grpc(false).await.unwrap();
    let answer = client.generate(generate(5)).await.unwrap().into_inner();
    assert_eq!(answer.usage.unwrap().completion_tokens, 5);
    let body = completion(8).to_string();
    let mut texts = Vec::new();
    for (version, name) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let args = [version, "-w", "\n%{http_version}", "-H", "content-type: application/json", "-d", &body];
        let Some(mut curl) = world.curl(&args, "/v1/completions") else { return };
        let output = curl.output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let (answer, spoken) = said.rsplit_once('\n').unwrap();
        assert_eq!(spoken, name, "{said} {}", String::from_utf8_lossy(&output.stderr));
        let answer: serde_json::Value = serde_json::from_str(answer).unwrap();
        texts.push(answer["choices"][0]["text"].clone());
    }
    assert!(texts[0].is_string() && texts[0] == texts[1], "{texts:?}");
    assert!(began.elapsed() < Duration::from_secs(9), "handshakes of the silent were waited for");
    drop(silent);

    // Who does not speak TLS gets no answer in the clear.
    let mut plain = world.server.open("GET", "/health", &serde_json::Value::Null);
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP/"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_certificate_stays_outside() {
    let world = World::new("mutual", true, &[]);
    let mut known = world.grpc(true).await.unwrap();
    known.generate(generate(2)).await.unwrap();
    let unknown = match world.grpc(false).await {
        Ok(mut client) => client.generate(generate(2)).await.map(drop).map_err(|status| status.to_string()),
        Err(error) => Err(error.to_string()),
    };
    assert!(unknown.is_err());
    let (cert, key) = (world.folder.path("client.pem"), world.folder.path("client-key.pem"));
    let shows = ["--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()];
    let Some(mut curl) = world.curl(&shows, "/health") else { return };
    assert!(curl.output().unwrap().status.success());
    assert!(!world.curl(&[], "/health").unwrap().output().unwrap().status.success());
}

/// A stream of six seconds at least: a token takes 10 ms.
const NUM_TOKENS: u32 = 600;
const STREAM: Duration = Duration::from_secs(6);

/// The drain is that of a server without TLS: what streams is finished, and the process ends with 0. Before it, the
/// certificate is renewed while the stream runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_outlive_a_renewal_and_a_drain() {
    let world = World::new("drain", false, &["--executor", "mock", "--mock-step-time", "10ms"]);
    let mut client = world.grpc(false).await.unwrap();
    let began = Instant::now();
    let mut stream = client.generate_stream(generate(NUM_TOKENS)).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    let renewed = world.authority.sign("renewed");
    world.folder.write_pair(&renewed);
    let expected = CertificateDer::from_pem_slice(renewed.0.as_bytes()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let socket = TcpStream::connect(world.server.http()).await.unwrap();
        let connector = TlsConnector::from(Arc::new(world.config(false)));
        let mut socket = connector.connect(ServerName::try_from("localhost").unwrap(), socket).await.unwrap();
        if socket.get_ref().1.peer_certificates().unwrap()[0] == expected {
            assert!(began.elapsed() < STREAM, "the stream must still run when the drain begins");
            world.server.signal("TERM");
            // What is open and silent does not hold up the end.
            let mut rest = Vec::new();
            let closed = tokio::time::timeout(Duration::from_secs(30), socket.read_to_end(&mut rest)).await;
            assert!(closed.is_ok());
            break;
        }
        assert!(Instant::now() < deadline, "the renewed certificate is not shown");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut num_tokens = first.choice.unwrap().token_ids.len();
    while let Some(chunk) = stream.message().await.unwrap() {
        num_tokens += chunk.choice.unwrap().token_ids.len();
    }
    assert_eq!(num_tokens, NUM_TOKENS as usize, "the running stream finished");
    drop((client, stream));
    assert_eq!(world.server.wait(), 0);
}

#[test]
fn a_wrong_file_keeps_the_server_from_starting() {
    let (folder, authority) = (Folder::new("wrong"), Authority::new("servers"));
    let (cert, key) = folder.write_pair(&authority.sign("server"));
    let text = folder.write("text.pem", "hello");
    let [cert, key, text] = [cert, key, text].map(|path| path.to_str().unwrap().to_owned());
    for (args, part) in [
        (vec!["--tls-cert", &*cert], "--tls-cert: needs --tls-key"),
        (vec!["--tls-client-ca", &cert], "--tls-client-ca: needs --tls-cert and --tls-key"),
        (vec!["--tls-cert", &text, "--tls-key", &key], "text.pem: no certificate in it"),
        (vec!["--tls-cert", &cert, "--tls-key", &text], "text.pem: no private key"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_quire"))
            .args(["serve", "--port", "0", "--grpc-port", "0"])
            .args(args)
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains(part), "{message}");
    }
}
