//! Requests that were refused before the engine had them, for those who ask why.
//!
//! Bounded for each tenant, so that one who keeps knocking pushes out nobody else's. Written by front ends only.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quire_core::{Micros, TenantId};

/// Refusals of one tenant that are remembered.
const MAX_OF_TENANT: usize = 256;

/// One refused request, in the clock of [`crate::EngineClient::now`].
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The name by which its client knows it. Need not be unique.
    pub name: Arc<str>,
    /// Whose it is.
    pub tenant: TenantId,
    /// When the front end took it up.
    pub received: Micros,
    /// When it was refused.
    pub refused: Micros,
    /// The reason in one word, as the answer had it.
    pub code: &'static str,
    /// The reason as the answer had it.
    pub message: String,
    /// After how long it may come again, if that helps.
    pub retry_after: Option<Duration>,
}

/// The latest refusals of every tenant.
#[derive(Default)]
pub(crate) struct Refusals {
    by_tenant: Mutex<HashMap<TenantId, VecDeque<Refusal>>>,
}

impl Refusals {
    pub(crate) fn add(&self, refusal: Refusal) {
        let mut by_tenant = self.by_tenant.lock();
        let kept = by_tenant.entry(refusal.tenant).or_default();
        if kept.len() == MAX_OF_TENANT {
            kept.pop_front();
        }
        kept.push_back(refusal);
    }

    /// Those with this name, oldest first, of one tenant or of all.
    pub(crate) fn find(&self, name: &str, tenant: Option<TenantId>) -> Vec<Refusal> {
        let by_tenant = self.by_tenant.lock();
        let of = |id: &TenantId| tenant.is_none_or(|tenant| tenant == *id);
        let kept = by_tenant.iter().filter(|(id, _)| of(id)).flat_map(|(_, kept)| kept);
        let mut found: Vec<Refusal> = kept.filter(|refusal| &*refusal.name == name).cloned().collect();
        found.sort_by_key(|refusal| refusal.refused);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tenant_has_its_own_and_not_too_many() {
        let refusals = Refusals::default();
        let add = |tenant: u32, name: &str, at: u64| {
            refusals.add(Refusal {
                name: name.into(),
                tenant: TenantId(tenant),
                received: Micros(at),
                refused: Micros(at),
                code: "rate_limit_exceeded",
                message: String::new(),
                retry_after: None,
            });
        };
        let found = |name: &str, tenant: Option<u32>| -> Vec<u64> {
            refusals.find(name, tenant.map(TenantId)).iter().map(|refusal| refusal.refused.0).collect()
        };
        add(1, "same", 3);
        add(2, "same", 2);
        add(2, "other", 1);
        assert_eq!(
            [found("same", Some(1)), found("same", Some(2)), found("same", None)],
            [vec![3], vec![2], vec![2, 3]]
        );
        assert_eq!(found("none", None), []);
        for at in 0..MAX_OF_TENANT as u64 {
            add(1, "flood", 10 + at);
        }
        assert_eq!([found("same", Some(1)), found("same", Some(2))], [vec![], vec![2]]);
        assert_eq!(found("flood", Some(1)).len(), MAX_OF_TENANT);
    }
}
