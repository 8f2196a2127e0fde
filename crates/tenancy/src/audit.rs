//! The audit log: who asked for what, what it cost and how it ended; never what was said.
//!
//! One JSON line for each request and each change by an administrator. What becomes known of a request is noted on its
//! [`Trail`]; with the last clone of that, the record goes into a bounded queue to one thread, which writes. Where records
//! must not be lost, a request takes its place in the queue before anything else, so a full queue holds up new requests,
//! without keeping a thread, and the end of a request never waits.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use quire_core::FinishReason;
use quire_core::calendar::rfc3339;
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};

use crate::audit_writer::{Message, Writer};
use crate::credential::hex;
use crate::metrics::count_audit;
use crate::tenant::Access;

/// Records that wait to be written, or, where none may be lost, are to be written for requests that run.
const MAX_QUEUED: usize = 16_384;
/// How long [`AuditLog::flush`] and [`AuditLog::reopen`] wait for the writer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What happens when the queue is full, or the file cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// New requests wait.
    Block,
    /// Records are lost and counted.
    Drop,
}

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuditTarget {
    /// Standard output.
    Stdout,
    /// Appended to a file.
    File(PathBuf),
}

/// The way to the log; cheap to clone. The default keeps no log.
#[derive(Clone, Default)]
pub struct AuditLog {
    inner: Option<Arc<Log>>,
}

struct Log {
    queue: mpsc::Sender<Message>,
    on_full: OnFull,
}

/// How a request was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// An HTTP status.
    Http(u16),
    /// The name of a gRPC status code.
    Grpc(&'static str),
}

/// One line.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Record {
    time: String,
    request_id: String,
    tenant: Option<Arc<str>>,
    key: Option<String>,
    ip: Option<IpAddr>,
    protocol: &'static str,
    route: String,
    model: Option<String>,
    params_sha256: Option<String>,
    prompt_tokens: Option<u64>,
    cached_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    finish_reason: Option<&'static str>,
    status: Option<Answer>,
    error: Option<&'static str>,
    duration_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    change: Option<Value>,
}

impl AuditLog {
    /// Opens the log and starts the thread that writes it.
    ///
    /// # Errors
    /// The file cannot be opened, or the system gives no thread.
    pub fn open(target: AuditTarget, on_full: OnFull) -> std::io::Result<Self> {
        Self::with_capacity(target, on_full, MAX_QUEUED)
    }

    fn with_capacity(target: AuditTarget, on_full: OnFull, capacity: usize) -> std::io::Result<Self> {
        let (queue, inbox) = mpsc::channel(capacity);
        let writer = Writer::open(target, on_full)?;
        std::thread::Builder::new().name("quire-audit".into()).spawn(move || writer.run(inbox))?;
        count_audit("written", 0);
        count_audit("lost", 0);
        Ok(Self { inner: Some(Arc::new(Log { queue, on_full })) })
    }

    /// Whether there is a log.
    pub fn is_on(&self) -> bool {
        self.inner.is_some()
    }

    /// Begins the trail of a request. With [`OnFull::Block`] it waits while the queue is full.
    ///
    /// `route` must not hold what a client wrote.
    pub async fn begin(
        &self,
        protocol: &'static str,
        route: impl FnOnce() -> String,
        ip: Option<IpAddr>,
    ) -> Trail {
        let Some(log) = &self.inner else { return Trail::default() };
        let slot = match log.on_full {
            OnFull::Drop => None,
            // The writer ends with the process only.
            OnFull::Block => log.queue.clone().reserve_owned().await.ok(),
        };
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = Record {
            time: rfc3339(i64::try_from(unix.as_millis()).unwrap_or(i64::MAX)),
            ip,
            protocol,
            route: route(),
            ..Record::default()
        };
        let open = Open { log: Arc::clone(log), slot, record, begun: Instant::now() };
        Trail { open: Some(Arc::new(Mutex::new(open))) }
    }

    /// Waits until what was recorded so far is written.
    pub async fn flush(&self) {
        self.ask(Message::Flush).await;
    }

    /// Opens the file again, which somebody moved away.
    pub async fn reopen(&self) {
        self.ask(Message::Reopen).await;
    }

    async fn ask(&self, message: impl FnOnce(oneshot::Sender<()>) -> Message) {
        let Some(log) = &self.inner else { return };
        let (done, answer) = oneshot::channel();
        let all = async {
            if log.queue.send(message(done)).await.is_ok() {
                // A writer that is gone has nothing more to write.
                let _ = answer.await;
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            tracing::error!("the audit log was not written within {PATIENCE:?}");
        }
    }
}

/// What is known of one request so far. Its record is written when the last clone is dropped. Without a log it is nothing.
#[derive(Clone, Default)]
pub struct Trail {
    open: Option<Arc<Mutex<Open>>>,
}

struct Open {
    log: Arc<Log>,
    slot: Option<mpsc::OwnedPermit<Message>>,
    record: Record,
    begun: Instant,
}

impl Trail {
    fn note(&self, note: impl FnOnce(&mut Record)) {
        if let Some(open) = &self.open {
            note(&mut open.lock().record);
        }
    }

    /// The id under which its client knows it.
    pub fn named(&self, id: &str) {
        self.note(|record| id.clone_into(&mut record.request_id));
    }

    /// Who asks.
    pub fn by(&self, access: &Access) {
        self.note(|record| {
            record.tenant = Some(Arc::clone(&access.tenant.state.name));
            record.key = Some(access.key_id().to_owned());
        });
    }

    /// What is asked for: a model that exists, and the canonical text of the parameters, of which a hash is kept.
    pub fn asks(&self, model: &str, params: impl FnOnce() -> String) {
        self.note(|record| {
            record.model = Some(model.to_owned());
            record.params_sha256 = Some(hex(&Sha256::digest(params())));
        });
    }

    /// What it cost, and the worst end of its answers.
    pub(crate) fn cost(&self, [prompt, cached, completion]: [u64; 3], finish: Option<FinishReason>) {
        self.note(|record| {
            record.prompt_tokens = Some(prompt);
            record.cached_tokens = Some(cached);
            record.completion_tokens = Some(completion);
            record.finish_reason = finish.map(FinishReason::name);
        });
    }

    /// How it was answered, with the code of the error if it was one.
    pub fn answered(&self, answer: Answer, error: Option<&'static str>) {
        self.note(|record| (record.status, record.error) = (Some(answer), error));
    }

    /// What an administrator changed.
    pub fn changed(&self, change: Value) {
        self.note(|record| record.change = Some(change));
    }
}

impl std::fmt::Debug for Trail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.open.is_some() { "Trail(open)" } else { "Trail(none)" })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut record = std::mem::take(&mut self.record);
        record.duration_ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let message = Message::Record(Box::new(record));
        match self.slot.take() {
            Some(slot) => drop(slot.send(message)),
            None if self.log.queue.try_send(message).is_ok() => {}
            None => count_audit("lost", 1),
        }
    }
}

#[cfg(test)]
#[path = "audit_tests.rs"]
mod tests;
