//! Who asks, and how much they may have: credentials to tenants, demands to permits.
//!
//! Both front ends go through the same two doors: [`Tenancy::authenticate`] for every call, [`Tenancy::admit`] for every
//! request that is to be queued. What was reserved is settled when the [`Permit`] is gone, however the request ended.
//!
//! Invariants:
//! * keys are hashed when they come in and looked up by SHA-256; no error and no `Debug` output holds one;
//! * without keys everybody is the anonymous tenant; with keys nobody is, and no reload opens a server that was closed;
//! * a refused request takes nothing; an admitted one gives back what it did not use, once;
//! * a reload keeps ids, what is in use, and permits; a file that cannot be used changes nothing;
//! * time is an argument of everything that counts (`gcra`, `ledger`); no lock is held across an await;
//! * a record of the audit log holds no key and nothing that a client said;
//! * bounded: tenants, keys, ids, labels, settlements and records in wait.
//!
//! Reading order: [`file`] with `values`, [`limits`], [`budget`] and [`network`]; [`gcra`], `ledger`, [`demand`]; [`tenancy`], `table`,
//! [`tenant`], [`permit`]; `shared` with its scripts, [`watch`], `metrics`, `usage` with `usage_history`; `audit` with `audit_writer`;
//! `edit`.
#![forbid(unsafe_code)]

mod audit;
mod audit_writer;
pub mod budget;
mod credential;
pub mod demand;
mod edit;
pub mod file;
pub mod gcra;
mod ledger;
pub mod limits;
mod metrics;
pub mod network;
pub mod permit;
mod shared;
mod table;
pub mod tenancy;
pub mod tenant;
mod usage;
mod usage_history;
mod values;
pub mod watch;

pub use audit::{Answer, AuditLog, AuditTarget, OnFull, Trail};
pub use budget::{Budget, OverBudget, Period, Window};
pub use credential::{AuthError, KeyDigest, KeyError, Keys, bearer};
pub use demand::{Demand, Denied};
pub use edit::{Change, EditError, Expected, KeyView, TenantView, TenantsEditor};
pub use file::{FileError, TenantsFile};
pub use gcra::Level;
pub use ledger::Standing;
pub use limits::{Quota, Scope};
pub use permit::Permit;
pub use shared::{SharedStore, StoreError};
pub use table::TableError;
pub use tenancy::Tenancy;
pub use tenant::{Access, Tenant};
pub use usage::Usage;
pub use usage_history::{Counts, MAX_WINDOW};
pub use watch::Watch;
