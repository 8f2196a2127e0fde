//! Who enters the batch next: the highest priority first, in it the tenant that was served least, of its sequences the
//! first in order. Except that every other place goes to whoever has waited too long, if that is below the highest
//! priority: priorities delay, they do not starve.
//!
//! Within a priority there is one queue per tenant, and one ordered set of the tenants by counter. Counters only grow, so
//! an entry of that set may lie behind the truth but never ahead of it: it is brought up to date when it comes to the
//! front. A decision therefore costs a few look-ups, whatever the number of tenants.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use quire_core::{Micros, TenantId};

use crate::fair::{Counter, FairShare};
use crate::policy::OrderKey;
use crate::sequence::SeqIndex;

type Priority = Reverse<i8>;

#[derive(Debug, Default)]
struct TenantQueue {
    seqs: BTreeMap<OrderKey, SeqIndex>,
    /// The counter under which the tenant is listed as ready, unless the queue is empty.
    listed: Counter,
    /// Blocks with which its prompts begin alike, as far as is known.
    num_shared_blocks: u32,
}

/// All queues of a priority.
#[derive(Debug, Default)]
struct Class {
    /// By tenant.
    queues: Vec<TenantQueue>,
    /// Tenants whose queue is not empty.
    ready: BTreeSet<(Counter, TenantId)>,
}

impl Class {
    fn queue(&self, tenant: TenantId) -> Option<&TenantQueue> {
        self.queues.get(tenant.0 as usize)
    }

    fn first_of(&self, tenant: TenantId) -> Option<SeqIndex> {
        self.queue(tenant)?.seqs.first_key_value().map(|(_, &seq)| seq)
    }

    /// The smallest counter, and whose it is; brings entries up to date on the way.
    fn front(&mut self, skipped: &BTreeSet<TenantId>, fair: &FairShare) -> Option<(TenantId, Counter)> {
        loop {
            let &(listed, tenant) = self.ready.iter().find(|entry| !skipped.contains(&entry.1))?;
            let counter = fair.counter(tenant);
            if counter == listed {
                return Some((tenant, counter));
            }
            self.ready.remove(&(listed, tenant));
            self.ready.insert((counter, tenant));
            self.queues[tenant.0 as usize].listed = counter;
        }
    }
}

/// All sequences that wait for a place in the batch.
#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    classes: BTreeMap<Priority, Class>,
    /// By arrival; entries of sequences that no longer wait are dropped when they come to the front.
    by_age: VecDeque<OrderKey>,
    len: usize,
    /// The sum of [`TenantQueue::num_shared_blocks`].
    num_shared_blocks: u64,
    /// Whose queue was served last, and the counter of that tenant then.
    last: Option<(Priority, TenantId)>,
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
        let queues = self.classes.values().flat_map(|class| &class.queues);
        queues.flat_map(|queue| queue.seqs.values().copied())
    }

    pub(crate) fn get(&self, key: &OrderKey) -> Option<SeqIndex> {
        let (priority, tenant) = key.queue();
        self.classes.get(&priority)?.queue(tenant)?.seqs.get(key).copied()
    }

    /// `fresh`: it never waited before, so that its tenant may come back from idleness.
    pub(crate) fn insert(&mut self, key: OrderKey, seq: SeqIndex, fresh: bool, fair: &mut FairShare) {
        let (priority, tenant) = key.queue();
        let class = self.classes.entry(priority).or_default();
        if class.queues.len() <= tenant.0 as usize {
            class.queues.resize_with(tenant.0 as usize + 1, TenantQueue::default);
        }
        if class.queues[tenant.0 as usize].seqs.is_empty() {
            if fresh {
                // It starts at the level of those who have something waiting.
                let level = class.front(&self.skipped, fair).map_or(self.level, |(_, counter)| counter);
                fair.lift(tenant, level);
            }
            let listed = fair.counter(tenant);
            class.ready.insert((listed, tenant));
            class.queues[tenant.0 as usize].listed = listed;
        }
        class.queues[tenant.0 as usize].seqs.insert(key, seq);
        self.len += 1;
        self.note_age(key);
    }

    fn note_age(&mut self, key: OrderKey) {
        // Stale entries are at most as many as waiting ones.
        if self.by_age.len() > 2 * self.len + 64 {
            let mut by_age = std::mem::take(&mut self.by_age);
            by_age.retain(|key| self.get(key).is_some());
            self.by_age = by_age;
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
        let (priority, tenant) = key.queue();
        let Some(class) = self.classes.get_mut(&priority) else { return };
        let Some(queue) = class.queues.get_mut(tenant.0 as usize) else { return };
        if queue.seqs.remove(key).is_none() {
            return;
        }
        self.len -= 1;
        if queue.seqs.is_empty() {
            self.num_shared_blocks -= u64::from(std::mem::take(&mut queue.num_shared_blocks));
            class.ready.remove(&(queue.listed, tenant));
        }
    }

    /// Who is next, if anybody waits whose tenant is not skipped. Does not remove it.
    pub(crate) fn first(&mut self, now: Micros, fair: &FairShare) -> Option<SeqIndex> {
        if self.len == 0 {
            return None;
        }
        if let Some(key) = self.aged(now, fair.config().max_queue_age) {
            // The oldest stands for its queue, whose order is the tenant's own.
            let (priority, tenant) = key.queue();
            return self.classes.get(&priority)?.first_of(tenant);
        }
        for (&priority, class) in &mut self.classes {
            let Some((tenant, counter)) = class.front(&self.skipped, fair) else { continue };
            // The one served last, while it is not too far ahead.
            if let Some((of, last)) = self.last
                && of == priority
                && !self.skipped.contains(&last)
                && fair.counter(last).0 <= counter.0 + fair.quantum()
                && let Some(seq) = class.first_of(last)
            {
                return Some(seq);
            }
            return class.first_of(tenant);
        }
        None
    }

    /// The longest waiting sequence, if it has waited too long, priority keeps it waiting, and it is its turn.
    fn aged(&mut self, now: Micros, max_queue_age: u64) -> Option<OrderKey> {
        while let Some(&key) = self.by_age.front() {
            if self.get(&key).is_none() {
                self.by_age.pop_front();
                continue;
            }
            let (priority, tenant) = key.queue();
            let aged = now.since(key.arrival()).0 >= max_queue_age;
            let usable = !self.served_aged && !self.skipped.contains(&tenant);
            return (aged && usable && self.is_held_back(priority)).then_some(key);
        }
        None
    }

    /// Whether a higher priority has something waiting.
    fn is_held_back(&self, priority: Priority) -> bool {
        self.classes.range(..priority).any(|(_, class)| !class.ready.is_empty())
    }

    /// The sequence with this key is served: it leaves the queue, and its tenant is in turn.
    pub(crate) fn serve(&mut self, key: &OrderKey, fair: &FairShare) {
        let (priority, tenant) = key.queue();
        self.served_aged = self.is_held_back(priority);
        self.last = Some((priority, tenant));
        self.level = fair.counter(tenant);
        self.remove(key);
    }

    /// Of all tenants: blocks with which the prompts of each begin alike.
    pub(crate) fn num_shared_blocks(&self) -> u64 {
        self.num_shared_blocks
    }

    /// Prompts in the queue of this one begin with the same `num_blocks` blocks.
    pub(crate) fn note_shared(&mut self, key: &OrderKey, num_blocks: u32) {
        let (priority, tenant) = key.queue();
        let class = self.classes.get_mut(&priority);
        let Some(queue) = class.and_then(|class| class.queues.get_mut(tenant.0 as usize)) else { return };
        let before = std::mem::replace(&mut queue.num_shared_blocks, num_blocks);
        self.num_shared_blocks = self.num_shared_blocks - u64::from(before) + u64::from(num_blocks);
    }

    /// Blocks with which the prompts of this one's tenant begin alike.
    pub(crate) fn shared_blocks_of(&self, key: &OrderKey) -> u32 {
        let (priority, tenant) = key.queue();
        let class = self.classes.get(&priority);
        class.and_then(|class| class.queue(tenant)).map_or(0, |queue| queue.num_shared_blocks)
    }

    /// Whether a tenant is in turn.
    pub(crate) fn has_turn(&self) -> bool {
        self.last.is_some()
    }

    /// The tenant served last is in turn no more.
    pub(crate) fn end_turn(&mut self) {
        self.last = None;
    }

    /// Whether `of`'s tenant, with this counter, would be too far ahead of the smallest one beside it to stay in turn.
    pub(crate) fn is_ahead(&mut self, of: &OrderKey, counter: Counter, fair: &FairShare) -> bool {
        let class = self.classes.get_mut(&of.queue().0);
        let least = class.and_then(|class| class.front(&self.skipped, fair));
        least.is_some_and(|(tenant, least)| tenant != of.queue().1 && counter.0 > least.0 + fair.quantum())
    }

    /// Of the sequences with the priority of `beside`, the first of the tenant with the smallest counter.
    pub(crate) fn least_served(&mut self, beside: &OrderKey, fair: &FairShare) -> Option<SeqIndex> {
        let class = self.classes.get_mut(&beside.queue().0)?;
        let (tenant, _) = class.front(&self.skipped, fair)?;
        class.first_of(tenant)
    }

    /// The first of the queue in which this one waits, or waited.
    pub(crate) fn head_of(&self, key: &OrderKey) -> Option<SeqIndex> {
        let (priority, tenant) = key.queue();
        self.classes.get(&priority)?.first_of(tenant)
    }

    /// The newest of the lowest priority, if that is below `priority`, of those that may go.
    pub(crate) fn newest_below(&self, priority: i8, may_go: impl Fn(SeqIndex) -> bool) -> Option<SeqIndex> {
        let below = self.classes.iter().rev().take_while(|(of, _)| of.0 < priority);
        let newest = |class: &Class| {
            let queues = class.queues.iter();
            let last = queues.filter_map(|queue| queue.seqs.iter().rev().find(|&(_, &seq)| may_go(seq)));
            last.max_by_key(|(key, _)| key.age()).map(|(_, &seq)| seq)
        };
        below.map(|(_, class)| class).find_map(newest)
    }

    /// The lowest priority of those that wait.
    pub(crate) fn lowest_priority(&self) -> Option<i8> {
        let lowest = self.classes.iter().rev().find(|(_, class)| !class.ready.is_empty());
        lowest.map(|(priority, _)| priority.0)
    }

    /// Whether somebody of a higher priority waits.
    pub(crate) fn is_behind_priority(&self, key: &OrderKey) -> bool {
        self.is_held_back(key.queue().0)
    }

    /// Whether its tenant is left out of this step.
    pub(crate) fn is_skipped(&self, key: &OrderKey) -> bool {
        self.skipped.contains(&key.queue().1)
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
        for (&priority, class) in &self.classes {
            let mut num_ready = 0;
            for (queue, tenant) in class.queues.iter().zip(0..) {
                let name = (priority, TenantId(tenant));
                len += queue.seqs.len();
                num_ready += usize::from(!queue.seqs.is_empty());
                if queue.seqs.keys().any(|key| key.queue() != name) {
                    return Err(format!("queue {name:?} holds a stranger"));
                }
                if !queue.seqs.is_empty() && !class.ready.contains(&(queue.listed, name.1)) {
                    return Err(format!("queue {name:?} is not listed under {:?}", queue.listed));
                }
            }
            if num_ready != class.ready.len() {
                return Err(format!(
                    "{num_ready} tenants wait in {priority:?}, listed {}",
                    class.ready.len()
                ));
            }
        }
        if len != self.len {
            return Err(format!("{len} sequences wait, counted {}", self.len));
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
