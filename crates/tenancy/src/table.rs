//! Who is behind which key, as of one reading of the file; and what of a tenant outlives it.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use quire_core::{TenantId, TenantShare};

use crate::audit::Trail;
use crate::credential::{KeyDigest, Keys};
use crate::file::{KeyEntry, TenantSettings, TenantsFile};
use crate::limits::Scopes;
use crate::metrics::{MAX_LABELLED, TenantMetrics};
use crate::tenant::{Access, Key, Tenant, TenantState, Totals};

/// Ids given out in the life of a process. A tenant keeps its id when it leaves the file, because its last requests may
/// still run; so the number is bounded.
const MAX_IDS: usize = 16_384;

/// Why a table of tenants cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// One key cannot be two tenants'.
    #[error("tenant `{tenant}`, key `{key}`: --api-key is the same key; remove one of them")]
    KeyTwice {
        /// The tenant's id.
        tenant: String,
        /// The key's id.
        key: String,
    },
    /// A tenant's key opens something else.
    #[error("tenant `{tenant}`, key `{key}`: is the admin token, too; choose another")]
    Reserved {
        /// The tenant's id.
        tenant: String,
        /// The key's id.
        key: String,
    },
    /// The server must not open itself because a file lost its tenants.
    #[error(
        "no tenant is left, so nobody would need a key; to open the server, restart it without --tenants"
    )]
    WouldOpen,
    /// Too many different tenants came and went.
    #[error("more than {MAX_IDS} different tenants since the start; restart the server")]
    TooManyIds,
}

/// One reading of the file.
pub(crate) struct Table {
    pub(crate) by_key: HashMap<KeyDigest, Access>,
    /// Everybody, where no key is needed.
    pub(crate) anonymous: Option<Access>,
    /// All that the file has, and who is none of it first.
    pub(crate) tenants: Vec<Arc<Tenant>>,
    /// Indexed by id; tenants that have left keep their place.
    pub(crate) shares: Vec<TenantShare>,
}

/// Every tenant there ever was, by name; an id is a place in `states`.
#[derive(Default)]
pub(crate) struct Registry {
    by_name: HashMap<Arc<str>, usize>,
    pub(crate) states: Vec<Arc<TenantState>>,
}

impl Registry {
    fn state(&mut self, name: &str) -> Result<Arc<TenantState>, TableError> {
        if let Some(&at) = self.by_name.get(name) {
            return Ok(Arc::clone(&self.states[at]));
        }
        let id = self.states.len();
        if id >= MAX_IDS {
            return Err(TableError::TooManyIds);
        }
        let name: Arc<str> = name.into();
        let state = Arc::new(TenantState {
            id: TenantId(id as u32),
            ledger: Mutex::default(),
            refused: Mutex::default(),
            metrics: TenantMetrics::new(if id < MAX_LABELLED { &name } else { "other" }),
            totals: Totals::default(),
            history: Mutex::default(),
            name: Arc::clone(&name),
        });
        self.by_name.insert(name, id);
        self.states.push(Arc::clone(&state));
        Ok(state)
    }
}

impl Table {
    pub(crate) fn new(
        api_keys: &Keys,
        file: TenantsFile,
        registry: &mut Registry,
    ) -> Result<Self, TableError> {
        let open = api_keys.digests.is_empty() && file.tenants.is_empty();
        // The first id, 0, whether it is in use or not.
        let first = registry.state(if open { "anonymous" } else { "default" })?;
        let tenant = |settings: TenantSettings, ip_allow, state| {
            Arc::new(Tenant { settings, state, ip_allow, free_priority: !file.is_file })
        };
        let default = tenant(file.defaults, Vec::new(), first);
        let access =
            |key: Key| Access { tenant: Arc::clone(&default), key: Arc::new(key), trail: Trail::default() };
        let full = |id: &str| Key { id: id.to_owned(), expires: None, scopes: Scopes::ALL };
        let mut by_key: HashMap<_, _> =
            api_keys.digests.iter().map(|&digest| (digest, access(full("api-key")))).collect();
        let mut shares = vec![default.share()];
        let mut tenants = vec![Arc::clone(&default)];
        for entry in file.tenants {
            let tenant = tenant(entry.settings, entry.ip_allow, registry.state(&entry.id)?);
            let at = tenant.id().0 as usize;
            shares.resize(shares.len().max(at + 1), TenantShare::default());
            shares[at] = tenant.share();
            tenants.push(Arc::clone(&tenant));
            for KeyEntry { id, digest, expires, scopes } in entry.keys {
                let key = Arc::new(Key { id: id.clone(), expires, scopes });
                let access = Access { tenant: Arc::clone(&tenant), key, trail: Trail::default() };
                if by_key.insert(digest, access).is_some() {
                    return Err(TableError::KeyTwice { tenant: entry.id, key: id });
                }
            }
        }
        Ok(Self { by_key, anonymous: open.then(|| access(full("anonymous"))), tenants, shares })
    }
}

impl Table {
    /// Checks that nobody comes with this key.
    pub(crate) fn without(&self, key: &KeyDigest) -> Result<(), TableError> {
        let of = |access: &Access| TableError::Reserved {
            tenant: access.tenant().name().to_owned(),
            key: access.key_id().to_owned(),
        };
        self.by_key.get(key).map_or(Ok(()), |access| Err(of(access)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use metrics::with_local_recorder;
    use metrics_util::debugging::DebuggingRecorder;

    use super::*;

    fn file(tenants: std::ops::Range<usize>) -> TenantsFile {
        let text: String = tenants.map(|at| format!("[[tenants]]\nid = 't{at}'\n")).collect();
        TenantsFile::parse(&text, "t.toml").unwrap()
    }

    #[test]
    fn a_hundred_tenants_have_a_label_and_the_rest_share_one() {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let mut registry = Registry::default();
        with_local_recorder(&recorder, || {
            Table::new(&Keys::default(), file(0..150), &mut registry).unwrap();
            Table::new(&Keys::default(), file(150..300), &mut registry).unwrap();
        });
        let mut labels = HashSet::new();
        for (key, ..) in snapshotter.snapshot().into_vec() {
            let tenant =
                key.key().labels().find(|label| label.key() == "tenant").expect("all are a tenant's");
            labels.insert(tenant.value().to_owned());
        }
        assert_eq!(labels.len(), MAX_LABELLED + 1);
        assert!(labels.contains("other") && labels.contains("t98") && !labels.contains("t99"), "{labels:?}");
    }

    #[test]
    fn ids_are_bounded_and_never_given_out_twice() {
        let mut registry = Registry::default();
        let mut at = 0;
        let error = loop {
            match Table::new(&Keys::default(), file(at..at + 1000), &mut registry) {
                Ok(table) => assert!(table.shares.len() <= MAX_IDS),
                Err(error) => break error,
            }
            at += 1000;
        };
        assert_eq!((error, registry.states.len()), (TableError::TooManyIds, MAX_IDS));
        assert!(registry.states.iter().enumerate().all(|(at, state)| state.id.0 as usize == at));
        Table::new(&Keys::default(), file(0..1000), &mut registry).expect("known ones still fit");
    }
}
