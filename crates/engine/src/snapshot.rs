//! The engine's gauges, published once a step and read without stopping it.

use std::time::Duration;

use parking_lot::RwLock;

/// Numbers as of the last step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineSnapshot {
    /// Sequences in the running batch.
    pub num_running: u32,
    /// Sequences waiting.
    pub num_waiting: u32,
    /// The lowest priority of those.
    pub lowest_waiting: Option<i8>,
    /// Share of KV blocks referenced by sequences, `0..=1`.
    pub kv_usage: f64,
    /// Continuations ended per second, smoothed over the last ones; 0 until two have ended.
    pub finish_rate: f64,
    /// Milliseconds of the engine's clock at the last step.
    pub last_step_ms: u64,
}

impl EngineSnapshot {
    /// How long until `ahead` requests have ended at the current rate; between one second and one minute.
    pub fn estimated_wait(&self, ahead: u32) -> Duration {
        let seconds = if self.finish_rate > 0.0 { f64::from(ahead) / self.finish_rate } else { 1.0 };
        Duration::from_secs_f64(seconds.clamp(1.0, 60.0))
    }
}

/// Written by the dispatcher, read by anyone.
#[derive(Default)]
pub(crate) struct SharedSnapshot {
    inner: RwLock<EngineSnapshot>,
}

impl SharedSnapshot {
    pub(crate) fn load(&self) -> EngineSnapshot {
        *self.inner.read()
    }

    pub(crate) fn store(&self, snapshot: EngineSnapshot) {
        *self.inner.write() = snapshot;
    }
}
