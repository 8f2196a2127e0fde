//! Which idle block goes first.
//!
//! Idle blocks lie in *runs*: what was released at one time and shares a class, in the order of release, which is tail
//! first. A class has a queue of runs by age. The victim is the first block of a run; which run depends on the policy:
//! * [`EvictionPolicy::Lru`]: the oldest;
//! * [`EvictionPolicy::Learned`]: while it does better than the oldest ([`crate::duel`]), of the oldest and the youngest run of every class, the one whose index in the
//!   [`ReuseModel`] is least. The index rises and then falls with age, so the least of a class is at one of its ends.
//!
//! A released chain gets classes that do not fall towards its head ([`crate::kv_cache`]), so that tails go before what
//! they hang on. Every operation is O(1) but for the choice of a run, which looks at two ends of 32 classes, serves for
//! as many blocks as the run has, and is made anew when time has passed.

use quire_core::{BlockId, Micros};

use crate::reuse::{NUM_CLASSES, ReuseModel, WANTED};

const NONE: u32 = u32::MAX;
/// One queue per class, one for what is held, and one for what is wanted.
const NUM_QUEUES: usize = NUM_CLASSES + 2;
/// How many runs [`IdleBlocks::push_since`] looks back for the place of an older block.
const MAX_WALK: u32 = 64;

/// How blocks are chosen that must make room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// The least recently used first, tails before heads.
    Lru,
    /// The one least worth its room, by what was learned of reuse so far.
    #[default]
    Learned,
}

/// How one victim is chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Choice<'a> {
    /// The longest idle.
    Oldest,
    /// The one least worth its room.
    Least(&'a ReuseModel),
}

impl Choice<'_> {
    /// Whether `a` is worth its room more than `b` at `now`.
    pub(crate) fn prefers(self, a: &Idle, b: &Idle, now: Micros) -> bool {
        match self {
            Self::Oldest => a.since >= b.since,
            Self::Least(model) => a.index(now, model) > b.index(now, model),
        }
    }
}

/// A block without reference, and how it came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Idle {
    pub(crate) id: BlockId,
    pub(crate) class: u8,
    pub(crate) since: Micros,
}

impl Idle {
    pub(crate) fn age(&self, now: Micros, model: &ReuseModel) -> usize {
        model.age(now.0.saturating_sub(self.since.0))
    }

    fn index(&self, now: Micros, model: &ReuseModel) -> f64 {
        model.index(self.class, self.age(now, model))
    }
}

/// A block's place among the idle ones.
#[derive(Clone, Copy, Debug)]
struct Link {
    run: u32,
    /// Towards the victim's end of the run.
    prev: u32,
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    at: Micros,
    class: u8,
    /// The block that goes first, and the one that goes last.
    first: u32,
    last: u32,
    /// Neighbours in the class's queue.
    older: u32,
    younger: u32,
}

#[derive(Clone, Copy, Debug)]
struct Queue {
    oldest: u32,
    youngest: u32,
}

/// The idle blocks of a pool.
#[derive(Debug)]
pub(crate) struct IdleBlocks {
    links: Vec<Link>,
    runs: Vec<Run>,
    /// Entries of `runs` not in use.
    vacant: Vec<u32>,
    queues: [Queue; NUM_QUEUES],
    /// Bit `c`: queue `c` is not empty.
    occupied: u128,
    /// The run chosen last, and for which time.
    chosen: Option<(u32, Micros)>,
    len: u32,
}

impl IdleBlocks {
    pub(crate) fn new(num_blocks: u32) -> Self {
        let run = Run { at: Micros(0), class: 0, first: NONE, last: NONE, older: NONE, younger: NONE };
        Self {
            links: vec![Link { run: NONE, prev: NONE, next: NONE }; num_blocks as usize],
            runs: vec![run; num_blocks as usize],
            vacant: (0..num_blocks).rev().collect(),
            queues: [Queue { oldest: NONE, youngest: NONE }; NUM_QUEUES],
            occupied: 0,
            chosen: None,
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Adds a block; among those of one time and class it goes after the ones before.
    pub(crate) fn push(&mut self, id: BlockId, class: u8, now: Micros) {
        let youngest = self.queues[usize::from(class)].youngest;
        let run = match self.runs.get(youngest as usize) {
            Some(run) if run.at == now => youngest,
            _ => self.begin_run(class, now, youngest),
        };
        self.append(run, id);
    }

    /// Adds a block that became idle at `since`, somewhere else. Among very many younger ones it counts as younger than
    /// it is.
    pub(crate) fn push_since(&mut self, id: BlockId, class: u8, mut since: Micros) {
        let mut older = self.queues[usize::from(class)].youngest;
        for step in 0..=MAX_WALK {
            match self.runs.get(older as usize) {
                Some(run) if run.at > since && step == MAX_WALK => since = run.at,
                Some(run) if run.at > since => older = run.older,
                _ => break,
            }
        }
        let run = match self.runs.get(older as usize) {
            Some(run) if run.at == since => older,
            _ => self.begin_run(class, since, older),
        };
        self.append(run, id);
    }

    fn append(&mut self, run: u32, id: BlockId) {
        let last = std::mem::replace(&mut self.runs[run as usize].last, id.0);
        self.links[id.0 as usize] = Link { run, prev: last, next: NONE };
        match last {
            NONE => self.runs[run as usize].first = id.0,
            last => self.links[last as usize].next = id.0,
        }
        self.len += 1;
    }

    /// Takes out a block that is in here.
    pub(crate) fn remove(&mut self, id: BlockId) {
        let Link { run: at, prev, next } = self.links[id.0 as usize];
        match next {
            NONE => self.runs[at as usize].last = prev,
            next => self.links[next as usize].prev = prev,
        }
        match prev {
            NONE => self.runs[at as usize].first = next,
            prev => self.links[prev as usize].next = next,
        }
        if self.runs[at as usize].first == NONE {
            self.end_run(at);
        }
        self.len -= 1;
    }

    /// Takes out the block to evict at `now`.
    pub(crate) fn pop(&mut self, now: Micros, choice: Choice<'_>) -> Option<Idle> {
        let idle = self.first(now, choice)?;
        self.remove(idle.id);
        Some(idle)
    }

    /// The block to evict at `now`.
    pub(crate) fn first(&mut self, now: Micros, choice: Choice<'_>) -> Option<Idle> {
        let run = match (self.chosen, choice) {
            (Some((run, at)), _) if at == now => run,
            (_, Choice::Least(model)) => self.least(now, model)?,
            (_, Choice::Oldest) => self.oldest()?,
        };
        self.chosen = Some((run, now));
        let Run { first, class, at, .. } = self.runs[run as usize];
        Some(Idle { id: BlockId(first), class, since: at })
    }

    /// The run that is idle longest; the lower class of equals, which is the deeper.
    fn oldest(&self) -> Option<u32> {
        let oldest = self.queues.iter().map(|queue| queue.oldest).filter(|&run| run != NONE);
        oldest.min_by_key(|&run| self.runs[run as usize].at)
    }

    /// The run whose blocks are least worth their room; the older one of equals.
    fn least(&self, now: Micros, model: &ReuseModel) -> Option<u32> {
        let mut least: Option<(f64, Micros, u32)> = None;
        let mut classes = self.occupied;
        while classes != 0 {
            let class = classes.trailing_zeros() as u8;
            let queue = self.queues[usize::from(class)];
            classes &= classes - 1;
            let ends = if class == WANTED { [queue.youngest; 2] } else { [queue.oldest, queue.youngest] };
            for end in ends {
                let run = &self.runs[end as usize];
                let index = model.index(run.class, model.age(now.0.saturating_sub(run.at.0)));
                if least.is_none_or(|(lowest, at, _)| index < lowest || (index == lowest && run.at < at)) {
                    least = Some((index, run.at, end));
                }
            }
        }
        least.map(|(_, _, run)| run)
    }

    /// A run next to `older` in the class's queue, or at its old end.
    fn begin_run(&mut self, class: u8, since: Micros, older: u32) -> u32 {
        let at = self.vacant.pop().expect("a run holds a block, and there are as many runs as blocks");
        let queue = &mut self.queues[usize::from(class)];
        let younger = match older {
            NONE => std::mem::replace(&mut queue.oldest, at),
            older => std::mem::replace(&mut self.runs[older as usize].younger, at),
        };
        match younger {
            NONE => queue.youngest = at,
            younger => self.runs[younger as usize].older = at,
        }
        self.runs[at as usize] = Run { at: since, class, first: NONE, last: NONE, older, younger };
        self.occupied |= 1 << class;
        at
    }

    fn end_run(&mut self, at: u32) {
        let Run { class, older, younger, .. } = self.runs[at as usize];
        let queue = &mut self.queues[usize::from(class)];
        match older {
            NONE => queue.oldest = younger,
            older => self.runs[older as usize].younger = younger,
        }
        let queue = &mut self.queues[usize::from(class)];
        match younger {
            NONE => queue.youngest = older,
            younger => self.runs[younger as usize].older = older,
        }
        if self.queues[usize::from(class)].oldest == NONE {
            self.occupied &= !(1 << class);
        }
        if self.chosen.is_some_and(|(run, _)| run == at) {
            self.chosen = None;
        }
        self.vacant.push(at);
    }

    /// Walks every queue; `is_idle` says what must be in here.
    pub(crate) fn check(&self, is_idle: impl Fn(u32) -> bool) -> Result<(), String> {
        let (mut num_blocks, mut num_runs) = (0, 0);
        for (class, queue) in self.queues.iter().enumerate() {
            if (self.occupied >> class & 1 == 1) != (queue.oldest != NONE) {
                return Err(format!("eviction class {class}: wrongly marked as occupied or empty"));
            }
            let (mut at, mut older) = (queue.oldest, NONE);
            while at != NONE {
                let run = &self.runs[at as usize];
                if run.older != older || usize::from(run.class) != class || num_runs > self.runs.len() {
                    return Err(format!("the queue of eviction class {class} is broken at run {at}"));
                }
                num_blocks += self.check_run(at, &is_idle)?;
                num_runs += 1;
                (older, at) = (at, run.younger);
            }
            if older != queue.youngest {
                return Err(format!("eviction class {class} ends at run {older}, not {}", queue.youngest));
            }
        }
        if num_blocks != self.len || num_runs + self.vacant.len() != self.runs.len() {
            return Err(format!("{num_blocks} idle blocks in {num_runs} runs, but {} are counted", self.len));
        }
        Ok(())
    }

    fn check_run(&self, at: u32, is_idle: &impl Fn(u32) -> bool) -> Result<u32, String> {
        let run = &self.runs[at as usize];
        let (mut block, mut prev, mut len) = (run.first, NONE, 0);
        while block != NONE {
            let link = &self.links[block as usize];
            if link.run != at || link.prev != prev || !is_idle(block) || len > self.len {
                return Err(format!("eviction run {at} is broken at block {block}"));
            }
            (prev, block, len) = (block, link.next, len + 1);
        }
        if prev != run.last || len == 0 {
            return Err(format!("eviction run {at} of {len} blocks ends at {prev}, not {}", run.last));
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reuse::HELD;

    #[test]
    fn blocks_from_elsewhere_keep_their_age() {
        let mut idle = IdleBlocks::new(60);
        for id in 0..60_u32 {
            // Every time but one occurs, in no order, some twice.
            idle.push_since(BlockId(id), (id % 2) as u8, Micros(u64::from(id * 37 % 50)));
            idle.check(|other| other <= id).unwrap();
        }
        let popped: Vec<_> = std::iter::from_fn(|| idle.pop(Micros(0), Choice::Oldest)).collect();
        assert_eq!(popped.len(), 60);
        for class in [0, 1] {
            assert!(popped.iter().filter(|idle| idle.class == class).is_sorted_by_key(|idle| idle.since));
        }
        assert!(popped.iter().all(|idle| idle.since.0 == u64::from(idle.id.0 * 37 % 50)));
    }

    #[test]
    fn what_is_wanted_goes_last_and_the_latest_of_it_first() {
        let model = ReuseModel::new();
        let mut idle = IdleBlocks::new(8);
        let classes = [WANTED, 31, WANTED, HELD, WANTED, 0];
        (0..6_u32).zip(classes).for_each(|(id, class)| idle.push(BlockId(id), class, Micros(u64::from(id))));
        let mut pop = |now| idle.pop(Micros(now), Choice::Least(&model)).map(|idle| idle.id.0);
        assert_eq!([(); 4].map(|()| pop(10)), [Some(5), Some(1), Some(4), Some(2)]);
        // What was waited for too long is worth nothing.
        assert_eq!([(); 3].map(|()| pop(3_600_000_000)), [Some(0), Some(3), None]);
    }

    #[test]
    fn among_very_many_younger_runs_a_block_counts_as_younger() {
        let mut idle = IdleBlocks::new(200);
        (1..200_u32).for_each(|id| idle.push(BlockId(id), 0, Micros(u64::from(id))));
        idle.push_since(BlockId(0), 0, Micros(5));
        idle.check(|_| true).unwrap();
        let since = std::iter::from_fn(|| idle.pop(Micros(0), Choice::Oldest)).find(|idle| idle.id.0 == 0);
        assert_eq!(since.map(|idle| idle.since.0), Some(u64::from(199 - MAX_WALK)));
    }
}
