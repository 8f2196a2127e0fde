//! `quire.v1.Inference`.

use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use quire_core::Micros;
use quire_llm::{Generation, Lifecycle, Llm, Prompt, Refusal, RequestError};
use quire_tenancy::{Access, Demand, Permit, Scope, Standing, Tenancy};
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};

use crate::observe::{Call, code_name, observe};
use crate::proto::inference_server::Inference;
use crate::{convert, proto, status, timeline};

/// Longest accepted `x-request-id`.
const MAX_REQUEST_ID: usize = 128;

/// Two ticks of the timer.
const HEAD_START: Duration = Duration::from_millis(2);

/// The service over whatever model the lifecycle holds.
pub struct InferenceService {
    lifecycle: Lifecycle,
    tenancy: Tenancy,
    version: &'static str,
    ids: RandomState,
    count: std::sync::atomic::AtomicU64,
}

impl InferenceService {
    /// `version` is reported by `GetModelInfo`.
    pub fn new(lifecycle: Lifecycle, tenancy: Tenancy, version: &'static str) -> Self {
        let count = std::sync::atomic::AtomicU64::new(0);
        Self { lifecycle, tenancy, version, ids: RandomState::new(), count }
    }

    fn llm(&self) -> Result<&Llm, Status> {
        self.lifecycle.llm().map_err(|error| status::of(&error))
    }

    /// The model and the name to call it by, if `name` means it and the caller may know of it.
    fn llm_named(&self, name: &str, access: &Access) -> Result<(&Llm, String), Status> {
        let llm = self.llm()?;
        let names = llm.names().iter().filter(|name| access.tenant().may_use(name));
        let names: Vec<&str> = names.map(String::as_str).collect();
        let found = if name.is_empty() { names.first() } else { names.iter().find(|&&known| known == name) };
        found.map(|&name| (llm, name.to_owned())).ok_or_else(|| {
            let served = if names.is_empty() { "no model for this key".to_owned() } else { names.join(", ") };
            Status::not_found(format!("the model `{name}` does not exist; this server has {served}"))
        })
    }

    /// A call that generates nothing counts as a request, and as nothing else.
    async fn enter<T>(&self, request: &Request<T>) -> Result<(Access, Permit), Status> {
        let access = access(request)?;
        access.require(Scope::Tokenize).map_err(|denied| status::denied(&denied))?;
        let permit = self.tenancy.admit(&access, Demand::default()).await;
        Ok((access, permit.map_err(|denied| status::denied(&denied))?))
    }

    /// The client's id if it is a harmless one, else a new one.
    fn request_id<T>(&self, request: &Request<T>) -> String {
        let given = request.metadata().get("x-request-id").and_then(|value| value.to_str().ok());
        given
            .filter(|id| is_harmless(id))
            .map_or_else(|| format!("gen-{:016x}", self.next_id()), str::to_owned)
    }

    fn next_id(&self) -> u64 {
        self.ids.hash_one(self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
    }

    async fn start(&self, request: Request<proto::GenerateRequest>) -> Result<Started, Status> {
        let received = Instant::now();
        let (id, access) = (self.request_id(&request), access(&request)?);
        access.trail().named(&id);
        let started = self.let_in(request, &id, &access).await;
        started.map_err(|status| self.note_refusal(status, &id, &access, received))
    }

    /// Remembers that a request was not let in, if that is what the status says, and says under which id.
    fn note_refusal(&self, mut status: Status, id: &str, access: &Access, received: Instant) -> Status {
        let refuses = [Code::ResourceExhausted, Code::Unavailable, Code::DeadlineExceeded];
        let Some(llm) = self.lifecycle.loaded().filter(|_| refuses.contains(&status.code())) else {
            return status;
        };
        let engine = llm.engine();
        let refused = engine.now();
        let took = u64::try_from(received.elapsed().as_micros()).unwrap_or(u64::MAX);
        engine.note_refusal(Refusal {
            name: id.into(),
            tenant: access.tenant().id(),
            received: Micros(refused.0.saturating_sub(took)),
            refused,
            code: code_name(status.code()),
            message: status.message().to_owned(),
            retry_after: status::retry_after(&status),
        });
        if let Ok(id) = id.parse() {
            status.metadata_mut().insert("x-request-id", id);
        }
        status
    }

    async fn let_in(
        &self,
        request: Request<proto::GenerateRequest>,
        id: &str,
        access: &Access,
    ) -> Result<Started, Status> {
        let timeout = timeout(&request)?;
        let message = request.into_inner();
        let denied = |denied| status::denied(&denied);
        access.require(Scope::Infer).and_then(|()| self.tenancy.precheck(access)).map_err(denied)?;
        let (llm, model) = self.llm_named(&message.model, access)?;
        let mut generate = convert::request(message).map_err(|error| status::of(&error))?;
        access.trail().asks(&model, || generate.canonical_params());
        let tenant = access.tenant();
        generate.request_id = Some(id.into());
        generate.tenant = tenant.id();
        generate.priority = tenant.priority(generate.priority);
        generate.cache_namespace = access.cache_namespace();
        generate.default_max_tokens = tenant.default_max_tokens(generate.sampling.n.unwrap_or(1));
        generate.timeout = timeout;
        generate.adapter = llm.adapter(&model);
        let prepared = llm.prepare(generate).await.map_err(|error| status::of(&error))?;
        let mut demand = Demand::default();
        demand.add(prepared.prompt_tokens(), prepared.n(), prepared.max_tokens());
        let permit = self.tenancy.admit(access, demand).await.map_err(denied)?;
        let meter = permit.meter(prepared.prompt_tokens(), prepared.n());
        let priority = permit.priority(prepared.priority());
        let generation = llm
            .start(prepared.with_priority(priority), Some(meter))
            .await
            .map_err(|error| status::of(&error))?;
        Ok(Started { id: id.to_owned(), model, generation, standing: *permit.standing() })
    }

    async fn answer(
        &self,
        request: Request<proto::GenerateRequest>,
    ) -> Result<Response<proto::GenerateResponse>, Status> {
        let Started { id, model, mut generation, standing } = self.start(request).await?;
        let choices = generation.collect().await.map_err(|error| status::of(&error))?;
        let mut response = Response::new(proto::GenerateResponse {
            id,
            model,
            choices: choices.into_iter().map(convert::choice).collect(),
            usage: Some(convert::usage(generation.usage())),
            prompt_token_ids: generation.prompt_token_ids().to_vec(),
            prompt_logprobs: convert::prompt_logprobs(generation.prompt_logprobs()),
        });
        status::insert_standing(response.metadata_mut(), &standing);
        Ok(response)
    }

    /// Nothing tells what never was from what is somebody else's.
    fn timeline(
        &self,
        access: &Access,
        message: &proto::GetRequestTimelineRequest,
    ) -> Result<Response<proto::RequestTimeline>, Status> {
        let sees_all = access.require(Scope::Admin).is_ok();
        if !sees_all {
            access.require(Scope::Infer).map_err(|denied| status::denied(&denied))?;
        }
        let tenant = (!sees_all).then(|| access.tenant().id());
        let id = &message.id;
        let stories = self.lifecycle.loaded().and_then(|llm| llm.stories(id, tenant));
        let stories = stories.ok_or_else(|| {
            Status::not_found(format!(
                "no request `{id}` of yours is known here; those that ended long ago are forgotten"
            ))
        })?;
        Ok(Response::new(timeline::message(stories)))
    }

    fn model_info(&self, access: &Access) -> Result<Response<proto::ModelInfo>, Status> {
        let (llm, model) = self.llm_named("", access)?;
        let limits = llm.engine().limits();
        Ok(Response::new(proto::ModelInfo {
            model,
            vocab_size: limits.vocab_size,
            max_model_len: limits.max_model_len,
            max_num_seqs: limits.max_num_seqs,
            max_num_batched_tokens: limits.max_num_batched_tokens,
            block_size: limits.block_size,
            num_blocks: limits.num_blocks,
            eos_token_ids: llm.eos_token_ids().to_vec(),
            version: self.version.to_owned(),
        }))
    }
}

/// Whether a client's id is fit for logs and metadata.
pub(crate) fn is_harmless(id: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !id.is_empty() && id.len() <= MAX_REQUEST_ID && id.bytes().all(plain)
}

/// A request on its way.
struct Started {
    id: String,
    model: String,
    generation: Generation,
    standing: Standing,
}

/// Who asks, as the interceptor noted.
fn access<T>(request: &Request<T>) -> Result<Access, Status> {
    let access = request.extensions().get::<Access>().cloned();
    access.ok_or_else(|| Status::internal("the request passed by the door"))
}

/// Ends an answer at its deadline. The transport keeps the time as well, but would say CANCELLED; so this is first.
async fn within<T>(
    timeout: Option<Duration>,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let Some(timeout) = timeout else { return answer.await };
    let outcome = tokio::time::timeout(timeout.saturating_sub(HEAD_START), answer).await;
    outcome.unwrap_or_else(|_| Err(status::of(&RequestError::DeadlineExceeded)))
}

/// `grpc-timeout`: up to eight digits and a unit (gRPC over HTTP/2, "Requests").
fn timeout<T>(request: &Request<T>) -> Result<Option<Duration>, Status> {
    let Some(value) = request.metadata().get("grpc-timeout") else { return Ok(None) };
    let parse = |text: &str| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let valid = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        let amount: u64 = digits.parse().ok().filter(|_| valid)?;
        match unit {
            "H" => Some(Duration::from_secs(amount * 3600)),
            "M" => Some(Duration::from_secs(amount * 60)),
            "S" => Some(Duration::from_secs(amount)),
            "m" => Some(Duration::from_millis(amount)),
            "u" => Some(Duration::from_micros(amount)),
            "n" => Some(Duration::from_nanos(amount)),
            _ => None,
        }
    };
    let duration = value.to_str().ok().and_then(parse);
    duration
        .map(Some)
        .ok_or_else(|| Status::invalid_argument("grpc-timeout: must be digits and one of H M S m u n"))
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStreamStream = ChunkStream;

    async fn generate(
        &self,
        request: Request<proto::GenerateRequest>,
    ) -> Result<Response<proto::GenerateResponse>, Status> {
        observe("Generate", async {
            let timeout = timeout(&request)?;
            within(timeout, self.answer(request)).await
        })
        .await
    }

    async fn generate_stream(
        &self,
        request: Request<proto::GenerateRequest>,
    ) -> Result<Response<ChunkStream>, Status> {
        let mut call = Call::new("GenerateStream");
        let timeout = timeout(&request).inspect_err(|status| call.end(status.code()))?;
        let Started { id, generation, standing, .. } =
            within(timeout, self.start(request)).await.inspect_err(|status| call.end(status.code()))?;
        let mut response = Response::new(ChunkStream { id, generation, first: true, call });
        status::insert_standing(response.metadata_mut(), &standing);
        Ok(response)
    }

    async fn tokenize(
        &self,
        request: Request<proto::TokenizeRequest>,
    ) -> Result<Response<proto::TokenizeResponse>, Status> {
        observe("Tokenize", async {
            let (access, _permit) = self.enter(&request).await?;
            let (llm, _) = self.llm_named("", &access)?;
            let message = request.into_inner();
            let ids = llm.tokenize(Prompt::Text(message.text), Some(!message.no_special_tokens)).await;
            ids.map(|ids| Response::new(proto::TokenizeResponse { ids })).map_err(|error| status::of(&error))
        })
        .await
    }

    async fn detokenize(
        &self,
        request: Request<proto::DetokenizeRequest>,
    ) -> Result<Response<proto::DetokenizeResponse>, Status> {
        observe("Detokenize", async {
            let (access, _permit) = self.enter(&request).await?;
            let (llm, _) = self.llm_named("", &access)?;
            let message = request.into_inner();
            let text = llm.detokenize(message.ids, message.skip_special_tokens).await;
            text.map(|text| Response::new(proto::DetokenizeResponse { text }))
                .map_err(|error| status::of(&error))
        })
        .await
    }

    async fn get_model_info(
        &self,
        request: Request<proto::GetModelInfoRequest>,
    ) -> Result<Response<proto::ModelInfo>, Status> {
        observe("GetModelInfo", async { self.model_info(&access(&request)?) }).await
    }

    async fn get_request_timeline(
        &self,
        request: Request<proto::GetRequestTimelineRequest>,
    ) -> Result<Response<proto::RequestTimeline>, Status> {
        observe("GetRequestTimeline", async { self.timeline(&access(&request)?, request.get_ref()) }).await
    }
}

/// The answer to `GenerateStream`. Dropping it cancels the request.
pub struct ChunkStream {
    id: String,
    generation: Generation,
    first: bool,
    call: Call,
}

impl ChunkStream {
    fn chunk(&mut self, delta: quire_llm::ChoiceDelta) -> proto::GenerateChunk {
        let mut chunk = proto::GenerateChunk { id: self.id.clone(), ..proto::GenerateChunk::default() };
        if std::mem::take(&mut self.first) {
            chunk.prompt_token_ids = self.generation.prompt_token_ids().to_vec();
            chunk.prompt_logprobs = convert::prompt_logprobs(self.generation.prompt_logprobs());
        }
        chunk.choice = Some(convert::choice(delta));
        if self.generation.is_finished() {
            chunk.usage = Some(convert::usage(self.generation.usage()));
        }
        chunk
    }
}

impl Stream for ChunkStream {
    type Item = Result<proto::GenerateChunk, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let item = match ready!(this.generation.poll_next(cx)) {
            None => {
                this.call.end(Code::Ok);
                None
            }
            Some(Ok(delta)) => Some(Ok(this.chunk(delta))),
            Some(Err(error)) => {
                Some(Err(status::of(&error)).inspect_err(|status: &Status| this.call.end(status.code())))
            }
        };
        Poll::Ready(item)
    }
}
