//! The one door of both front ends: credential to tenant, demand to permit.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, RwLock};
use quire_core::{TenantId, TenantShare};
use tokio::sync::watch;

use crate::budget::{Budget, Spent};
use crate::credential::{AuthError, KeyDigest, Keys};
use crate::demand::{Demand, Denied};
use crate::file::TenantsFile;
use crate::gcra::Nanos;
use crate::ledger::{Ledger, Refusal, Standing, Taken};
use crate::limits::{Limits, Quota};
use crate::metrics;
use crate::permit::{Permit, Reservation, Source, Used};
use crate::shared::{Charge, Charged, SharedStore};
use crate::table::{Registry, Table, TableError};
use crate::tenant::{Access, Tenant, TenantState};

/// What time it is: for what is counted a minute, and for the calendar.
#[derive(Clone, Copy)]
pub(crate) struct Now {
    /// Since the start.
    pub(crate) nanos: Nanos,
    /// Seconds since 1970.
    pub(crate) unix: i64,
}

/// Credentials, limits and what is used of them. Cheap to clone.
#[derive(Clone)]
pub struct Tenancy {
    inner: Arc<Inner>,
}

struct Inner {
    api_keys: Keys,
    table: RwLock<Arc<Table>>,
    /// No tenant's.
    reserved: RwLock<Option<KeyDigest>>,
    registry: Mutex<Registry>,
    store: Option<Arc<SharedStore>>,
    epoch: Instant,
    /// The same, in seconds since 1970.
    started: i64,
    changes: watch::Sender<u64>,
}

impl Tenancy {
    /// Keys of `--api-key`, the tenants of a file, and the store that replicas share, if they do.
    ///
    /// # Errors
    /// The keys contradict the file.
    pub fn new(
        api_keys: Keys,
        file: TenantsFile,
        store: Option<Arc<SharedStore>>,
    ) -> Result<Self, TableError> {
        metrics::create_series();
        let mut registry = Registry::default();
        let table = Table::new(&api_keys, file, &mut registry)?;
        let inner = Inner {
            api_keys,
            table: RwLock::new(Arc::new(table)),
            reserved: RwLock::default(),
            registry: Mutex::new(registry),
            store,
            epoch: Instant::now(),
            started: unix_now(),
            changes: watch::Sender::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Takes another reading of the file. Running requests keep their permits, tenants their ids and what they used.
    ///
    /// # Errors
    /// As [`Tenancy::new`], and [`TableError::WouldOpen`]; the old table stays.
    pub fn reload(&self, file: TenantsFile) -> Result<(), TableError> {
        self.commit(self.prepare(file)?);
        Ok(())
    }

    /// Checks another reading of the file.
    pub(crate) fn prepare(&self, file: TenantsFile) -> Result<Table, TableError> {
        let inner = &self.inner;
        let table = Table::new(&inner.api_keys, file, &mut inner.registry.lock())?;
        if table.anonymous.is_some() && self.requires_key() {
            return Err(TableError::WouldOpen);
        }
        if let Some(reserved) = &*inner.reserved.read() {
            table.without(reserved)?;
        }
        Ok(table)
    }

    /// Makes it the one that holds.
    pub(crate) fn commit(&self, table: Table) {
        *self.inner.table.write() = Arc::new(table);
        self.inner.changes.send_modify(|version| *version += 1);
    }

    /// Told of every reload.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// What the scheduler is to give whom, indexed by [`TenantId`].
    pub fn shares(&self) -> Vec<TenantShare> {
        self.table().shares.clone()
    }

    /// Whether a credential is needed.
    pub fn requires_key(&self) -> bool {
        self.table().anonymous.is_none()
    }

    /// From now on nobody may come with this key, whatever a file says: it opens something else.
    ///
    /// # Errors
    /// Somebody does already.
    pub fn reserve(&self, key: KeyDigest) -> Result<(), TableError> {
        self.table().without(&key)?;
        *self.inner.reserved.write() = Some(key);
        Ok(())
    }

    /// Whether limits are shared with other replicas now.
    pub fn shares_limits(&self) -> bool {
        self.inner.store.as_ref().is_some_and(|store| store.is_connected())
    }

    /// The name of a tenant that has this id, or had it.
    pub fn name_of(&self, id: TenantId) -> Option<Arc<str>> {
        self.inner.registry.lock().states.get(id.0 as usize).map(|state| Arc::clone(&state.name))
    }

    /// Every tenant there ever was, by id.
    pub(crate) fn states(&self) -> Vec<Arc<TenantState>> {
        self.inner.registry.lock().states.clone()
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.inner.table.read())
    }

    /// Who stands behind a bearer token (see [`crate::bearer`]) that came from `peer`.
    ///
    /// # Errors
    /// A key is needed and none, or a wrong one, came, or from a wrong place.
    pub fn authenticate(&self, token: Option<&str>, peer: Option<IpAddr>) -> Result<Access, AuthError> {
        self.authenticate_at(token, peer, self.now().unix)
    }

    fn authenticate_at(
        &self,
        token: Option<&str>,
        peer: Option<IpAddr>,
        unix_seconds: i64,
    ) -> Result<Access, AuthError> {
        let table = self.table();
        if let Some(anonymous) = &table.anonymous {
            return Ok(anonymous.clone());
        }
        let token = token.ok_or(AuthError::Missing)?;
        let access = table.by_key.get(&KeyDigest::of(token)).ok_or(AuthError::Invalid)?;
        if access.key.expires.is_some_and(|expires| expires <= unix_seconds) {
            return Err(AuthError::Expired);
        }
        if !access.tenant.may_come_from(peer) {
            return Err(AuthError::Address);
        }
        Ok(access.clone())
    }

    /// Whether a request has a chance, before work is spent on it. Takes nothing.
    ///
    /// # Errors
    /// [`Denied::Limited`] while a limit of this replica is reached, or one that the shared store spoke of.
    pub fn precheck(&self, access: &Access) -> Result<(), Denied> {
        let tenant = &access.tenant;
        if let Some(denied) = self.still_refused(tenant) {
            return Err(denied);
        }
        let mut demand = Demand::default();
        demand.add(0, 1, 0);
        let now = self.now();
        // On a copy, so nothing is taken.
        let mut ledger = *tenant.state.ledger.lock();
        // What the store said of the budget last may be too much: others have given back since.
        let budget = tenant.budget().filter(|_| !self.shares_limits());
        let fits = ledger.enter(tenant.limits(), &demand);
        let fits = fits.and_then(|()| reserve(&mut ledger, now, tenant.limits(), budget, &demand).map(drop));
        fits.map_err(|refusal| deny(tenant, refusal, ledger.standing(now.nanos, tenant.limits())))
    }

    /// A refusal of the shared store that holds yet.
    fn still_refused(&self, tenant: &Tenant) -> Option<Denied> {
        let (until, denied) = (*tenant.state.refused.lock())?;
        let left = until.checked_sub(self.now().nanos).filter(|&left| left > 0)?;
        let Denied::Limited { quota, limit, standing, .. } = denied else { return None };
        tenant.state.metrics.throttled(quota);
        Some(Denied::Limited { quota, limit, retry_after: Duration::from_nanos(left), standing })
    }

    /// Reserves what a request may use at most, or says when to come again. Taking all of it is one step.
    ///
    /// # Errors
    /// [`Denied::TooLarge`] if no waiting would help, [`Denied::Limited`] if it would.
    pub async fn admit(&self, access: &Access, demand: Demand) -> Result<Permit, Denied> {
        let Some(store) = self.inner.store.clone() else { return self.admit_at(self.now(), access, demand) };
        let (tenancy, access) = (self.clone(), access.clone());
        // A task of its own: if the client goes away meanwhile, the permit is still made, dropped and so settled.
        let task = tokio::spawn(async move { tenancy.admit_shared(&store, &access, demand).await });
        task.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    /// Against the limits of this process alone.
    fn admit_at(&self, now: Now, access: &Access, demand: Demand) -> Result<Permit, Denied> {
        let tenant = &access.tenant;
        let limits = tenant.limits();
        demand.check(limits, tenant.budget())?;
        let (outcome, standing) = {
            let mut ledger = tenant.state.ledger.lock();
            let outcome = ledger.enter(limits, &demand).and_then(|()| {
                let taken = reserve(&mut ledger, now, limits, tenant.budget(), &demand);
                if taken.is_err() {
                    leave_all(&mut ledger, &demand);
                }
                taken
            });
            (outcome, ledger.standing(now.nanos, limits))
        };
        match outcome {
            Ok(reserved) => Ok(permit(access, demand, reserved, Source::Local, standing)),
            Err(refusal) => Err(deny(tenant, refusal, standing)),
        }
    }

    /// Places in this process, rates and concurrency over all replicas. If the store does not answer in time, the limits
    /// of this replica apply alone.
    async fn admit_shared(
        &self,
        store: &Arc<SharedStore>,
        access: &Access,
        demand: Demand,
    ) -> Result<Permit, Denied> {
        let tenant = &access.tenant;
        let limits = tenant.limits();
        demand.check(limits, tenant.budget())?;
        let now = self.now();
        let (entered, in_flight, standing) = {
            let mut ledger = tenant.state.ledger.lock();
            let entered = ledger.enter(limits, &demand);
            (entered, ledger.in_flight(), ledger.standing(now.nanos, limits))
        };
        entered.map_err(|refusal| deny(tenant, refusal, standing))?;
        let budget = tenant.budget().filter(|_| demand.choices > 0);
        let budget = budget.map(|budget| (budget, budget.period.window(now.unix)));
        let name = &tenant.state.name;
        let charged = store.charge(Charge { tenant: name, limits, budget, demand: &demand, in_flight }).await;
        match charged {
            Some(Ok(Charged { taken, budget: spent, standing })) => {
                if let Some((spent, used)) = spent {
                    tenant.state.ledger.lock().spending.set(spent.window, used);
                }
                let reserved = (taken, spent.map(|(spent, _)| spent));
                Ok(permit(access, demand, reserved, Source::Shared(Arc::clone(store)), standing))
            }
            Some(Err((refusal, standing))) => {
                leave_all(&mut tenant.state.ledger.lock(), &demand);
                let refusal = match budget {
                    Some((_, window)) if refusal.quota == Quota::Budget => {
                        Refusal { retry_after: window.left(now.unix), ..refusal }
                    }
                    _ => refusal,
                };
                let denied = deny(tenant, refusal, standing);
                if refusal.quota == Quota::Rpm {
                    let wait = u64::try_from(refusal.retry_after.as_nanos()).unwrap_or(u64::MAX);
                    *tenant.state.refused.lock() = Some((now.nanos.saturating_add(wait), denied));
                }
                Err(denied)
            }
            None => {
                metrics::count_store_error();
                leave_all(&mut tenant.state.ledger.lock(), &demand);
                self.admit_at(now, access, demand)
            }
        }
    }

    pub(crate) fn now(&self) -> Now {
        Now {
            nanos: u64::try_from(self.inner.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX),
            unix: unix_now(),
        }
    }

    /// Since when it counts, in seconds since 1970.
    pub(crate) fn started(&self) -> i64 {
        self.inner.started
    }
}

fn unix_now() -> i64 {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(unix.as_secs()).unwrap_or(i64::MAX)
}

impl Default for Tenancy {
    /// Everybody may come in.
    fn default() -> Self {
        Self::from(Keys::default())
    }
}

impl From<Keys> for Tenancy {
    fn from(keys: Keys) -> Self {
        Self::new(keys, TenantsFile::default(), None).expect("without tenants there is nothing to contradict")
    }
}

impl std::fmt::Debug for Tenancy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tenancy({} keys)", self.table().by_key.len())
    }
}

fn leave_all(ledger: &mut Ledger, demand: &Demand) {
    ledger.leave_queue(demand.choices, demand.input_tokens);
    ledger.leave(demand.choices);
}

fn deny(tenant: &Tenant, refusal: Refusal, standing: Standing) -> Denied {
    let Refusal { quota, limit, retry_after } = refusal;
    tenant.state.metrics.throttled(quota);
    Denied::Limited { quota, limit, retry_after, standing }
}

/// Takes from buckets and budget, or from none.
fn reserve(
    ledger: &mut Ledger,
    now: Now,
    limits: &Limits,
    budget: Option<&Budget>,
    demand: &Demand,
) -> Result<(Taken, Option<Spent>), Refusal> {
    let spent = ledger.budget(now.unix, budget, demand)?;
    let taken = ledger.take(now.nanos, limits, demand)?;
    spent.iter().for_each(|spent| ledger.spending.take(spent));
    Ok((taken, spent))
}

fn permit(
    access: &Access,
    demand: Demand,
    (taken, spent): (Taken, Option<Spent>),
    source: Source,
    standing: Standing,
) -> Permit {
    Permit::new(Reservation {
        tenant: Arc::clone(&access.tenant),
        trail: access.trail.clone(),
        demand,
        taken,
        spent,
        source,
        standing,
        admitted: Instant::now(),
        used: Used::default(),
    })
}

#[cfg(test)]
#[path = "tenancy_tests.rs"]
mod tests;
