//! The same answers in pieces: one event per piece, its constant parts rendered once per stream.

use std::task::{Context, Poll};

use quire_llm::{ChoiceDelta, Generation, RequestError};
use serde::Serialize;
use serde_json::json;
use smallvec::SmallVec;

use crate::error::ApiError;
use crate::openai::completions::push_prompt;
use crate::openai::logprobs::{ChatLogprobs, TextLogprobs};
use crate::openai::stop_reason;
use crate::openai::usage::Usage;
use crate::sse::{COMMON_FRAME_BYTES, Events, FRAME_BYTES, write_error};

/// What every event of an answer repeats, and what its choices hold.
pub(crate) struct Answer {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
    pub(crate) with_logprobs: bool,
    pub(crate) with_token_ids: bool,
}

/// Which route's events.
#[derive(Clone, Copy)]
pub(crate) enum Shape {
    /// `chat.completion.chunk`.
    Chat,
    /// `text_completion`.
    Text {
        /// The first piece of a choice holds the prompt.
        echo: bool,
    },
}

/// The events of one answer.
pub(crate) struct Chunks {
    generations: SmallVec<[Generation; 1]>,
    choices: SmallVec<[ChoiceState; 1]>,
    /// `data: {"id":…,"choices":[`
    head: Box<[u8]>,
    /// What follows the choices, up to the end of the event.
    tail: &'static [u8],
    shape: Shape,
    answer: Answer,
    include_usage: bool,
}

#[derive(Clone, Default)]
struct ChoiceState {
    started: bool,
    text_offset: u32,
}

impl Chunks {
    pub(crate) fn new(
        generations: Vec<Generation>,
        answer: Answer,
        shape: Shape,
        include_usage: bool,
    ) -> Self {
        let object = match shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Text { .. } => "text_completion",
        };
        let head = json!({
            "id": answer.id, "object": object, "created": answer.created, "model": answer.model,
            "system_fingerprint": answer.system_fingerprint,
        });
        let head = head.to_string();
        let head = format!("data: {},\"choices\":[", head.trim_end_matches('}'));
        let choices = generations.iter().map(Generation::num_choices).sum();
        Self {
            choices: SmallVec::from_elem(ChoiceState::default(), choices),
            generations: generations.into_iter().collect(),
            head: head.into_bytes().into(),
            tail: if include_usage { b",\"usage\":null}\n\n" } else { b"}\n\n" },
            shape,
            answer,
            include_usage,
        }
    }

    /// One round over the prompts of the request. Ready: all have ended.
    fn poll_round(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<Result<(), RequestError>> {
        let mut first_choice = 0;
        let mut pending = false;
        for at in 0..self.generations.len() {
            loop {
                if out.len() >= FRAME_BYTES {
                    return Poll::Pending;
                }
                match self.generations[at].poll_next(cx) {
                    Poll::Ready(Some(Ok(delta))) => self.write(at, first_choice, &delta, out),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                    Poll::Ready(None) => break,
                    Poll::Pending => {
                        pending = true;
                        break;
                    }
                }
            }
            first_choice += self.generations[at].num_choices();
        }
        if pending { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn write(&mut self, generation: usize, first_choice: usize, delta: &ChoiceDelta, out: &mut Vec<u8>) {
        let index = first_choice + delta.index as usize;
        match self.shape {
            Shape::Chat => self.write_chat(generation, index, delta, out),
            Shape::Text { echo } => self.write_text(generation, index, echo, delta, out),
        }
        self.choices[index].started = true;
    }

    fn write_chat(&mut self, generation: usize, index: usize, delta: &ChoiceDelta, out: &mut Vec<u8>) {
        if !self.choices[index].started {
            self.open(index, out);
            out.extend_from_slice(
                br#","delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]"#,
            );
            if self.answer.with_token_ids {
                out.extend_from_slice(b",\"prompt_token_ids\":");
                write_json(&self.generations[generation].prompt_token_ids()[..], out);
            }
            out.extend_from_slice(self.tail);
        }
        self.open(index, out);
        out.extend_from_slice(b",\"delta\":{");
        if !delta.text.is_empty() {
            out.extend_from_slice(b"\"content\":");
            write_json(&delta.text, out);
        }
        out.extend_from_slice(b"},\"logprobs\":");
        let logprobs = (self.answer.with_logprobs && !delta.logprobs.is_empty())
            .then(|| ChatLogprobs::new(&delta.logprobs));
        write_json(&logprobs, out);
        self.close(delta, out);
        out.extend_from_slice(b"}]");
        out.extend_from_slice(self.tail);
    }

    fn write_text(
        &mut self,
        generation: usize,
        index: usize,
        echo: bool,
        delta: &ChoiceDelta,
        out: &mut Vec<u8>,
    ) {
        let first = !self.choices[index].started;
        self.open(index, out);
        out.extend_from_slice(b",\"text\":");
        write_json(&delta.text, out);
        out.extend_from_slice(b",\"logprobs\":");
        let mut lists = TextLogprobs::starting_at(self.choices[index].text_offset);
        if self.answer.with_logprobs {
            if first && echo {
                push_prompt(&self.generations[generation], &mut lists);
            }
            delta.logprobs.iter().for_each(|token| lists.push(token));
            self.choices[index].text_offset = lists.offset();
            write_json(&lists, out);
        } else {
            out.extend_from_slice(b"null");
        }
        self.close(delta, out);
        if first && self.answer.with_token_ids {
            out.extend_from_slice(b",\"prompt_token_ids\":");
            write_json(&self.generations[generation].prompt_token_ids()[..], out);
        }
        out.extend_from_slice(b"}]");
        out.extend_from_slice(self.tail);
    }

    /// From the start of an event to the index of its choice.
    fn open(&self, index: usize, out: &mut Vec<u8>) {
        if out.is_empty() {
            out.reserve(COMMON_FRAME_BYTES);
        }
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        write_json(&index, out);
    }

    /// The fields at the end of a choice that both shapes have.
    fn close(&self, delta: &ChoiceDelta, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"finish_reason\":");
        write_json(&delta.finish.as_ref().map(|finish| finish.reason.name()), out);
        if let Some(finish) = &delta.finish {
            out.extend_from_slice(b",\"stop_reason\":");
            write_json(&stop_reason(finish), out);
        }
        if self.answer.with_token_ids {
            out.extend_from_slice(b",\"token_ids\":");
            write_json(&delta.token_ids, out);
        }
    }

    fn write_end(&self, out: &mut Vec<u8>) {
        if self.include_usage {
            out.extend_from_slice(&self.head);
            out.extend_from_slice(b"],\"usage\":");
            write_json(&Usage::sum(self.generations.iter().map(Generation::usage)), out);
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}

impl Events for Chunks {
    fn poll_events(&mut self, cx: &mut Context<'_>, out: &mut Vec<u8>) -> Poll<()> {
        match self.poll_round(cx, out) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => {
                self.write_end(out);
                Poll::Ready(())
            }
            Poll::Ready(Err(error)) => {
                write_error(&ApiError::from(error), out);
                Poll::Ready(())
            }
        }
    }
}

/// Appends a value as JSON.
fn write_json<T: Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) {
    // Neither the writer nor our own types can fail.
    serde_json::to_writer(out, value).expect("writing plain data to memory cannot fail");
}
