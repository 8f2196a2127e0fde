//! From one message per step to one mailbox per request.
//!
//! The engine thread sends each step's events and output as a whole; the dispatcher, a tokio task, sorts them into
//! mailboxes, records metrics, and sends the buffers back for reuse. A mailbox holds at most what its request may
//! generate, so it needs no other bound.
//!
//! With a thousand streams a step finds none of them in the nearer caches, so what a token costs here is the number of
//! cache lines it touches: a mailbox is one piece of memory, with the tokens and what metrics need inside.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use quire_core::{
    FinishReason, Micros, ModelRunnerOutput, Request, RequestId, TokenId, TokenLogprobs, Usage,
};
use quire_scheduler::{SeqEvent, SeqEventKind, SeqNote};
use smallvec::SmallVec;
use tokio::sync::mpsc::Receiver;

use crate::client::Shared;
use crate::core::StepStats;
use crate::metrics::LiveRequest;
use crate::snapshot::EngineSnapshot;

/// Mailboxes that are asked for from memory together.
const LOOK_AHEAD: usize = 16;

/// A piece of one continuation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SeqDelta {
    /// Which continuation.
    pub index: u32,
    /// Set on the first piece: prompt tokens found in the prefix cache.
    pub started: Option<u32>,
    /// `(position, log-probability of the prompt token there)`, ascending.
    pub prompt_logprobs: Vec<(u32, TokenLogprobs)>,
    /// New tokens, the stop token included.
    pub tokens: SmallVec<[TokenId; 4]>,
    /// Parallel to `tokens`, or empty if none of them has any.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// Set on the last piece.
    pub finished: Option<Box<SeqFinished>>,
}

/// The end of one continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SeqFinished {
    /// Why.
    pub reason: FinishReason,
    /// The stop token that ended it, if one did; also the last of the tokens.
    pub stop_token: Option<TokenId>,
    /// What it cost.
    pub usage: Usage,
}

/// Everything one step produced. Travels to the dispatcher and back.
#[derive(Default)]
pub(crate) struct StepMessage {
    pub(crate) events: Vec<SeqEvent>,
    pub(crate) output: ModelRunnerOutput,
    pub(crate) notes: Vec<SeqNote>,
    pub(crate) stats: StepStats,
}

/// Pieces waiting for their reader: at most one per continuation, later tokens are appended to it.
pub(crate) struct Mailbox {
    id: RequestId,
    inner: Mutex<MailboxInner>,
}

struct MailboxInner {
    waker: Option<Waker>,
    /// Continuations that have not ended.
    open: u32,
    pending: SmallVec<[SeqDelta; 1]>,
    measured: LiveRequest,
}

impl Mailbox {
    pub(crate) fn new(request: &Request) -> Self {
        let inner = MailboxInner {
            waker: None,
            open: request.params.n,
            pending: SmallVec::new(),
            measured: LiveRequest::new(request),
        };
        Self { id: request.id, inner: Mutex::new(inner) }
    }

    pub(crate) fn poll_pop(&self, cx: &mut Context<'_>) -> Poll<SeqDelta> {
        let mut inner = self.inner.lock();
        if !inner.pending.is_empty() {
            return Poll::Ready(inner.pending.remove(0));
        }
        if !inner.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            inner.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Tokens of all continuations so far.
    pub(crate) fn num_generated(&self) -> u32 {
        self.inner.lock().measured.generated
    }

    /// Lets `write` extend the pending piece of `index`, and wakes the reader. Returns the continuations still open.
    fn update(&self, index: u32, write: impl FnOnce(&mut SeqDelta, &mut LiveRequest)) -> u32 {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let at = match inner.pending.iter().position(|delta| delta.index == index) {
            Some(at) => at,
            None => {
                inner.pending.push(SeqDelta { index, ..SeqDelta::default() });
                inner.pending.len() - 1
            }
        };
        let delta = &mut inner.pending[at];
        write(delta, &mut inner.measured);
        if delta.finished.is_some() {
            inner.open = inner.open.saturating_sub(1);
        }
        let open = inner.open;
        let waker = inner.waker.take();
        drop(guard);
        if let Some(waker) = waker {
            waker.wake();
        }
        open
    }
}

/// Where clients leave the mailboxes of new requests for the dispatcher, before the engine hears of the requests.
#[derive(Default)]
pub(crate) struct Registry {
    arrived: Mutex<Vec<Arc<Mailbox>>>,
}

impl Registry {
    pub(crate) fn insert(&self, mailbox: Arc<Mailbox>) {
        self.arrived.lock().push(mailbox);
    }

    /// For a request that never came to the engine. If the dispatcher has it already it keeps it, to no harm: that
    /// happens only while an engine dies.
    pub(crate) fn remove(&self, id: RequestId) {
        self.arrived.lock().retain(|mailbox| mailbox.id != id);
    }
}

/// Mailboxes of live requests. Ids are given out in order, so a multiplication spreads them well enough.
type Mailboxes = HashMap<RequestId, Arc<Mailbox>, BuildHasherDefault<IdHasher>>;

#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u64(&mut self, id: u64) {
        // The golden ratio in 64 bits; the map takes its bits from both ends.
        self.0 = (self.0.rotate_left(8) ^ id).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

/// Runs until the engine thread hangs up.
pub(crate) async fn run(shared: Arc<Shared>, mut steps: Receiver<StepMessage>, recycle: Sender<StepMessage>) {
    let mut rate = FinishRate::default();
    let mut mailboxes = Mailboxes::default();
    while let Some(mut message) = steps.recv().await {
        shared.metrics.record_step(&message.stats);
        shared.timelines.note(&message.notes);
        // After the message: whoever has an event in it left his mailbox before.
        let arrived = std::mem::take(&mut *shared.registry.arrived.lock());
        mailboxes.extend(arrived.into_iter().map(|mailbox| (mailbox.id, mailbox)));
        let ended = deliver(&shared, &mut mailboxes, &mut message);
        shared.snapshot.store(snapshot(&message.stats, rate.update(message.stats.at, ended)));
        message.events.clear();
        message.output.clear();
        // The engine thread may have ended; then the buffers just go.
        let _ = recycle.send(message);
    }
}

fn snapshot(stats: &StepStats, finish_rate: f64) -> EngineSnapshot {
    EngineSnapshot {
        num_running: stats.scheduler.running,
        num_waiting: stats.scheduler.waiting,
        lowest_waiting: stats.scheduler.lowest_waiting,
        kv_usage: stats.scheduler.kv_usage,
        finish_rate,
        last_step_ms: stats.at.0 / 1000,
    }
}

/// Continuations ended per second, over windows of at least one second, each weighted by half.
#[derive(Default)]
struct FinishRate {
    window_start: Micros,
    ended: u32,
    per_second: f64,
}

impl FinishRate {
    fn update(&mut self, now: Micros, ended: u32) -> f64 {
        self.ended += ended;
        let seconds = now.since(self.window_start).as_secs_f64();
        if seconds >= 1.0 {
            let latest = f64::from(self.ended) / seconds;
            self.per_second = if self.per_second > 0.0 { 0.5 * (self.per_second + latest) } else { latest };
            self.window_start = now;
            self.ended = 0;
        }
        self.per_second
    }
}

/// Sorts the step into mailboxes; returns how many continuations ended.
fn deliver(shared: &Shared, mailboxes: &mut Mailboxes, message: &mut StepMessage) -> u32 {
    let StepMessage { events, output, stats, .. } = message;
    let (mut ended, mut num_tokens) = (0, 0);
    let mut done: SmallVec<[RequestId; 8]> = SmallVec::new();
    for events in events.chunks(LOOK_AHEAD) {
        let mut found = [None; LOOK_AHEAD];
        // Nothing here waits for the read before, so all of them are on their way at once.
        let mut touched = 0;
        for (found, event) in found.iter_mut().zip(events) {
            *found = mailboxes.get(&event.request);
            touched ^= found.map_or(0, |mailbox| mailbox.id.0);
        }
        std::hint::black_box(touched);
        for (mailbox, event) in found.iter().zip(events) {
            if let SeqEventKind::Finished { reason, usage, .. } = &event.kind {
                shared.timelines.ended(event.request, event.index, *reason, usage);
            }
            let Some(mailbox) = mailbox else { continue };
            let open = mailbox.update(event.index, |delta, measured| {
                let new = shared.metrics.record(event, stats.at, measured);
                measured.generated += new as u32;
                num_tokens += new;
                apply(event, output, delta);
            });
            if matches!(event.kind, SeqEventKind::Finished { .. }) {
                ended += 1;
                shared.release(1);
                if open == 0 {
                    done.push(event.request);
                }
            }
        }
    }
    shared.metrics.record_generated(num_tokens);
    for id in done {
        mailboxes.remove(&id);
    }
    ended
}

fn apply(event: &SeqEvent, output: &mut ModelRunnerOutput, delta: &mut SeqDelta) {
    match &event.kind {
        &SeqEventKind::Started { cached_tokens } => delta.started = Some(cached_tokens),
        &SeqEventKind::PromptLogprobs { entry } => {
            let (_, position, logprobs) = output.prompt_logprobs[entry as usize].clone();
            delta.prompt_logprobs.push((position, logprobs));
        }
        &SeqEventKind::Tokens { row, num_tokens } => {
            let start = output.rows[row as usize].start as usize;
            let range = start..start + num_tokens as usize;
            let logprobs = &mut output.logprobs[range.clone()];
            if !delta.logprobs.is_empty() || logprobs.iter().any(Option::is_some) {
                delta.logprobs.resize(delta.tokens.len(), None);
                delta.logprobs.extend(logprobs.iter_mut().map(Option::take));
            }
            delta.tokens.extend_from_slice(&output.tokens[range]);
        }
        SeqEventKind::Finished { reason, stop_token, usage } => {
            let finished = SeqFinished { reason: *reason, stop_token: *stop_token, usage: **usage };
            delta.finished = Some(Box::new(finished));
        }
    }
}
