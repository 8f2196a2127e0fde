//! The clients' side of the proof: every continuation gets what the closed form says, once, in order, in time.

use std::collections::{BTreeMap, BTreeSet};

use quire_core::{FinishReason, ModelRunnerOutput, Request, RequestId, TokenId, Usage};
use quire_scheduler::{Policy, SeqEvent, SeqEventKind};

use crate::oracle;
use crate::workload::Workload;

/// Calls of `step` that a request may need beyond three for each token before it in the order.
const STEP_ALLOWANCE: u64 = 30;

/// How many times longer things may take among several tenants.
const FAIRNESS_ALLOWANCE: u64 = 8;

/// No run takes longer, in microseconds.
const MAX_RUN_TIME: u64 = 20_000_000;

/// One continuation as its client sees it.
struct Continuation {
    started: bool,
    finished: bool,
    output: Vec<TokenId>,
    /// The prefix that ends with the latest token.
    prefix: u64,
    /// The latest token is a stop token: nothing but the end may follow.
    stopped: bool,
    reported: BTreeSet<u32>,
}

/// One accepted request.
struct Client {
    request: Request,
    continuations: Vec<Continuation>,
    /// Ends that the client asked for, by continuation (`None`: all).
    asked: Vec<(Option<u32>, FinishReason)>,
    /// Calls of `step` since arrival, and how many it may see.
    age: u64,
    bound: u64,
}

/// A finished conversation turn.
pub(crate) struct Answer {
    pub(crate) request: Request,
    /// Output of continuation 0.
    pub(crate) output: Vec<TokenId>,
}

/// All clients of a run.
#[derive(Default)]
pub(crate) struct Checker {
    live: BTreeMap<RequestId, Client>,
    num_live_continuations: u32,
    vocab_size: u32,
    num_tenants: usize,
    /// Who waited so long may overtake higher priorities.
    max_queue_age: u64,
    /// With latency targets: nobody waits longer for the first place.
    max_wait: Option<u64>,
    pub(crate) num_tokens: u64,
    pub(crate) num_accepted: u64,
    answers: Vec<Answer>,
}

type Verdict = Result<(), String>;

impl Checker {
    pub(crate) fn new(vocab_size: u32, workload: &Workload) -> Self {
        Self {
            vocab_size,
            num_tenants: workload.tenants.len(),
            max_queue_age: workload.config.fairness.max_queue_age,
            max_wait: match workload.config.policy {
                Policy::Fcfs => None,
                Policy::DeadlineSlack(targets) => Some(targets.max_wait.0),
            },
            ..Self::default()
        }
    }

    pub(crate) fn accepted(&mut self, request: Request) {
        let mut prefix = oracle::root(request.salt);
        request.prompt.iter().for_each(|&token| prefix = oracle::extend(prefix, token));
        let new = || Continuation {
            started: false,
            finished: false,
            output: Vec::new(),
            prefix,
            stopped: false,
            reported: BTreeSet::new(),
        };
        let work = work_of(&request);
        // What already runs may be in front. Of what comes later, only what precedes in the order, and what enters the
        // batch while continuations still wait for their leader.
        let before: u64 = self.live.values().map(|client| work_of(&client.request)).sum();
        // Between tenants, and among those who waited long, the order depends on what was served so far.
        let fixed_order =
            self.num_tenants == 1 && self.max_queue_age > MAX_RUN_TIME && self.max_wait.is_none();
        for client in self.live.values_mut() {
            let partly_queued = client.continuations.iter().any(|c| !c.started && !c.finished);
            let many = client.continuations.len() > 1;
            if !fixed_order || precedes(&request, &client.request) || (many && partly_queued) {
                client.bound += if self.num_tenants > 1 { FAIRNESS_ALLOWANCE * work } else { work };
            }
        }
        let continuations: Vec<_> = (0..request.params.n).map(|_| new()).collect();
        self.num_accepted += 1;
        self.num_live_continuations += request.params.n;
        let mut bound = STEP_ALLOWANCE + work + before;
        if self.num_tenants > 1 {
            // Places change hands, and what loses its place computes its tokens anew.
            bound *= FAIRNESS_ALLOWANCE;
        }
        self.live.insert(request.id, Client { request, continuations, asked: Vec::new(), age: 0, bound });
    }

    /// The client wants no more.
    pub(crate) fn asked_to_finish(&mut self, id: RequestId, index: Option<u32>, reason: FinishReason) {
        if let Some(client) = self.live.get_mut(&id) {
            client.asked.push((index, reason));
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.live.is_empty()
    }

    /// Requests that ended since the last call.
    pub(crate) fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// Looks at everything one call of `step` reported, which began at `began` and ended at `now`.
    pub(crate) fn check_step(
        &mut self,
        began: u64,
        now: u64,
        events: &[SeqEvent],
        output: &ModelRunnerOutput,
    ) -> Verdict {
        for event in events {
            self.check_event(began, now, event, output).map_err(|violation| {
                format!("request {} continuation {}: {violation}", event.request, event.index)
            })?;
        }
        for (id, client) in &mut self.live {
            client.age += 1;
            if client.request.deadline.is_some_and(|deadline| deadline.0 <= began) {
                return Err(format!("request {id} outlives its deadline"));
            }
            let waits = client.continuations.iter().all(|c| !c.started);
            if self.max_wait.is_some_and(|max| waits && client.request.arrival.0 + max < began) {
                return Err(format!("request {id} waits longer than promised"));
            }
            if client.age > client.bound {
                return Err(format!("request {id} starves: not done after {} steps", client.age));
            }
        }
        Ok(())
    }

    fn check_event(&mut self, began: u64, now: u64, event: &SeqEvent, output: &ModelRunnerOutput) -> Verdict {
        let vocab_size = self.vocab_size;
        let client = self.live.get_mut(&event.request).ok_or("an event after the end, or of nobody")?;
        let (request, asked) = (&client.request, &client.asked);
        let continuation =
            client.continuations.get_mut(event.index as usize).ok_or("no such continuation")?;
        if continuation.finished {
            return Err("an event after Finished".into());
        }
        match event.kind.clone() {
            SeqEventKind::Started { cached_tokens } => {
                if std::mem::replace(&mut continuation.started, true) {
                    return Err("Started twice".into());
                }
                if cached_tokens as usize >= request.prompt.len() {
                    return Err("the last prompt token was taken from the cache".into());
                }
                let starter = request.clone();
                self.check_nobody_was_overtaken(began, &starter)
            }
            SeqEventKind::PromptLogprobs { entry } => check_logprobs(continuation, request, output, entry),
            SeqEventKind::Tokens { row, num_tokens } => {
                self.num_tokens += u64::from(num_tokens);
                let row = output.rows.get(row as usize).ok_or("a row that does not exist")?;
                let seed = request.params.seed_of(event.index);
                for &token in &output.tokens_of(row)[..num_tokens as usize] {
                    check_token(continuation, request, seed, token, vocab_size)?;
                }
                Ok(())
            }
            SeqEventKind::Finished { reason, stop_token, usage } => {
                if reason == FinishReason::Rejected && self.max_wait.is_none() {
                    return Err("it was given up without latency targets".into());
                }
                check_reason(continuation, request, asked, event.index, reason, stop_token, now)?;
                check_usage(continuation, request, &usage)?;
                if event.index == 0 && reason != FinishReason::Error {
                    check_all_reported(continuation, request, reason)?;
                }
                continuation.finished = true;
                self.num_live_continuations -= 1;
                self.forget_if_done(event.request);
                Ok(())
            }
        }
    }

    /// Whoever starts must precede all that never started; continuations wait for their leader, so they do not count.
    /// Between tenants only priorities count, and they only while no tenant may be held back by its share.
    fn check_nobody_was_overtaken(&self, began: u64, starter: &Request) -> Verdict {
        if self.max_wait.is_some() {
            return Ok(());
        }
        let aged = began.saturating_sub(starter.arrival.0) >= self.max_queue_age;
        for client in self.live.values() {
            let request = &client.request;
            let waits = client.continuations.iter().all(|c| !c.started);
            let comparable =
                request.tenant == starter.tenant && (request.priority == starter.priority || !aged);
            if waits && comparable && precedes(request, starter) {
                return Err(format!("it overtook request {}", request.id));
            }
        }
        Ok(())
    }

    fn forget_if_done(&mut self, id: RequestId) {
        let done = self.live.get(&id).is_some_and(|client| client.continuations.iter().all(|c| c.finished));
        if let Some(client) = done.then(|| self.live.remove(&id)).flatten() {
            let output = client.continuations.into_iter().next().map(|c| c.output).unwrap_or_default();
            self.answers.push(Answer { request: client.request, output });
        }
    }
}

/// An upper bound of the steps a request needs when it is first in the order: one token each, three times over because
/// a preempted sequence computes its tokens anew and may wait a step for blocks in quarantine.
fn work_of(request: &Request) -> u64 {
    3 * u64::from(request.params.n) * (request.prompt.len() as u64 + u64::from(request.params.max_tokens))
}

fn precedes(a: &Request, b: &Request) -> bool {
    a.priority > b.priority || (a.priority == b.priority && (a.arrival, a.id) < (b.arrival, b.id))
}

fn check_token(
    continuation: &mut Continuation,
    request: &Request,
    seed: u64,
    token: TokenId,
    vocab_size: u32,
) -> Verdict {
    let params = &request.params;
    let at = continuation.output.len() as u32;
    if !continuation.started {
        return Err("a token before Started".into());
    }
    if continuation.stopped || at >= params.max_tokens {
        return Err(format!("token {at} comes after the end"));
    }
    let expected = oracle::sample(continuation.prefix, seed, at, params, vocab_size);
    if token != expected {
        return Err(format!("token {at} is {token}, alone it would be {expected}"));
    }
    continuation.stopped = at >= params.min_tokens && params.stop_token_ids.contains(&token);
    continuation.prefix = oracle::extend(continuation.prefix, token);
    continuation.output.push(token);
    Ok(())
}

fn check_logprobs(
    continuation: &mut Continuation,
    request: &Request,
    output: &ModelRunnerOutput,
    entry: u32,
) -> Verdict {
    let (_, position, logprobs) =
        output.prompt_logprobs.get(entry as usize).ok_or("an entry that does not exist")?;
    let at = *position as usize;
    if request.params.prompt_logprobs.is_none() || at == 0 || at >= request.prompt.len() {
        return Err(format!("nobody asked for the log-probability of position {position}"));
    }
    if !continuation.reported.insert(*position) {
        return Err(format!("position {position} is reported twice"));
    }
    let mut prefix = oracle::root(request.salt);
    request.prompt[..at].iter().for_each(|&token| prefix = oracle::extend(prefix, token));
    if *logprobs != oracle::logprobs(prefix, request.prompt[at]) {
        return Err(format!("the log-probability of position {position} is somebody else's"));
    }
    Ok(())
}

fn check_reason(
    continuation: &Continuation,
    request: &Request,
    asked: &[(Option<u32>, FinishReason)],
    index: u32,
    reason: FinishReason,
    stop_token: Option<TokenId>,
    now: u64,
) -> Verdict {
    let was_asked = asked.iter().any(|&(of, why)| why == reason && of.is_none_or(|of| of == index));
    let full = continuation.output.len() == request.params.max_tokens as usize;
    let justified = match reason {
        FinishReason::Stop if stop_token.is_some() => {
            continuation.stopped && continuation.output.last().copied() == stop_token
        }
        FinishReason::Stop | FinishReason::Abort => was_asked && !continuation.stopped && !full,
        FinishReason::Length => full && !continuation.stopped,
        FinishReason::Deadline => {
            request.deadline.is_some_and(|deadline| deadline.0 <= now) && !continuation.stopped && !full
        }
        FinishReason::Error => false,
        // Only what never started is given up for being late.
        FinishReason::Rejected => !continuation.started,
    };
    if justified {
        return Ok(());
    }
    Err(format!("it ended by {} after {} tokens", reason.name(), continuation.output.len()))
}

fn check_usage(continuation: &Continuation, request: &Request, usage: &Usage) -> Verdict {
    let times = [usage.arrival, usage.first_scheduled, usage.first_token, usage.finished];
    let counts = usage.prompt_tokens as usize == request.prompt.len()
        && usage.generated_tokens as usize == continuation.output.len()
        && usage.cached_tokens < usage.prompt_tokens
        && usage.arrival == request.arrival;
    if counts && times.is_sorted() {
        return Ok(());
    }
    Err(format!("its usage is wrong: {usage:?}"))
}

fn check_all_reported(continuation: &Continuation, request: &Request, reason: FinishReason) -> Verdict {
    let computed = matches!(reason, FinishReason::Length) || !continuation.output.is_empty();
    let wanted = request.params.prompt_logprobs.is_some() && computed;
    if wanted && continuation.reported.len() + 1 != request.prompt.len() {
        return Err(format!(
            "{} of {} log-probabilities",
            continuation.reported.len(),
            request.prompt.len() - 1
        ));
    }
    Ok(())
}
