//! The thread that writes the audit log: takes what waits, and writes it in one piece.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::audit::{AuditTarget, OnFull, Record};
use crate::metrics::count_audit;

/// Bytes that are written at once; one record may go beyond.
const MAX_BATCH: usize = 64 << 10;
/// Between two tries to write to a file that fails.
const RETRY: Duration = Duration::from_millis(500);

/// What travels to the writer.
pub(crate) enum Message {
    Record(Box<Record>),
    Reopen(oneshot::Sender<()>),
    Flush(oneshot::Sender<()>),
}

enum Sink {
    Stdout,
    File(File),
}

/// Owns the file.
pub(crate) struct Writer {
    target: AuditTarget,
    on_full: OnFull,
    sink: Sink,
    batch: Vec<u8>,
    /// Records in the batch.
    num_records: u64,
    is_failing: bool,
}

impl Writer {
    pub(crate) fn open(target: AuditTarget, on_full: OnFull) -> io::Result<Self> {
        let sink = open(&target)?;
        Ok(Self { target, on_full, sink, batch: Vec::new(), num_records: 0, is_failing: false })
    }

    /// Until every sender is gone.
    pub(crate) fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        while let Some(message) = inbox.blocking_recv() {
            self.take(message);
            while self.batch.len() < MAX_BATCH
                && let Ok(message) = inbox.try_recv()
            {
                self.take(message);
            }
            self.write();
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Record(record) => {
                // Neither plain data nor memory can fail.
                serde_json::to_writer(&mut self.batch, &record).expect("a record is plain data");
                self.batch.push(b'\n');
                self.num_records += 1;
            }
            Message::Flush(done) => {
                self.write();
                // Nobody may be waiting any more.
                let _ = done.send(());
            }
            Message::Reopen(done) => {
                self.write();
                match open(&self.target) {
                    Ok(sink) => self.sink = sink,
                    Err(error) => {
                        tracing::error!(%error, "the audit log cannot be opened again; the old file is kept");
                    }
                }
                let _ = done.send(());
            }
        }
    }

    /// Writes the batch. Where none may be lost, until it is written: meanwhile the queue fills and requests wait.
    fn write(&mut self) {
        let mut written = 0;
        while written < self.batch.len() {
            let outcome = match &mut self.sink {
                Sink::Stdout => io::stdout().write(&self.batch[written..]),
                Sink::File(file) => file.write(&self.batch[written..]),
            };
            match outcome {
                Ok(0) | Err(_) if self.on_full == OnFull::Drop => {
                    self.complain(outcome);
                    count_audit("lost", self.num_records);
                    self.num_records = 0;
                    break;
                }
                Ok(0) | Err(_) => {
                    self.complain(outcome);
                    std::thread::sleep(RETRY);
                }
                Ok(more) => {
                    written += more;
                    self.is_failing = false;
                }
            }
        }
        if matches!(self.sink, Sink::Stdout) {
            // What it could not take was said above.
            let _ = io::stdout().flush();
        }
        count_audit("written", self.num_records);
        self.num_records = 0;
        self.batch.clear();
    }

    fn complain(&mut self, outcome: io::Result<usize>) {
        if !std::mem::replace(&mut self.is_failing, true) {
            let error =
                outcome.err().map_or_else(|| "nothing was taken".to_owned(), |error| error.to_string());
            tracing::error!(error, on_full = ?self.on_full, "the audit log cannot be written");
        }
    }
}

fn open(target: &AuditTarget) -> io::Result<Sink> {
    match target {
        AuditTarget::Stdout => Ok(Sink::Stdout),
        AuditTarget::File(path) => open_file(path).map(Sink::File),
    }
}

/// For its owner's eyes only, if it is new.
fn open_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    options.open(path)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    use super::*;

    /// What is counted when three records are written there.
    fn counted(path: &str) -> HashMap<String, u64> {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        ::metrics::with_local_recorder(&recorder, || {
            let (queue, inbox) = mpsc::channel(4);
            for _ in 0..3 {
                assert!(queue.try_send(Message::Record(Box::default())).is_ok());
            }
            drop(queue);
            Writer::open(AuditTarget::File(path.into()), OnFull::Drop).unwrap().run(inbox);
        });
        let counters = snapshotter.snapshot().into_vec().into_iter().map(|(key, _, _, value)| {
            let label = key.key().labels().next().map(|label| label.value().to_owned());
            let DebugValue::Counter(count) = value else { panic!("a counter") };
            (label.unwrap_or_default(), count)
        });
        counters.filter(|(_, count)| *count > 0).collect()
    }

    #[test]
    fn what_is_written_and_what_is_lost_is_counted() {
        let path = std::env::temp_dir().join(format!("quire-audit-writer-{}", std::process::id()));
        assert_eq!(counted(path.to_str().unwrap()), HashMap::from([("written".to_owned(), 3)]));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 3);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        std::fs::remove_file(path).unwrap();
        if cfg!(target_os = "linux") {
            assert_eq!(counted("/dev/full"), HashMap::from([("lost".to_owned(), 3)]), "the disk is full");
        }
    }
}
