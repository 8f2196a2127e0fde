//! Takes changed files while the server runs: certificates are renewed long before anybody wants to restart for it.
//!
//! Contents are compared, not times: a mounted secret changes by a symbolic link. Certificate and key are two files, so
//! between two writes they may not belong together; then everything stays as it was, and the next look decides.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::{Tls, TlsError};

/// Whether files changed.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    Same,
    Taken,
    /// They cannot be used, for a reason not yet told.
    Refused(String),
}

/// What was seen last.
struct Watch {
    tls: Tls,
    seen: Vec<Vec<u8>>,
    failure: Option<String>,
}

impl Tls {
    /// Looks every `period`, for ever. Files that cannot be used leave everything as it was, and are logged once.
    pub async fn watch(self, period: Duration) {
        let mut watch = Watch::new(self);
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // A file on a network may keep a thread waiting.
            let look = tokio::task::spawn_blocking(move || {
                let look = watch.look();
                (watch, look)
            });
            let Ok((next, look)) = look.await else { return };
            watch = next;
            match look {
                Look::Same => {}
                Look::Taken => {
                    tracing::info!(cert = %watch.tls.files.cert.display(), "took the changed certificate");
                }
                Look::Refused(reason) => {
                    tracing::error!("{reason}; the certificate stays as it was");
                }
            }
        }
    }
}

impl Watch {
    fn new(tls: Tls) -> Self {
        Self { tls, seen: Vec::new(), failure: None }
    }

    fn look(&mut self) -> Look {
        match self.take() {
            Ok(look) => {
                self.failure = None;
                look
            }
            Err(error) => {
                let reason = error.to_string();
                if self.failure.replace(reason.clone()).as_ref() == Some(&reason) {
                    return Look::Same;
                }
                Look::Refused(reason)
            }
        }
    }

    fn take(&mut self) -> Result<Look, TlsError> {
        let contents = self.tls.files.read()?;
        let seen = contents.bytes();
        if self.seen == seen {
            return Ok(Look::Same);
        }
        let configs = contents.configs()?;
        // What is seen first is what was opened, or newer than that.
        let is_first = std::mem::replace(&mut self.seen, seen).is_empty();
        self.tls.replace(configs);
        Ok(if is_first { Look::Same } else { Look::Taken })
    }
}
