//! The admin API, on a listener of its own: tenants, running requests, drain. Its token opens nothing else, and no key of
//! the public port opens this.
//!
//! Reading order: this file (who may come in, and where to), `tenants`, `process`, `body`.

mod body;
mod process;
mod tenants;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use http::HeaderMap;
use quire_llm::Lifecycle;
use quire_tenancy::{AuditLog, AuthError, KeyDigest, Tenancy, TenantsEditor};
use quire_tls::Tls;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::auth::{Peer, answered, begin, token};
use crate::error::ApiError;
use crate::observe::observe;
use crate::router::{not_found, wrong_method};
use crate::server::{PATIENCE, accept};

/// What decides which log lines are written.
pub trait LogFilter: Send + Sync {
    /// A level, or levels by target: `info,quire_http=debug`.
    fn level(&self) -> String;

    /// Another one, from now on.
    ///
    /// # Errors
    /// It is none; the message says why.
    fn set_level(&self, level: &str) -> Result<(), String>;
}

/// What the admin API is told at start.
pub struct AdminConfig {
    /// Of the token that every call needs.
    pub token: KeyDigest,
    /// The model, and where the process is in its life.
    pub lifecycle: Lifecycle,
    /// Whose tenants.
    pub tenancy: Tenancy,
    /// Their file, if there is one.
    pub tenants: Option<TenantsEditor>,
    /// Where every call is recorded.
    pub audit: AuditLog,
    /// The process's log.
    pub log_filter: Arc<dyn LogFilter>,
    /// What encrypts connections; they are not without.
    pub tls: Option<Tls>,
    /// What `GET /admin/v1/config` shows; secrets are masked already.
    pub settings: Value,
    /// Of the program.
    pub version: String,
}

/// Shared by all handlers.
#[derive(Clone)]
struct Admin {
    inner: Arc<Inner>,
}

struct Inner {
    config: AdminConfig,
    started: Instant,
}

impl std::ops::Deref for Admin {
    type Target = AdminConfig;

    fn deref(&self) -> &AdminConfig {
        &self.inner.config
    }
}

/// Serves until `shutdown` resolves, then lets open connections finish their answers and returns.
pub async fn serve(listener: TcpListener, config: AdminConfig, shutdown: impl Future<Output = ()>) {
    let tls = config.tls.clone();
    accept(listener, tls, router(config), PATIENCE, shutdown).await;
}

/// Every route, each behind the token.
pub fn router(config: AdminConfig) -> Router {
    let admin = Admin { inner: Arc::new(Inner { config, started: Instant::now() }) };
    let tenant = get(tenants::show).put(tenants::put).patch(tenants::patch).delete(tenants::remove);
    let door = from_fn_with_state(admin.clone(), authenticate);
    Router::new()
        .route("/admin/v1/tenants", get(tenants::list))
        .route("/admin/v1/tenants/{id}", tenant)
        .route("/admin/v1/tenants/{id}/keys", post(tenants::add_key))
        .route("/admin/v1/tenants/{id}/keys/{key}", delete(tenants::remove_key))
        .route("/admin/v1/tenants/{id}/usage", get(tenants::usage))
        .route("/admin/v1/requests", get(process::requests))
        .route("/admin/v1/requests/{id}", delete(process::abort))
        .route("/admin/v1/drain", post(process::drain))
        .route("/admin/v1/undrain", post(process::undrain))
        .route("/admin/v1/cache/reset", post(process::reset_cache))
        .route("/admin/v1/log-level", get(process::log_level).post(process::set_log_level))
        .route("/admin/v1/config", get(process::config))
        .route("/admin/v1/state", get(process::state))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(door)
        .layer(from_fn(observe))
        .with_state(admin)
}

/// Lets a request with the token through, with its trail as an extension, or answers 401.
async fn authenticate(State(admin): State<Admin>, mut request: Request, next: Next) -> Response {
    let peer: Option<IpAddr> = request.extensions().get::<Peer>().map(|peer| peer.0);
    let trail = begin(&admin.audit, "admin", &request, peer).await;
    let response = match check(&admin, request.headers()) {
        Ok(()) => {
            request.extensions_mut().insert(trail.clone());
            next.run(request).await
        }
        Err(error) => ApiError::from(error).into_response(),
    };
    answered(&trail, &response);
    response
}

fn check(admin: &Admin, headers: &HeaderMap) -> Result<(), AuthError> {
    let token = token(headers)?.ok_or(AuthError::Missing)?;
    if KeyDigest::of(token).equals(&admin.token) { Ok(()) } else { Err(AuthError::Invalid) }
}
