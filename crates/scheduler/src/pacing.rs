//! Latency targets: when a request is due, how large a step may be, and who cannot be served in time.
//!
//! A first token is due [`LatencyTargets::ttft`] after arrival, or a multiple of the time its prompt takes alone where
//! that is longer. Requests go by the latest time at which they can start (least slack first); prompts are computed in
//! chunks that keep the predicted step within the inter-token target while anybody decodes. Work that cannot be done in
//! time is refused, at once if the queue ahead shows it, or when its latest start has passed: computing it would only
//! make others late. Output lengths are never looked at.

use std::collections::BTreeMap;

use quire_core::{Micros, Request, RequestId};

use crate::cost::{CostModel, OnlineCostModel, StepShape};

/// What a deployment promises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatencyTargets {
    /// Time to the first token, at least.
    pub ttft: Micros,
    /// Time to the first token, as a multiple of what the prompt takes alone; the larger of the two counts.
    pub ttft_stretch: f64,
    /// Time between two tokens.
    pub itl: Micros,
    /// Nobody waits longer for a place: served or refused by then.
    pub max_wait: Micros,
    /// What steps take, before any was measured.
    pub cost: CostModel,
}

impl LatencyTargets {
    /// Two seconds or four times the prompt's own time, 50 ms between tokens, 30 s in the queue.
    pub const fn new(cost: CostModel) -> Self {
        Self {
            ttft: Micros(2_000_000),
            ttft_stretch: 4.0,
            itl: Micros(50_000),
            max_wait: Micros(30_000_000),
            cost,
        }
    }
}

/// Steps are planned to take this part of the inter-token target: predictions err.
const ITL_MARGIN: f64 = 0.95;
/// The first prompt in order gets a chunk of this many tokens whatever the decodes take.
const MIN_CHUNK: u32 = 64;
/// Prompts share the device with decodes; they are not expected to be slowed down more than this.
const MAX_SLOWDOWN: f64 = 8.0;

/// A request that was not scheduled yet.
#[derive(Clone, Copy, Debug)]
struct Queued {
    /// What its prompt takes alone, in microseconds.
    prefill_us: f64,
}

/// When a request is due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Due {
    /// The first token.
    pub(crate) first_token: Micros,
    /// The latest start.
    pub(crate) start_by: Micros,
    prefill_us: f64,
}

/// The state behind [`LatencyTargets`].
#[derive(Debug)]
pub(crate) struct Pacing {
    targets: LatencyTargets,
    model: OnlineCostModel,
    /// By latest start.
    queued: BTreeMap<(Micros, RequestId), Queued>,
    /// When the previous step was collected.
    last_collected: Micros,
}

impl Pacing {
    pub(crate) fn new(targets: LatencyTargets) -> Self {
        let model = OnlineCostModel::new(targets.cost);
        Self { targets, model, queued: BTreeMap::new(), last_collected: Micros(0) }
    }

    pub(crate) fn model(&self) -> &OnlineCostModel {
        &self.model
    }

    /// When `request` is due, as far as can be known before its prompt is looked up.
    pub(crate) fn due(&self, request: &Request) -> Due {
        let shape = StepShape::default().with_row(0, request.prompt.len() as u32);
        let prefill_us = self.model.predict(&shape);
        let after = |us: f64| Micros(request.arrival.0.saturating_add(us as u64));
        let mut first_token = after((self.targets.ttft.0 as f64).max(self.targets.ttft_stretch * prefill_us));
        if let Some(deadline) = request.deadline {
            first_token = first_token.min(deadline);
        }
        let start_by = Micros(first_token.0.saturating_sub(prefill_us as u64));
        let start_by = start_by.min(after(self.targets.max_wait.0 as f64));
        Due { first_token, start_by, prefill_us }
    }

    /// By how much decodes slow a prompt down.
    fn slowdown(&self, decodes: &StepShape) -> f64 {
        if decodes.num_rows == 0 {
            return 1.0;
        }
        let itl = self.targets.itl.0 as f64;
        let left = itl - self.model.predict(decodes);
        (itl / left.max(1.0)).clamp(1.0, MAX_SLOWDOWN)
    }

    /// How late the first token would be if the request queued up now, in microseconds; not positive: in time.
    pub(crate) fn lateness(&self, due: &Due, now: Micros, decodes: &StepShape) -> f64 {
        let before = self.queued.range(..(due.start_by, RequestId(u64::MAX)));
        let ahead: f64 = before.map(|(_, queued)| queued.prefill_us).sum();
        let slowdown = self.slowdown(decodes);
        now.0 as f64 + slowdown * (ahead + due.prefill_us) - due.first_token.0 as f64
    }

    pub(crate) fn enqueue(&mut self, id: RequestId, due: &Due) {
        self.queued.insert((due.start_by, id), Queued { prefill_us: due.prefill_us });
    }

    /// The request was scheduled, or ended.
    pub(crate) fn dequeue(&mut self, id: RequestId, start_by: Micros) {
        self.queued.remove(&(start_by, id));
    }

    /// A request whose latest start has passed.
    pub(crate) fn hopeless(&self, now: Micros) -> Option<RequestId> {
        let (&(start_by, id), _) = self.queued.first_key_value()?;
        (start_by < now).then_some(id)
    }

    /// What the prompts of a step may take it to, in microseconds.
    pub(crate) fn limit_us(&self, decodes: &StepShape) -> f64 {
        if decodes.num_rows == 0 { f64::INFINITY } else { ITL_MARGIN * self.targets.itl.0 as f64 }
    }

    /// The longest chunk, `<= max_tokens`, of a prompt at `start` beside `shape`. 0: wait for the next step. `first`: it
    /// must advance.
    pub(crate) fn chunk(
        &self,
        shape: &StepShape,
        limit_us: f64,
        start: u32,
        max_tokens: u32,
        first: bool,
    ) -> u32 {
        if limit_us == f64::INFINITY {
            return max_tokens;
        }
        let least = MIN_CHUNK.min(max_tokens);
        let chunk = self.model.largest_row(shape, start, max_tokens, limit_us);
        match (chunk >= least, first) {
            (true, _) => chunk,
            (false, true) => least,
            (false, false) => 0,
        }
    }

    /// A step was collected at `now`. It had the device from when it was planned, or from when the one before ended.
    pub(crate) fn collected(&mut self, shape: &StepShape, planned: Micros, now: Micros) {
        let began = planned.max(self.last_collected);
        self.model.observe(shape, now.since(began).0 as f64);
        self.last_collected = now;
    }

    pub(crate) fn num_queued(&self) -> usize {
        self.queued.len()
    }
}
