//! Identifiers. Newtypes, so that a slot cannot be passed where a block is meant.

/// An entry of the model's vocabulary. Ids `>= vocab_size` are rejected at the edge.
pub type TokenId = u32;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// One request inside one engine, unique for the life of the process.
    RequestId(u64)
}
id! {
    /// A place in the persistent batch, `0..max_num_seqs`. The executor mirrors per-sequence state by slot.
    Slot(u32)
}
id! {
    /// A physical block of the KV cache, `0..num_blocks`.
    BlockId(u32)
}
id! {
    /// A block of the host tier, `0..num_host_blocks`: KV that waits in host memory.
    HostBlockId(u32)
}
id! {
    /// One engine step. Strictly increasing.
    StepId(u64)
}
id! {
    /// A tenant, as an index into the configured tenants; 0 is the default (or anonymous) tenant.
    TenantId(u32)
}
id! {
    /// A LoRA adapter, as an index into those that the model was loaded with.
    AdapterId(u32)
}
id! {
    /// A point in time or a duration in microseconds. The epoch is the caller's (engine start, or 0 in a simulation).
    Micros(u64)
}

impl Micros {
    /// Time since `earlier`, zero if `earlier` lies in the future.
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// In seconds, for metrics.
    pub const fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e6
    }
}
