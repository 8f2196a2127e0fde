//! `--api-key`, `--tenants` and `--quota-store` become the one [`Tenancy`] that both front ends and the scheduler follow.

use std::time::Duration;

use quire_core::TenantShare;
use quire_engine::EngineClient;
use quire_tenancy::{Keys, SharedStore, Tenancy, TenantsFile, Watch};

use crate::args::ServerArgs;
use crate::{Failure, Result};

/// How often the tenants file is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How often each tenant's part of the tokens is published, and over what time it is taken.
const SHARE_INTERVAL: Duration = Duration::from_secs(1);
const SHARE_WINDOW: Duration = Duration::from_secs(60);

/// Reads the file, connects the store, and follows changes in the background.
pub(crate) async fn open(args: &ServerArgs) -> Result<Tenancy> {
    let keys = Keys::new(&args.api_key).map_err(|error| Failure(format!("--api-key: {error}")))?;
    let store = match args.quota_store.as_str() {
        "memory" => None,
        url => {
            let store = SharedStore::start(url).await;
            Some(store.map_err(|error| Failure(format!("--quota-store: {error}")))?)
        }
    };
    let opened = args.tenants.clone().map(Watch::open).transpose();
    let opened = opened.map_err(|error| Failure(format!("--tenants: {error}")))?;
    let (watch, file) = opened.map_or((None, TenantsFile::default()), |(watch, file)| (Some(watch), file));
    let tenancy = Tenancy::new(keys, file, store).map_err(|error| Failure(format!("--tenants: {error}")))?;
    if args.tenants.is_some() || args.quota_store != "memory" {
        let shared = tenancy.shares_limits();
        tracing::info!(tenants = tenancy.shares().len() - 1, limits_shared = shared, "limits");
    }
    if let Some(watch) = watch {
        tokio::spawn(watch.run(tenancy.clone(), WATCH_INTERVAL));
    }
    tokio::spawn(tenancy.clone().keep_history());
    tokio::spawn(tenancy.clone().publish_shares(SHARE_INTERVAL, SHARE_WINDOW));
    Ok(tenancy)
}

/// Tells the scheduler what is whose, at once and after every reload of the file. Never ends.
pub(crate) async fn follow_shares(tenancy: Tenancy, engine: EngineClient) {
    let mut changes = tenancy.subscribe();
    loop {
        set_tenants(&engine, &tenancy.shares());
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// The one place where weights and shares of the KV pool reach the engine.
fn set_tenants(engine: &EngineClient, shares: &[TenantShare]) {
    tracing::debug!(tenants = shares.len(), "shares of the engine");
    engine.set_tenants(shares);
}
