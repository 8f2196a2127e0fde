//! The async side of the engine: submit a request, read its tokens, end it early.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::mpsc::Sender;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use quire_core::{
    AdapterId, BlockHasher, CacheSalt, FinishReason, Limits, Micros, Request, RequestError, RequestId,
    SamplingParams, TenantId, TenantShare, TokenId,
};
use tokio::sync::Notify;

use crate::dispatch::{Mailbox, Registry, SeqDelta};
use crate::metrics::{EngineMetrics, Rejection};
use crate::queue::{self, Place};
use crate::refusals::{Refusal, Refusals};
use crate::sessions::Sessions;
use crate::snapshot::{EngineSnapshot, SharedSnapshot};
use crate::timeline::{Origin, Timeline, Timelines};

/// What a caller asks of an engine; ids and times are added by [`EngineClient::submit`].
#[derive(Clone, Debug)]
pub struct RequestSpec {
    /// Prompt token ids.
    pub prompt: Arc<[TokenId]>,
    /// How to sample; `stop_token_ids` holds the model's end-of-sequence ids unless they are to be ignored.
    pub params: Arc<SamplingParams>,
    /// Who asks.
    pub tenant: TenantId,
    /// Higher runs first; 0 is normal.
    pub priority: i8,
    /// Which adapter is put on the model, if any. Its blocks have a namespace of their own within that of `cache_salt`.
    pub adapter: Option<AdapterId>,
    /// Namespace of the prefix cache; `None` neither reads nor fills it.
    pub cache_salt: Option<CacheSalt>,
    /// The conversation that it is a turn of, if the client named one: what its last turn began with is not hashed again.
    pub session: Option<u64>,
    /// Time from now after which the answer is worthless.
    pub timeout: Option<Duration>,
}

/// Where an engine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EngineState {
    /// Takes requests.
    Ready = 0,
    /// Finishes what it has, takes nothing new.
    Draining = 1,
    /// The device failed or the thread ended; nothing more comes.
    Dead = 2,
}

impl EngineState {
    const fn from_u8(value: u8) -> Self {
        match value {
            0 => Self::Ready,
            1 => Self::Draining,
            _ => Self::Dead,
        }
    }
}

/// What travels to the engine thread. The queue is bounded by admission: at most [`queue::most`] are live, each
/// sends one `Add`, one `Finish` per continuation and one when its handle is dropped; an administrator may send more.
pub(crate) enum Command {
    Add { request: Request, place: Place },
    Finish { id: RequestId, index: Option<u32>, reason: FinishReason },
    AbortAll { reason: FinishReason },
    SetTenants(Vec<TenantShare>),
    Stop,
}

/// State that client, dispatcher and engine thread share.
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) hasher: BlockHasher,
    /// Whether anybody will ask for the addresses of a prompt's blocks.
    pub(crate) caches_prefixes: bool,
    pub(crate) registry: Registry,
    pub(crate) snapshot: SharedSnapshot,
    pub(crate) metrics: EngineMetrics,
    pub(crate) sessions: Sessions,
    pub(crate) timelines: Timelines,
    refusals: Refusals,
    /// Live continuations: accepted and not finished.
    pub(crate) live: AtomicU32,
    pub(crate) idle: Notify,
    state: AtomicU8,
    epoch: Instant,
    next_id: AtomicU64,
}

impl Shared {
    pub(crate) fn new(
        limits: Limits,
        hasher: BlockHasher,
        caches_prefixes: bool,
        metrics: EngineMetrics,
    ) -> Self {
        Self {
            limits,
            hasher,
            caches_prefixes,
            registry: Registry::default(),
            snapshot: SharedSnapshot::default(),
            metrics,
            sessions: Sessions::default(),
            timelines: Timelines::default(),
            refusals: Refusals::default(),
            live: AtomicU32::new(0),
            idle: Notify::new(),
            state: AtomicU8::new(EngineState::Ready as u8),
            epoch: Instant::now(),
            next_id: AtomicU64::new(1),
        }
    }

    pub(crate) fn now(&self) -> Micros {
        Micros(self.epoch.elapsed().as_micros() as u64)
    }

    pub(crate) fn state(&self) -> EngineState {
        EngineState::from_u8(self.state.load(Ordering::Acquire))
    }

    /// Moves forward only: a dead engine never becomes ready again.
    pub(crate) fn advance_state(&self, state: EngineState) {
        self.state.fetch_max(state as u8, Ordering::AcqRel);
        // What was sent before is seen by whoever reads the inbox from now on, or else the sender sees the state.
        fence(Ordering::SeqCst);
    }

    /// Gives back the places of `n` ended continuations.
    pub(crate) fn release(&self, n: u32) {
        if self.live.fetch_sub(n, Ordering::AcqRel) == n {
            self.idle.notify_waiters();
        }
    }
}

/// A handle to one engine; cheap to clone.
#[derive(Clone)]
pub struct EngineClient {
    shared: Arc<Shared>,
    inbox: Sender<Command>,
}

impl EngineClient {
    pub(crate) fn new(shared: Arc<Shared>, inbox: Sender<Command>) -> Self {
        Self { shared, inbox }
    }

    /// The bounds requests are checked against.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// The hasher of the prefix cache, for salts.
    pub fn hasher(&self) -> &BlockHasher {
        &self.shared.hasher
    }

    /// Where the engine is in its life.
    pub fn state(&self) -> EngineState {
        self.shared.state()
    }

    /// Queue lengths, KV usage and the like as of the last step.
    pub fn snapshot(&self) -> EngineSnapshot {
        self.shared.snapshot.load()
    }

    /// Microseconds since the engine started: the clock of every [`quire_core::Usage`].
    pub fn now(&self) -> Micros {
        self.shared.now()
    }

    /// Checks the request, takes a place in the bounded queue and sends it to the engine. Hashes the prompt's blocks, so
    /// call it off the I/O threads when prompts are long (a 16k-token prompt takes about a tenth of a millisecond).
    ///
    /// # Errors
    /// Invalid or too long, [`RequestError::Overloaded`] when the queue is full, [`RequestError::Unavailable`] when the
    /// engine drains or is dead.
    pub fn submit(&self, spec: RequestSpec) -> Result<RequestHandle, RequestError> {
        self.submit_from(spec, None)
    }

    /// [`Self::submit`], and keeps a [`Timeline`] of the request under the name that its origin gives.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn submit_from(
        &self,
        spec: RequestSpec,
        origin: Option<Origin>,
    ) -> Result<RequestHandle, RequestError> {
        match self.state() {
            EngineState::Ready => {}
            EngineState::Draining => return Err(self.unavailable("draining")),
            EngineState::Dead => return Err(self.unavailable("dead")),
        }
        let shared = &self.shared;
        let now = shared.now();
        let n = spec.params.n;
        let salt = salt_with(&shared.hasher, spec.cache_salt.unwrap_or_default(), spec.adapter);
        let mut request = Request {
            id: RequestId(shared.next_id.fetch_add(1, Ordering::Relaxed)),
            block_hashes: Arc::from([]),
            prompt: spec.prompt,
            salt,
            adapter: spec.adapter,
            params: spec.params,
            tenant: spec.tenant,
            priority: spec.priority,
            arrival: now,
            deadline: spec.timeout.map(|timeout| Micros(now.0.saturating_add(timeout.as_micros() as u64))),
        };
        request.validate(&shared.limits)?;
        let place = self.admit(n, request.priority)?;
        if spec.cache_salt.is_some() && shared.caches_prefixes {
            request.block_hashes = shared.sessions.chain(&shared.hasher, salt, spec.session, &request.prompt);
        }
        let id = request.id;
        let mailbox = Arc::new(Mailbox::new(&request));
        shared.registry.insert(Arc::clone(&mailbox));
        shared.metrics.accepted(&request);
        if let Some(origin) = origin {
            shared.timelines.accepted(&request, origin, &mailbox);
        }
        let in_our_clock = |at: Micros| shared.epoch.checked_add(Duration::from_micros(at.0));
        let deadline = request.deadline.and_then(in_our_clock);
        let handle = RequestHandle {
            id,
            mailbox,
            shared: Arc::clone(shared),
            inbox: self.inbox.clone(),
            unfinished: n,
            deadline,
        };
        let sent = self.inbox.send(Command::Add { request, place }).is_ok();
        fence(Ordering::SeqCst);
        // The engine marks itself dead before it empties its inbox for the last time, so a request sent while it was
        // alive is always ended by it; one sent later may never be seen.
        if !sent || self.state() == EngineState::Dead {
            shared.registry.remove(id);
            shared.timelines.withdrawn(id);
            return Err(self.unavailable("dead"));
        }
        Ok(handle)
    }

    /// What became of the requests of this name, oldest first and not too many: of one tenant, or of all. Those that
    /// ended long ago are forgotten.
    pub fn timelines(&self, name: &str, tenant: Option<TenantId>) -> Vec<Timeline> {
        self.shared.timelines.find(name, tenant)
    }

    /// What became so far of every request that is not over and has a name, oldest first.
    pub fn live(&self) -> Vec<Timeline> {
        self.shared.timelines.live()
    }

    /// Ends the live requests of this name with [`FinishReason::Abort`], and tells whose they were.
    pub fn abort(&self, name: &str) -> Vec<TenantId> {
        let live = self.shared.timelines.live_named(name);
        for &(id, _) in &live {
            // A dead engine has ended it already.
            let _ = self.inbox.send(Command::Finish { id, index: None, reason: FinishReason::Abort });
        }
        live.into_iter().map(|(_, tenant)| tenant).collect()
    }

    /// Remembers a request that was refused before it was submitted, or when it was.
    pub fn note_refusal(&self, refusal: Refusal) {
        self.shared.refusals.add(refusal);
    }

    /// The requests of this name that were refused, oldest first: of one tenant, or of all. Only the latest of each
    /// tenant are known.
    pub fn refusals(&self, name: &str, tenant: Option<TenantId>) -> Vec<Refusal> {
        self.shared.refusals.find(name, tenant)
    }

    fn unavailable(&self, state: &'static str) -> RequestError {
        self.shared.metrics.rejected(Rejection::Unavailable);
        RequestError::Unavailable { state }
    }

    /// Takes `n` places among `max_num_seqs` running and as many waiting ones as the priority may fill; or in place of
    /// others, if a lower priority waits.
    fn admit(&self, n: u32, priority: i8) -> Result<Place, RequestError> {
        let limits = &self.shared.limits;
        let take = |capacity: u32| {
            self.shared.live.fetch_update(Ordering::AcqRel, Ordering::Acquire, |live| {
                live.checked_add(n).filter(|&total| total <= capacity)
            })
        };
        let limit = queue::share(limits, priority);
        let Err(live) = take(limits.max_num_seqs.saturating_add(limit)) else { return Ok(Place::Free) };
        let snapshot = self.snapshot();
        let displaces = snapshot.lowest_waiting.is_some_and(|lowest| lowest < priority);
        if displaces && take(queue::most(limits)).is_ok() {
            return Ok(Place::Displaces);
        }
        self.shared.metrics.rejected(Rejection::QueueFull);
        Err(RequestError::Overloaded {
            queued: live.saturating_sub(limits.max_num_seqs),
            limit,
            retry_after: snapshot.estimated_wait(live.saturating_sub(limits.max_num_seqs)),
        })
    }

    /// Refuses new requests from now on; running ones go on.
    pub fn drain(&self) {
        self.shared.advance_state(EngineState::Draining);
    }

    /// Resolves once no request is live.
    pub async fn idle(&self) {
        loop {
            let notified = self.shared.idle.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.shared.live.load(Ordering::Acquire) == 0 {
                return;
            }
            notified.await;
        }
    }

    /// Ends every live request with `reason`; their streams get a final event.
    pub fn abort_all(&self, reason: FinishReason) {
        // A dead engine has ended them already.
        let _ = self.inbox.send(Command::AbortAll { reason });
    }

    /// Sets the shares of all tenants, indexed by [`TenantId`], from the next step on. Tenants beyond have the default
    /// share. What was served so far stays on each tenant's account, so this can be called at any time.
    pub fn set_tenants(&self, shares: &[TenantShare]) {
        // A dead engine serves nobody.
        let _ = self.inbox.send(Command::SetTenants(shares.to_vec()));
    }

    /// Asks the engine thread to end. Live requests are ended with [`FinishReason::Abort`].
    pub fn stop(&self) {
        let _ = self.inbox.send(Command::Stop);
    }
}

/// Front ends that watch a deadline themselves let go of a request so much before it.
const DEADLINE_GRACE: Duration = Duration::from_millis(5);

/// One request in flight. Dropping it cancels what is unfinished.
pub struct RequestHandle {
    id: RequestId,
    mailbox: Arc<Mailbox>,
    shared: Arc<Shared>,
    inbox: Sender<Command>,
    unfinished: u32,
    deadline: Option<Instant>,
}

impl RequestHandle {
    /// The engine's id of the request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next piece of any continuation; `None` once all have ended. Pieces of one continuation come in order; what
    /// several steps produced while nobody read comes as one piece.
    pub async fn next(&mut self) -> Option<SeqDelta> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`RequestHandle::next`] for a hand-written future.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<SeqDelta>> {
        if self.unfinished == 0 {
            return Poll::Ready(None);
        }
        let delta = ready!(self.mailbox.poll_pop(cx));
        if delta.finished.is_some() {
            self.unfinished -= 1;
        }
        Poll::Ready(Some(delta))
    }

    /// Ends one continuation, for example because a stop string matched. Its final piece still comes.
    pub fn finish(&self, index: u32, reason: FinishReason) {
        // A dead engine has ended it already.
        let _ = self.inbox.send(Command::Finish { id: self.id, index: Some(index), reason });
    }

    /// Where the engine is in its life: what an abort means depends on it.
    pub fn engine_state(&self) -> EngineState {
        self.shared.state()
    }

    /// Why it ends if it is dropped now: nobody waits any more, or nobody waited longer than was agreed.
    pub fn reason_of_drop(&self) -> FinishReason {
        match self.deadline {
            Some(deadline) if Instant::now() + DEADLINE_GRACE >= deadline => FinishReason::Deadline,
            _ => FinishReason::Abort,
        }
    }
}

impl Drop for RequestHandle {
    fn drop(&mut self) {
        if self.unfinished > 0 {
            let reason = self.reason_of_drop();
            let _ = self.inbox.send(Command::Finish { id: self.id, index: None, reason });
        }
    }
}

/// The namespace of the blocks of a model with an adapter: keys and values of one never serve another.
fn salt_with(hasher: &BlockHasher, salt: CacheSalt, adapter: Option<AdapterId>) -> CacheSalt {
    let Some(AdapterId(id)) = adapter else { return salt };
    let mut namespace = b"adapter".to_vec();
    namespace.extend(id.to_le_bytes());
    namespace.extend(salt.0.to_le_bytes());
    hasher.salt(&namespace)
}
