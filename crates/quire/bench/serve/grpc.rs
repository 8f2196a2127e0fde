//! The same requests over `quire.v1`, all on one connection, as gRPC clients send them.

use std::time::Instant;

use quire_grpc::proto::inference_client::InferenceClient;
use quire_grpc::proto::{
    self, GenerateChunk, GenerateRequest, GetModelInfoRequest, Sampling, Stopping, TokenIds,
};
use serde::Deserialize;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::client::{Answer, Failed, OnRead};
use super::sse::Usage;
use crate::{Failure, Result};

/// Where requests go.
#[derive(Debug)]
pub(crate) struct GrpcTarget {
    client: InferenceClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
}

/// What a request's JSON body says; the other fields ask for what gRPC always does.
#[derive(Deserialize)]
struct Body {
    model: String,
    prompt: Vec<u32>,
    max_tokens: u32,
    temperature: f32,
    #[serde(default)]
    ignore_eos: bool,
}

impl GrpcTarget {
    /// `url` is `http://HOST:PORT`.
    pub(crate) async fn connect(url: &str, api_key: Option<&str>) -> Result<Self> {
        let fail = |reason: String| Failure(format!("{url}: {reason}"));
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| fail(error.to_string()))?;
        let channel = endpoint.tcp_nodelay(true).connect().await;
        let client = InferenceClient::new(channel.map_err(|error| fail(error.to_string()))?);
        let authorization = api_key.map(|key| format!("Bearer {key}").parse()).transpose();
        let authorization = authorization.map_err(|_| Failure("--api-key: not fit for a header".into()))?;
        Ok(Self { client, authorization })
    }

    /// The name of the model that it serves.
    pub(crate) async fn model(&self) -> Result<String> {
        let info = self.client.clone().get_model_info(self.request(GetModelInfoRequest {})).await;
        let info = info.map_err(|status| Failure(format!("GetModelInfo: {}", status.message())))?;
        Ok(info.into_inner().model)
    }

    /// Sends what the JSON body of the same request over HTTP says, and reads its stream to the end.
    pub(crate) async fn stream(&self, body: &[u8], on_read: &impl OnRead) -> Result<Answer, Failed> {
        let message = message(body).map_err(|error| Failed::Garbled(error.to_string()))?;
        let sent = Instant::now();
        let answer = self.client.clone().generate_stream(self.request(message)).await;
        let mut stream = answer.map_err(|status| failed(&status))?.into_inner();
        let mut progress = Progress::default();
        while let Some(chunk) = stream.message().await.map_err(|status| failed(&status))? {
            progress.take(Instant::now(), &chunk, on_read);
        }
        progress.answer(sent)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }
}

fn message(body: &[u8]) -> serde_json::Result<GenerateRequest> {
    let Body { model, prompt, max_tokens, temperature, ignore_eos } = serde_json::from_slice(body)?;
    Ok(GenerateRequest {
        model,
        prompt: Some(proto::generate_request::Prompt::TokenIds(TokenIds { ids: prompt })),
        sampling: Some(Sampling { temperature: Some(temperature), ..Sampling::default() }),
        stopping: Some(Stopping { max_tokens: Some(max_tokens), ignore_eos, ..Stopping::default() }),
        ..GenerateRequest::default()
    })
}

fn failed(status: &Status) -> Failed {
    if status.code() == Code::ResourceExhausted && status.metadata().contains_key("retry-after") {
        return Failed::Rejected;
    }
    Failed::Stream(format!("{:?}: {}", status.code(), status.message()))
}

/// What is known of an answer while it comes.
#[derive(Default)]
struct Progress {
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_events: u32,
    usage: Option<Usage>,
}

impl Progress {
    fn take(&mut self, now: Instant, chunk: &GenerateChunk, on_read: &impl OnRead) {
        if let Some(usage) = &chunk.usage {
            let proto::Usage { prompt_tokens, completion_tokens, .. } = *usage;
            self.usage = Some(Usage { prompt_tokens, completion_tokens });
        }
        if chunk.choice.as_ref().is_some_and(|choice| !choice.token_ids.is_empty()) {
            on_read.on_read(now, self.last_token, 1);
            self.num_events += 1;
            self.first_token.get_or_insert(now);
            self.last_token = Some(now);
        }
    }

    fn answer(self, sent: Instant) -> Result<Answer, Failed> {
        let Self { first_token, last_token, num_events, usage } = self;
        let (Some(first_token), Some(last_token)) = (first_token, last_token) else {
            return Err(Failed::CutOff("the answer has no token".into()));
        };
        // Messages come one by one, whatever a read of the connection held.
        Ok(Answer { sent, first_token, last_token, num_events, num_reads: num_events, usage })
    }
}
