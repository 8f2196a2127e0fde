//! What became of each request, for those who ask why it took so long.
//!
//! The scheduler notes changes ([`SeqNote`]), the engine thread hands them over with the step's results, and the
//! dispatcher files them here under the name by which the client knows the request. Bounded: so many entries a request,
//! so many ended requests; what does not fit is counted.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use quire_core::{FinishReason, Micros, Request, RequestId, TenantId, Usage};
use quire_scheduler::{NoteKind, SeqNote, WaitCause};

use crate::dispatch::Mailbox;

/// Entries of one timeline.
const MAX_ENTRIES: usize = 64;
/// From so many entries on, chunks in a row share one.
const MERGE_FROM: usize = 40;
/// Ended requests that are remembered.
const MAX_ENDED: usize = 4096;
/// Timelines of one answer: a name may stand for many requests.
const MAX_FOUND: usize = 64;

/// Where a request comes from, in the clock of [`crate::EngineClient::now`].
#[derive(Clone, Debug)]
pub struct Origin {
    /// The name by which its client knows it. Need not be unique.
    pub name: Arc<str>,
    /// When the front end took it up.
    pub received: Micros,
    /// When its prompt was tokens.
    pub prepared: Micros,
    /// When its tenant's limits had let it in.
    pub admitted: Micros,
}

/// One thing that happened to one continuation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When it happened, or began.
    pub at: Micros,
    /// Which continuation.
    pub index: u32,
    /// What.
    pub kind: EntryKind,
}

/// Kinds of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// It waits for this reason, from then on.
    Waits(WaitCause),
    /// It got a place in the batch; so many of its tokens were there.
    Entered {
        /// Tokens from the prefix cache.
        cached_tokens: u32,
    },
    /// Pieces of its prompt were computed, in steps that began at the entry's time or later.
    Chunks {
        /// How many.
        num_chunks: u32,
        /// Tokens in all of them.
        num_tokens: u32,
        /// When the step with the last of them began.
        last: Micros,
    },
    /// It lost its place.
    Preempted(WaitCause),
    /// Its first token was there.
    FirstToken,
    /// It is over.
    Ended {
        /// Why.
        reason: FinishReason,
        /// Tokens that were generated.
        generated_tokens: u32,
    },
}

/// What became of one request.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// Where it came from.
    pub origin: Origin,
    /// Whose it is.
    pub tenant: TenantId,
    /// Higher runs first.
    pub priority: i8,
    /// When the engine accepted it.
    pub arrival: Micros,
    /// Tokens in its prompt.
    pub prompt_tokens: u32,
    /// Those of them that were found in the prefix cache when it first got a place.
    pub cached_tokens: u32,
    /// When it first got a place.
    pub started: Option<Micros>,
    /// When the first token of any continuation was there.
    pub first_token: Option<Micros>,
    /// When the last continuation was over, and why.
    pub ended: Option<(Micros, FinishReason)>,
    /// Tokens of all continuations that are over.
    pub generated_tokens: u32,
    /// Times that a continuation lost its place.
    pub num_preemptions: u32,
    /// How long it waited for each [`WaitCause`], by its number, over all continuations; what still waits is not in it.
    pub waited: [Micros; WaitCause::ALL.len()],
    /// In order, as far as they were kept.
    pub entries: Vec<Entry>,
    /// Entries that were not kept.
    pub num_left_out: u32,
    /// Continuations that wait: which, for what, since when.
    waiting: Vec<(u32, WaitCause, Micros)>,
    /// Continuations that are not over.
    num_open: u32,
    mailbox: Weak<Mailbox>,
}

impl Timeline {
    fn new(request: &Request, origin: Origin, mailbox: &Arc<Mailbox>) -> Self {
        Self {
            origin,
            tenant: request.tenant,
            priority: request.priority,
            arrival: request.arrival,
            prompt_tokens: request.prompt.len() as u32,
            cached_tokens: 0,
            started: None,
            first_token: None,
            ended: None,
            generated_tokens: 0,
            num_preemptions: 0,
            waited: [Micros(0); WaitCause::ALL.len()],
            entries: Vec::new(),
            num_left_out: 0,
            // The others wait for the first one's prompt, which is no wait of their own.
            waiting: vec![(0, WaitCause::Step, request.arrival)],
            num_open: request.params.n,
            mailbox: Arc::downgrade(mailbox),
        }
    }

    /// What the continuations that wait at this time wait for, and since when.
    pub fn waiting(&self) -> impl Iterator<Item = (u32, WaitCause, Micros)> + '_ {
        self.waiting.iter().copied()
    }

    /// Tokens of all continuations so far.
    pub fn generated_so_far(&self) -> u32 {
        self.mailbox.upgrade().map_or(self.generated_tokens, |mailbox| mailbox.num_generated())
    }

    fn push(&mut self, at: Micros, index: u32, kind: EntryKind) {
        if let EntryKind::Chunks { num_tokens: more, .. } = kind
            && self.entries.len() >= MERGE_FROM
            && let Some(Entry { index: of, kind: EntryKind::Chunks { num_chunks, num_tokens, last }, .. }) =
                self.entries.last_mut()
            && *of == index
        {
            (*num_chunks, *num_tokens, *last) = (*num_chunks + 1, *num_tokens + more, at);
        } else if self.entries.len() < MAX_ENTRIES {
            self.entries.push(Entry { at, index, kind });
        } else {
            self.num_left_out += 1;
        }
    }

    /// The continuation waits for `cause` from now on, or for nothing.
    fn wait(&mut self, index: u32, at: Micros, cause: Option<WaitCause>) {
        if let Some(place) = self.waiting.iter().position(|&(of, ..)| of == index) {
            let (_, before, since) = self.waiting.swap_remove(place);
            self.waited[before as usize].0 += at.since(since).0;
        }
        self.waiting.extend(cause.map(|cause| (index, cause, at)));
    }

    fn note(&mut self, note: &SeqNote) {
        let SeqNote { index, at, .. } = *note;
        let kind = match note.kind {
            NoteKind::Waits(cause) => {
                self.wait(index, at, Some(cause));
                EntryKind::Waits(cause)
            }
            NoteKind::Entered { cached_tokens } => {
                self.wait(index, at, None);
                if self.started.is_none() {
                    (self.started, self.cached_tokens) = (Some(at), cached_tokens);
                }
                EntryKind::Entered { cached_tokens }
            }
            NoteKind::Chunk { num_tokens } => EntryKind::Chunks { num_chunks: 1, num_tokens, last: at },
            NoteKind::Preempted(cause) => {
                self.num_preemptions += 1;
                self.wait(index, at, Some(cause));
                EntryKind::Preempted(cause)
            }
            NoteKind::FirstToken => {
                self.first_token.get_or_insert(at);
                EntryKind::FirstToken
            }
        };
        self.push(at, index, kind);
    }

    /// Returns whether that was the last continuation.
    fn end(&mut self, index: u32, reason: FinishReason, usage: &Usage) -> bool {
        let at = usage.finished;
        self.wait(index, at, None);
        self.generated_tokens += usage.generated_tokens;
        self.num_open = self.num_open.saturating_sub(1);
        self.push(at, index, EntryKind::Ended { reason, generated_tokens: usage.generated_tokens });
        if self.num_open == 0 {
            self.ended = Some((at, reason));
            self.entries.shrink_to_fit();
            // Even a weak reference would keep its memory.
            self.mailbox = Weak::new();
        }
        self.num_open == 0
    }
}

/// All timelines. Written by clients (as requests come) and by the dispatcher; never touched by the engine thread.
#[derive(Default)]
pub(crate) struct Timelines {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    by_request: HashMap<RequestId, Timeline>,
    by_name: BTreeSet<(Arc<str>, RequestId)>,
    /// Oldest first.
    ended: VecDeque<RequestId>,
}

impl Inner {
    fn remove(&mut self, id: RequestId) {
        if let Some(timeline) = self.by_request.remove(&id) {
            self.by_name.remove(&(timeline.origin.name, id));
        }
    }
}

impl Timelines {
    pub(crate) fn accepted(&self, request: &Request, origin: Origin, mailbox: &Arc<Mailbox>) {
        let mut inner = self.inner.lock();
        inner.by_name.insert((Arc::clone(&origin.name), request.id));
        inner.by_request.insert(request.id, Timeline::new(request, origin, mailbox));
    }

    /// It never came to the engine.
    pub(crate) fn withdrawn(&self, id: RequestId) {
        self.inner.lock().remove(id);
    }

    pub(crate) fn note(&self, notes: &[SeqNote]) {
        if notes.is_empty() {
            return;
        }
        let mut inner = self.inner.lock();
        for note in notes {
            if let Some(timeline) = inner.by_request.get_mut(&note.request) {
                timeline.note(note);
            }
        }
    }

    pub(crate) fn ended(&self, id: RequestId, index: u32, reason: FinishReason, usage: &Usage) {
        let mut inner = self.inner.lock();
        let Some(timeline) = inner.by_request.get_mut(&id) else { return };
        if !timeline.end(index, reason, usage) {
            return;
        }
        inner.ended.push_back(id);
        if inner.ended.len() > MAX_ENDED
            && let Some(oldest) = inner.ended.pop_front()
        {
            inner.remove(oldest);
        }
    }

    /// Those that are not over, oldest first.
    pub(crate) fn live(&self) -> Vec<Timeline> {
        let inner = self.inner.lock();
        let mut live: Vec<_> =
            inner.by_request.iter().filter(|(_, timeline)| timeline.ended.is_none()).collect();
        live.sort_unstable_by_key(|(id, _)| **id);
        live.into_iter().map(|(_, timeline)| timeline.clone()).collect()
    }

    /// Those of this name that are not over, with whose they are.
    pub(crate) fn live_named(&self, name: &str) -> Vec<(RequestId, TenantId)> {
        let inner = self.inner.lock();
        let from = (Arc::from(name), RequestId(0));
        let ids = inner.by_name.range(from..).take_while(|(of, _)| &**of == name).map(|&(_, id)| id);
        let live = ids.filter_map(|id| Some((id, inner.by_request.get(&id)?)));
        live.filter(|(_, timeline)| timeline.ended.is_none())
            .map(|(id, timeline)| (id, timeline.tenant))
            .collect()
    }

    /// Those with this name, oldest first, of one tenant or of all.
    pub(crate) fn find(&self, name: &str, tenant: Option<TenantId>) -> Vec<Timeline> {
        let inner = self.inner.lock();
        let from = (Arc::from(name), RequestId(0));
        let ids = inner.by_name.range(from..).take_while(|(of, _)| &**of == name).map(|&(_, id)| id);
        let found = ids.filter_map(|id| inner.by_request.get(&id));
        found
            .filter(|found| tenant.is_none_or(|tenant| found.tenant == tenant))
            .take(MAX_FOUND)
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use quire_core::{CacheSalt, SamplingParams};

    use super::*;

    fn accept(timelines: &Timelines, id: u64, name: &str, tenant: u32, n: u32) {
        let request = Request {
            id: RequestId(id),
            prompt: Arc::from([1, 2, 3]),
            block_hashes: Arc::from([]),
            salt: CacheSalt(0),
            adapter: None,
            params: Arc::new(SamplingParams { n, ..SamplingParams::greedy(4) }),
            tenant: TenantId(tenant),
            priority: 0,
            arrival: Micros(100),
            deadline: None,
        };
        let [received, prepared, admitted] = [70, 80, 90].map(Micros);
        let origin = Origin { name: name.into(), received, prepared, admitted };
        timelines.accepted(&request, origin, &Arc::new(Mailbox::new(&request)));
    }

    fn note(timelines: &Timelines, id: u64, index: u32, at: u64, kind: NoteKind) {
        timelines.note(&[SeqNote { request: RequestId(id), index, at: Micros(at), kind }]);
    }

    fn end(timelines: &Timelines, id: u64, index: u32, at: u64) {
        let usage = Usage { finished: Micros(at), generated_tokens: 5, ..Usage::default() };
        timelines.ended(RequestId(id), index, FinishReason::Stop, &usage);
    }

    #[test]
    fn waits_add_up_by_cause() {
        let timelines = Timelines::default();
        accept(&timelines, 1, "a", 0, 1);
        for (at, kind) in [
            (110, NoteKind::Waits(WaitCause::Queue)),
            (150, NoteKind::Waits(WaitCause::KvPressure)),
            (200, NoteKind::Entered { cached_tokens: 2 }),
            (200, NoteKind::Chunk { num_tokens: 1 }),
            (230, NoteKind::FirstToken),
            (240, NoteKind::Preempted(WaitCause::KvPressure)),
            (250, NoteKind::Entered { cached_tokens: 0 }),
        ] {
            note(&timelines, 1, 0, at, kind);
        }
        end(&timelines, 1, 0, 300);
        let [timeline] = &timelines.find("a", None)[..] else { panic!("one of this name") };
        let waited = |cause: WaitCause| timeline.waited[cause as usize].0;
        assert_eq!([WaitCause::Step, WaitCause::Queue, WaitCause::KvPressure].map(waited), [10, 40, 60]);
        assert_eq!((timeline.started, timeline.first_token), (Some(Micros(200)), Some(Micros(230))));
        assert_eq!((timeline.cached_tokens, timeline.num_preemptions, timeline.generated_tokens), (2, 1, 5));
        assert_eq!(timeline.ended, Some((Micros(300), FinishReason::Stop)));
        assert_eq!((timeline.entries.len(), timeline.waiting().count()), (8, 0));
    }

    #[test]
    fn a_long_story_is_cut_and_counted() {
        let timelines = Timelines::default();
        accept(&timelines, 1, "a", 0, 1);
        for at in 0..100 {
            note(&timelines, 1, 0, 200 + at, NoteKind::Chunk { num_tokens: 10 });
        }
        let timeline = &timelines.find("a", None)[0];
        assert_eq!(timeline.entries.len(), MERGE_FROM);
        let merged = EntryKind::Chunks { num_chunks: 61, num_tokens: 610, last: Micros(299) };
        assert_eq!(timeline.entries[MERGE_FROM - 1].kind, merged);
        for at in 0..50 {
            note(&timelines, 1, 0, 300 + 2 * at, NoteKind::Preempted(WaitCause::KvPressure));
            note(&timelines, 1, 0, 301 + 2 * at, NoteKind::Entered { cached_tokens: 0 });
        }
        let timeline = &timelines.find("a", None)[0];
        assert_eq!((timeline.entries.len(), timeline.num_left_out), (MAX_ENTRIES, 100 - 24));
        assert_eq!(
            (timeline.num_preemptions, timeline.waited[WaitCause::KvPressure as usize]),
            (50, Micros(50))
        );
    }

    #[test]
    fn names_are_shared_and_tenants_are_not() {
        let timelines = Timelines::default();
        for (id, name, tenant) in [(1, "a", 0), (2, "a", 1), (3, "a", 0), (4, "ab", 0)] {
            accept(&timelines, id, name, tenant, 1);
        }
        let of = |name, tenant: Option<u32>| timelines.find(name, tenant.map(TenantId)).len();
        assert_eq!(
            [of("a", None), of("a", Some(0)), of("a", Some(1)), of("a", Some(2)), of("b", None)],
            [3, 2, 1, 0, 0]
        );
        end(&timelines, 1, 0, 200);
        let live: Vec<u32> = timelines.live().iter().map(|timeline| timeline.tenant.0).collect();
        assert_eq!(live, [1, 0, 0]);
        let named = [(RequestId(2), TenantId(1)), (RequestId(3), TenantId(0))];
        assert_eq!(timelines.live_named("a"), named);
        timelines.withdrawn(RequestId(3));
        assert_eq!(of("a", Some(0)), 1);
    }

    #[test]
    fn the_oldest_that_ended_are_forgotten() {
        let timelines = Timelines::default();
        accept(&timelines, 0, "live", 0, 2);
        end(&timelines, 0, 1, 5);
        for id in 1..=MAX_ENDED as u64 + 10 {
            accept(&timelines, id, &format!("r{id}"), 0, 1);
            end(&timelines, id, 0, 200 + id);
        }
        let inner = timelines.inner.lock();
        assert_eq!(
            (inner.by_request.len(), inner.by_name.len(), inner.ended.len()),
            (MAX_ENDED + 1, MAX_ENDED + 1, MAX_ENDED)
        );
        drop(inner);
        assert_eq!((timelines.find("r10", None).len(), timelines.find("r11", None).len()), (0, 1));
        assert_eq!(timelines.find("live", None)[0].ended, None, "one of its two continuations goes on");
    }
}
