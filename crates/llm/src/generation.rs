//! An answer in the making: the engine's tokens in, text pieces of each choice out.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use quire_core::{FinishReason, Meter, RequestError, TokenId, TokenLogprobs};
use quire_engine::{EngineState, RequestHandle, SeqDelta};
use quire_tokenizer::Tokenizer;
use smallvec::SmallVec;

use crate::choice::{Choice, Event, Rules};
use crate::logprobs::TokenLogprob;

/// A piece of one choice. Joined in order, the pieces of a choice are its answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChoiceDelta {
    /// Which choice, `0..n`.
    pub index: u32,
    /// New text: whole characters, nothing that may yet turn out to be part of a stop string. May be empty.
    pub text: String,
    /// New tokens. They may run ahead of the text; the token that ended the choice is the last one.
    pub token_ids: Vec<TokenId>,
    /// Parallel to `token_ids` if log-probabilities were asked for, else empty.
    pub logprobs: Vec<TokenLogprob>,
    /// Set on the last piece.
    pub finish: Option<Finish>,
}

impl ChoiceDelta {
    pub(crate) fn new(index: u32) -> Self {
        Self { index, ..Self::default() }
    }

    /// Appends the next piece of the same choice.
    pub fn append(&mut self, next: Self) {
        debug_assert_eq!(self.index, next.index);
        self.text.push_str(&next.text);
        self.token_ids.extend(next.token_ids);
        self.logprobs.extend(next.logprobs);
        self.finish = next.finish;
    }
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    /// [`FinishReason::Stop`] or [`FinishReason::Length`]; every other end is an error of the stream.
    pub reason: FinishReason,
    /// What stopped it; `None` for [`FinishReason::Length`].
    pub stop_reason: Option<StopReason>,
    /// What this choice cost, its ending token included.
    pub usage: TokenUsage,
}

/// What stopped a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// One of the model's own end-of-sequence tokens.
    Eos(TokenId),
    /// A token of the request's `stop_token_ids`.
    Token(TokenId),
    /// One of the request's stop strings.
    String(String),
}

/// Tokens that were paid for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenUsage {
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Those of them found in the prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
}

/// A request in flight. Dropping it cancels what is unfinished.
///
/// One piece of memory for a request of one choice: see `quire_engine::dispatch` for why that matters.
pub struct Generation {
    handle: RequestHandle,
    rules: Rules,
    prompt_token_ids: Arc<[TokenId]>,
    prompt_logprobs: PromptLogprobs,
    cached_tokens: Option<u32>,
    choices: SmallVec<[Choice; 1]>,
    /// Choices that have not ended.
    open: usize,
    /// Tokens of choices that have ended.
    completion_tokens: u32,
    /// Pieces that came together with one that has been handed out.
    ready: VecDeque<ChoiceDelta>,
    meter: Option<Box<dyn Meter>>,
}

impl Generation {
    pub(crate) fn new(
        handle: RequestHandle,
        rules: Rules,
        prompt_token_ids: Arc<[TokenId]>,
        prompt_text: Option<&str>,
        meter: Option<Box<dyn Meter>>,
    ) -> Self {
        let choices = (0..rules.params.n).map(|i| Choice::new(i, &rules, &prompt_token_ids, prompt_text));
        let wanted = rules.params.prompt_logprobs.is_some();
        Self {
            handle,
            prompt_logprobs: PromptLogprobs::new(wanted, prompt_token_ids.len()),
            cached_tokens: None,
            open: rules.params.n as usize,
            choices: choices.collect(),
            completion_tokens: 0,
            ready: VecDeque::new(),
            rules,
            prompt_token_ids,
            meter,
        }
    }

    /// The prompt as token ids.
    pub fn prompt_token_ids(&self) -> &Arc<[TokenId]> {
        &self.prompt_token_ids
    }

    /// Choices of the request.
    pub fn num_choices(&self) -> usize {
        self.choices.len()
    }

    /// The text of the prompt's first token, which has no log-probability to come with.
    pub fn first_prompt_token_text(&self) -> String {
        let first = self.prompt_token_ids.first();
        first.and_then(|&id| self.rules.tokenizer.token_text(id)).unwrap_or_default()
    }

    /// One entry per prompt token, the first always `None`; empty unless asked for. Complete by the first piece.
    pub fn prompt_logprobs(&self) -> &[Option<TokenLogprob>] {
        &self.prompt_logprobs.entries
    }

    /// Prompt and cached tokens, and the generated tokens of all choices that have ended. Complete after the last piece.
    pub fn usage(&self) -> TokenUsage {
        TokenUsage { completion_tokens: self.completion_tokens, ..self.prompt_usage() }
    }

    /// Whether every piece has been read, so that [`Generation::usage`] is complete.
    pub fn is_finished(&self) -> bool {
        self.open == 0 && self.ready.is_empty()
    }

    fn prompt_usage(&self) -> TokenUsage {
        TokenUsage {
            prompt_tokens: self.prompt_token_ids.len() as u32,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            completion_tokens: 0,
        }
    }

    /// The next piece of any choice; `None` after the last piece of the last choice, or after an error.
    ///
    /// # Errors
    /// [`RequestError::DeadlineExceeded`], [`RequestError::Unavailable`] when the server shuts down first,
    /// [`RequestError::Internal`] when the engine failed.
    pub async fn next(&mut self) -> Option<Result<ChoiceDelta, RequestError>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`Generation::next`] for a hand-written body or stream. Whoever polls late gets what came meanwhile in one piece.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<ChoiceDelta, RequestError>>> {
        loop {
            if let Some(delta) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(delta)));
            }
            if self.open == 0 {
                return Poll::Ready(None);
            }
            let outcome = match ready!(self.handle.poll_next(cx)) {
                Some(delta) => self.take(delta),
                None => Err(RequestError::Internal("the engine ended the request early".into())),
            };
            let outcome = outcome.map_err(|error| self.explain(error));
            match outcome {
                Ok(None) => {}
                Ok(Some(delta)) => return Poll::Ready(Some(Ok(delta))),
                Err(error) => {
                    self.settle(reason_of(&error));
                    self.open = 0;
                    self.ready.clear();
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }

    /// Waits for all of it: one complete piece per choice, in order of their index.
    ///
    /// # Errors
    /// As [`Generation::next`].
    pub async fn collect(&mut self) -> Result<Vec<ChoiceDelta>, RequestError> {
        let mut whole: Vec<ChoiceDelta> = (0..self.rules.params.n).map(ChoiceDelta::new).collect();
        while let Some(delta) = self.next().await {
            let delta = delta?;
            whole[delta.index as usize].append(delta);
        }
        Ok(whole)
    }

    /// Takes what the engine made, while nothing is ready; returns the first piece that it led to.
    fn take(&mut self, mut delta: SeqDelta) -> Result<Option<ChoiceDelta>, RequestError> {
        self.note_start(&delta);
        for (position, logprobs) in delta.prompt_logprobs.drain(..) {
            self.prompt_logprobs.insert(&self.rules.tokenizer, &self.prompt_token_ids, position, &logprobs);
        }
        let index = delta.index;
        let Some(choice) = self.choices.get_mut(index as usize) else {
            return Err(RequestError::Internal(format!("the engine reported an unknown choice {index}")));
        };
        match choice.take(&self.rules, delta)? {
            Event::None => {}
            Event::Ended { engine_goes_on } => {
                if engine_goes_on {
                    self.handle.finish(index, FinishReason::Stop);
                }
                self.open -= 1;
                self.completion_tokens += choice.num_tokens();
                if self.open == 0 {
                    let is_cut = self
                        .choices
                        .iter()
                        .any(|choice| choice.finish_reason() == Some(FinishReason::Length));
                    self.settle(if is_cut { FinishReason::Length } else { FinishReason::Stop });
                }
            }
        }
        Ok(self.publish(index as usize))
    }

    /// An abort while the engine goes on is somebody's decision about this request.
    fn explain(&self, error: RequestError) -> RequestError {
        let goes_on = self.handle.engine_state() == EngineState::Ready;
        match error {
            RequestError::Unavailable { .. } if goes_on => RequestError::Cancelled,
            error => error,
        }
    }

    fn note_start(&mut self, delta: &SeqDelta) {
        let Some(cached) = delta.started else { return };
        if self.cached_tokens.is_none() {
            self.cached_tokens = Some(cached);
            if let Some(meter) = &mut self.meter {
                meter.started(cached);
            }
        }
    }

    /// Tells the meter, once, what was used.
    fn settle(&mut self, reason: FinishReason) {
        if let Some(mut meter) = self.meter.take() {
            let open = self.choices.iter().filter(|choice| !choice.has_ended());
            meter.ended(self.completion_tokens + open.map(Choice::num_tokens).sum::<u32>(), reason);
        }
    }

    /// What is worth a piece now: nothing before the prompt's log-probabilities are complete, then first whatever had
    /// to wait for them. Returns the first one; the others are ready.
    fn publish(&mut self, index: usize) -> Option<ChoiceDelta> {
        let prompt = self.prompt_usage();
        let ended = self.choices[index].has_ended();
        match self.prompt_logprobs.release(ended) {
            Release::Hold => None,
            Release::One => self.choices[index].pop(&self.rules, prompt),
            Release::All => {
                let rules = &self.rules;
                self.ready.extend(self.choices.iter_mut().filter_map(|choice| choice.pop(rules, prompt)));
                self.ready.pop_front()
            }
        }
    }
}

impl Drop for Generation {
    /// Whoever goes away pays for what was made until then, also for what he did not read.
    fn drop(&mut self) {
        if self.meter.is_none() {
            return;
        }
        let mut cx = Context::from_waker(Waker::noop());
        let mut unread = 0;
        loop {
            let Poll::Ready(Some(delta)) = self.handle.poll_next(&mut cx) else { break };
            self.note_start(&delta);
            // Behind its end, as `llm` counts it, a choice costs nothing.
            if self.choices.get(delta.index as usize).is_some_and(|choice| !choice.has_ended()) {
                unread += delta.tokens.len() as u32;
            }
        }
        self.completion_tokens += unread;
        self.settle(self.handle.reason_of_drop());
    }
}

fn reason_of(error: &RequestError) -> FinishReason {
    match error {
        RequestError::DeadlineExceeded => FinishReason::Deadline,
        RequestError::Cancelled => FinishReason::Abort,
        RequestError::Overloaded { .. } | RequestError::Late { .. } => FinishReason::Rejected,
        _ => FinishReason::Error,
    }
}

/// Log-probabilities of the prompt's tokens, as they come in.
struct PromptLogprobs {
    entries: Vec<Option<TokenLogprob>>,
    missing: usize,
    released: bool,
}

enum Release {
    Hold,
    All,
    One,
}

impl PromptLogprobs {
    fn new(wanted: bool, prompt_len: usize) -> Self {
        let len = if wanted { prompt_len } else { 0 };
        let missing = len.saturating_sub(1);
        // Where nothing has to wait, no room is made for what did.
        Self { entries: vec![None; len], missing, released: missing == 0 }
    }

    fn insert(&mut self, tokenizer: &Tokenizer, prompt: &[TokenId], position: u32, logprobs: &TokenLogprobs) {
        let position = position as usize;
        // Choices share the prompt; each position counts once whoever reports it.
        if let Some(entry @ None) = self.entries.get_mut(position) {
            *entry = Some(TokenLogprob::new(tokenizer, prompt[position], logprobs));
            self.missing = self.missing.saturating_sub(1);
        }
    }

    /// Whether pieces may go out; a choice that has ended proves that no more entries come.
    fn release(&mut self, ended: bool) -> Release {
        if self.released {
            return Release::One;
        }
        if self.missing > 0 && !ended {
            return Release::Hold;
        }
        self.released = true;
        Release::All
    }
}
