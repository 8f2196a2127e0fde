//! `--tls-cert`, `--tls-key` and `--tls-client-ca` become the one [`Tls`] of all listeners.

use std::time::Duration;

use quire_tls::{Tls, TlsFiles};

use crate::args::ServerArgs;
use crate::{Failure, Result};

/// How often the files are looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Reads the files, and follows changes in the background; `None` without a certificate.
pub(crate) fn open(args: &ServerArgs) -> Result<Option<Tls>> {
    let (Some(cert), Some(key)) = (args.tls_cert.clone(), args.tls_key.clone()) else { return Ok(None) };
    let tls = Tls::open(TlsFiles { cert, key, client_ca: args.tls_client_ca.clone() });
    let tls = tls.map_err(|error| Failure(format!("TLS: {error}")))?;
    tokio::spawn(tls.clone().watch(WATCH_INTERVAL));
    Ok(Some(tls))
}

/// How addresses begin.
pub(crate) fn scheme(tls: Option<&Tls>) -> &'static str {
    if tls.is_some() { "https" } else { "http" }
}
