//! Who pays for a request: a contract between whoever admits requests and whoever runs them.

use crate::FinishReason;

/// Follows one request from admission to its end, so that what was reserved for it can be settled with what it used.
/// Dropping a meter ends it, too: a request that never came to run is dropped without a call.
pub trait Meter: Send {
    /// The request left the queue; so many of its prompt tokens came from the prefix cache. Called at most once.
    fn started(&mut self, cached_tokens: u32);

    /// The request is over, after so many tokens over all its choices. Called at most once, as the last thing.
    fn ended(&mut self, generated_tokens: u32, reason: FinishReason);
}
