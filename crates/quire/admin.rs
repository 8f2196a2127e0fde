//! `--admin-token` and `--admin-addr` become the admin API.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use quire_http::admin::AdminConfig;
use quire_llm::Lifecycle;
use quire_tenancy::{AuditLog, KeyDigest, Tenancy, TenantsEditor};
use quire_tls::Tls;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::Result;
use crate::args::ServerArgs;
use crate::config::ConfigError;
use crate::logging::Logger;
use crate::serve::bind;

/// Shortest token: who guesses a thousand a second needs longer than a server lives.
const MIN_TOKEN_BYTES: usize = 16;
/// Settings that are secrets as a whole.
const SECRETS: [&str; 2] = ["api_key", "admin_token"];
/// What stands in place of a secret.
const MASK: &str = "***";

/// A listener for the API, and what it is told; `None` without a token.
pub(crate) async fn open(
    args: &ServerArgs,
    settings: &BTreeMap<String, String>,
    lifecycle: &Lifecycle,
    tenancy: &Tenancy,
    audit: &AuditLog,
    tls: Option<&Tls>,
) -> Result<Option<(TcpListener, SocketAddr, AdminConfig)>> {
    let Some(token) = &args.admin_token else { return Ok(None) };
    check_token(token, args.api_key.as_deref())?;
    let digest = KeyDigest::of(token);
    tenancy.reserve(digest).map_err(|error| token_error(error.to_string()))?;
    let (listener, address) = bind(args.admin_addr.ip(), args.admin_addr.port(), "admin-addr").await?;
    if !address.ip().is_loopback() && tls.is_none() {
        tracing::warn!("the admin API can be reached from other machines, at {address}, without encryption");
    }
    let config = AdminConfig {
        token: digest,
        lifecycle: lifecycle.clone(),
        tenancy: tenancy.clone(),
        tenants: args.tenants.clone().map(|path| TenantsEditor::new(path, tenancy.clone())),
        audit: audit.clone(),
        log_filter: Arc::new(Logger),
        tls: tls.cloned(),
        settings: masked(settings),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Ok(Some((listener, address, config)))
}

fn check_token(token: &str, api_key: Option<&str>) -> Result<(), ConfigError> {
    if token.len() < MIN_TOKEN_BYTES || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        let message =
            format!("must have at least {MIN_TOKEN_BYTES} visible ASCII characters: openssl rand -hex 24");
        return Err(token_error(message));
    }
    if api_key == Some(token) {
        return Err(token_error("is --api-key, too; choose another"));
    }
    Ok(())
}

fn token_error(message: impl Into<String>) -> ConfigError {
    ConfigError { flag: "admin-token", message: message.into() }
}

/// The settings without their secrets: passwords are also part of addresses.
fn masked(settings: &BTreeMap<String, String>) -> Value {
    let mask = |(name, value): (&String, &String)| {
        let value = if SECRETS.contains(&name.as_str()) { MASK.to_owned() } else { without_password(value) };
        (name.clone(), Value::from(value))
    };
    Value::Object(settings.iter().map(mask).collect())
}

fn without_password(value: &str) -> String {
    let parts = value.split_once("://").and_then(|(scheme, rest)| {
        let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        Some((scheme, authority.rsplit_once('@')?.1, path))
    });
    parts.map_or_else(|| value.to_owned(), |(scheme, host, path)| format!("{scheme}://{MASK}@{host}{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked() {
        let settings = [
            ("api_key", "s3cret"),
            ("admin_token", "s3cret"),
            ("quota_store", "redis://user:s3cret@10.0.0.1:6379/2?timeout_ms=5"),
            ("port", "8000"),
            ("tenants", "/etc/quire/tenants@home.toml"),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let masked = masked(&settings.into());
        assert!(!masked.to_string().contains("s3cret"), "{masked}");
        assert_eq!(masked["quota_store"], "redis://***@10.0.0.1:6379/2?timeout_ms=5");
        assert_eq!(
            (&masked["port"], &masked["tenants"]),
            (&"8000".into(), &"/etc/quire/tenants@home.toml".into())
        );
        assert_eq!(without_password("redis://10.0.0.1"), "redis://10.0.0.1");
    }

    #[test]
    fn tokens_are_long_and_no_key() {
        for (token, api_key) in [
            ("", None),
            ("0123456789abcde", None),
            ("0123456789 abcdef", None),
            ("0123456789abcdef", Some("0123456789abcdef")),
        ] {
            assert_eq!(check_token(token, api_key).unwrap_err().flag, "admin-token", "{token:?}");
        }
        check_token("0123456789abcdef", Some("other")).unwrap();
    }
}
