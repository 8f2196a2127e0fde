//! Latency targets: when a request is due, how large a step may be, and who cannot be served in time.
//!
//! A first token is due [`LatencyTargets::ttft`] after arrival, or a multiple of the time its prompt takes alone where
//! that is longer. Requests go by when they are due (earliest deadline first, which meets all deadlines if anything can);
//! prompts are computed in chunks that keep the predicted step within the inter-token target while anybody decodes. Work
//! that cannot be done in time is refused, at once if the queue ahead shows it, or when its latest start has passed: computing it would only
//! make others late. Output lengths are never looked at.

use std::collections::{BTreeMap, BTreeSet};

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
/// A prompt must start so many times its own time before it is due, and a step: others share the device.
const SPARE: f64 = 1.25;
/// The first prompt in order gets a chunk of this many tokens whatever the decodes take.
const MIN_CHUNK: u32 = 64;
/// Prompts share the device with decodes; they are not expected to be slowed down more than this.
const MAX_SLOWDOWN: f64 = 8.0;

/// Short prompts must leave a part of the time of a usual long one in the queue, lest they fill it to the brim and only
/// long ones be refused: the quantile that is a usual long one, the part, and how fast the quantile is learned.
const USUAL: f64 = 0.9;
const HEADROOM: f64 = 0.5;
const QUANTILE_RATE: f64 = 0.02;

/// When a request is due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Due {
    /// The first token.
    pub(crate) first_token: Micros,
    /// The latest start, with something to spare.
    pub(crate) start_by: Micros,
    prefill_us: f64,
}

/// The state behind [`LatencyTargets`].
#[derive(Debug)]
pub(crate) struct Pacing {
    targets: LatencyTargets,
    model: OnlineCostModel,
    /// What the prompts that were not scheduled yet take alone, in microseconds, in their order.
    queued: BTreeMap<(Micros, RequestId), f64>,
    /// The same requests by latest start.
    by_start: BTreeSet<(Micros, RequestId)>,
    /// Nine in ten prompts take less than this, alone; no more than what may be late for its own length.
    usual_prefill_us: f64,
    /// When the previous step was collected.
    last_collected: Micros,
}

impl Pacing {
    pub(crate) fn new(targets: LatencyTargets) -> Self {
        let model = OnlineCostModel::new(targets.cost);
        Self {
            targets,
            model,
            queued: BTreeMap::new(),
            by_start: BTreeSet::new(),
            usual_prefill_us: 0.0,
            last_collected: Micros(0),
        }
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
        let start_by = Micros(first_token.0.saturating_sub((SPARE * prefill_us) as u64 + self.targets.itl.0));
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

    /// Learns how long prompts are (a quantile by stochastic approximation; Robbins & Monro, 1951).
    pub(crate) fn arrived(&mut self, due: &Due) {
        let step = QUANTILE_RATE * due.prefill_us.max(self.usual_prefill_us);
        let longer = due.prefill_us > self.usual_prefill_us;
        self.usual_prefill_us += if longer { step * USUAL } else { step * (USUAL - 1.0) };
        let own_target = self.targets.ttft.0 as f64 / self.targets.ttft_stretch;
        self.usual_prefill_us = self.usual_prefill_us.clamp(0.0, own_target);
    }

    /// How late the first token would be if the request queued up now, in microseconds; not positive: in time.
    pub(crate) fn lateness(&self, due: &Due, now: Micros, decodes: &StepShape) -> f64 {
        let before = self.queued.range(..(due.first_token, RequestId(u64::MAX)));
        let ahead: f64 = before.map(|(_, prefill_us)| prefill_us).sum();
        let slowdown = self.slowdown(decodes);
        now.0 as f64 + slowdown * (ahead + due.prefill_us.max(HEADROOM * self.usual_prefill_us))
            - due.first_token.0 as f64
    }

    pub(crate) fn enqueue(&mut self, id: RequestId, due: &Due) {
        self.queued.insert((due.first_token, id), due.prefill_us);
        self.by_start.insert((due.start_by, id));
    }

    /// The request was scheduled, or ended.
    pub(crate) fn dequeue(&mut self, id: RequestId, due: &Due) {
        self.queued.remove(&(due.first_token, id));
        self.by_start.remove(&(due.start_by, id));
    }

    /// A request whose latest start has passed.
    pub(crate) fn hopeless(&self, now: Micros) -> Option<RequestId> {
        let &(start_by, id) = self.by_start.first()?;
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quire_core::{CacheSalt, SamplingParams, TenantId};

    use super::*;

    /// A token takes 10 us; nothing else costs anything.
    fn pacing() -> Pacing {
        let cost = CostModel {
            fixed: 0.0,
            per_row: 0.0,
            weights: 0.0,
            per_token: 10.0,
            per_context_token: 0.0,
            per_attention: 0.0,
            per_copied_block: 0.0,
        };
        Pacing::new(LatencyTargets::new(cost))
    }

    fn request(prompt_len: usize, deadline: Option<u64>) -> Request {
        Request {
            id: RequestId(1),
            prompt: vec![0; prompt_len].into(),
            block_hashes: Arc::from([]),
            salt: CacheSalt(0),
            params: Arc::new(SamplingParams::default()),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(1_000_000),
            deadline: deadline.map(Micros),
        }
    }

    #[test]
    fn a_first_token_is_due_by_target_by_length_or_by_deadline() {
        let pacing = pacing();
        let due = |prompt_len, deadline| {
            let Due { first_token, start_by, .. } = pacing.due(&request(prompt_len, deadline));
            (first_token.0, start_by.0)
        };
        assert_eq!(due(1000, None), (3_000_000, 3_000_000 - 12_500 - 50_000));
        assert_eq!(
            due(100_000, None),
            (5_000_000, 5_000_000 - 1_250_000 - 50_000),
            "four times its own time"
        );
        assert_eq!(due(1000, Some(1_500_000)), (1_500_000, 1_500_000 - 12_500 - 50_000));
        assert_eq!(due(2_000_000, None).1, 31_000_000, "nobody waits longer than max_wait");
    }

    #[test]
    fn lateness_counts_what_is_due_earlier_and_the_decodes() {
        let mut pacing = pacing();
        let now = Micros(1_000_000);
        let due = pacing.due(&request(1000, None));
        let idle = StepShape::default();
        assert_eq!(pacing.lateness(&due, now, &idle), 10_000.0 - 2_000_000.0);
        // Due later, so it does not count; then 1.995 s that are due earlier.
        pacing.enqueue(RequestId(7), &Due { first_token: Micros(9_000_000), prefill_us: 1e6, ..due });
        assert!(pacing.lateness(&due, now, &idle) < 0.0);
        let earlier = Due { first_token: Micros(2_000_000), prefill_us: 1_995_000.0, ..due };
        pacing.enqueue(RequestId(8), &earlier);
        assert_eq!(pacing.lateness(&due, now, &idle), 5000.0);
        pacing.dequeue(RequestId(8), &earlier);
        // Decodes that take half of every step make prompts take twice as long.
        let decodes = StepShape { num_rows: 2500, num_tokens: 2500, ..idle };
        assert_eq!(pacing.lateness(&due, now, &decodes), 20_000.0 - 2_000_000.0);
    }

    #[test]
    fn chunks_fill_the_target_while_anybody_decodes() {
        let pacing = pacing();
        let idle = StepShape::default();
        assert_eq!(pacing.chunk(&idle, pacing.limit_us(&idle), 0, 8192, true), 8192);
        let decodes = StepShape { num_rows: 1000, num_tokens: 1000, ..idle };
        let limit = pacing.limit_us(&decodes);
        assert_eq!(pacing.chunk(&decodes, limit, 0, 8192, true), 3750, "47.5 ms less 10 ms");
        let many = StepShape { num_rows: 4740, num_tokens: 4740, ..idle };
        assert_eq!(pacing.chunk(&many, limit, 0, 8192, false), 0, "10 tokens are not worth it");
        assert_eq!(pacing.chunk(&many, limit, 0, 8192, true), MIN_CHUNK, "but the first one advances");
        assert_eq!(pacing.chunk(&many, limit, 0, 9, false), 9, "unless it is all there is");
    }
}
