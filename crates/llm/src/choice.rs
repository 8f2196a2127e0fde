//! One continuation: tokens to text, stop strings, and where it ends.

use std::sync::Arc;

use quire_core::{FinishReason, RequestError, SamplingParams, TokenId, TokenLogprobs};
use quire_engine::{SeqDelta, SeqFinished};
use quire_tokenizer::{Detokenizer, StopMatcher, Tokenizer};

use crate::generation::{ChoiceDelta, Finish, StopReason, TokenUsage};
use crate::logprobs::TokenLogprob;

/// What all choices of a request go by.
pub(crate) struct Rules {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    /// The model's own end-of-sequence ids, to tell them from the client's stop ids.
    pub(crate) eos_token_ids: Arc<[TokenId]>,
    /// Report every token at once, also without text.
    pub(crate) every_token: bool,
    /// The client wants the prompt only: what is generated is dropped.
    pub(crate) prompt_only: bool,
}

/// What a piece from the engine led to.
pub(crate) enum Event {
    None,
    /// The choice is complete. `engine_goes_on`: a stop string matched, and the engine has to be told.
    Ended {
        engine_goes_on: bool,
    },
}

pub(crate) struct Choice {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    /// What has not been handed out.
    pending: ChoiceDelta,
    num_tokens: u32,
    end: Option<(FinishReason, Option<StopReason>)>,
}

impl Choice {
    pub(crate) fn new(index: u32, rules: &Rules, prompt: &[TokenId], prompt_text: Option<&str>) -> Self {
        let mut pending = ChoiceDelta::new(index);
        pending.text.push_str(prompt_text.unwrap_or_default());
        Self {
            detokenizer: Detokenizer::after_prompt(&rules.tokenizer, rules.skip_special, prompt),
            matcher: StopMatcher::new(&rules.stop, rules.include_stop),
            pending,
            num_tokens: 0,
            end: None,
        }
    }

    pub(crate) fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Takes what the engine made. Whatever comes after the end is dropped.
    pub(crate) fn take(&mut self, rules: &Rules, delta: SeqDelta) -> Result<Event, RequestError> {
        if self.has_ended() {
            return Ok(Event::None);
        }
        let mut logprobs = delta.logprobs.into_iter();
        for token in delta.tokens {
            let matched = self.push_token(rules, token, logprobs.next().flatten().as_ref());
            if let Some(stop) = matched {
                self.end = Some((FinishReason::Stop, Some(stop)));
                return Ok(Event::Ended { engine_goes_on: delta.finished.is_none() });
            }
        }
        let Some(finished) = delta.finished else { return Ok(Event::None) };
        self.end = Some(self.finish(rules, &finished)?);
        Ok(Event::Ended { engine_goes_on: false })
    }

    /// The piece that is due, if there is one. `prompt` is the request's usage without generated tokens.
    pub(crate) fn pop(&mut self, rules: &Rules, prompt: TokenUsage) -> Option<ChoiceDelta> {
        let pending = &self.pending;
        let due = self.has_ended()
            || !pending.text.is_empty()
            || !pending.logprobs.is_empty()
            || (rules.every_token && !pending.token_ids.is_empty());
        if !due || pending.finish.is_some() {
            return None;
        }
        let next = ChoiceDelta::new(pending.index);
        let mut delta = std::mem::replace(&mut self.pending, next);
        if let Some((reason, stop_reason)) = self.end.clone() {
            let usage = TokenUsage { completion_tokens: self.num_tokens, ..prompt };
            delta.finish = Some(Finish { reason, stop_reason, usage });
            // Remembered, so that a choice ends once.
            self.pending.finish.clone_from(&delta.finish);
        }
        Some(delta)
    }

    /// Takes one token; the stop string that its text completed, if one did.
    fn push_token(
        &mut self,
        rules: &Rules,
        token: TokenId,
        logprobs: Option<&TokenLogprobs>,
    ) -> Option<StopReason> {
        if rules.prompt_only {
            return None;
        }
        self.num_tokens += 1;
        self.pending.token_ids.push(token);
        if let Some(logprobs) = logprobs {
            self.pending.logprobs.push(TokenLogprob::new(&rules.tokenizer, token, logprobs));
        }
        // The engine ends the choice at a stop token, so any is the last one. Its text is a control code, not an answer.
        if rules.params.stop_token_ids.binary_search(&token).is_ok() && !rules.include_stop {
            return None;
        }
        let mut text = String::new();
        self.detokenizer.push(token, &mut text);
        self.push_text(rules, &text)
    }

    fn push_text(&mut self, rules: &Rules, text: &str) -> Option<StopReason> {
        if self.num_tokens <= rules.params.min_tokens {
            self.pending.text.push_str(text);
            return None;
        }
        let found = self.matcher.push(text, &mut self.pending.text)?;
        Some(StopReason::String(rules.stop[found.index].clone()))
    }

    /// Ends the text as the engine ended the tokens.
    fn finish(
        &mut self,
        rules: &Rules,
        finished: &SeqFinished,
    ) -> Result<(FinishReason, Option<StopReason>), RequestError> {
        match finished.reason {
            FinishReason::Stop | FinishReason::Length => {}
            FinishReason::Deadline => return Err(RequestError::DeadlineExceeded),
            // We never abort a choice that someone still reads: the server is shutting down.
            FinishReason::Abort => return Err(RequestError::Unavailable { state: "shutting down" }),
            FinishReason::Error => return Err(RequestError::Internal("the engine failed".into())),
        }
        if rules.prompt_only {
            return Ok((FinishReason::Length, None));
        }
        let mut text = String::new();
        self.detokenizer.finish(&mut text);
        if let Some(stop) = self.push_text(rules, &text) {
            return Ok((FinishReason::Stop, Some(stop)));
        }
        self.matcher.finish(&mut self.pending.text);
        let stop_token = finished.stop_token.map(|id| {
            if rules.eos_token_ids.contains(&id) { StopReason::Eos(id) } else { StopReason::Token(id) }
        });
        Ok((finished.reason, stop_token))
    }
}
