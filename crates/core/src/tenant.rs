//! What the engine knows of a tenant. Keys, quotas and names stay outside (crate `tenancy`).

/// A tenant's share of the engine. Tables of these are indexed by [`crate::TenantId`]; an id beyond the table has the
/// default share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TenantShare {
    /// Fair-share weight; > 0. A tenant with weight 2 gets twice the service of one with weight 1 while both wait.
    pub weight: f32,
    /// Part of the KV pool that its live sequences may hold together; in (0, 1].
    pub kv_blocks_share: f32,
}

impl Default for TenantShare {
    /// Weight 1, the whole pool.
    fn default() -> Self {
        Self { weight: 1.0, kv_blocks_share: 1.0 }
    }
}
