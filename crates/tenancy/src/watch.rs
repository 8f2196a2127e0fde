//! Takes changes of the tenants file while the server runs.

use std::path::PathBuf;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::time::{MissedTickBehavior, interval};

use crate::file::{FileError, TenantsFile, read_text};
use crate::metrics;
use crate::tenancy::Tenancy;

/// A file that is read again and again. Contents are compared, not times: a mounted ConfigMap changes by a symbolic link,
/// and a file may be written twice within the resolution of its time.
pub struct Watch {
    path: PathBuf,
    seen: Option<[u8; 32]>,
    /// The last failure to read, so that it is logged once.
    failure: Option<String>,
}

impl Watch {
    /// Reads the file for the first time.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn open(path: PathBuf) -> Result<(Self, TenantsFile), FileError> {
        let text = read_text(&path)?;
        let file = TenantsFile::parse(&text, &path.display().to_string())?;
        Ok((Self { path, seen: Some(Sha256::digest(text).into()), failure: None }, file))
    }

    /// Looks every `period`, forever. A file that cannot be used leaves everything as it was, is logged once and counted.
    pub async fn run(mut self, tenancy: Tenancy, period: Duration) {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let tenancy = tenancy.clone();
            // A file on a network may keep a thread waiting.
            let look = tokio::task::spawn_blocking(move || {
                self.look(&tenancy);
                self
            });
            let Ok(watch) = look.await else { return };
            self = watch;
        }
    }

    fn look(&mut self, tenancy: &Tenancy) {
        let outcome = match read_text(&self.path) {
            Ok(text) => {
                let digest = Sha256::digest(&text).into();
                if self.seen == Some(digest) {
                    self.failure = None;
                    return;
                }
                self.seen = Some(digest);
                self.failure = None;
                let parsed = TenantsFile::parse(&text, &self.path.display().to_string());
                parsed.map_err(|error| error.to_string()).and_then(|file| {
                    let name = self.path.display();
                    tenancy.reload(file).map_err(|error| format!("{name}: {error}"))
                })
            }
            Err(error) => {
                let error = error.to_string();
                if self.failure.replace(error.clone()).as_ref() == Some(&error) {
                    return;
                }
                Err(error)
            }
        };
        metrics::count_reload(outcome.is_ok());
        match outcome {
            Ok(()) => tracing::info!(path = %self.path.display(), "took the changed tenants file"),
            Err(error) => tracing::error!("{error}; the tenants stay as they were"),
        }
    }
}
