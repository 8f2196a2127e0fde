//! The prompts that are yet to be computed, and when one more would have its first token.
//!
//! Work is time on the device with nothing else on it. A request is served after those of a higher priority, and after
//! those of its tenant that are due earlier; of the other tenants, as much work goes before it as fair shares give them
//! meanwhile.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Bound;

use quire_core::{Micros, RequestId, TenantId};

/// Over how long inflows are averaged, in microseconds.
const MEMORY: f64 = 10_000_000.0;
/// Over a few seconds a tenant may send so many times what it sends on average.
const BURST: f64 = 3.0;
/// An inflow that is no more than this part of the device has run dry.
const DRY: f64 = 1e-3;

type Queue = (Reverse<i8>, TenantId);

/// Where a prompt stands in the backlog.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Place {
    pub(crate) priority: Reverse<i8>,
    pub(crate) tenant: TenantId,
    /// When its first token is due.
    pub(crate) due: Micros,
}

#[derive(Clone, Copy, Debug)]
struct Prompt {
    /// What is left of it, in microseconds.
    work: f64,
    /// Nothing can make it late: it is late.
    is_late: bool,
}

#[derive(Debug, Default)]
struct Line {
    prompts: BTreeMap<(Micros, RequestId), Prompt>,
    work: f64,
}

/// How much work a tenant was promised lately: a sum that decays with [`MEMORY`].
#[derive(Clone, Copy, Debug)]
struct Inflow {
    work: f64,
    at: Micros,
}

impl Inflow {
    /// What is left of the sum. Not an exponential, whose last bits differ between machines.
    fn work_at(&self, now: Micros) -> f64 {
        self.work / (1.0 + now.since(self.at).0 as f64 / MEMORY)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    lines: BTreeMap<Queue, Line>,
    inflows: BTreeMap<Queue, Inflow>,
    /// The next inflow to be looked at for whether it has run dry.
    next: Option<Queue>,
}

/// What a request finds when it comes.
#[derive(Clone, Copy)]
pub(crate) struct Newcomer<'a> {
    pub(crate) place: Place,
    pub(crate) now: Micros,
    /// Of its own prompt, in microseconds, and what it is to leave for others.
    pub(crate) work: f64,
    pub(crate) headroom: f64,
    /// How much longer prompts take than alone on the device.
    pub(crate) slowdown: f64,
    /// What share a tenant has, in units of this one's.
    pub(crate) relative_share: &'a dyn Fn(TenantId) -> f64,
}

impl Backlog {
    pub(crate) fn insert(&mut self, id: RequestId, place: &Place, work: f64, is_late: bool) {
        let line = self.lines.entry((place.priority, place.tenant)).or_default();
        line.prompts.insert((place.due, id), Prompt { work, is_late });
        line.work += work;
    }

    /// Takes note of work that was promised.
    pub(crate) fn promised(&mut self, place: &Place, work: f64, now: Micros) {
        let queue = (place.priority, place.tenant);
        let inflow = self.inflows.entry(queue).or_insert(Inflow { work: 0.0, at: now });
        *inflow = Inflow { work: inflow.work_at(now) + work, at: now };
        // One other is looked at each time, so that there are never many that have run dry.
        let from = self.next.map_or(Bound::Unbounded, Bound::Excluded);
        self.next = self.inflows.range((from, Bound::Unbounded)).next().map(|(&queue, _)| queue);
        if let Some(queue) = self.next
            && self.inflows[&queue].work_at(now) < DRY * MEMORY
        {
            self.inflows.remove(&queue);
        }
    }

    /// So much is left of a prompt; nothing: it goes. One that is not here is ignored.
    pub(crate) fn set(&mut self, id: RequestId, place: &Place, work: f64) {
        let queue = (place.priority, place.tenant);
        let Some(line) = self.lines.get_mut(&queue) else { return };
        if work > 0.0 {
            let Some(prompt) = line.prompts.get_mut(&(place.due, id)) else { return };
            line.work += work - std::mem::replace(&mut prompt.work, work);
            return;
        }
        if let Some(prompt) = line.prompts.remove(&(place.due, id)) {
            line.work -= prompt.work;
        }
        // A sum of its own for each stretch of waiting, so that rounding does not add up.
        if line.prompts.is_empty() {
            self.lines.remove(&queue);
        }
    }

    /// By how much a first token would be too late if this request queued up: its own, or one of its tenant that was
    /// promised and that it would delay. In microseconds; not positive: all are in time.
    pub(crate) fn lateness(&self, new: &Newcomer<'_>) -> f64 {
        let Newcomer { place, now, slowdown, .. } = *new;
        let own = self.lines.get(&(place.priority, place.tenant));
        let (mut ahead, mut behind) = (0.0, Vec::new());
        for (&(due, _), prompt) in own.iter().flat_map(|line| &line.prompts) {
            if due <= place.due {
                ahead += prompt.work;
            } else if !prompt.is_late {
                behind.push((due, prompt.work));
            } else {
                behind.push((Micros(u64::MAX), prompt.work));
            }
        }
        let late = |work: f64, due: Micros| now.0 as f64 + slowdown * work - due.0 as f64;
        let mut total = ahead + new.work;
        let others = self.others(new, total);
        let worst = late(others + ahead + new.work.max(new.headroom), place.due);
        if worst > 0.0 {
            return worst;
        }
        for (due, work) in behind {
            total += work;
            // At least what goes before the newcomer; counting tenants again for each would cost more than it tells.
            let with = late(others + total, due);
            let without = with - slowdown * new.work;
            if with > 0.0 && without <= 0.0 {
                return with;
            }
        }
        worst
    }

    /// Work of others that is served before so much of the tenant's own: what waits, and what comes meanwhile, if it
    /// comes as it did lately; no more than its share in all.
    fn others(&self, new: &Newcomer<'_>, own_work: f64) -> f64 {
        let Place { priority, tenant, .. } = new.place;
        let upto = ..=(priority, TenantId(u32::MAX));
        let is_other = |&(of, whose): &Queue| of != priority || whose != tenant;
        let capped = |(of, whose): Queue, work: f64| {
            if of == priority { work.min(own_work * (new.relative_share)(whose)) } else { work }
        };
        let lines = self.lines.range(upto).filter(|(queue, _)| is_other(queue));
        let waiting: f64 = lines.map(|(&queue, line)| capped(queue, line.work)).sum();
        let meanwhile = BURST * new.slowdown * (own_work + waiting) / MEMORY;
        let inflows = self.inflows.range(upto).filter(|(queue, _)| is_other(queue));
        let coming = inflows.map(|(&queue, inflow)| {
            let waits = self.lines.get(&queue).map_or(0.0, |line| line.work);
            capped(queue, waits + meanwhile * inflow.work_at(new.now)) - capped(queue, waits)
        });
        waiting + coming.sum::<f64>()
    }

    pub(crate) fn len(&self) -> usize {
        self.lines.values().map(|line| line.prompts.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(priority: i8, tenant: u32, due: u64) -> Place {
        Place { priority: Reverse(priority), tenant: TenantId(tenant), due: Micros(due) }
    }

    fn lateness(backlog: &Backlog, place: Place, work: f64, slowdown: f64) -> f64 {
        let relative_share = &|tenant: TenantId| if tenant == TenantId(9) { 3.0 } else { 1.0 };
        backlog.lateness(&Newcomer { place, now: Micros(100), work, headroom: 0.0, slowdown, relative_share })
    }

    #[test]
    fn what_is_due_earlier_goes_first_and_priorities_before_all() {
        let mut backlog = Backlog::default();
        backlog.insert(RequestId(1), &place(0, 0, 500), 30.0, false);
        backlog.insert(RequestId(2), &place(0, 0, 900), 1000.0, false);
        backlog.insert(RequestId(3), &place(1, 5, 9999), 7.0, false);
        backlog.insert(RequestId(4), &place(-1, 0, 1), 5000.0, false);
        assert_eq!(lateness(&backlog, place(0, 0, 600), 10.0, 2.0), 100.0 + 2.0 * 47.0 - 600.0);
        backlog.set(RequestId(1), &place(0, 0, 500), 20.0);
        assert_eq!(lateness(&backlog, place(0, 0, 600), 10.0, 2.0), 100.0 + 2.0 * 37.0 - 600.0);
        backlog.set(RequestId(1), &place(0, 0, 500), 0.0);
        assert_eq!(lateness(&backlog, place(0, 0, 600), 10.0, 2.0), 100.0 + 2.0 * 17.0 - 600.0);
        assert_eq!(backlog.len(), 3);
    }

    #[test]
    fn a_newcomer_must_not_make_others_late_unless_they_are() {
        let mut backlog = Backlog::default();
        backlog.insert(RequestId(1), &place(0, 0, 1000), 850.0, false);
        assert!(lateness(&backlog, place(0, 0, 600), 40.0, 1.0) < 0.0);
        assert_eq!(lateness(&backlog, place(0, 0, 600), 60.0, 1.0), 10.0, "the other would be late");
        assert!(lateness(&backlog, place(0, 0, 600), 60.0, 1.1) < 0.0, "it is already");
        assert!(
            lateness(&backlog, place(0, 1, 600), 60.0, 1.0) < 0.0,
            "tenants do not stand in each other's line"
        );
        assert!(lateness(&backlog, place(1, 0, 600), 60.0, 1.0) < 0.0, "nor do priorities");
        backlog.set(RequestId(1), &place(0, 0, 1000), 0.0);
        backlog.insert(RequestId(1), &place(0, 0, 1000), 850.0, true);
        assert!(
            lateness(&backlog, place(0, 0, 600), 60.0, 1.0) < 0.0,
            "it was put off, and promised nothing"
        );
    }

    #[test]
    fn other_tenants_take_their_share_and_no_more() {
        let mut backlog = Backlog::default();
        backlog.insert(RequestId(1), &place(0, 1, 500), 5000.0, false);
        backlog.insert(RequestId(2), &place(0, 2, 500), 8.0, false);
        assert_eq!(lateness(&backlog, place(0, 0, 600), 50.0, 1.0), 100.0 + 50.0 + 50.0 + 8.0 - 600.0);
        backlog.insert(RequestId(3), &place(0, 9, 500), 5000.0, false);
        assert_eq!(
            lateness(&backlog, place(0, 0, 600), 50.0, 1.0),
            100.0 + 50.0 + 50.0 + 8.0 + 150.0 - 600.0
        );
    }

    #[test]
    fn what_others_will_send_goes_before_up_to_their_share() {
        let mut backlog = Backlog::default();
        let late = |backlog: &Backlog, tenant, work| lateness(backlog, place(0, tenant, 600), work, 1.0);
        // A tenth of the device over the memory; in a burst three tenths.
        backlog.promised(&place(0, 1, 500), 0.1 * MEMORY, Micros(100));
        assert_eq!(late(&backlog, 0, 50.0), 100.0 + 50.0 + 0.3 * 50.0 - 600.0);
        assert_eq!(late(&backlog, 1, 50.0), 100.0 + 50.0 - 600.0, "its own is no other's");
        for _ in 0..20 {
            backlog.promised(&place(0, 1, 500), 0.1 * MEMORY, Micros(100));
        }
        assert_eq!(late(&backlog, 0, 50.0), 100.0 + 50.0 + 50.0 - 600.0, "no more than its share");
        // It ran dry long ago, and goes when another one's is noted.
        for _ in 0..3 {
            backlog.promised(&place(0, 2, 500), 1.0, Micros(1 << 40));
        }
        assert!(!backlog.inflows.contains_key(&(Reverse(0), TenantId(1))));
    }
}
