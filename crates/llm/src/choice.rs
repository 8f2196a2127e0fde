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
    /// Those of `params`; shared with other requests where they are the model's own, so that they stay in the cache.
    pub(crate) stop_token_ids: Arc<[TokenId]>,
    /// That of `params`.
    pub(crate) min_tokens: u32,
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
    /// Only where there are stop strings.
    matcher: Option<Box<StopMatcher>>,
    /// What has not been handed out.
    pending: ChoiceDelta,
    num_tokens: u32,
    end: Option<Box<(FinishReason, Option<StopReason>)>>,
}

impl Choice {
    pub(crate) fn new(index: u32, rules: &Rules, prompt: &[TokenId], prompt_text: Option<&str>) -> Self {
        let mut pending = ChoiceDelta::new(index);
        pending.text.push_str(prompt_text.unwrap_or_default());
        Self {
            detokenizer: Detokenizer::after_prompt(&rules.tokenizer, rules.skip_special, prompt),
            matcher: (!rules.stop.is_empty())
                .then(|| Box::new(StopMatcher::new(&rules.stop, rules.include_stop))),
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

    /// Why it ended, if it has.
    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        self.end.as_ref().map(|end| end.0)
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
                self.end = Some(Box::new((FinishReason::Stop, Some(stop))));
                return Ok(Event::Ended { engine_goes_on: delta.finished.is_none() });
            }
        }
        let Some(finished) = delta.finished else { return Ok(Event::None) };
        self.end = Some(Box::new(self.finish(rules, &finished)?));
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
        if let Some((reason, stop_reason)) = self.end.as_deref().cloned() {
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
        if rules.stop_token_ids.binary_search(&token).is_ok() && !rules.include_stop {
            return None;
        }
        if self.matcher.is_none() {
            self.detokenizer.push(token, &mut self.pending.text);
            return None;
        }
        let mut text = String::new();
        self.detokenizer.push(token, &mut text);
        self.push_text(rules, &text)
    }

    fn push_text(&mut self, rules: &Rules, text: &str) -> Option<StopReason> {
        let Some(matcher) = self.matcher.as_mut().filter(|_| self.num_tokens > rules.min_tokens) else {
            self.pending.text.push_str(text);
            return None;
        };
        let found = matcher.push(text, &mut self.pending.text)?;
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
            // How late it would have been is not known here.
            FinishReason::Rejected => {
                return Err(RequestError::Late { retry_after: std::time::Duration::from_secs(1) });
            }
        }
        if rules.prompt_only {
            return Ok((FinishReason::Length, None));
        }
        let mut text = String::new();
        self.detokenizer.finish(&mut text);
        if let Some(stop) = self.push_text(rules, &text) {
            return Ok((FinishReason::Stop, Some(stop)));
        }
        if let Some(matcher) = &mut self.matcher {
            matcher.finish(&mut self.pending.text);
        }
        let stop_token = finished.stop_token.map(|id| {
            if rules.eos_token_ids.contains(&id) { StopReason::Eos(id) } else { StopReason::Token(id) }
        });
        Ok((finished.reason, stop_token))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use quire_core::Usage;

    use super::*;

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        let config = quire_demo_model::TOKENIZER_CONFIG_JSON.as_bytes();
        Tokenizer::from_parts(quire_demo_model::TOKENIZER_JSON.as_bytes(), Some(config)).unwrap()
    });

    fn rules(stop: &[&str], include_stop: bool, min_tokens: u32) -> Rules {
        let eos = vec![0, 2];
        let params =
            SamplingParams { min_tokens, stop_token_ids: vec![0, 2, 77], ..SamplingParams::default() };
        Rules {
            tokenizer: TOKENIZER.clone(),
            stop_token_ids: params.stop_token_ids.as_slice().into(),
            min_tokens,
            params: Arc::new(params),
            stop: stop.iter().map(|&stop| stop.to_owned()).collect(),
            include_stop,
            skip_special: true,
            eos_token_ids: eos.into(),
            every_token: false,
            prompt_only: false,
        }
    }

    fn finished(reason: FinishReason, stop_token: Option<TokenId>) -> SeqFinished {
        SeqFinished { reason, stop_token, usage: Usage::default() }
    }

    /// Feeds `tokens` cut into pieces and joins what comes out.
    fn run(rules: &Rules, pieces: &[&[TokenId]], finished: SeqFinished) -> Result<ChoiceDelta, RequestError> {
        let mut choice = Choice::new(0, rules, &[5, 6], None);
        let mut whole = ChoiceDelta::new(0);
        let mut ends = 0;
        for (at, piece) in pieces.iter().enumerate() {
            let last = at + 1 == pieces.len();
            let delta = SeqDelta {
                tokens: piece.iter().copied().collect(),
                logprobs: vec![None; piece.len()],
                finished: last.then(|| Box::new(finished)),
                ..SeqDelta::default()
            };
            ends += usize::from(matches!(choice.take(rules, delta)?, Event::Ended { .. }));
            if let Some(delta) = choice.pop(rules, TokenUsage::default()) {
                whole.append(delta);
            }
        }
        assert_eq!(ends, 1, "a choice ends once");
        assert_eq!(choice.pop(rules, TokenUsage::default()), None, "and is silent afterwards");
        Ok(whole)
    }

    fn next(state: &mut u64, bound: usize) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state % bound as u64) as usize
    }

    #[test]
    fn the_cut_of_the_tokens_does_not_matter() {
        let mut state = 0x1234_5678_9abc_def1;
        let length = finished(FinishReason::Length, None);
        let mut matches = 0;
        for round in 0..300 {
            let tokens: Vec<TokenId> = (0..30).map(|_| 100 + next(&mut state, 1900) as TokenId).collect();
            let text = run(&rules(&[], false, 0), &[&tokens], length).unwrap().text;
            // A stop string from the middle of the text, so that it spans tokens.
            let chars: Vec<char> = text.chars().collect();
            let start = next(&mut state, chars.len() - 5);
            let stop: String = chars[start..start + 1 + next(&mut state, 5)].iter().collect();
            let rules = rules(&[&stop, "never there"], round % 2 == 0, next(&mut state, 6) as u32);
            let whole = run(&rules, &[&tokens], length).unwrap();
            let mut pieces = Vec::new();
            let mut rest = &tokens[..];
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at(1 + next(&mut state, rest.len().min(4)));
                pieces.push(piece);
                rest = tail;
            }
            assert_eq!(run(&rules, &pieces, length).unwrap(), whole, "round {round}, stop {stop:?}");
            let finish = whole.finish.unwrap();
            assert_eq!(finish.usage.completion_tokens as usize, whole.token_ids.len());
            if finish.reason == FinishReason::Stop {
                matches += 1;
                assert_eq!(finish.stop_reason, Some(StopReason::String(stop.clone())));
                assert!(text.starts_with(&whole.text), "round {round}");
                assert_eq!(whole.text.ends_with(&stop), rules.include_stop, "round {round}");
            } else {
                assert_eq!(whole.text, text);
            }
        }
        assert!(matches > 200, "{matches} of 300 rounds found their stop string");
    }

    #[test]
    fn a_stop_token_ends_without_text_and_says_which_it_was() {
        let rules = rules(&[], false, 0);
        for (token, reason) in [(77, StopReason::Token(77)), (2, StopReason::Eos(2))] {
            let stop = finished(FinishReason::Stop, Some(token));
            // The last token and the end may come in separate pieces.
            for pieces in [&[&[300, 301, token][..]][..], &[&[300, 301, token], &[]]] {
                let whole = run(&rules, pieces, stop).unwrap();
                assert_eq!(whole.text, rules.tokenizer.decode(&[300, 301], true));
                assert_eq!(whole.token_ids, [300, 301, token]);
                assert_eq!(whole.finish.unwrap().stop_reason, Some(reason.clone()));
            }
        }
    }

    #[test]
    fn ends_that_are_no_answers_are_errors() {
        let rules = rules(&[], false, 0);
        let error = |reason| run(&rules, &[&[300]], finished(reason, None)).unwrap_err();
        assert_eq!(error(FinishReason::Deadline), RequestError::DeadlineExceeded);
        assert!(matches!(error(FinishReason::Abort), RequestError::Unavailable { .. }));
        assert!(matches!(error(FinishReason::Error), RequestError::Internal(_)));
    }
}
