//! What a request's headers say: who asks, under which id, until when.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use http::request::Parts;
use quire_core::Micros;
use quire_llm::{GenerateRequest, Generation, Llm, Prepared, Refusal, RequestError};
use quire_tenancy::{Access, Demand, Permit, Scope, Tenancy};

use crate::error::ApiError;
use crate::observe::RequestId;
use crate::state::AppState;

const TIMEOUT: &str = "x-request-timeout-ms";

/// The longest time to live that a client may ask for: a day.
const MAX_TIMEOUT_MS: u64 = 86_400_000;

/// Who asks, and how.
pub(crate) struct Caller {
    pub(crate) access: Access,
    pub(crate) request_id: RequestId,
    /// From now.
    pub(crate) timeout: Option<Duration>,
    /// When its head was there.
    received: Instant,
}

impl FromRequestParts<AppState> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &AppState) -> Result<Self, ApiError> {
        let (Some(access), Some(request_id)) =
            (parts.extensions.get::<Access>(), parts.extensions.get::<RequestId>())
        else {
            return Err(ApiError::internal("the request passed by the door"));
        };
        let timeout =
            parts.headers.get(TIMEOUT).map(|value| parse_timeout(value.to_str().ok())).transpose()?;
        let (access, request_id) = (access.clone(), request_id.clone());
        Ok(Self { access, request_id, timeout, received: Instant::now() })
    }
}

impl Caller {
    /// Whether the key is for this, and the tenant's limits leave any hope: before work is spent on the request.
    pub(crate) fn knock(&self, scope: Scope, tenancy: &Tenancy) -> Result<(), ApiError> {
        self.access.require(scope)?;
        Ok(tenancy.precheck(&self.access)?)
    }

    /// The names of the model that exist for this caller.
    pub(crate) fn models<'a>(&self, llm: &'a Llm) -> Vec<&'a str> {
        let names = llm.names().iter().map(String::as_str);
        names.filter(|name| self.access.tenant().may_use(name)).collect()
    }

    /// Sets what depends on who asks; `prompts` requests like this one belong together.
    pub(crate) fn sign(&self, request: &mut GenerateRequest, prompts: usize) {
        let tenant = self.access.tenant();
        let choices =
            request.sampling.n.unwrap_or(1).saturating_mul(u32::try_from(prompts).unwrap_or(u32::MAX));
        request.request_id = Some(Arc::clone(&self.request_id.0));
        request.tenant = tenant.id();
        request.priority = tenant.priority(request.priority);
        request.cache_namespace = self.access.cache_namespace();
        request.default_max_tokens = tenant.default_max_tokens(choices);
        request.timeout = self.timeout;
    }

    /// Notes for the audit log what is asked for.
    pub(crate) fn note_question(&self, model: &str, request: &GenerateRequest) {
        self.access.trail().asks(model, || request.canonical_params());
    }

    /// Reserves what the prompts of one request may use.
    pub(crate) async fn admit(&self, tenancy: &Tenancy, prompts: &[Prepared]) -> Result<Permit, ApiError> {
        let mut demand = Demand::default();
        prompts.iter().for_each(|prompt| demand.add(prompt.prompt_tokens(), prompt.n(), prompt.max_tokens()));
        Ok(tenancy.admit(&self.access, demand).await?)
    }

    /// Remembers, for whoever asks later, that the request was not let in, if that is what the error says.
    pub(crate) fn note_refusal(&self, llm: &Llm, error: &ApiError) {
        let Some((code, message)) = error.refusal() else { return };
        let refused = llm.engine().now();
        let took = u64::try_from(self.received.elapsed().as_micros()).unwrap_or(u64::MAX);
        llm.engine().note_refusal(Refusal {
            name: Arc::clone(&self.request_id.0),
            tenant: self.access.tenant().id(),
            received: Micros(refused.0.saturating_sub(took)),
            refused,
            code,
            message: message.to_owned(),
            retry_after: error.retry_after(),
        });
    }
}

/// Submits a prompt under the permit of its request.
pub(crate) async fn start(llm: &Llm, permit: &Permit, prompt: Prepared) -> Result<Generation, RequestError> {
    let meter = permit.meter(prompt.prompt_tokens(), prompt.n());
    let priority = permit.priority(prompt.priority());
    llm.start(prompt.with_priority(priority), Some(meter)).await
}

fn parse_timeout(value: Option<&str>) -> Result<Duration, ApiError> {
    match value.and_then(|value| value.trim().parse::<u64>().ok()) {
        Some(ms @ 1..=MAX_TIMEOUT_MS) => Ok(Duration::from_millis(ms)),
        _ => {
            Err(ApiError::invalid(TIMEOUT, format!("must be a whole number between 1 and {MAX_TIMEOUT_MS}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_positive_milliseconds() {
        assert_eq!(parse_timeout(Some("250")).unwrap(), Duration::from_millis(250));
        for bad in [None, Some("0"), Some("-1"), Some("1.5"), Some("soon"), Some("86400001")] {
            assert!(parse_timeout(bad).is_err(), "{bad:?}");
        }
    }
}
