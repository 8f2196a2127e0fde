//! Traces made from a seed: the kinds of sharing that a prefix cache meets, each alone, so that a policy that lives off
//! one recorded trace shows.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use quire_core::Micros;

use crate::rng::{Rng, mix};
use crate::trace::{TRACE_BLOCK_SIZE, TraceRequest};

/// A kind of sharing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Conversations whose every turn repeats all before it; think times of half a minute to some minutes.
    Chat,
    /// Few long system prompts of very different popularity, each with short questions that never come back.
    SharedPrompts,
    /// Agents that call again within seconds, tens of times, on a deep prefix that all agents of a kind share.
    Agents,
    /// Long documents, most read once, some asked about a second and third time.
    Documents,
    /// A small set of prompts used all the time, flooded now and then by a long row of prompts used once.
    Scans,
    /// All of these at once.
    Mixed,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Chat, Self::SharedPrompts, Self::Agents, Self::Documents, Self::Scans, Self::Mixed];
}

/// `num_requests` requests, about three per second.
pub fn generate(workload: Workload, seed: u64, num_requests: usize) -> Vec<TraceRequest> {
    let mut sessions = Sessions { rng: Rng::new(seed), next_block: 0, salt: mix(seed) };
    let mut queue = BinaryHeap::new();
    let mut requests = Vec::with_capacity(num_requests);
    let mut now = 0;
    while requests.len() < num_requests {
        // A new session whenever nothing planned is due.
        let start = now + sessions.rng.exponential(sessions.mean_gap(workload));
        while queue.peek().is_some_and(|Reverse(turn): &Reverse<Turn>| turn.at <= start) {
            let Some(Reverse(turn)) = queue.pop() else { break };
            requests.push(turn.request());
            queue.extend(sessions.follow(turn).map(Reverse));
        }
        now = start;
        queue.push(Reverse(sessions.start(workload, now)));
    }
    requests.truncate(num_requests);
    requests
}

/// One request and what comes after it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    at: u64,
    /// Breaks ties.
    number: u64,
    turns_left: u32,
    mean_pause: u64,
    /// Blocks that a turn adds.
    growth: u32,
    output_tokens: u32,
    blocks: Vec<u64>,
}

impl Turn {
    fn request(&self) -> TraceRequest {
        TraceRequest {
            arrival: Micros(self.at),
            input_tokens: self.blocks.len() as u32 * TRACE_BLOCK_SIZE,
            output_tokens: self.output_tokens,
            blocks: self.blocks.clone(),
        }
    }
}

struct Sessions {
    rng: Rng,
    next_block: u64,
    salt: u64,
}

impl Sessions {
    /// Microseconds between two new sessions.
    fn mean_gap(&self, workload: Workload) -> u64 {
        match workload {
            Workload::Chat => 800_000,
            Workload::Agents => 4_000_000,
            Workload::Mixed => 600_000,
            _ => 350_000,
        }
    }

    fn start(&mut self, workload: Workload, now: u64) -> Turn {
        const KINDS: [Workload; 5] =
            [Workload::Chat, Workload::SharedPrompts, Workload::Agents, Workload::Documents, Workload::Scans];
        let rng = &mut self.rng;
        let output_tokens = rng.range(1, 400);
        // (blocks shared with others, blocks of its own, turns that follow, pause, growth)
        let (shared, own, turns_left, mean_pause, growth) = match workload {
            Workload::Mixed => {
                let kind = *rng.pick(&KINDS);
                return self.start(kind, now);
            }
            Workload::Chat => (0, rng.log_range(1, 48), rng.geometric(60), 120_000_000, rng.range(1, 4)),
            Workload::SharedPrompts => (rng.log_range(1, 64), rng.range(1, 3), 0, 0, 0),
            Workload::Agents => (20, rng.range(1, 4), rng.range(3, 30), 8_000_000, 1),
            Workload::Documents => {
                let again = if rng.one_in(4) { rng.range(1, 3) } else { 0 };
                (0, rng.range(20, 120), again, 100_000_000, 1)
            }
            // A flood of 150 prompts in every 600.
            Workload::Scans if now / 350_000 % 600 < 150 => (0, rng.range(10, 40), 0, 0, 0),
            Workload::Scans => (rng.range(1, 40), 1, 0, 0, 0),
        };
        let mut blocks = Vec::with_capacity((shared + own) as usize);
        // The shared part is named by its own length: popular short ones, rare long ones.
        let group = mix(self.salt ^ u64::from(shared) << 8 ^ workload as u64);
        blocks.extend((0..u64::from(shared)).map(|at| 1 << 63 | mix(group ^ at)));
        let mut turn =
            Turn { at: now, number: self.next_block, turns_left, mean_pause, growth, output_tokens, blocks };
        self.append(&mut turn, own);
        turn
    }

    fn follow(&mut self, mut turn: Turn) -> Option<Turn> {
        turn.turns_left = turn.turns_left.checked_sub(1)?;
        turn.at += turn.mean_pause / 4 + self.rng.exponential(turn.mean_pause * 3 / 4);
        turn.output_tokens = self.rng.range(1, 400);
        let growth = turn.growth;
        self.append(&mut turn, growth);
        (turn.blocks.len() < 240).then_some(turn)
    }

    fn append(&mut self, turn: &mut Turn, num_blocks: u32) {
        turn.blocks.extend(self.next_block..self.next_block + u64::from(num_blocks));
        self.next_block += u64::from(num_blocks);
        turn.number = self.next_block;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_seed_decides_and_prefixes_are_chains() {
        for workload in Workload::ALL {
            let requests = generate(workload, 7, 500);
            assert_eq!(requests, generate(workload, 7, 500));
            assert_ne!(requests, generate(workload, 8, 500));
            assert!(requests.is_sorted_by_key(|request| request.arrival), "{workload:?}");
            // A block has one parent, always.
            let mut parents = BTreeMap::new();
            let mut shared = 0;
            for request in &requests {
                assert_eq!(request.input_tokens, request.blocks.len() as u32 * TRACE_BLOCK_SIZE);
                let mut parent = None;
                for &block in &request.blocks {
                    shared += usize::from(parents.contains_key(&block));
                    assert_eq!(*parents.entry(block).or_insert(parent), parent, "{workload:?}");
                    parent = Some(block);
                }
            }
            assert!(shared > 100, "{workload:?}: only {shared} blocks are used again");
        }
    }
}
