//! What all handlers share: the model once it is loaded, and where the process is in its life.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use quire_llm::{Llm, RequestError};
use quire_tenancy::Keys;

use crate::error::ApiError;

/// Renders the metrics page (Prometheus text format).
pub type MetricsPage = Arc<dyn Fn() -> String + Send + Sync>;

/// What the front end is told at start.
#[derive(Clone)]
pub struct HttpConfig {
    /// Who may come in.
    pub keys: Keys,
    /// The page under `/metrics`.
    pub metrics: MetricsPage,
    /// Whether `/metrics` needs no key.
    pub metrics_without_key: bool,
    /// The version under `/version`, and in `system_fingerprint`.
    pub version: String,
    /// Bytes of a body at most.
    pub max_body_bytes: usize,
    /// A stream that is silent for this long gets a comment, so that no proxy takes it for dead.
    pub keep_alive: Duration,
}

impl HttpConfig {
    /// The defaults: 8 MiB bodies, a comment every 10 s.
    pub fn new(keys: Keys, metrics: MetricsPage, version: impl Into<String>) -> Self {
        Self {
            keys,
            metrics,
            metrics_without_key: false,
            version: version.into(),
            max_body_bytes: 8 << 20,
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// Where the process is in its life. It only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Lifecycle {
    /// The model is not there yet.
    Loading = 0,
    /// Takes requests.
    Ready = 1,
    /// Finishes what it has, takes nothing new.
    Draining = 2,
    /// The engine failed.
    Dead = 3,
}

impl Lifecycle {
    /// In words, for health pages and errors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Dead => "dead",
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
    llm: OnceLock<Llm>,
    lifecycle: AtomicU8,
}

impl AppState {
    /// A state without a model: health answers, inference does not.
    pub fn new(config: HttpConfig) -> Self {
        let fingerprint = format!("quire-{}", config.version);
        let lifecycle = AtomicU8::new(Lifecycle::Loading as u8);
        Self { inner: Arc::new(Inner { config, fingerprint, llm: OnceLock::new(), lifecycle }) }
    }

    /// The model is there: inference begins. Only the first call counts.
    pub fn set_ready(&self, llm: Llm) {
        if self.inner.llm.set(llm).is_ok() {
            self.advance(Lifecycle::Ready);
        }
    }

    /// Takes no new requests from now on.
    pub fn set_draining(&self) {
        self.advance(Lifecycle::Draining);
    }

    /// The engine failed.
    pub fn set_dead(&self) {
        self.advance(Lifecycle::Dead);
    }

    fn advance(&self, to: Lifecycle) {
        self.inner.lifecycle.fetch_max(to as u8, Ordering::AcqRel);
    }

    /// Where the process is in its life, as the shell said it or as the engine shows it.
    pub fn lifecycle(&self) -> Lifecycle {
        let told = match self.inner.lifecycle.load(Ordering::Acquire) {
            0 => Lifecycle::Loading,
            1 => Lifecycle::Ready,
            2 => Lifecycle::Draining,
            _ => Lifecycle::Dead,
        };
        let shown = match self.inner.llm.get().and_then(Llm::unavailable) {
            None => Lifecycle::Loading,
            Some("draining") => Lifecycle::Draining,
            Some(_) => Lifecycle::Dead,
        };
        told.max(shown)
    }

    /// The model, if it takes requests.
    pub(crate) fn llm(&self) -> Result<&Llm, ApiError> {
        let state = self.lifecycle();
        match (state, self.inner.llm.get()) {
            (Lifecycle::Ready, Some(llm)) => Ok(llm),
            _ => Err(RequestError::Unavailable { state: state.name() }.into()),
        }
    }

    pub(crate) fn config(&self) -> &HttpConfig {
        &self.inner.config
    }

    /// What answers report as the system that made them.
    pub(crate) fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }
}
