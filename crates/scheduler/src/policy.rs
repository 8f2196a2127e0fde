//! Who goes first. One total order decides admission (first in order enters first), the use of a short token budget
//! (first in order computes first) and preemption (last in order loses its blocks).
//!
//! Because a sequence only ever takes blocks from those after it, the first one always advances, and because nothing in
//! the key changes while a request lives, everyone becomes first: no starvation among equals. Fair share will be one
//! more field of the key, in front of `arrival`.

use std::cmp::Reverse;

use quire_core::{Micros, Request, RequestId};

/// Position in the order: smaller goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OrderKey {
    priority: Reverse<i8>,
    arrival: Micros,
    request: RequestId,
    index: u32,
}

impl OrderKey {
    pub(crate) fn new(request: &Request, index: u32) -> Self {
        Self { priority: Reverse(request.priority), arrival: request.arrival, request: request.id, index }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quire_core::{CacheSalt, SamplingParams, TenantId};

    use super::*;

    fn key(id: u64, priority: i8, arrival: u64, index: u32) -> OrderKey {
        let request = Request {
            id: RequestId(id),
            prompt: Arc::from([1]),
            block_hashes: Arc::from([]),
            salt: CacheSalt(0),
            params: Arc::new(SamplingParams::default()),
            tenant: TenantId(0),
            priority,
            arrival: Micros(arrival),
            deadline: None,
        };
        OrderKey::new(&request, index)
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
