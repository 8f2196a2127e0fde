//! Log lines on standard error.

use std::io::IsTerminal;
use std::sync::{Mutex, OnceLock, PoisonError};

use quire_http::admin::LogFilter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::LogFormat;

/// Words for a level.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Puts another filter in place of the one that holds.
type Replace = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

/// The filter of the process, by its text.
struct Installed {
    level: Mutex<String>,
    replace: Replace,
}

static INSTALLED: OnceLock<Installed> = OnceLock::new();

/// Installs the logger of the process. `QUIRE_LOG` sets its level, or levels by target as in `info,quire_http=debug`.
///
/// # Errors
/// `QUIRE_LOG` does not parse.
pub fn init(format: LogFormat, default_level: &str) -> Result<(), String> {
    let spec = std::env::var("QUIRE_LOG").unwrap_or_default();
    let spec = if spec.is_empty() { default_level.to_owned() } else { spec };
    let filter = parse(&spec).map_err(|error| format!("QUIRE_LOG: {error}"))?;
    let ansi = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi);
    // Tests in one process may install it twice; the first stays.
    match format {
        LogFormat::Text => {
            let builder = builder.with_target(false).with_filter_reloading();
            let handle = builder.reload_handle();
            if builder.finish().try_init().is_ok() {
                remember(
                    spec,
                    Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string())),
                );
            }
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            if builder.finish().try_init().is_ok() {
                remember(
                    spec,
                    Box::new(move |filter| handle.reload(filter).map_err(|error| error.to_string())),
                );
            }
        }
    }
    Ok(())
}

fn remember(level: String, replace: Replace) {
    // Whoever installed the logger is the first to be here.
    let _ = INSTALLED.set(Installed { level: Mutex::new(level), replace });
}

/// A word alone must be a level: the parser would take any other for a target of which everything is wanted.
fn parse(spec: &str) -> Result<EnvFilter, String> {
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    let wrong = spec.split(',').map(str::trim).find(|part| !part.contains('=') && !is_level(part));
    if let Some(part) = wrong {
        let levels = LEVELS.join(", ");
        return Err(format!(
            "`{part}` is neither a level ({levels}) nor TARGET=LEVEL, as in info,quire_http=debug"
        ));
    }
    EnvFilter::try_new(spec).map_err(|error| format!("`{spec}`: {error}"))
}

/// The logger as the admin API sees it.
pub(crate) struct Logger;

impl LogFilter for Logger {
    fn level(&self) -> String {
        let level = INSTALLED.get().map(|installed| &installed.level);
        level.map_or_else(
            || "off".to_owned(),
            |level| level.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        )
    }

    fn set_level(&self, level: &str) -> Result<(), String> {
        let filter = parse(level)?;
        let installed = INSTALLED.get().ok_or("nothing is logged by this process")?;
        let mut shown = installed.level.lock().unwrap_or_else(PoisonError::into_inner);
        (installed.replace)(filter)?;
        level.clone_into(&mut shown);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_or_levels_by_target() {
        for good in ["info", "TRACE", "off", "warn,quire_http=debug", "quire_engine=trace, error"] {
            parse(good).unwrap();
        }
        for bad in ["", "verbose", "info,quire_http", "quire_http=loud", "info,,warn"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
