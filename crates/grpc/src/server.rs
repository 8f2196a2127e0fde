//! Serving: listener, limits, credentials, health and reflection.

use std::future::Future;

use quire_llm::{Lifecycle, ServerState};
use quire_tenancy::{AuditLog, Tenancy, Trail, bearer};
use quire_tls::Tls;
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::audit::AuditLayer;
use crate::collected::Collected;
use crate::incoming::encrypted;
use crate::proto::inference_server::InferenceServer;
use crate::service::InferenceService;
use crate::{observe, proto, status};

/// The name under which health is reported, besides the empty one.
pub(crate) const SERVICE: &str = "quire.v1.Inference";

/// What the server needs.
#[derive(Clone)]
pub struct ServerConfig {
    /// The model and the state of the process.
    pub lifecycle: Lifecycle,
    /// Who may call, and how much they may have; shared with the other front end.
    pub tenancy: Tenancy,
    /// Where calls are recorded.
    pub audit: AuditLog,
    /// What encrypts connections; they are not without.
    pub tls: Option<Tls>,
    /// Largest accepted message in bytes.
    pub max_message_bytes: usize,
    /// Calls at once on one connection.
    pub max_concurrent_streams: u32,
    /// Reported by `GetModelInfo`.
    pub version: &'static str,
}

/// Serves until `shutdown` resolves, then finishes the calls in flight.
///
/// # Errors
/// The transport failed.
pub async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    observe::create_series();
    let auth = Auth { tenancy: config.tenancy.clone() };
    let (reporter, health) = tonic_health::server::health_reporter();
    let watcher = tokio::spawn(report_health(reporter, config.lifecycle.clone()));
    let service = InferenceService::new(config.lifecycle, config.tenancy, config.version);
    let inference = InferenceServer::new(service)
        .max_decoding_message_size(config.max_message_bytes)
        .max_encoding_message_size(usize::MAX);
    // Some clients still ask with the older protocol, so both are answered.
    let reflection = reflection_builder().build_v1().expect("the descriptors come from our own build");
    let reflection_alpha =
        reflection_builder().build_v1alpha().expect("the descriptors come from our own build");
    let router = Server::builder()
        .max_concurrent_streams(config.max_concurrent_streams)
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(30)))
        .layer(AuditLayer::new(config.audit))
        .add_service(health)
        .add_service(InterceptedService::new(inference, auth.clone()))
        .add_service(InterceptedService::new(reflection, auth.clone()))
        .add_service(InterceptedService::new(reflection_alpha, auth));
    let result = match config.tls {
        Some(tls) => {
            let connections = encrypted(listener, tls).map(|stream| stream.map(Collected::new));
            router.serve_with_incoming_shutdown(connections, shutdown).await
        }
        None => {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let connections = incoming.map(|stream| stream.map(Collected::new));
            router.serve_with_incoming_shutdown(connections, shutdown).await
        }
    };
    watcher.abort();
    result
}

fn reflection_builder() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// Keeps `grpc.health.v1` in step with the state of the process.
async fn report_health(reporter: HealthReporter, lifecycle: Lifecycle) {
    let mut states = lifecycle.subscribe();
    loop {
        let status = match *states.borrow_and_update() {
            ServerState::Ready => ServingStatus::Serving,
            ServerState::Loading | ServerState::Draining | ServerState::Dead => ServingStatus::NotServing,
        };
        reporter.set_service_status("", status).await;
        reporter.set_service_status(SERVICE, status).await;
        if states.changed().await.is_err() {
            return;
        }
    }
}

/// Checks the credential and notes who asks.
#[derive(Clone)]
struct Auth {
    tenancy: Tenancy,
}

impl Interceptor for Auth {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let mut values = request.metadata().get_all("authorization").iter();
        let header = values.next();
        // Which of two would a proxy in front of us have checked?
        let header = if values.next().is_some() { None } else { header };
        let token = header.and_then(|value| value.to_str().ok()).and_then(bearer);
        let peer = request.remote_addr().map(|peer| peer.ip());
        let access =
            self.tenancy.authenticate(token, peer).map_err(|error| status::unauthenticated(&error))?;
        let trail = request.extensions().get::<Trail>().cloned().unwrap_or_default();
        trail.by(&access);
        request.extensions_mut().insert(access.with_trail(trail));
        Ok(request)
    }
}
