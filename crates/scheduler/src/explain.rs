//! Notes why sequences wait. The first in line is what a step looks at; whoever comes into the queue, or to the front of
//! its tenant's, is looked at once. So the work is that of changes, not of the queue's length.

use crate::note::{NoteKind, SeqNote, WaitCause};
use crate::scheduler::Scheduler;
use crate::sequence::{SeqIndex, SeqState};

/// Notes of a step, and what the next ones are compared with.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    list: Vec<SeqNote>,
    /// Who was first in line, as slab index and identity, when that was last looked at.
    first: Option<(SeqIndex, u32)>,
    /// Sequences, by slab index and identity, whose reason is to be found.
    unexplained: Vec<(SeqIndex, u32)>,
}

impl Scheduler {
    /// What was noted since the latest call of `schedule` began.
    pub fn notes(&self) -> &[SeqNote] {
        &self.notes.list
    }

    /// Exchanges [`Self::notes`] for a buffer to reuse, whose content does not matter.
    pub fn swap_notes(&mut self, notes: &mut Vec<SeqNote>) {
        std::mem::swap(&mut self.notes.list, notes);
        self.notes.list.clear();
    }

    /// Nobody may have wanted those of the step before.
    pub(crate) fn begin_notes(&mut self) {
        self.notes.list.clear();
    }

    pub(crate) fn note(&mut self, seq: SeqIndex, kind: NoteKind) {
        let hot = self.seqs.hot(seq);
        self.notes.list.push(SeqNote { request: hot.request, index: hot.index, at: self.now, kind });
    }

    /// The reason of this waiting sequence is to be found at the end of the next step.
    pub(crate) fn ask_why(&mut self, seq: SeqIndex) {
        self.notes.unexplained.push((seq, self.seqs.hot(seq).identity));
    }

    /// Says why a sequence waits, if that is news.
    pub(crate) fn note_wait(&mut self, seq: SeqIndex, cause: WaitCause) {
        let data = self.seqs.data_mut(seq);
        if data.wait_cause != cause {
            data.wait_cause = cause;
            self.note(seq, NoteKind::Waits(cause));
        }
    }

    /// The step is planned: whoever still waits is told why. `blocked`: what kept out the first in line.
    pub(crate) fn explain_waiting(&mut self, blocked: Option<WaitCause>) {
        if self.waiting.len() == 0 {
            self.notes.unexplained.clear();
            self.notes.first = None;
            return;
        }
        let first = self.waiting.first(self.now, &self.fair);
        let named = first.map(|seq| (seq, self.seqs.hot(seq).identity));
        if named != self.notes.first {
            // Who was first waits for a reason of another kind, if it still waits.
            self.notes.unexplained.extend(self.notes.first);
            self.notes.first = named;
        }
        if let (Some(seq), Some(cause)) = (first, blocked) {
            self.note_wait(seq, cause);
        }
        let mut unexplained = std::mem::take(&mut self.notes.unexplained);
        for (seq, identity) in unexplained.drain(..) {
            let hot = self.seqs.hot(seq);
            if hot.identity == identity && hot.state == SeqState::Waiting && Some(seq) != first {
                let cause = self.cause_behind(seq);
                self.note_wait(seq, cause);
            }
        }
        self.notes.unexplained = unexplained;
    }

    /// Why a sequence waits that is not the first in line.
    fn cause_behind(&self, seq: SeqIndex) -> WaitCause {
        let key = &self.seqs.data(seq).key;
        if self.waiting.head_of(key) != Some(seq) {
            WaitCause::Queue
        } else if self.waiting.is_skipped(key) {
            WaitCause::KvShare
        } else if self.waiting.is_behind_priority(key) {
            WaitCause::Priority
        } else {
            WaitCause::Fairness
        }
    }
}
