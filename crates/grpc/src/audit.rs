//! Calls in the audit log: a trail from before the credential is looked at until the call's last answer.

use std::pin::Pin;
use std::task::{Context, Poll};

use quire_tenancy::{Answer, AuditLog};
use tonic::Code;
use tonic::transport::server::TcpConnectInfo;
use tower::{Layer, Service};

use crate::observe::{RPCS, code_name};
use crate::server::SERVICE;
use crate::service::is_harmless;

/// Health is asked all the time, by anybody.
const HEALTH: &str = "/grpc.health.";

/// Puts a [`quire_tenancy::Trail`] into the extensions of every call but health, and notes the status.
#[derive(Clone)]
pub(crate) struct AuditLayer {
    log: AuditLog,
}

impl AuditLayer {
    pub(crate) fn new(log: AuditLog) -> Self {
        Self { log }
    }
}

impl<S> Layer<S> for AuditLayer {
    type Service = Audited<S>;

    fn layer(&self, inner: S) -> Audited<S> {
        Audited { log: self.log.clone(), inner }
    }
}

/// A service with the layer around it.
#[derive(Clone)]
pub(crate) struct Audited<S> {
    log: AuditLog,
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for Audited<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        // The one that is ready is called, the other one takes its place.
        let other = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, other);
        if !self.log.is_on() || request.uri().path().starts_with(HEALTH) {
            return Box::pin(inner.call(request));
        }
        let log = self.log.clone();
        Box::pin(async move {
            let peer = request.extensions().get::<TcpConnectInfo>();
            let peer = peer.and_then(TcpConnectInfo::remote_addr).map(|peer| peer.ip());
            let route = route(request.uri().path());
            let trail = log.begin("grpc", || route.to_owned(), peer).await;
            let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok());
            id.filter(|id| is_harmless(id)).iter().for_each(|id| trail.named(id));
            request.extensions_mut().insert(trail.clone());
            let response = inner.call(request).await?;
            // A call that fails at once has its status here; what fails later tells it by how its answer ends.
            let status = response.headers().get("grpc-status");
            let code = status.map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()));
            trail.answered(Answer::Grpc(code_name(code)), None);
            Ok(response)
        })
    }
}

/// The call's name, if it is one of ours: a path is a client's words.
fn route(path: &str) -> &'static str {
    let name = path.strip_prefix('/').and_then(|path| path.strip_prefix(SERVICE)?.strip_prefix('/'));
    RPCS.into_iter().find(|&known| name == Some(known)).unwrap_or("other")
}
