//! Log lines on standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::LogFormat;

/// Installs the logger of the process. `QUIRE_LOG` sets its level, or levels by target as in `info,quire_http=debug`.
///
/// # Errors
/// `QUIRE_LOG` does not parse.
pub fn init(format: LogFormat, default_level: &str) -> Result<(), String> {
    let spec = std::env::var("QUIRE_LOG").unwrap_or_default();
    let spec = if spec.is_empty() { default_level.to_owned() } else { spec };
    let filter = EnvFilter::try_new(&spec).map_err(|error| format!("QUIRE_LOG: `{spec}`: {error}"))?;
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    let installed = match format {
        LogFormat::Text => builder.with_target(false).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).finish().try_init(),
    };
    // Tests in one process may install it twice; the first stays.
    let _ = installed;
    Ok(())
}
