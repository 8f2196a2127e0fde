//! The order of sequences. One total order decides the use of a short token budget (first in order computes first) and
//! who may take blocks from whom (only from those after oneself); within the queue of a tenant it decides admission.
//!
//! Because a sequence only ever takes blocks from those after it, the first one always advances, and because nothing in
//! the key changes while a request lives, everyone becomes first. Fairness between tenants lies in admission
//! (`waiting`), and in the choice of the victim among those after.

use std::cmp::Reverse;

use quire_core::{Micros, Request, RequestId, TenantId};

use crate::pacing::LatencyTargets;

/// In which order requests of one tenant and priority are served, and how their prompts are cut.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Policy {
    /// By arrival; chunks as large as the step's budget allows.
    #[default]
    Fcfs,
    /// By slack to latency targets; chunks as large as the targets allow; what cannot be done in time is refused.
    DeadlineSlack(LatencyTargets),
}

/// Position in the order: smaller goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OrderKey {
    priority: Reverse<i8>,
    /// When it should be served; its arrival where nothing is due.
    due: Micros,
    arrival: Micros,
    request: RequestId,
    index: u32,
    /// Last, so that it decides nothing.
    tenant: TenantId,
}

impl OrderKey {
    /// `tenant`: as registered.
    pub(crate) fn new(request: &Request, index: u32, tenant: TenantId, due: Micros) -> Self {
        Self {
            priority: Reverse(request.priority),
            due,
            arrival: request.arrival,
            request: request.id,
            index,
            tenant,
        }
    }

    /// The same sequence, put off.
    pub(crate) fn due_at(self, due: Micros) -> Self {
        Self { due, ..self }
    }

    pub(crate) fn priority(&self) -> i8 {
        self.priority.0
    }

    pub(crate) fn arrival(&self) -> Micros {
        self.arrival
    }

    /// Larger is newer.
    pub(crate) fn age(&self) -> (Micros, RequestId) {
        (self.arrival, self.request)
    }

    /// The queue in which it waits.
    pub(crate) fn queue(&self) -> (Reverse<i8>, TenantId) {
        (self.priority, self.tenant)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quire_core::{CacheSalt, SamplingParams};

    use super::*;

    fn key(id: u64, priority: i8, arrival: u64, index: u32) -> OrderKey {
        let request = Request {
            id: RequestId(id),
            prompt: Arc::from([1]),
            block_hashes: Arc::from([]),
            salt: CacheSalt(0),
            adapter: None,
            params: Arc::new(SamplingParams::default()),
            tenant: TenantId(0),
            priority,
            arrival: Micros(arrival),
            deadline: None,
        };
        OrderKey::new(&request, index, TenantId(id as u32 % 3), request.arrival)
    }

    #[test]
    fn priority_then_arrival_then_id_then_index() {
        let order = [
            key(9, 1, 9, 0),
            key(8, 0, 1, 0),
            key(2, 0, 2, 0),
            key(3, 0, 2, 0),
            key(3, 0, 2, 1),
            key(1, -1, 0, 0),
        ];
        assert!(order.is_sorted_by(|a, b| a < b));
    }
}
