//! From one message per step to one mailbox per request.
//!
//! The engine thread sends each step's events and output as a whole; the dispatcher, a tokio task, sorts them into
//! mailboxes, records metrics, and sends the buffers back for reuse. A mailbox holds at most what its request may
//! generate, so it needs no other bound.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, Waker};

use dashmap::DashMap;
use parking_lot::Mutex;
use quire_core::{FinishReason, Micros, ModelRunnerOutput, RequestId, TokenId, TokenLogprobs, Usage};
use quire_scheduler::{SeqEvent, SeqEventKind, SeqNote};
use tokio::sync::mpsc::Receiver;

use crate::client::Shared;
use crate::core::StepStats;
use crate::snapshot::EngineSnapshot;

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
    pub tokens: Vec<TokenId>,
    /// Parallel to `tokens`.
    pub logprobs: Vec<Option<TokenLogprobs>>,
    /// Set on the last piece.
    pub finished: Option<SeqFinished>,
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
    inner: Mutex<MailboxInner>,
}

struct MailboxInner {
    pending: VecDeque<SeqDelta>,
    waker: Option<Waker>,
    /// Continuations that have not ended.
    open: u32,
}

impl Mailbox {
    pub(crate) fn new(n: u32) -> Self {
        Self { inner: Mutex::new(MailboxInner { pending: VecDeque::new(), waker: None, open: n }) }
    }

    pub(crate) fn poll_pop(&self, cx: &mut Context<'_>) -> Poll<SeqDelta> {
        let mut inner = self.inner.lock();
        if let Some(delta) = inner.pending.pop_front() {
            return Poll::Ready(delta);
        }
        inner.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Lets `write` extend the pending piece of `index`, and wakes the reader. Returns the continuations still open.
    fn update(&self, index: u32, write: impl FnOnce(&mut SeqDelta)) -> u32 {
        let mut inner = self.inner.lock();
        let at = match inner.pending.iter().position(|delta| delta.index == index) {
            Some(at) => at,
            None => {
                inner.pending.push_back(SeqDelta { index, ..SeqDelta::default() });
                inner.pending.len() - 1
            }
        };
        let delta = &mut inner.pending[at];
        write(delta);
        if delta.finished.is_some() {
            inner.open = inner.open.saturating_sub(1);
        }
        let open = inner.open;
        let waker = inner.waker.take();
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
        open
    }
}

/// Mailboxes of live requests.
#[derive(Default)]
pub(crate) struct Registry {
    mailboxes: DashMap<RequestId, Arc<Mailbox>>,
}

impl Registry {
    pub(crate) fn insert(&self, id: RequestId, mailbox: Arc<Mailbox>) {
        self.mailboxes.insert(id, mailbox);
    }

    pub(crate) fn remove(&self, id: RequestId) {
        self.mailboxes.remove(&id);
    }

    fn get(&self, id: RequestId) -> Option<Arc<Mailbox>> {
        self.mailboxes.get(&id).map(|entry| Arc::clone(entry.value()))
    }
}

/// Runs until the engine thread hangs up.
pub(crate) async fn run(shared: Arc<Shared>, mut steps: Receiver<StepMessage>, recycle: Sender<StepMessage>) {
    let mut rate = FinishRate::default();
    while let Some(mut message) = steps.recv().await {
        shared.metrics.record(&message);
        shared.timelines.note(&message.notes);
        let ended = deliver(&shared, &mut message);
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
fn deliver(shared: &Shared, message: &mut StepMessage) -> u32 {
    let mut ended = 0;
    for event in &message.events {
        if let SeqEventKind::Finished { reason, usage, .. } = &event.kind {
            shared.timelines.ended(event.request, event.index, *reason, usage);
        }
        let Some(mailbox) = shared.registry.get(event.request) else { continue };
        let output = &mut message.output;
        let open = mailbox.update(event.index, |delta| apply(event, output, delta));
        if matches!(event.kind, SeqEventKind::Finished { .. }) {
            ended += 1;
            shared.release(1);
            if open == 0 {
                shared.registry.remove(event.request);
            }
        }
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
            delta.tokens.extend_from_slice(&output.tokens[range.clone()]);
            delta.logprobs.extend(output.logprobs[range].iter_mut().map(Option::take));
        }
        SeqEventKind::Finished { reason, stop_token, usage } => {
            delta.finished = Some(SeqFinished { reason: *reason, stop_token: *stop_token, usage: **usage });
        }
    }
}
