//! Behaviour of the whole state machine, driven step by step by a fake device.

use std::sync::Arc;

use quire_core::{
    BlockHasher, ExecutorLimits, FinishReason, LogitRows, Micros, ModelRunnerOutput, Request, RequestError,
    RequestId, SamplingParams, SchedulerOutput, StepId, TenantId, TokenId, TokenLogprobs,
};

use crate::event::SeqEventKind;
use crate::{Scheduler, SchedulerConfig, SeqEvent};

pub(crate) fn limits() -> ExecutorLimits {
    ExecutorLimits {
        block_size: 4,
        num_blocks: 64,
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        max_model_len: 128,
        vocab_size: 1000,
        max_steps_in_flight: 1,
        kv_groups: vec![None],
    }
}

pub(crate) struct Rig {
    pub(crate) scheduler: Scheduler,
    hasher: BlockHasher,
    pub(crate) now: u64,
    out: SchedulerOutput,
    pub(crate) events: Vec<SeqEvent>,
    next_token: TokenId,
}

impl Rig {
    fn new(limits: ExecutorLimits) -> Self {
        Self::with(limits, |_| {})
    }

    pub(crate) fn with(limits: ExecutorLimits, change: impl Fn(&mut SchedulerConfig)) -> Self {
        let hasher = BlockHasher::new((1, 2), limits.block_size);
        let mut config = SchedulerConfig::new(limits, hasher);
        change(&mut config);
        let out = SchedulerOutput::default();
        Self { scheduler: Scheduler::new(config), hasher, now: 0, out, events: Vec::new(), next_token: 500 }
    }

    pub(crate) fn request(
        &self,
        id: u64,
        prompt: impl IntoIterator<Item = TokenId>,
        params: SamplingParams,
    ) -> Request {
        let prompt: Vec<TokenId> = prompt.into_iter().collect();
        let salt = self.hasher.salt(b"");
        Request {
            id: RequestId(id),
            block_hashes: self.hasher.chain(salt, &prompt).into(),
            prompt: prompt.into(),
            salt,
            adapter: None,
            params: Arc::new(params),
            tenant: TenantId(0),
            priority: 0,
            arrival: Micros(id),
            deadline: None,
        }
    }

    pub(crate) fn add(&mut self, id: u64, prompt: impl IntoIterator<Item = TokenId>, params: SamplingParams) {
        let request = self.request(id, prompt, params);
        self.scheduler.add(request).unwrap();
    }

    /// The next plan; (start, length, sample) of its rows.
    fn schedule(&mut self) -> Vec<(u32, u32, bool)> {
        self.now += 1;
        self.scheduler.schedule(Micros(self.now), &mut self.out, &mut self.events);
        self.scheduler.check_invariants().unwrap();
        self.out.scheduled.iter().map(|r| (r.num_computed_tokens, r.num_new_tokens, r.sample)).collect()
    }

    /// The current plan.
    pub(crate) fn plan(&self) -> &SchedulerOutput {
        &self.out
    }

    /// The answer to the current plan: a fresh token for each sampled row.
    fn answer(&mut self) -> ModelRunnerOutput {
        let mut output = ModelRunnerOutput { step: self.out.step, ..ModelRunnerOutput::default() };
        for row in &self.out.scheduled {
            if row.logits == LogitRows::All {
                for at in 0..row.num_new_tokens {
                    let logprobs = TokenLogprobs { logprob: 0.0, rank: 1, top: Vec::new() };
                    output.prompt_logprobs.push((row.slot, row.num_computed_tokens + at + 1, logprobs));
                }
            }
            if row.sample {
                output.push_row(row.slot, &[self.next_token], []);
                self.next_token += 1;
            }
        }
        output
    }

    fn update(&mut self, output: &ModelRunnerOutput) {
        self.scheduler.update(Micros(self.now), output, &mut self.events);
        self.scheduler.check_invariants().unwrap();
    }

    pub(crate) fn step(&mut self) -> Vec<(u32, u32, bool)> {
        let rows = self.schedule();
        if !rows.is_empty() {
            let output = self.answer();
            self.update(&output);
        }
        rows
    }

    pub(crate) fn run(&mut self) {
        for _ in 0..10_000 {
            if !self.scheduler.has_work() {
                return;
            }
            self.step();
        }
        panic!("the scheduler does not come to an end: {:?}", self.scheduler.stats());
    }

    pub(crate) fn finished(&self) -> Vec<(u64, u32, FinishReason, u32)> {
        let finished = self.events.iter().filter_map(|event| match &event.kind {
            SeqEventKind::Finished { reason, usage, .. } => {
                Some((event.request.0, event.index, *reason, usage.generated_tokens))
            }
            _ => None,
        });
        finished.collect()
    }
}

#[test]
fn prefill_is_chunked_beside_decodes_under_one_budget() {
    let mut rig = Rig::with(limits(), |config| config.max_prefill_chunk = 20);
    rig.add(1, 0..5, SamplingParams::greedy(50));
    assert_eq!(rig.step(), [(0, 5, true)]);
    rig.add(2, 0..70, SamplingParams::greedy(2));
    rig.add(3, 100..130, SamplingParams::greedy(2));
    // Block 0 of request 2 is known from request 1; 31 tokens remain beside the decode.
    assert_eq!(rig.step(), [(5, 1, true), (4, 20, false), (0, 11, false)]);
    assert_eq!(rig.scheduler.stats().prefill_tokens, 31);
    assert_eq!(rig.scheduler.stats().decode_tokens, 1);
    assert_eq!(rig.step(), [(6, 1, true), (24, 20, false), (11, 11, false)]);
    assert_eq!(rig.step(), [(7, 1, true), (44, 20, false), (22, 8, true)]);
    rig.run();
    assert_eq!(rig.finished().len(), 3);
}

#[test]
fn a_cached_prompt_still_computes_its_last_token() {
    let mut rig = Rig::new(limits());
    rig.add(1, 0..8, SamplingParams::greedy(6));
    rig.run();
    // Prompt and outputs 500..505 (the last one was never an input): three full blocks.
    let turn: Vec<TokenId> = (0..8).chain(500..506).collect();
    rig.add(2, turn[..8].iter().copied(), SamplingParams::greedy(1));
    assert_eq!(rig.step(), [(7, 1, true)], "block 1 is copied, since its last token is computed");
    rig.add(3, turn[..13].iter().copied(), SamplingParams::greedy(1));
    assert_eq!(rig.step(), [(12, 1, true)], "generated blocks are found too");
    let mut other = rig.request(4, turn, SamplingParams::greedy(1));
    other.salt = rig.hasher.salt(b"other");
    other.block_hashes = rig.hasher.chain(other.salt, &other.prompt).into();
    rig.scheduler.add(other).unwrap();
    assert_eq!(rig.step(), [(0, 14, true)], "nothing is shared across salts");
    assert_eq!(rig.scheduler.stats().prefix_cache_hits, 7 + 12);
}

#[test]
fn a_prompt_cached_whole_computes_one_token_into_a_copy() {
    let mut rig = Rig::new(limits());
    rig.add(1, 0..12, SamplingParams::greedy(2));
    rig.run();
    rig.add(2, 0..12, SamplingParams::greedy(2));
    assert_eq!(rig.schedule(), [(11, 1, true)]);
    let [copy] = rig.out.block_copies[..] else { panic!("{:?}", rig.out.block_copies) };
    let table = &rig.out.new[0].block_tables[0];
    assert_eq!((table.len(), table[2]), (3, copy.dst));
    assert!(!table.contains(&copy.src), "the original belongs to the cache");
    let output = rig.answer();
    rig.update(&output);
    rig.run();
    // Another tail: nothing to copy, and the block is computed.
    rig.add(3, (0..11).chain([99]), SamplingParams::greedy(2));
    assert_eq!(rig.schedule(), [(8, 4, true)]);
    // No block to spare for the copy's source: the last block is computed as before.
    let mut rig = Rig::new(ExecutorLimits { num_blocks: 3, ..limits() });
    rig.add(1, 0..12, SamplingParams::greedy(1));
    rig.run();
    rig.add(2, 0..12, SamplingParams::greedy(1));
    assert_eq!(rig.step(), [(8, 4, true)]);
}

#[test]
fn the_last_in_order_is_preempted_and_keeps_its_tokens() {
    let mut rig =
        Rig::with(ExecutorLimits { num_blocks: 6, ..limits() }, |c| c.enable_prefix_caching = false);
    rig.add(1, 0..8, SamplingParams::greedy(9));
    rig.add(2, 10..18, SamplingParams::greedy(9));
    assert_eq!(rig.step().len(), 2);
    for _ in 0..4 {
        assert_eq!(rig.step().len(), 2);
    }
    assert_eq!(rig.step(), [(12, 1, true)], "request 2 lost its blocks, and nobody was admitted");
    assert_eq!(rig.out.freed.len(), 1);
    assert_eq!(rig.scheduler.stats().num_preemptions, 1);
    rig.run();
    assert_eq!(rig.finished(), [(1, 0, FinishReason::Length, 9), (2, 0, FinishReason::Length, 9)]);
    let tokens = rig.events.iter().filter(|e| matches!(e.kind, SeqEventKind::Tokens { .. })).count();
    assert_eq!(tokens, 18, "no token is reported twice");
}

#[test]
fn followers_share_the_prompt_and_copy_what_they_write() {
    let mut rig = Rig::new(limits());
    rig.add(1, 0..10, SamplingParams { n: 3, ..SamplingParams::greedy(3) });
    assert_eq!(rig.step(), [(0, 10, true)]);
    assert_eq!(rig.schedule(), [(10, 1, true), (9, 1, true), (9, 1, true)]);
    let leader_tail = rig.out.block_copies[0].src;
    assert!(rig.out.block_copies.iter().all(|copy| copy.src == leader_tail));
    for (new, copy) in rig.out.new.iter().zip(&rig.out.block_copies) {
        assert_eq!(new.block_tables[0][2], copy.dst);
        assert_eq!(new.seed, new.params.seed_of(new.index));
    }
    assert_eq!(rig.scheduler.stats().kv_blocks_used, 2 + 3);
    let output = rig.answer();
    rig.update(&output);
    rig.run();
    let mut finished = rig.finished();
    finished.sort_unstable_by_key(|f| f.1);
    assert_eq!(finished, [0, 1, 2].map(|index| (1, index, FinishReason::Length, 3)));
    assert_eq!(rig.scheduler.stats().kv_blocks_used, 0);
}

#[test]
fn the_next_follower_leads_when_the_leader_ends_early() {
    let mut rig = Rig::with(limits(), |config| config.max_prefill_chunk = 4);
    rig.add(1, 0..10, SamplingParams { n: 3, ..SamplingParams::greedy(2) });
    rig.step();
    rig.scheduler.finish(RequestId(1), Some(0), FinishReason::Abort);
    rig.scheduler.finish(RequestId(1), Some(7), FinishReason::Abort);
    rig.scheduler.finish(RequestId(9), None, FinishReason::Abort);
    rig.run();
    let expected =
        [(1, 0, FinishReason::Abort, 0), (1, 1, FinishReason::Length, 2), (1, 2, FinishReason::Length, 2)];
    assert_eq!(rig.finished(), expected);
}

#[test]
fn a_stop_found_late_discards_the_overshoot_and_quarantines_its_blocks() {
    let mut rig = Rig::new(ExecutorLimits { max_steps_in_flight: 2, num_blocks: 2, ..limits() });
    rig.add(1, 0..4, SamplingParams { stop_token_ids: vec![500], ..SamplingParams::greedy(4) });
    assert_eq!(rig.schedule(), [(0, 4, true)]);
    let first = rig.answer();
    assert_eq!(rig.schedule(), [(4, 1, true)], "its input is still on the device");
    let second = rig.answer();
    rig.update(&first);
    assert!(matches!(
        rig.events.last().unwrap().kind,
        SeqEventKind::Finished { reason: FinishReason::Stop, stop_token: Some(500), .. }
    ));
    assert_eq!(rig.scheduler.stats().kv_blocks_quarantined, 2);
    rig.add(2, 50..55, SamplingParams::greedy(1));
    assert_eq!(rig.schedule(), [], "step 2 may still write the blocks");
    let num_events = rig.events.len();
    rig.update(&second);
    assert_eq!(rig.events.len(), num_events, "the overshoot is not reported");
    assert_eq!(rig.schedule(), [(0, 5, true)]);
}

#[test]
fn no_row_is_scheduled_past_max_tokens_and_min_tokens_holds_back_stops() {
    let mut rig = Rig::new(ExecutorLimits { max_steps_in_flight: 2, ..limits() });
    let stops = vec![500, 501, 502, 503];
    rig.add(1, 0..4, SamplingParams { stop_token_ids: stops, min_tokens: 1, ..SamplingParams::greedy(2) });
    rig.schedule();
    let first = rig.answer();
    assert_eq!(rig.schedule(), [(4, 1, true)]);
    let second = rig.answer();
    rig.update(&first);
    assert_eq!(rig.schedule(), [], "the second token is the last");
    rig.update(&second);
    assert_eq!(rig.finished(), [(1, 0, FinishReason::Stop, 2)]);
}

#[test]
fn deadlines_end_waiting_and_running_requests() {
    let mut rig = Rig::new(ExecutorLimits { max_num_seqs: 1, ..limits() });
    for id in [1, 2] {
        let mut request = rig.request(id, 0..4, SamplingParams::greedy(100));
        request.deadline = Some(Micros(5));
        rig.scheduler.add(request).unwrap();
    }
    rig.run();
    let reasons: Vec<_> = rig.finished().iter().map(|f| f.2).collect();
    assert_eq!(reasons, [FinishReason::Deadline; 2]);
    assert_eq!(rig.finished()[1].3, 0);
}

#[test]
fn higher_priority_enters_first() {
    let mut rig = Rig::new(ExecutorLimits { max_num_seqs: 1, ..limits() });
    rig.add(1, 0..4, SamplingParams::greedy(1));
    let mut urgent = rig.request(2, 0..4, SamplingParams::greedy(1));
    urgent.priority = 1;
    rig.scheduler.add(urgent).unwrap();
    rig.run();
    assert_eq!(rig.finished().iter().map(|f| f.0).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn prompt_logprobs_are_reported_once_each_whatever_is_cached_or_preempted() {
    let mut rig = Rig::with(ExecutorLimits { num_blocks: 7, ..limits() }, |c| c.max_prefill_chunk = 3);
    rig.add(1, 0..8, SamplingParams::greedy(12));
    rig.step();
    let scored = SamplingParams { prompt_logprobs: Some(0), n: 2, ..SamplingParams::greedy(6) };
    rig.add(2, 0..10, scored);
    rig.run();
    assert!(rig.scheduler.stats().num_preemptions > 0, "the pool is meant to be too small");
    let reported = rig
        .events
        .iter()
        .filter(|e| matches!(e.kind, SeqEventKind::PromptLogprobs { .. }))
        .collect::<Vec<_>>();
    assert_eq!(reported.len(), 9);
    assert!(reported.iter().all(|e| e.request == RequestId(2) && e.index == 0));
    assert_eq!(rig.finished().len(), 3);
}

#[test]
fn blocks_below_the_window_are_given_back() {
    let mut rig = Rig::new(ExecutorLimits { kv_groups: vec![Some(6)], ..limits() });
    rig.add(1, 0..20, SamplingParams::greedy(40));
    for _ in 0..30 {
        rig.step();
        assert!(rig.scheduler.stats().kv_blocks_used <= 5, "a window of 6 spans at most 3 blocks");
    }
    rig.run();
    // Blocks of the end suffice for a hit; the early ones need not be there.
    rig.add(2, (0..20).chain(500..530), SamplingParams::greedy(1));
    assert_eq!(rig.step(), [(48, 2, true)]);
}

#[test]
fn what_cannot_run_is_refused() {
    let mut rig = Rig::with(ExecutorLimits { num_blocks: 4, ..limits() }, |c| c.max_queued_requests = 1);
    let refusal = |rig: &mut Rig, prompt: u32, params| {
        let request = rig.request(1, 0..prompt, params);
        rig.scheduler.add(request).unwrap_err()
    };
    let greedy = SamplingParams::greedy;
    assert!(matches!(refusal(&mut rig, 10, greedy(8)), RequestError::TooLong { needed: 18, .. }));
    assert!(matches!(refusal(&mut rig, 10, greedy(u32::MAX)), RequestError::TooLong { .. }));
    assert!(matches!(refusal(&mut rig, 0, greedy(1)), RequestError::Invalid { field: "prompt", .. }));
    assert!(matches!(refusal(&mut rig, 1, greedy(0)), RequestError::Invalid { field: "max_tokens", .. }));
    let many = SamplingParams { n: 9, ..greedy(1) };
    assert!(matches!(refusal(&mut rig, 1, many), RequestError::Invalid { field: "n", .. }));
    rig.add(1, 0..10, greedy(7));
    assert!(matches!(refusal(&mut rig, 1, greedy(1)), RequestError::Invalid { field: "id", .. }));
    let second = rig.request(2, 0..2, greedy(1));
    assert!(matches!(rig.scheduler.add(second), Err(RequestError::Overloaded { queued: 1, limit: 1, .. })));
    rig.run();
    let last = rig.out.step;
    assert_eq!(rig.schedule(), []);
    rig.add(3, 0..2, greedy(1));
    rig.schedule();
    assert_eq!(rig.out.step, StepId(last.0 + 1), "an empty plan consumes no step");
}

#[test]
fn finish_all_ends_everything_once() {
    let mut rig = Rig::new(limits());
    rig.add(1, 0..10, SamplingParams { n: 3, ..SamplingParams::greedy(3) });
    rig.step();
    rig.add(2, 0..10, SamplingParams::greedy(3));
    rig.scheduler.finish_all(FinishReason::Error);
    assert!(rig.scheduler.has_work(), "the events are still to be delivered");
    rig.run();
    assert_eq!(rig.finished().len(), 4);
    assert!(rig.finished().iter().all(|f| f.2 == FinishReason::Error));
}
