//! `--audit-log` becomes the one [`AuditLog`] of all front ends.

use std::path::Path;

use quire_tenancy::{AuditLog, AuditTarget, OnFull};

use crate::args::{AuditOnFull, ServerArgs};
use crate::{Failure, Result};

/// Opens the log, and follows SIGHUP in the background: whoever rotates logs moves the file away and sends it. Without a
/// log, SIGHUP ends the process as ever.
pub(crate) fn open(args: &ServerArgs) -> Result<AuditLog> {
    let Some(path) = &args.audit_log else { return Ok(AuditLog::default()) };
    let target = match path.as_path() {
        dash if dash == Path::new("-") => AuditTarget::Stdout,
        path => AuditTarget::File(path.to_owned()),
    };
    let on_full = match args.audit_on_full {
        AuditOnFull::Block => OnFull::Block,
        AuditOnFull::Drop => OnFull::Drop,
    };
    let fail = |error: std::io::Error| Failure(format!("--audit-log {}: {error}", path.display()));
    let log = AuditLog::open(target, on_full).map_err(fail)?;
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut hangups = signal(SignalKind::hangup()).map_err(fail)?;
        let log = log.clone();
        tokio::spawn(async move {
            while hangups.recv().await.is_some() {
                log.reopen().await;
            }
        });
    }
    Ok(log)
}
