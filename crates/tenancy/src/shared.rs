//! Limits that replicas share, in Redis: one script an admission, one a settlement, each atomic there and in Redis' time.
//!
//! A request waits for Redis at most `timeout_ms` of the address, and never for a connection: connecting is a background task's.
//! While Redis is away, each replica's own limits apply (`docs/adr`). Concurrency is kept as a number for each replica
//! that only it writes; the numbers of a replica that fell silent expire.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Weak};
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, Script};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::budget::{Budget, OverBudget, Period, Spent, Window};
use crate::demand::Demand;
use crate::gcra::{self, Rate};
use crate::ledger::{RATES, Refusal, Standing, Taken, rates};
use crate::limits::{Limits, Quota};
use crate::metrics;

/// How long an admission waits for Redis, unless the address says otherwise.
const DEFAULT_TIMEOUT_MS: u64 = 100;
/// How long it may be told to wait.
const MAX_TIMEOUT_MS: u64 = 10_000;
/// How long anything else does.
const SLOW_TIMEOUT: Duration = Duration::from_secs(1);
/// A replica that is silent for so long has nothing in flight any more.
const LEASE: Duration = Duration::from_secs(30);
/// How often it speaks, and how often a lost connection is tried again.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between two times that a replica speaks of what it has in flight.
const TICKS_PER_LEASE: u64 = 10;
/// Seconds for which the count of a budget outlives its period: the clocks of replicas and store may differ.
const KEEP_BUDGET: i64 = 86_400;
/// Settlements that wait to be sent. More are dropped, which charges their requests in full.
const MAX_SETTLEMENTS: usize = 4096;

/// Why a store cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The address is none of Redis.
    #[error("must be `memory` or redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE][?timeout_ms=N]: {0}")]
    Address(String),
    /// It asks for TLS.
    #[error("rediss:// (TLS) is not supported; use redis:// in a private network or through a TLS tunnel")]
    Tls,
}

/// The store that replicas share.
pub struct SharedStore {
    client: Client,
    /// How long an admission waits.
    patience: Duration,
    /// This process among the replicas.
    replica: String,
    connection: Mutex<Option<MultiplexedConnection>>,
    settlements: mpsc::Sender<Settlement>,
    /// Answers in flight here, by tenant, with the version of the number.
    in_flight: DashMap<Arc<str>, (u32, u64)>,
    charge: Script,
    settle: Script,
}

/// An admission.
pub(crate) struct Charge<'a> {
    pub(crate) tenant: &'a Arc<str>,
    pub(crate) limits: &'a Limits,
    /// The budget, and its period that runs.
    pub(crate) budget: Option<(&'a Budget, Window)>,
    pub(crate) demand: &'a Demand,
    /// In this process, this request included; and the version of the number.
    pub(crate) in_flight: (u32, u64),
}

/// An admission that was let in.
pub(crate) struct Charged {
    pub(crate) taken: Taken,
    /// What of the budget, and what is used of it by all replicas.
    pub(crate) budget: Option<(Spent, u64)>,
    pub(crate) standing: Standing,
}

/// The end of a request.
pub(crate) struct Settlement {
    pub(crate) tenant: Arc<str>,
    pub(crate) unused: Taken,
    /// Tokens of the budget that were not used.
    pub(crate) unspent: Option<Spent>,
    pub(crate) in_flight: (u32, u64),
}

impl SharedStore {
    /// Connects, or keeps trying in the background. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The address is wrong. That nobody answers there is no error.
    pub async fn start(url: &str) -> Result<Arc<Self>, StoreError> {
        let (url, patience) = split_timeout(url)?;
        let client = Client::open(url).map_err(|error| StoreError::Address(error.to_string()))?;
        if let ConnectionAddr::TcpTls { .. } = client.get_connection_info().addr() {
            return Err(StoreError::Tls);
        }
        let (settlements, inbox) = mpsc::channel(MAX_SETTLEMENTS);
        let script = |body: &str| Script::new(&[include_str!("announce.lua"), body].concat());
        let store = Arc::new(Self {
            patience,
            replica: format!("{:016x}", RandomState::new().hash_one(std::process::id())),
            connection: Mutex::new(None),
            settlements,
            in_flight: DashMap::new(),
            charge: script(include_str!("charge.lua")),
            settle: script(include_str!("settle.lua")),
            client,
        });
        if !store.connect().await {
            tracing::warn!("the quota store does not answer; until it does, each replica's own limits apply");
        }
        tokio::spawn(maintain(Arc::downgrade(&store), inbox));
        Ok(store)
    }

    /// Whether the store answered last.
    pub fn is_connected(&self) -> bool {
        self.connection.lock().is_some()
    }

    async fn connect(&self) -> bool {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(SLOW_TIMEOUT))
            .set_response_timeout(Some(SLOW_TIMEOUT));
        let connecting = async {
            let mut connection = self.client.get_multiplexed_async_connection_with_config(&config).await?;
            self.charge.load_async(&mut connection).await?;
            self.settle.load_async(&mut connection).await?;
            redis::RedisResult::Ok(connection)
        };
        match timeout(SLOW_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => {
                *self.connection.lock() = Some(connection);
                true
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "cannot connect to the quota store");
                false
            }
            Err(_) => false,
        }
    }

    /// A connection that failed is not used again.
    fn disconnect(&self, reason: &str) {
        metrics::count_store_error();
        if self.connection.lock().take().is_some() {
            tracing::error!(
                reason,
                "the quota store failed; until it answers, each replica's own limits apply"
            );
        }
    }

    /// Takes places and units over all replicas, or says which limit refuses. `None`: the store did not answer.
    pub(crate) async fn charge(&self, charge: Charge<'_>) -> Option<Result<Charged, (Refusal, Standing)>> {
        let Charge { tenant, limits, budget, demand, in_flight } = charge;
        self.note(tenant, in_flight);
        let Some(mut connection) = self.connection.lock().clone() else {
            metrics::count_store_error();
            return None;
        };
        let rates = rates(limits);
        let mut taken = [0; 3];
        let mut call = self.charge.prepare_invoke();
        keys(&mut call, tenant, budget.map(|(budget, window)| (budget.period, window)));
        for (at, cost) in demand.costs().into_iter().enumerate() {
            let micros = |rate: Rate, units| rate.duration_of(units).div_ceil(1000);
            let (cost, burst) =
                rates[at].map_or((0, 0), |rate| (micros(rate, cost), micros(rate, rate.burst())));
            taken[at] = cost.saturating_mul(1000);
            call.arg(cost).arg(burst);
        }
        call.arg(limits.concurrency.unwrap_or(0)).arg(&self.replica).arg(in_flight.1).arg(in_flight.0);
        call.arg(LEASE.as_micros() as u64);
        let (tokens, cost) = budget.map_or((0, 0), |(budget, _)| (budget.tokens, demand.tokens()));
        let rejects = budget.is_some_and(|(budget, _)| budget.action == OverBudget::Reject);
        call.arg(tokens).arg(cost).arg(u8::from(rejects));
        call.arg(budget.map_or(0, |(_, window)| window.end.saturating_add(KEEP_BUDGET)));
        let answer = timeout(self.patience, call.invoke_async::<[u64; 7]>(&mut connection)).await;
        let [which, wait, lags @ .., used, over] = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                self.disconnect(&error.to_string());
                return None;
            }
            Err(_) => {
                self.disconnect("no answer in time");
                return None;
            }
        };
        let mut levels = [None; 3];
        for (at, lag) in lags.into_iter().enumerate() {
            // Costs were rounded up to microseconds; that must not take a whole unit from what is told.
            let lag = lag.saturating_mul(1000).saturating_sub(999);
            levels[at] = rates[at].map(|rate| gcra::level(lag, rate));
        }
        let standing = Standing::of(levels);
        let (quota, limit) = match which {
            0 => {
                let spent = budget.map(|(budget, window)| {
                    let spent = Spent { period: budget.period, window, tokens: cost, is_over: over > 0 };
                    (spent, used)
                });
                return Some(Ok(Charged { taken, budget: spent, standing }));
            }
            at @ 1..=3 => {
                let at = at as usize - 1;
                (RATES[at], rates[at].map_or(0, Rate::limit))
            }
            5 => (Quota::Budget, tokens),
            _ => (Quota::Concurrency, limits.concurrency.unwrap_or(0).into()),
        };
        Some(Err((Refusal { quota, limit, retry_after: Duration::from_micros(wait) }, standing)))
    }

    /// Settles in the background.
    pub(crate) fn settle(&self, settlement: Settlement) {
        self.note(&settlement.tenant, settlement.in_flight);
        if self.settlements.try_send(settlement).is_err() {
            metrics::count_store_error();
        }
    }

    /// Remembers the newest number.
    fn note(&self, tenant: &Arc<str>, in_flight: (u32, u64)) {
        let mut entry = self.in_flight.entry(Arc::clone(tenant)).or_default();
        if entry.1 < in_flight.1 {
            *entry = in_flight;
        }
    }

    async fn send(&self, settlement: &Settlement) {
        // Lost while the store is away: leases end, and buckets refill.
        let Some(mut connection) = self.connection.lock().clone() else { return };
        let mut call = self.settle.prepare_invoke();
        let unspent = settlement.unspent;
        keys(&mut call, &settlement.tenant, unspent.map(|spent| (spent.period, spent.window)));
        for unused in settlement.unused {
            call.arg(unused / 1000);
        }
        let (here, version) = settlement.in_flight;
        call.arg(&self.replica).arg(version).arg(here).arg(LEASE.as_micros() as u64);
        call.arg(unspent.map_or(0, |spent| spent.tokens));
        match timeout(SLOW_TIMEOUT, call.invoke_async::<u64>(&mut connection)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => self.disconnect(&error.to_string()),
            Err(_) => self.disconnect("no answer in time"),
        }
    }

    /// Says what is in flight here, so that the leases do not end before the requests.
    async fn renew(&self) {
        self.in_flight.retain(|_, (count, _)| *count > 0);
        // Not held across the sends.
        let running: Vec<_> =
            self.in_flight.iter().map(|entry| (Arc::clone(entry.key()), *entry.value())).collect();
        for (tenant, in_flight) in running {
            self.send(&Settlement { tenant, unused: [0; 3], unspent: None, in_flight }).await;
        }
    }
}

/// Takes `timeout_ms` out of an address.
fn split_timeout(url: &str) -> Result<(String, Duration), StoreError> {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let mut ms = DEFAULT_TIMEOUT_MS;
    let mut rest: Vec<&str> = Vec::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        match part.strip_prefix("timeout_ms=") {
            None => rest.push(part),
            Some(value) => {
                let valid = value.parse().ok().filter(|value| (1..=MAX_TIMEOUT_MS).contains(value));
                let message = || format!("timeout_ms must be between 1 and {MAX_TIMEOUT_MS}, got {value:?}");
                ms = valid.ok_or_else(|| StoreError::Address(message()))?;
            }
        }
    }
    let query = if rest.is_empty() { String::new() } else { format!("?{}", rest.join("&")) };
    Ok((format!("{address}{query}"), Duration::from_millis(ms)))
}

/// One hash slot a tenant, so that scripts work in a cluster, too.
fn keys(call: &mut redis::ScriptInvocation<'_>, tenant: &str, budget: Option<(Period, Window)>) {
    for quota in RATES {
        call.key(format!("quire:{{{tenant}}}:{quota}"));
    }
    call.key(format!("quire:{{{tenant}}}:in_flight"));
    // Each period has a key of its own, so replicas whose clocks differ a little charge the period they are in.
    call.key(match budget {
        Some((period, window)) => format!("quire:{{{tenant}}}:budget:{period}:{}", window.start),
        None => format!("quire:{{{tenant}}}:budget"),
    });
}

/// Sends settlements, renews leases, connects again; ends with the store.
async fn maintain(store: Weak<SharedStore>, mut inbox: mpsc::Receiver<Settlement>) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count = 0_u64;
    loop {
        let settlement = tokio::select! {
            settlement = inbox.recv() => match settlement {
                Some(settlement) => Some(settlement),
                None => return,
            },
            _ = ticks.tick() => None,
        };
        let Some(store) = store.upgrade() else { return };
        match settlement {
            Some(settlement) => store.send(&settlement).await,
            None => {
                count += 1;
                let lost = !store.is_connected();
                if lost && store.connect().await {
                    tracing::info!("the quota store answers; limits are shared again");
                }
                if lost || count.is_multiple_of(TICKS_PER_LEASE) {
                    store.renew().await;
                }
            }
        }
    }
}
