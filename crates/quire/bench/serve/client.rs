//! One request: over a connection of the pool if one is idle, read as it comes, each read timed once.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::http::{Body, Head, Piece, write_head};
use super::sse::{Chunk, EventSplitter, Usage, error_message};
use crate::{Failure, Result};

/// Bytes read at once: some events, so that many connections need little memory.
const READ_BYTES: usize = 4 << 10;
/// An answer that is not streamed is smaller.
const MAX_BODY_BYTES: usize = 64 << 20;

/// Where requests go.
#[derive(Debug)]
pub(crate) struct Target {
    address: SocketAddr,
    host: String,
    /// What comes before the routes.
    prefix: String,
    api_key: Option<String>,
    idle: Mutex<Vec<TcpStream>>,
}

/// Why a request has no whole answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Failed {
    /// 429 with Retry-After: the server is as full as it wants to be.
    Rejected,
    /// Any other status but 200.
    Status(u16, String),
    /// No connection.
    Connect(String),
    /// The connection broke, or the answer ended before it said why.
    CutOff(String),
    /// Not what HTTP or server-sent events look like.
    Garbled(String),
    /// The stream ended with an error.
    Stream(String),
    /// Took too long.
    Timeout,
}

impl Failed {
    /// In a row's name.
    pub(crate) fn slug(&self) -> String {
        match self {
            Self::Rejected => "rejected".into(),
            Self::Status(status, _) => format!("status-{status}"),
            Self::Connect(_) => "connect".into(),
            Self::CutOff(_) => "cut-off".into(),
            Self::Garbled(_) => "garbled".into(),
            Self::Stream(_) => "stream-error".into(),
            Self::Timeout => "timeout".into(),
        }
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rejected => f.write_str("the server is full (429, Retry-After)"),
            Self::Status(status, message) => write!(f, "status {status}: {message}"),
            Self::Connect(message) => write!(f, "cannot connect: {message}"),
            Self::CutOff(message) => write!(f, "the answer was cut off: {message}"),
            Self::Garbled(message) => write!(f, "the answer cannot be read: {message}"),
            Self::Stream(message) => write!(f, "the stream ended with an error: {message}"),
            Self::Timeout => f.write_str("--request-timeout has passed"),
        }
    }
}

/// Hears of every read that brought tokens.
pub(crate) trait OnRead {
    /// `events` events came with one read; `previous` is when the one before came.
    fn on_read(&self, now: Instant, previous: Option<Instant>, events: u32);
}

impl OnRead for () {
    fn on_read(&self, _: Instant, _: Option<Instant>, _: u32) {}
}

/// What an answer was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) sent: Instant,
    pub(crate) first_token: Instant,
    pub(crate) last_token: Instant,
    /// Events with tokens.
    pub(crate) num_events: u32,
    /// Reads that brought them.
    pub(crate) num_reads: u32,
    /// `None`: the server did not say.
    pub(crate) usage: Option<Usage>,
}

impl Target {
    /// `base_url` is `http://HOST[:PORT][/PREFIX]`.
    pub(crate) fn new(base_url: &str, api_key: Option<&str>) -> Result<Self> {
        let wrong =
            |reason: &str| Failure(format!("--base-url {base_url}: {reason}, as http://127.0.0.1:8000"));
        let rest = base_url
            .strip_prefix("http://")
            .ok_or_else(|| wrong("only plain HTTP is spoken; write a URL"))?;
        let (host, prefix) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        let with_port = if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
            host.to_owned()
        } else {
            format!("{host}:80")
        };
        let mut addresses =
            with_port.to_socket_addrs().map_err(|error| wrong(&format!("{error}; write a URL")))?;
        let address = addresses.next().ok_or_else(|| wrong("the host has no address; write a URL"))?;
        if api_key.is_some_and(|key| key.contains(['\r', '\n'])) {
            return Err(Failure("--api-key: a key has no line breaks".into()));
        }
        // What people paste often ends with a slash or with the version.
        let prefix = prefix.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let (host, api_key) = (host.to_owned(), api_key.map(str::to_owned));
        Ok(Self { address, host, prefix, api_key, idle: Mutex::default() })
    }

    /// Sends a request that is answered with one JSON value.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        let fail = |reason: String| Failure(format!("http://{}{}{path}: {reason}", self.host, self.prefix));
        let mut content = Vec::new();
        let take = |_: Instant, data: &[u8]| {
            content.extend_from_slice(data);
            if content.len() > MAX_BODY_BYTES { Err(Failed::Garbled("too long".into())) } else { Ok(()) }
        };
        let request = self.request(method, path, body);
        self.exchange(&request, take).await.map_err(|failed| fail(failed.to_string()))?;
        serde_json::from_slice(&content).map_err(|error| fail(format!("the answer is not JSON: {error}")))
    }

    /// Sends a request and reads its stream of events to the end.
    pub(crate) async fn stream(
        &self,
        path: &str,
        body: &[u8],
        on_read: &impl OnRead,
    ) -> Result<Answer, Failed> {
        let request = self.request("POST", path, body);
        let mut tracker = Tracker::default();
        let take = |now: Instant, data: &[u8]| tracker.take(now, data, on_read);
        let sent = self.exchange(&request, take).await?;
        tracker.answer(sent)
    }

    fn request(&self, method: &str, path: &str, body: &[u8]) -> Vec<u8> {
        let path = format!("{}{path}", self.prefix);
        let mut request = write_head(method, &path, &self.host, self.api_key.as_deref(), body.len());
        request.extend_from_slice(body);
        request
    }

    /// Sends `request`; what comes back with status 200 goes to `take`. Returns when it was sent.
    async fn exchange(
        &self,
        request: &[u8],
        mut take: impl FnMut(Instant, &[u8]) -> Result<(), Failed>,
    ) -> Result<Instant, Failed> {
        let sent = Instant::now();
        let mut stream = self.send(request).await?;
        let mut buffer = vec![0; READ_BYTES];
        let (mut head, mut end) = (None, 0);
        while head.is_none() {
            if end == buffer.len() {
                buffer.resize(2 * end, 0);
            }
            let count = read(&mut stream, &mut buffer[end..]).await?;
            if count == 0 {
                return Err(Failed::CutOff("no head came".into()));
            }
            end += count;
            head = Head::parse(&buffer[..end]).map_err(Failed::Garbled)?;
        }
        let Some((mut head, start)) = head else { unreachable!("the loop ends with a head") };
        let mut error = Vec::new();
        let mut input = start..end;
        let is_ok = head.status == 200;
        loop {
            let now = Instant::now();
            let mut take = |data: &[u8]| {
                if is_ok {
                    return take(now, data);
                }
                error.extend_from_slice(&data[..data.len().min(READ_BYTES.saturating_sub(error.len()))]);
                Ok(())
            };
            if take_body(&mut head.body, &buffer[input], &mut take)? {
                break;
            }
            let count = read(&mut stream, &mut buffer).await?;
            if count == 0 && head.body.may_end_here() {
                break;
            }
            if count == 0 {
                return Err(Failed::CutOff("the connection was closed".into()));
            }
            input = 0..count;
        }
        if head.keep_alive {
            self.idle().push(stream);
        }
        match (head.status, head.has_retry_after) {
            (200, _) => Ok(sent),
            (429, true) => Err(Failed::Rejected),
            (status, _) => Err(Failed::Status(status, error_message(&error))),
        }
    }

    /// Writes `request` to an idle connection that is still open, or else to a new one.
    async fn send(&self, request: &[u8]) -> Result<TcpStream, Failed> {
        loop {
            let Some(mut stream) = self.idle().pop() else { break };
            // Nothing may be waiting to be read: neither an end nor bytes that nobody asked for.
            let is_silent = stream.try_read(&mut [0]).is_err_and(|error| error.kind() == WOULD_BLOCK);
            if is_silent && stream.write_all(request).await.is_ok() {
                return Ok(stream);
            }
        }
        let connect = |error: std::io::Error| Failed::Connect(error.to_string());
        let mut stream = TcpStream::connect(self.address).await.map_err(connect)?;
        stream.set_nodelay(true).map_err(connect)?;
        stream.write_all(request).await.map_err(|error| Failed::CutOff(error.to_string()))?;
        Ok(stream)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const WOULD_BLOCK: std::io::ErrorKind = std::io::ErrorKind::WouldBlock;

async fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<usize, Failed> {
    stream.read(buffer).await.map_err(|error| Failed::CutOff(error.to_string()))
}

/// Takes what `input` has of the body. True: that was its end.
fn take_body(
    body: &mut Body,
    mut input: &[u8],
    take: &mut impl FnMut(&[u8]) -> Result<(), Failed>,
) -> Result<bool, Failed> {
    loop {
        match body.next(&mut input).map_err(Failed::Garbled)? {
            Piece::Data(data) => take(data)?,
            Piece::NeedMore => return Ok(false),
            Piece::End if input.is_empty() => return Ok(true),
            Piece::End => return Err(Failed::Garbled("bytes follow the answer".into())),
        }
    }
}

/// What is known of an answer while it comes.
#[derive(Default)]
struct Tracker {
    splitter: EventSplitter,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_events: u32,
    num_reads: u32,
    usage: Option<Usage>,
    is_finished: bool,
    error: Option<String>,
}

impl Tracker {
    fn take(&mut self, now: Instant, data: &[u8], on_read: &impl OnRead) -> Result<(), Failed> {
        let mut num_events = 0;
        let Self { splitter, usage, is_finished, error, .. } = self;
        let split = splitter.feed(data, |event| {
            let chunk = Chunk::read(event);
            num_events += u32::from(chunk.is_token);
            *is_finished |= chunk.is_finish || chunk.is_done;
            *usage = chunk.usage.or(*usage);
            if let Some(message) = chunk.error {
                *error = Some(message);
            }
        });
        split.map_err(|reason| Failed::Garbled(reason.to_owned()))?;
        if num_events > 0 {
            on_read.on_read(now, self.last_token, num_events);
            // Several chunks of one read have the same time.
            self.num_reads += u32::from(self.last_token != Some(now));
            self.num_events += num_events;
            self.first_token.get_or_insert(now);
            self.last_token = Some(now);
        }
        Ok(())
    }

    fn answer(self, sent: Instant) -> Result<Answer, Failed> {
        if let Some(message) = self.error {
            return Err(Failed::Stream(message));
        }
        if !self.is_finished {
            return Err(Failed::CutOff("the stream has no end".into()));
        }
        let (Some(first_token), Some(last_token)) = (self.first_token, self.last_token) else {
            return Err(Failed::CutOff("the answer has no token".into()));
        };
        let Self { num_events, num_reads, usage, .. } = self;
        Ok(Answer { sent, first_token, last_token, num_events, num_reads, usage })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::TcpListener;

    use super::*;

    const HEAD: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    const TOKEN: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
    const LAST: &str = "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"length\"}]}\n\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":2}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    fn chunk(text: &str) -> String {
        format!("{:x}\r\n{text}\r\n", text.len())
    }

    /// A server that answers each connection with the next of `answers`, then closes it.
    async fn serve(answers: Vec<Vec<String>>) -> Target {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for pieces in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 4096];
                let _ = stream.read(&mut request).await.unwrap();
                for piece in pieces {
                    stream.write_all(piece.as_bytes()).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            }
        });
        Target::new(&url, None).unwrap()
    }

    async fn answer_to(pieces: &[String]) -> Result<Answer, Failed> {
        serve(vec![pieces.to_vec()]).await.stream("/v1/completions", b"{}", &()).await
    }

    #[tokio::test]
    async fn a_stream_is_timed_and_counted() {
        let pieces =
            [HEAD.to_owned(), chunk(TOKEN), chunk(&[LAST, USAGE, DONE].concat()), "0\r\n\r\n".into()];
        let answer = answer_to(&pieces).await.unwrap();
        assert_eq!((answer.num_events, answer.num_reads), (2, 2));
        assert_eq!(answer.usage, Some(Usage { prompt_tokens: 4, completion_tokens: 2 }));
        assert!(answer.first_token - answer.sent >= Duration::from_millis(25));
        assert!(answer.last_token - answer.first_token >= Duration::from_millis(25));
    }

    #[tokio::test]
    async fn coalesced_events_are_one_read() {
        let all = [HEAD, &chunk(&[TOKEN, TOKEN].concat()), &chunk(LAST), &chunk(DONE), "0\r\n\r\n"].concat();
        let answer = answer_to(&[all]).await.unwrap();
        assert_eq!((answer.num_events, answer.num_reads, answer.usage), (3, 1, None));
    }

    #[tokio::test]
    async fn what_is_not_a_whole_answer_has_failed() {
        let end = "0\r\n\r\n".to_owned();
        let refused = "HTTP/1.1 429 Busy\r\nretry-after: 1\r\ncontent-length: 2\r\n\r\n{}".to_owned();
        let error =
            "HTTP/1.1 400 Bad\r\ncontent-length: 32\r\n\r\n{\"error\":{\"message\":\"too long\"}}".to_owned();
        let late = chunk("data: {\"error\":{\"message\":\"too late\"}}\n\n");
        let cases = [
            (vec![HEAD.into(), chunk(TOKEN)], "cut-off"),
            (vec![HEAD.into(), chunk(TOKEN), end.clone()], "cut-off"),
            (vec![HEAD.into(), chunk(DONE), end.clone()], "cut-off"),
            (vec![HEAD.into(), chunk(TOKEN), late, end], "stream-error"),
            (vec![refused], "rejected"),
            (vec![error], "status-400"),
            (vec!["SSH-2.0-x\r\n\r\n".into()], "garbled"),
            (vec![HEAD.into(), "zz\r\n".into()], "garbled"),
            (vec![], "cut-off"),
        ];
        for (pieces, slug) in cases {
            assert_eq!(answer_to(&pieces).await.unwrap_err().slug(), slug, "{pieces:?}");
        }
        let nobody = Target::new("http://127.0.0.1:1", None).unwrap();
        assert_eq!(nobody.stream("/", b"", &()).await.unwrap_err().slug(), "connect");
    }

    #[tokio::test]
    async fn connections_are_used_again_unless_they_are_closed() {
        let whole = |text: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        let target = serve(vec![vec![whole("1")], vec![whole("2")]]).await;
        assert_eq!(target.ask("GET", "/", b"").await.unwrap(), 1);
        assert_eq!(target.idle().len(), 1);
        // The server closes it in the meantime.
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(target.ask("GET", "/", b"").await.unwrap(), 2);
    }

    #[test]
    fn urls() {
        let target = Target::new("http://127.0.0.1:9000/v1/", Some("k")).unwrap();
        assert_eq!((target.host.as_str(), target.prefix.as_str()), ("127.0.0.1:9000", ""));
        let request = String::from_utf8(target.request("POST", "/v1/completions", b"{}")).unwrap();
        assert!(
            request.starts_with("POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:9000\r\n"),
            "{request}"
        );
        assert!(request.contains("\r\nauthorization: Bearer k\r\n") && request.ends_with("\r\n\r\n{}"));
        assert_eq!(Target::new("http://127.0.0.1/proxy", None).unwrap().prefix, "/proxy");
        for bad in ["127.0.0.1:8000", "https://127.0.0.1", "http://"] {
            assert!(Target::new(bad, None).unwrap_err().to_string().contains("--base-url"), "{bad}");
        }
        assert!(Target::new("http://127.0.0.1", Some("a\r\nb")).is_err());
    }
}
