//! The text-level API that the HTTP and gRPC front ends share: messages or text in, text pieces out.
//!
//! A front end turns its body into a [`GenerateRequest`], [`Llm::generate`] makes token ids of it and submits them to
//! the engine, and the [`Generation`] that comes back turns the engine's tokens into text as they arrive.
//!
//! Invariants:
//! * the same request gives the same answer through every front end, because all of text handling happens here;
//! * templates and tokenization run in a bounded pool, never on an I/O thread; so does the hashing of a prompt that takes
//!   longer than the way there;
//! * what a choice reports (text, token ids, log-probabilities, usage) ends with the token that ended it, however
//!   many more tokens the engine made before it heard of the end: results do not depend on timing;
//! * however a stream is cut into pieces, the joined pieces are the same;
//! * dropping a [`Generation`] cancels its request.
//!
//! Reading order: [`request`], [`llm`], [`params`], [`generation`], `choice`; then [`lifecycle`], [`logprobs`] and
//! `pool`; [`story`], `operations`.
#![forbid(unsafe_code)]

mod choice;
pub mod generation;
pub mod lifecycle;
pub mod llm;
pub mod logprobs;
mod operations;
pub mod params;
mod pool;
pub mod request;
pub mod story;

pub use generation::{ChoiceDelta, Finish, Generation, StopReason, TokenUsage};
pub use lifecycle::{Lifecycle, ServerState};
pub use llm::{Llm, LlmConfig, Prepared};
pub use logprobs::{TokenLogprob, TopLogprob};
pub use operations::LiveRequest;
pub use params::GenerationDefaults;
pub use quire_core::{FinishReason, RequestError, TenantId, TokenId};
pub use quire_engine::refusals::Refusal;
pub use request::{ChatMessage, ChatPrompt, GenerateRequest, Prompt, SamplingOptions};
pub use story::{Rejected, Stories, Story, StoryEvent};
