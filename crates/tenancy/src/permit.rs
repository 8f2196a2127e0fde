//! An admitted request: what is reserved for it, and the settlement when it ends, however it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use quire_core::{FinishReason, Meter};

use crate::audit::Trail;
use crate::budget::{LOWEST_PRIORITY, Spent};
use crate::demand::Demand;
use crate::ledger::{Standing, Taken};
use crate::metrics::Outcome;
use crate::shared::{Settlement, SharedStore};
use crate::tenant::Tenant;

/// Where the buckets are that a reservation was taken from.
pub(crate) enum Source {
    /// This process.
    Local,
    /// The store that replicas share.
    Shared(Arc<SharedStore>),
}

/// A request that was let in. What it did not use is given back when the permit and all of its [`PermitMeter`]s are gone.
pub struct Permit {
    reservation: Arc<Reservation>,
}

impl Permit {
    pub(crate) fn new(reservation: Reservation) -> Self {
        let permit = Self { reservation: Arc::new(reservation) };
        permit.reservation.tenant.state.metrics.waiting.increment(permit.reservation.demand.choices);
        permit
    }

    /// How it stands with the limits, this request included.
    pub fn standing(&self) -> &Standing {
        &self.reservation.standing
    }

    /// The priority to run with: the lowest, if the budget is used up and does not refuse.
    pub fn priority(&self, asked: i8) -> i8 {
        let is_over = self.reservation.spent.is_some_and(|spent| spent.is_over);
        if is_over { asked.min(LOWEST_PRIORITY) } else { asked }
    }

    /// The meter of one of the prompts that were added to the demand.
    pub fn meter(&self, prompt_tokens: u32, choices: u32) -> Box<dyn Meter> {
        Box::new(PermitMeter {
            reservation: Arc::clone(&self.reservation),
            prompt_tokens,
            choices,
            running: false,
        })
    }
}

/// What is reserved, and what of it was used so far.
pub(crate) struct Reservation {
    pub(crate) tenant: Arc<Tenant>,
    pub(crate) trail: Trail,
    pub(crate) demand: Demand,
    /// What the buckets gave.
    pub(crate) taken: Taken,
    /// What of the budget.
    pub(crate) spent: Option<Spent>,
    pub(crate) source: Source,
    pub(crate) standing: Standing,
    pub(crate) admitted: Instant,
    pub(crate) used: Used,
}

#[derive(Default)]
pub(crate) struct Used {
    /// Choices and prompt tokens that left the queue.
    started_choices: AtomicU32,
    started_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    output_tokens: AtomicU64,
    /// The worst end so far, by its place in [`ENDS`] and one more; 0: none.
    worst: AtomicU8,
}

/// Ends of answers, the worst last.
const ENDS: [FinishReason; 6] = [
    FinishReason::Rejected,
    FinishReason::Stop,
    FinishReason::Length,
    FinishReason::Abort,
    FinishReason::Deadline,
    FinishReason::Error,
];

impl Reservation {
    /// The part of what the buckets gave that was not used.
    fn unused(&self) -> Taken {
        let [_, input, output] = self.taken;
        let part = |taken: u64, used: u64, reserved: u64| {
            let unused = u128::from(reserved.saturating_sub(used));
            // Rounded down: never more than was taken.
            u64::try_from(u128::from(taken) * unused / u128::from(reserved.max(1))).unwrap_or(taken)
        };
        let started = self.used.started_tokens.load(Ordering::Acquire);
        let generated = self.used.output_tokens.load(Ordering::Acquire);
        [
            // A request that was made counts, whatever became of it.
            0,
            part(input, started, self.demand.input_tokens),
            part(output, generated, self.demand.output_tokens),
        ]
    }

    /// The same of the budget, in tokens.
    fn unspent(&self) -> u64 {
        let used = self.used.started_tokens.load(Ordering::Acquire)
            + self.used.output_tokens.load(Ordering::Acquire);
        self.spent.map_or(0, |spent| spent.tokens.saturating_sub(used))
    }

    /// The worst end of its answers.
    fn finish(&self) -> Option<FinishReason> {
        let worst = usize::from(self.used.worst.load(Ordering::Acquire));
        worst.checked_sub(1).map(|at| ENDS[at])
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let state = &self.tenant.state;
        let (unused, unspent) = (self.unused(), self.unspent());
        let never_started = self.demand.choices.saturating_sub(*self.used.started_choices.get_mut());
        let waiting_tokens = self.demand.input_tokens.saturating_sub(*self.used.started_tokens.get_mut());
        let in_flight = {
            let mut ledger = state.ledger.lock();
            ledger.leave_queue(never_started, waiting_tokens);
            ledger.leave(self.demand.choices);
            if matches!(self.source, Source::Local) {
                ledger.give_back(unused);
            }
            if let Some(spent) = self.spent {
                ledger.spending.give_back(spent.window, unspent);
            }
            ledger.in_flight()
        };
        if let Source::Shared(store) = &self.source {
            let unspent = self.spent.map(|spent| Spent { tokens: unspent, ..spent });
            store.settle(Settlement { tenant: Arc::clone(&state.name), unused, unspent, in_flight });
        }
        state.metrics.waiting.decrement(never_started);
        let [input, cached, output] = [
            self.used.started_tokens.get_mut(),
            self.used.cached_tokens.get_mut(),
            self.used.output_tokens.get_mut(),
        ]
        .map(|count| *count);
        state.metrics.input.increment(input);
        state.metrics.cached.increment(cached);
        state.metrics.output.increment(output);
        state.totals.add([input, cached, output]);
        // A call that generates nothing is over when it is answered.
        let finish = self.finish();
        let outcome = match finish {
            _ if self.demand.choices == 0 => Outcome::Completed,
            // Never came to run.
            None => Outcome::Rejected,
            Some(reason) => Outcome::of(reason),
        };
        state.metrics.ended(outcome);
        if self.demand.choices > 0 {
            self.trail.cost([input, cached, output], finish);
        }
    }
}

/// Follows one prompt of an admitted request.
struct PermitMeter {
    reservation: Arc<Reservation>,
    prompt_tokens: u32,
    choices: u32,
    running: bool,
}

impl Meter for PermitMeter {
    fn started(&mut self, cached_tokens: u32) {
        if std::mem::replace(&mut self.running, true) {
            return;
        }
        let Reservation { tenant, used, admitted, .. } = &*self.reservation;
        used.started_choices.fetch_add(self.choices, Ordering::AcqRel);
        used.started_tokens.fetch_add(self.prompt_tokens.into(), Ordering::AcqRel);
        used.cached_tokens.fetch_add(cached_tokens.into(), Ordering::AcqRel);
        tenant.state.ledger.lock().leave_queue(self.choices, self.prompt_tokens.into());
        let metrics = &tenant.state.metrics;
        metrics.waiting.decrement(self.choices);
        metrics.running.increment(self.choices);
        metrics.queue_seconds.record(admitted.elapsed());
    }

    fn ended(&mut self, generated_tokens: u32, reason: FinishReason) {
        self.reservation.used.output_tokens.fetch_add(generated_tokens.into(), Ordering::AcqRel);
        let place = ENDS.iter().position(|&end| end == reason).map_or(0, |at| at as u8 + 1);
        self.reservation.used.worst.fetch_max(place, Ordering::AcqRel);
    }
}

impl Drop for PermitMeter {
    fn drop(&mut self) {
        if self.running {
            self.reservation.tenant.state.metrics.running.decrement(self.choices);
        }
    }
}
