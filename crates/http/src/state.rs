//! What all handlers share.

use std::sync::Arc;
use std::time::Duration;

use quire_llm::{Lifecycle, Llm};
use quire_tenancy::{AuditLog, Tenancy};
use quire_tls::Tls;

use crate::error::ApiError;

/// Renders the metrics page (Prometheus text format).
pub type MetricsPage = Arc<dyn Fn() -> String + Send + Sync>;

/// What the front end is told at start.
#[derive(Clone)]
pub struct HttpConfig {
    /// The model, and where the process is in its life; shared with the other front end and the shell.
    pub lifecycle: Lifecycle,
    /// Who may come in, and how much they may have; shared with the other front end.
    pub tenancy: Tenancy,
    /// The page under `/metrics`.
    pub metrics: MetricsPage,
    /// Whether `/metrics` needs no key. It shows every tenant; a key of a tenants file needs the scope `metrics`.
    pub metrics_without_key: bool,
    /// The version under `/version`, and in `system_fingerprint`.
    pub version: String,
    /// Where every request that needs a key is recorded; none unless set.
    pub audit: AuditLog,
    /// What encrypts connections; they are not unless set.
    pub tls: Option<Tls>,
    /// Bytes of a body at most.
    pub max_body_bytes: usize,
    /// A stream that is silent for this long gets a comment, so that no proxy takes it for dead.
    pub keep_alive: Duration,
}

impl HttpConfig {
    /// The defaults: 8 MiB bodies, a comment every 10 s.
    pub fn new(tenancy: impl Into<Tenancy>, metrics: MetricsPage, version: impl Into<String>) -> Self {
        Self {
            lifecycle: Lifecycle::default(),
            tenancy: tenancy.into(),
            metrics,
            metrics_without_key: false,
            version: version.into(),
            audit: AuditLog::default(),
            tls: None,
            max_body_bytes: 8 << 20,
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// Shared by all handlers; cheap to clone.
#[derive(Clone)]
pub struct AppState {
    inner: Arc<Inner>,
}

struct Inner {
    config: HttpConfig,
    fingerprint: String,
}

impl AppState {
    /// A state in whatever part of its life `config.lifecycle` is: health answers at once.
    pub fn new(config: HttpConfig) -> Self {
        let fingerprint = format!("quire-{}", config.version);
        Self { inner: Arc::new(Inner { config, fingerprint }) }
    }

    /// Where the process is in its life, and the model once it is loaded.
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.inner.config.lifecycle
    }

    /// The model, if it takes requests.
    pub(crate) fn llm(&self) -> Result<&Llm, ApiError> {
        Ok(self.lifecycle().llm()?)
    }

    pub(crate) fn tenancy(&self) -> &Tenancy {
        &self.inner.config.tenancy
    }

    pub(crate) fn config(&self) -> &HttpConfig {
        &self.inner.config
    }

    /// What answers report as the system that made them.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }
}
