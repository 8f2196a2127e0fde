//! Who enters the batch next: the highest priority first, in it the tenant that was served least, of its sequences the
//! first in order. Except that every other place goes to whoever has waited too long, if that is below the highest
//! priority: priorities delay, they do not starve.
//!
//! One queue per priority and tenant, and one ordered set of those queues by the counter of their tenant. Counters only
//! grow, so an entry of that set may lie behind the truth but never ahead of it: it is brought up to date when it comes
//! to the front. A decision therefore costs a few look-ups in ordered maps, whatever the number of tenants.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use quire_core::{Micros, TenantId};

use crate::fair::{Counter, FairShare};
use crate::policy::OrderKey;
use crate::sequence::SeqIndex;

/// A priority and a tenant: the name of a queue.
type QueueName = (Reverse<i8>, TenantId);

#[derive(Debug, Default)]
struct TenantQueue {
    seqs: BTreeMap<OrderKey, SeqIndex>,
    /// The counter under which it stands in `ready`.
    listed: Counter,
}

/// All sequences that wait for a place in the batch.
#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    queues: BTreeMap<QueueName, TenantQueue>,
    ready: BTreeSet<(Reverse<i8>, Counter, TenantId)>,
    /// Arrivals, ascending; entries of sequences that no longer wait are dropped when they come to the front.
    by_age: VecDeque<OrderKey>,
    len: usize,
    /// The queue that was served last, and the counter of its tenant then.
    last: Option<QueueName>,
    level: Counter,
    /// The last place went to somebody who had waited too long.
    served_aged: bool,
    /// Tenants that cannot be served in this step.
    skipped: BTreeSet<TenantId>,
}

impl WaitingQueue {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Sequences in an order that is fixed but means nothing.
    pub(crate) fn seqs(&self) -> impl Iterator<Item = SeqIndex> + '_ {
        self.queues.values().flat_map(|queue| queue.seqs.values().copied())
    }

    pub(crate) fn get(&self, key: &OrderKey) -> Option<SeqIndex> {
        self.queues.get(&key.queue())?.seqs.get(key).copied()
    }

    /// `fresh`: it never waited before, so that its tenant may come back from idleness.
    pub(crate) fn insert(&mut self, key: OrderKey, seq: SeqIndex, fresh: bool, fair: &mut FairShare) {
        let name = key.queue();
        if !self.queues.contains_key(&name) {
            self.open_queue(name, fresh, fair);
        }
        let queue = self.queues.entry(name).or_default();
        queue.seqs.insert(key, seq);
        self.len += 1;
        self.note_age(key);
    }

    /// The tenant had nothing waiting here: it starts at the level of those who have.
    fn open_queue(&mut self, name: QueueName, fresh: bool, fair: &mut FairShare) {
        let (priority, tenant) = name;
        if fresh {
            let level = self.front(priority, fair).map_or(self.level, |(_, counter)| counter);
            fair.lift(tenant, level);
        }
        let listed = fair.counter(tenant);
        self.ready.insert((priority, listed, tenant));
        self.queues.insert(name, TenantQueue { seqs: BTreeMap::new(), listed });
    }

    fn note_age(&mut self, key: OrderKey) {
        // Stale entries are at most as many as waiting ones.
        if self.by_age.len() > 2 * self.len + 64 {
            let queues = &self.queues;
            let waits = |key: &OrderKey| queues.get(&key.queue()).is_some_and(|q| q.seqs.contains_key(key));
            self.by_age.retain(waits);
        }
        let at = match self.by_age.back() {
            Some(last) if last.arrival() > key.arrival() => {
                self.by_age.partition_point(|other| other.arrival() <= key.arrival())
            }
            _ => self.by_age.len(),
        };
        self.by_age.insert(at, key);
    }

    pub(crate) fn remove(&mut self, key: &OrderKey) {
        let name = key.queue();
        let Some(queue) = self.queues.get_mut(&name) else { return };
        if queue.seqs.remove(key).is_none() {
            return;
        }
        self.len -= 1;
        if queue.seqs.is_empty() {
            let (priority, tenant) = name;
            self.ready.remove(&(priority, queue.listed, tenant));
            self.queues.remove(&name);
        }
    }

    /// The smallest counter in a priority, and whose it is; brings entries up to date on the way.
    fn front(&mut self, priority: Reverse<i8>, fair: &FairShare) -> Option<(TenantId, Counter)> {
        loop {
            let from = (priority, Counter(0.0), TenantId(0));
            let mut entries = self.ready.range(from..).take_while(|entry| entry.0 == priority);
            let &(_, listed, tenant) = entries.find(|entry| !self.skipped.contains(&entry.2))?;
            let counter = fair.counter(tenant);
            if counter == listed {
                return Some((tenant, counter));
            }
            self.ready.remove(&(priority, listed, tenant));
            self.ready.insert((priority, counter, tenant));
            if let Some(queue) = self.queues.get_mut(&(priority, tenant)) {
                queue.listed = counter;
            }
        }
    }

    /// Who is next, if anybody waits whose tenant is not skipped. Does not remove it.
    pub(crate) fn first(&mut self, now: Micros, fair: &FairShare) -> Option<SeqIndex> {
        if let Some(key) = self.aged(now, fair.config().max_queue_age) {
            // The oldest stands for its queue, whose order is the tenant's own.
            return self.queues.get(&key.queue())?.seqs.first_key_value().map(|(_, &seq)| seq);
        }
        let mut from = None;
        loop {
            let priority = self.next_priority(from)?;
            if let Some(tenant) = self.next_tenant(priority, fair) {
                let queue = self.queues.get(&(priority, tenant))?;
                return queue.seqs.first_key_value().map(|(_, &seq)| seq);
            }
            from = Some(priority);
        }
    }

    fn next_priority(&self, after: Option<Reverse<i8>>) -> Option<Reverse<i8>> {
        let Some(after) = after else { return self.ready.first().map(|entry| entry.0) };
        let below = Reverse(after.0.checked_sub(1)?);
        self.ready.range((below, Counter(0.0), TenantId(0))..).next().map(|entry| entry.0)
    }

    /// The tenant with the smallest counter, or the one served last while it is not too far ahead.
    fn next_tenant(&mut self, priority: Reverse<i8>, fair: &FairShare) -> Option<TenantId> {
        let (tenant, counter) = self.front(priority, fair)?;
        if let Some(last) = self.last
            && last.0 == priority
            && self.queues.contains_key(&last)
            && !self.skipped.contains(&last.1)
            && fair.counter(last.1).0 <= counter.0 + fair.config().quantum
        {
            return Some(last.1);
        }
        Some(tenant)
    }

    /// The longest waiting sequence, if it has waited too long, priority keeps it waiting, and it is its turn.
    fn aged(&mut self, now: Micros, max_queue_age: u64) -> Option<OrderKey> {
        while let Some(&key) = self.by_age.front() {
            if self.get(&key).is_none() {
                self.by_age.pop_front();
                continue;
            }
            let (priority, tenant) = key.queue();
            let held_back = self.ready.first().is_some_and(|entry| entry.0 < priority);
            let aged = now.since(key.arrival()).0 >= max_queue_age;
            let usable = !self.served_aged && !self.skipped.contains(&tenant);
            return (held_back && aged && usable).then_some(key);
        }
        None
    }

    /// The sequence with this key is served: it leaves the queue, and its tenant is in turn.
    pub(crate) fn serve(&mut self, key: &OrderKey, fair: &FairShare) {
        let name = key.queue();
        self.served_aged = self.ready.first().is_some_and(|entry| entry.0 < name.0);
        self.last = Some(name);
        self.level = fair.counter(name.1);
        self.remove(key);
    }

    /// Leaves a tenant out until [`Self::end_step`].
    pub(crate) fn skip(&mut self, tenant: TenantId) {
        self.skipped.insert(tenant);
    }

    pub(crate) fn end_step(&mut self) {
        if !self.skipped.is_empty() {
            self.skipped.clear();
        }
    }

    /// Recounts.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut len = 0;
        for (name, queue) in &self.queues {
            len += queue.seqs.len();
            if queue.seqs.is_empty() || queue.seqs.keys().any(|key| key.queue() != *name) {
                return Err(format!("queue {name:?} is empty or holds a stranger"));
            }
            if !self.ready.contains(&(name.0, queue.listed, name.1)) {
                return Err(format!("queue {name:?} is not listed under {:?}", queue.listed));
            }
        }
        if len != self.len || self.ready.len() != self.queues.len() {
            return Err(format!(
                "{len} wait in {} queues, counted {} and {}",
                self.queues.len(),
                self.len,
                self.ready.len()
            ));
        }
        if self.by_age.len() < len || !self.by_age.iter().map(OrderKey::arrival).is_sorted() {
            return Err("the list by age is incomplete or out of order".into());
        }
        if !self.skipped.is_empty() {
            return Err("tenants are skipped between steps".into());
        }
        Ok(())
    }
}
