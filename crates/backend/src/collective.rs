//! What tensor-parallel ranks that share memory say to one another: sums and gathers of f32.
//!
//! Each rank writes its numbers into a slot of its own; at a barrier everybody is there; then each reads all slots, in the
//! order of the ranks. So every rank gets the same bits every time, whoever comes first. A slot has two sides, used in
//! turn: nobody can write to a side before the barrier behind which all have read it, so one barrier a call is enough.
//!
//! A rank that is dropped, for whatever reason, ends the group: who waits for it, or comes later, gets an error.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// How long to spin before parking: layers follow one another quickly, and an idle server must cost nothing.
const SPIN: Duration = Duration::from_micros(50);

/// One rank's membership of a group. See [`Communicator::group`].
#[derive(Debug)]
pub struct Communicator {
    rank: usize,
    group: Arc<Group>,
    /// Which side of the slots is next.
    side: usize,
}

/// Why ranks cannot go on together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A rank has ended; its own error says why.
    #[error("tensor-parallel rank {rank} of {world} has stopped")]
    Gone {
        /// Which.
        rank: usize,
        /// Of how many.
        world: usize,
    },
    /// The ranks do not run the same step.
    #[error("tensor-parallel rank {rank} brings {theirs} numbers where this one brings {own}")]
    Differs {
        /// The other rank.
        rank: usize,
        /// What it brings.
        theirs: usize,
        /// What was expected.
        own: usize,
    },
}

#[derive(Debug)]
struct Group {
    /// By rank, two sides each.
    slots: Vec<[RwLock<Vec<f32>>; 2]>,
    barrier: Barrier,
}

impl Default for Communicator {
    /// The only rank of its group: every sum is what it brings.
    fn default() -> Self {
        Self::group(1).remove(0)
    }
}

impl Communicator {
    /// The members of a new group of `world` ranks (at least 1), by rank; each goes to a thread of its own.
    pub fn group(world: usize) -> Vec<Self> {
        let world = world.max(1);
        let slots = (0..world).map(|_| Default::default()).collect();
        let group = Arc::new(Group { slots, barrier: Barrier::new(world) });
        (0..world).map(|rank| Self { rank, group: group.clone(), side: 0 }).collect()
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks in the group.
    pub fn world(&self) -> usize {
        self.group.slots.len()
    }

    /// Adds up the `values` of all ranks, in the order of the ranks. All must call it, with equally many numbers.
    ///
    /// # Errors
    /// Another rank has stopped, or brings another number of values.
    pub fn all_reduce(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let side = self.bring(values)?;
        for rank in 0..self.world() {
            let theirs = self.slot(rank, side);
            if theirs.len() != values.len() {
                return Err(CollectiveError::Differs { rank, theirs: theirs.len(), own: values.len() });
            }
            match rank {
                0 => values.copy_from_slice(&theirs),
                _ => values.iter_mut().zip(theirs.iter()).for_each(|(sum, x)| *sum += x),
            }
        }
        Ok(())
    }

    /// Puts the rows of all ranks side by side: row `i` of `out` is row `i` of rank 0, then that of rank 1, and so on. Ranks
    /// may bring rows of different widths; `out` is `[rows, sum of the widths]`.
    ///
    /// # Errors
    /// As for [`Self::all_reduce`].
    pub fn all_gather(&mut self, part: &[f32], out: &mut [f32], rows: usize) -> Result<(), CollectiveError> {
        if rows == 0 || out.is_empty() {
            return Ok(());
        }
        let side = self.bring(part)?;
        let (mut begin, width) = (0, out.len() / rows);
        for rank in 0..self.world() {
            let theirs = self.slot(rank, side);
            let end = begin + theirs.len() / rows;
            let is_last = rank + 1 == self.world();
            if end > width || (is_last && end < width) {
                return Err(CollectiveError::Differs {
                    rank,
                    theirs: theirs.len(),
                    own: (width - begin) * rows,
                });
            }
            for (out, theirs) in out.chunks_exact_mut(width).zip(theirs.chunks_exact((end - begin).max(1))) {
                out[begin..end].copy_from_slice(theirs);
            }
            begin = end;
        }
        Ok(())
    }

    /// Shows `values` to the others, and returns when everybody has done so: on which side.
    fn bring(&mut self, values: &[f32]) -> Result<usize, CollectiveError> {
        let side = self.side;
        self.side = 1 - side;
        let mut slot = self.group.slots[self.rank][side].write().unwrap_or_else(PoisonError::into_inner);
        slot.clear();
        slot.extend_from_slice(values);
        drop(slot);
        self.group.barrier.wait()?;
        Ok(side)
    }

    fn slot(&self, rank: usize, side: usize) -> RwLockReadGuard<'_, Vec<f32>> {
        self.group.slots[rank][side].read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.group.barrier.leave(self.rank);
    }
}

/// Where all ranks meet, unless one of them is gone.
#[derive(Debug)]
struct Barrier {
    world: usize,
    /// Meetings so far.
    generation: AtomicU64,
    /// [`State::gone`] is set.
    is_broken: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    arrived: usize,
    /// The first rank that was dropped.
    gone: Option<usize>,
}

impl Barrier {
    fn new(world: usize) -> Self {
        Self {
            world,
            generation: AtomicU64::new(0),
            is_broken: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) -> Result<(), CollectiveError> {
        let mut state = self.lock();
        self.check(&state)?;
        // Changes under the lock only.
        let generation = self.generation.load(Ordering::Acquire);
        state.arrived += 1;
        if state.arrived == self.world {
            state.arrived = 0;
            self.generation.store(generation + 1, Ordering::Release);
            self.changed.notify_all();
            return Ok(());
        }
        drop(state);
        let have_met = || self.generation.load(Ordering::Acquire) != generation;
        let begin = Instant::now();
        while !have_met() && !self.is_broken.load(Ordering::Acquire) && begin.elapsed() < SPIN {
            std::hint::spin_loop();
        }
        let mut state = self.lock();
        while !have_met() {
            self.check(&state)?;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn check(&self, state: &State) -> Result<(), CollectiveError> {
        state.gone.map_or(Ok(()), |rank| Err(CollectiveError::Gone { rank, world: self.world }))
    }

    fn leave(&self, rank: usize) {
        self.lock().gone.get_or_insert(rank);
        self.is_broken.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` on every rank of a group, each on its thread.
    fn on_ranks<T: Send>(world: usize, body: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
        let body = &body;
        std::thread::scope(|scope| {
            let ranks: Vec<_> =
                Communicator::group(world).into_iter().map(|rank| scope.spawn(move || body(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// Numbers whose sum depends on its order.
    fn numbers(rank: usize, round: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| (0.1 + rank as f32).powi((i + round) as i32 % 7) * 1.37).collect()
    }

    #[test]
    fn sums_have_the_order_of_the_ranks_whoever_comes_first() {
        for world in [1, 2, 3, 5] {
            on_ranks(world, |mut comm| {
                for round in 0..200 {
                    let len = round % 9;
                    let mut values = numbers(comm.rank(), round, len);
                    if (comm.rank() + round) % 3 == 0 {
                        std::thread::yield_now();
                    }
                    comm.all_reduce(&mut values).unwrap();
                    let mut want = numbers(0, round, len);
                    for rank in 1..world {
                        want.iter_mut().zip(numbers(rank, round, len)).for_each(|(sum, x)| *sum += x);
                    }
                    assert_eq!(values, want, "rank {} of {world}, round {round}", comm.rank());
                }
            });
        }
    }

    #[test]
    fn rows_of_different_widths_are_put_side_by_side() {
        let gathered = on_ranks(3, |mut comm| {
            let width = [2, 2, 1][comm.rank()];
            let part: Vec<f32> = (0..2 * width).map(|i| (10 * comm.rank() + i) as f32).collect();
            let mut out = vec![0.0; 10];
            comm.all_gather(&part, &mut out, 2).unwrap();
            out
        });
        for out in gathered {
            assert_eq!(out, [0.0, 1.0, 10.0, 11.0, 20.0, 2.0, 3.0, 12.0, 13.0, 21.0]);
        }
    }

    #[test]
    fn nobody_waits_for_a_rank_that_is_gone() {
        let gone = CollectiveError::Gone { rank: 1, world: 3 };
        let begin = Instant::now();
        let ends = on_ranks(3, |mut comm| {
            comm.all_reduce(&mut [1.0]).unwrap();
            if comm.rank() == 1 {
                // The others are waiting by then, parked.
                std::thread::sleep(Duration::from_millis(20));
                return Ok(());
            }
            let first = comm.all_reduce(&mut [1.0]);
            assert_eq!(first, comm.all_reduce(&mut [1.0]), "and so for ever");
            first
        });
        assert_eq!(ends, [Err(gone.clone()), Ok(()), Err(gone)]);
        assert!(begin.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn ranks_that_differ_are_an_error() {
        let ends = on_ranks(2, |mut comm| comm.all_reduce(&mut vec![0.0; 1 + comm.rank()]));
        assert_eq!(ends[0], Err(CollectiveError::Differs { rank: 1, theirs: 2, own: 1 }));
        assert!(ends[1].is_err());
        let ends = on_ranks(2, |mut comm| comm.all_gather(&[0.0; 2], &mut [0.0; 5], 1));
        assert!(ends.iter().all(Result::is_err), "{ends:?}");
    }
}
