//! Counts calls by name and status code.

use metrics::counter;
use quire_core::metric_names::{CLIENT_DISCONNECTS, GRPC_REQUESTS};
use tonic::{Code, Response, Status};

/// Every call there is; their series exist from the start.
pub(crate) const RPCS: [&str; 6] =
    ["Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModelInfo", "GetRequestTimeline"];

/// Creates the series that every scrape shows.
pub(crate) fn create_series() {
    for rpc in RPCS {
        counter!(GRPC_REQUESTS.name, "rpc" => rpc, "code" => code_name(Code::Ok)).increment(0);
    }
}

/// One call; counted once, as cancelled if it is dropped before its end.
pub(crate) struct Call {
    rpc: &'static str,
    is_open: bool,
}

impl Call {
    pub(crate) fn new(rpc: &'static str) -> Self {
        Self { rpc, is_open: true }
    }

    /// Counts the call; later ends do not count.
    pub(crate) fn end(&mut self, code: Code) {
        if std::mem::take(&mut self.is_open) {
            counter!(GRPC_REQUESTS.name, "rpc" => self.rpc, "code" => code_name(code)).increment(1);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.is_open {
            counter!(CLIENT_DISCONNECTS.name).increment(1);
        }
        self.end(Code::Cancelled);
    }
}

/// Runs a unary call and counts it.
pub(crate) async fn observe<T>(
    rpc: &'static str,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Response<T>, Status> {
    let mut call = Call::new(rpc);
    let result = answer.await;
    call.end(result.as_ref().map_or_else(Status::code, |_| Code::Ok));
    result
}

/// The code's name in the gRPC specification.
pub(crate) const fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::Unavailable => "UNAVAILABLE",
        Code::Unauthenticated => "UNAUTHENTICATED",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::Internal => "INTERNAL",
        _ => "UNKNOWN",
    }
}
