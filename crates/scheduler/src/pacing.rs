//! Latency targets: when a request is due, how large a step may be, and who cannot be served in time.
//!
//! A first token is due [`LatencyTargets::ttft`] after arrival, or a multiple of the time its prompt takes alone where
//! that is longer. Requests go by when they are due (earliest deadline first, which meets all deadlines if anything can);
//! prompts are computed in chunks that keep the predicted step within the inter-token target while anybody decodes. Work
//! that could not be done in time, or would make others late that were let in before, is refused when it comes: whoever
//! is let in may count on it. If a prediction was wrong, the request is put off behind those that are in time, but for no
//! longer than [`LatencyTargets::max_wait`]. Output lengths are never looked at.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::ops::Range;

use quire_core::{Micros, Request, RequestId, TenantId};

use crate::backlog::{Backlog, Newcomer, Place};
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
    /// Nobody waits longer for a place: served by then, or given up.
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
/// Prompts are expected to take so many times what the model says: those that are computed meanwhile decode afterwards,
/// and slow the others down.
const CAUTION: f64 = 1.6;
/// Steps without decodes end after this time, in microseconds, so that whoever comes meanwhile gets a place, or hears
/// that there is none.
const PROMPT_STEP: f64 = 90_000.0;

/// Short prompts must leave a part of the time of a usual long one in the queue, lest they fill it to the brim and only
/// long ones be refused: the quantile that is a usual long one, the part, and how fast the quantile is learned.
const USUAL: f64 = 0.9;
const HEADROOM: f64 = 0.5;
const QUANTILE_RATE: f64 = 0.02;

/// When a request is due.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Due {
    /// Among whom, and when the first token.
    pub(crate) place: Place,
    /// The latest start, with something to spare.
    pub(crate) start_by: Micros,
    /// What its prompt takes alone, in microseconds: all of it, and what is not cached.
    prefill_us: f64,
    work_us: f64,
    /// It was put off.
    is_late: bool,
}

/// The state behind [`LatencyTargets`].
#[derive(Debug)]
pub(crate) struct Pacing {
    targets: LatencyTargets,
    model: OnlineCostModel,
    /// The prompts that are not computed yet, those in the batch included.
    backlog: Backlog,
    /// Requests that have not started, by latest start.
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
            backlog: Backlog::default(),
            by_start: BTreeSet::new(),
            usual_prefill_us: 0.0,
            last_collected: Micros(0),
        }
    }

    pub(crate) fn model(&self) -> &OnlineCostModel {
        &self.model
    }

    /// What tokens `start..end` of a prompt take alone, in microseconds.
    fn work(&self, start: u32, end: u32) -> f64 {
        self.model.predict(&StepShape::default().with_row(start, end - start))
    }

    /// When `request` is due, `tenant` as registered. Of its prompt, `num_cached` tokens need not be computed.
    pub(crate) fn due(&self, request: &Request, tenant: TenantId, num_cached: u32) -> Due {
        let prompt_len = request.prompt.len() as u32;
        let prefill_us = self.work(0, prompt_len);
        let after = |us: f64| Micros(request.arrival.0.saturating_add(us as u64));
        let mut first_token = after((self.targets.ttft.0 as f64).max(self.targets.ttft_stretch * prefill_us));
        if let Some(deadline) = request.deadline {
            first_token = first_token.min(deadline);
        }
        let place = Place { priority: Reverse(request.priority), tenant, due: first_token };
        let start_by = self.start_by(first_token, prefill_us).min(after(self.targets.max_wait.0 as f64));
        let work_us = self.work(num_cached.min(prompt_len - 1), prompt_len);
        Due { place, start_by, prefill_us, work_us, is_late: false }
    }

    fn start_by(&self, first_token: Micros, prefill_us: f64) -> Micros {
        Micros(first_token.0.saturating_sub((SPARE * prefill_us) as u64 + self.targets.itl.0))
    }

    /// When a request is due whose latest start has passed: as late as it may wait. `None`: that has passed, too, or its
    /// deadline comes before.
    pub(crate) fn put_off(&self, due: &Due, request: &Request, now: Micros) -> Option<Due> {
        let first_token = Micros(request.arrival.0.saturating_add(self.targets.max_wait.0));
        let start_by = self.start_by(first_token, due.prefill_us);
        let is_too_late =
            due.is_late || start_by < now || request.deadline.is_some_and(|deadline| deadline < first_token);
        let place = Place { due: first_token, ..due.place };
        (!is_too_late).then_some(Due { place, start_by, is_late: true, ..*due })
    }

    /// By how much decodes slow a prompt down.
    fn slowdown(&self, decodes: &StepShape) -> f64 {
        if decodes.num_rows == 0 {
            return 1.0;
        }
        let limit = self.limit_us(decodes);
        let left = limit - self.model.predict(decodes);
        (limit / left.max(1.0)).clamp(1.0, MAX_SLOWDOWN)
    }

    /// Learns how long prompts are (a quantile by stochastic approximation; Robbins & Monro, 1951).
    pub(crate) fn arrived(&mut self, due: &Due) {
        let step = QUANTILE_RATE * due.prefill_us.max(self.usual_prefill_us);
        let longer = due.prefill_us > self.usual_prefill_us;
        self.usual_prefill_us += if longer { step * USUAL } else { step * (USUAL - 1.0) };
        let own_target = self.targets.ttft.0 as f64 / self.targets.ttft_stretch;
        self.usual_prefill_us = self.usual_prefill_us.clamp(0.0, own_target);
    }

    /// By how much a first token would be late if the request queued up now, its own or one that was promised before, in
    /// microseconds; not positive: all are in time. `relative_share`: of other tenants, in units of this one's.
    pub(crate) fn lateness(
        &self,
        due: &Due,
        now: Micros,
        decodes: &StepShape,
        relative_share: &dyn Fn(TenantId) -> f64,
    ) -> f64 {
        self.backlog.lateness(&Newcomer {
            place: due.place,
            now,
            work: due.work_us,
            headroom: HEADROOM * self.usual_prefill_us,
            slowdown: CAUTION * self.slowdown(decodes),
            relative_share,
        })
    }

    pub(crate) fn enqueue(&mut self, id: RequestId, due: &Due) {
        self.backlog.insert(id, &due.place, due.work_us, due.is_late);
        self.by_start.insert((due.start_by, id));
    }

    /// A request is let in, and may count on it.
    pub(crate) fn promised(&mut self, due: &Due, now: Micros) {
        self.backlog.promised(&due.place, due.work_us, now);
    }

    /// The request has a place.
    pub(crate) fn started(&mut self, id: RequestId, due: &Due) {
        self.by_start.remove(&(due.start_by, id));
    }

    /// Of its prompt, tokens `rest` are yet to be computed.
    pub(crate) fn advanced(&mut self, id: RequestId, due: &Due, rest: Range<u32>) {
        let work = if rest.is_empty() { 0.0 } else { self.work(rest.start, rest.end) };
        self.backlog.set(id, &due.place, work);
    }

    /// The request ended.
    pub(crate) fn dequeue(&mut self, id: RequestId, due: &Due) {
        self.backlog.set(id, &due.place, 0.0);
        self.by_start.remove(&(due.start_by, id));
    }

    /// A request whose latest start has passed.
    pub(crate) fn hopeless(&self, now: Micros) -> Option<RequestId> {
        let &(start_by, id) = self.by_start.first()?;
        (start_by < now).then_some(id)
    }

    /// What the prompts of a step may take it to, in microseconds.
    pub(crate) fn limit_us(&self, decodes: &StepShape) -> f64 {
        let itl = ITL_MARGIN * self.targets.itl.0 as f64;
        if decodes.num_rows == 0 { itl.max(PROMPT_STEP) } else { itl }
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

    /// Requests that have not started.
    pub(crate) fn num_queued(&self) -> usize {
        self.by_start.len()
    }

    /// Prompts that are not computed yet.
    pub(crate) fn backlog_len(&self) -> usize {
        self.backlog.len()
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
            adapter: None,
            params: Arc::new(SamplingParams::default()),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(1_000_000),
            deadline: deadline.map(Micros),
        }
    }

    fn due(pacing: &Pacing, prompt_len: usize, deadline: Option<u64>) -> Due {
        pacing.due(&request(prompt_len, deadline), TenantId(0), 0)
    }

    #[test]
    fn a_first_token_is_due_by_target_by_length_or_by_deadline() {
        let pacing = pacing();
        let due = |prompt_len, deadline| {
            let Due { place, start_by, .. } = due(&pacing, prompt_len, deadline);
            (place.due.0, start_by.0)
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
    fn who_is_late_is_put_off_once_and_not_beyond_a_deadline() {
        let pacing = pacing();
        let first = due(&pacing, 1000, None);
        let later = pacing.put_off(&first, &request(1000, None), Micros(3_000_000)).unwrap();
        assert_eq!((later.place.due.0, later.start_by.0), (31_000_000, 31_000_000 - 12_500 - 50_000));
        assert_eq!(pacing.put_off(&later, &request(1000, None), Micros(31_000_000)), None);
        assert_eq!(pacing.put_off(&first, &request(1000, Some(9_000_000)), Micros(3_000_000)), None);
    }

    #[test]
    fn what_is_cached_need_not_be_computed_but_does_not_change_what_was_promised() {
        let pacing = pacing();
        let cached = pacing.due(&request(100_000, None), TenantId(0), 90_000);
        assert_eq!((cached.place, cached.work_us), (due(&pacing, 100_000, None).place, 100_000.0));
    }

    #[test]
    fn chunks_fill_the_target_while_anybody_decodes() {
        let pacing = pacing();
        let idle = StepShape::default();
        assert_eq!(pacing.chunk(&idle, pacing.limit_us(&idle), 0, 8192, true), 8192);
        assert_eq!(
            pacing.chunk(&idle, pacing.limit_us(&idle), 0, 65536, true),
            9000,
            "but not for longer than 90 ms"
        );
        let decodes = StepShape { num_rows: 1000, num_tokens: 1000, ..idle };
        let limit = pacing.limit_us(&decodes);
        assert_eq!(pacing.chunk(&decodes, limit, 0, 8192, true), 3750, "47.5 ms less 10 ms");
        let many = StepShape { num_rows: 4740, num_tokens: 4740, ..idle };
        assert_eq!(pacing.chunk(&many, limit, 0, 8192, false), 0, "10 tokens are not worth it");
        assert_eq!(pacing.chunk(&many, limit, 0, 8192, true), MIN_CHUNK, "but the first one advances");
        assert_eq!(pacing.chunk(&many, limit, 0, 9, false), 9, "unless it is all there is");
    }
}
