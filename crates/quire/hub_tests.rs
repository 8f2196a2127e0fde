//! Downloads from a hub on loopback that speaks just enough of the protocol: file list, redirects, ranges, tokens.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::*;

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// What was asked.
struct Asked {
    path: String,
    token: Option<String>,
    range: Option<String>,
}

type Log = Mutex<Vec<Asked>>;

/// A hub with one repository `org/name`.
struct FakeHub {
    endpoint: String,
    log: Arc<Log>,
}

#[derive(Clone)]
struct Repository {
    files: HashMap<String, Vec<u8>>,
    /// Needed to see anything.
    token: Option<String>,
}

impl FakeHub {
    fn start(repository: Repository) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let shared = Arc::clone(&log);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (repository, log) = (repository.clone(), Arc::clone(&shared));
                std::thread::spawn(move || serve_connection(&stream, &repository, &log));
            }
        });
        Self { endpoint, log }
    }

    fn paths(&self) -> Vec<String> {
        self.log.lock().unwrap().iter().map(|asked| asked.path.clone()).collect()
    }
}

fn serve_connection(mut stream: &TcpStream, repository: &Repository, log: &Log) {
    let mut lines = BufReader::new(stream).lines();
    while let Some(Ok(request)) = lines.next() {
        let mut headers = HashMap::new();
        for line in lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(':').unwrap();
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let path = request.split(' ').nth(1).unwrap().to_owned();
        let token = headers.get("authorization").cloned();
        let range = headers.get("range").cloned();
        log.lock().unwrap().push(Asked { path: path.clone(), token: token.clone(), range: range.clone() });
        let allowed =
            repository.token.as_ref().is_none_or(|wanted| token == Some(format!("Bearer {wanted}")));
        let (status, extra, body) = match allowed {
            true => answer(&path, range.as_deref(), repository),
            false => (401, String::new(), Vec::new()),
        };
        let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n{extra}\r\n", body.len());
        if stream.write_all(&[head.as_bytes(), &body].concat()).is_err() {
            return;
        }
    }
}

fn answer(path: &str, range: Option<&str>, repository: &Repository) -> (u16, String, Vec<u8>) {
    if path == "/api/models/org/name/revision/main" {
        let mut names: Vec<&String> = repository.files.keys().collect();
        names.sort();
        let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let info = serde_json::json!({ "sha": SHA, "siblings": siblings });
        return (200, String::new(), info.to_string().into_bytes());
    }
    // The real hub redirects large files to another host; the headers about the repository are on the redirect.
    let (file, redirected) = match path.strip_prefix(&format!("/org/name/resolve/{SHA}/")) {
        Some(file) => (file, false),
        None => (path.strip_prefix("/cdn/").unwrap_or_default(), true),
    };
    let Some(content) = repository.files.get(file) else { return (404, String::new(), Vec::new()) };
    let mut extra = format!("x-repo-commit: {SHA}\r\netag: \"tag-of-{file}\"\r\n");
    if file.ends_with(".safetensors") && !redirected {
        let _ = write!(extra, "location: /cdn/{file}\r\n");
        return (302, extra, Vec::new());
    }
    let (first, last) =
        range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')).unwrap_or(("0", ""));
    let first: usize = first.parse().unwrap();
    let last = last.parse().map_or(content.len() - 1, |last: usize| last.min(content.len() - 1));
    let _ = write!(extra, "content-range: bytes {first}-{last}/{}\r\n", content.len());
    (206, extra, content[first..=last].to_vec())
}

fn files(names: &[(&str, &str)]) -> HashMap<String, Vec<u8>> {
    names.iter().map(|&(name, content)| (name.to_owned(), content.as_bytes().to_vec())).collect()
}

fn sharded() -> HashMap<String, Vec<u8>> {
    files(&[
        ("config.json", "{}"),
        ("tokenizer.json", "{\"t\": 1}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("README.md", "not needed"),
        ("pytorch_model.bin", "refused"),
        ("consolidated.safetensors", "the same weights once more"),
        ("onnx/config.json", "elsewhere"),
        ("../evil.safetensors", "outside"),
        ("model-00001-of-00002.safetensors", "first shard"),
        ("model-00002-of-00002.safetensors", "second shard"),
        (
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
                "c": "model-00001-of-00002.safetensors"}}"#,
        ),
    ])
}

/// A configuration with an empty cache, removed when dropped.
struct Client(HubConfig);

impl Client {
    fn new(name: &str, endpoint: &str) -> Self {
        let cache = std::env::temp_dir().join(format!("quire-hub-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&cache);
        std::fs::create_dir_all(&cache).unwrap();
        Self(HubConfig { endpoint: endpoint.into(), cache, token: None, offline: false, progress: false })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0.cache);
    }
}

fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = directory
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn downloads_what_is_needed_and_only_once() {
    let hub = FakeHub::start(Repository { files: sharded(), token: None });
    let mut client = Client::new("sharded", &format!("{}/", hub.endpoint));
    let directory = client.0.fetch("org/name", true).unwrap();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names_in(&directory), expected);
    assert_eq!(std::fs::read(directory.join("model-00002-of-00002.safetensors")).unwrap(), b"second shard");

    let before = hub.paths().len();
    assert_eq!(client.0.fetch("org/name", true).unwrap(), directory);
    let again = hub.paths()[before..].to_vec();
    assert_eq!(again, ["/api/models/org/name/revision/main"], "nothing is downloaded twice");

    client.0.endpoint = "http://127.0.0.1:1".into();
    assert_eq!(client.0.fetch("org/name", true).unwrap(), directory, "the hub is gone, the copy is used");
    client.0.offline = true;
    assert_eq!(client.0.fetch("org/name", true).unwrap(), directory);
    let error = client.0.fetch("org/other", true).unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
}

#[test]
fn goes_on_where_a_download_stopped() {
    let hub = FakeHub::start(Repository { files: sharded(), token: None });
    let client = Client::new("resume", &hub.endpoint);
    let blobs = client.0.cache.join("models--org--name/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    // The name is the crate's own: the blob's, with its extension replaced.
    std::fs::write(blobs.join("tag-of-model-00001-of-00002.part"), b"first").unwrap();
    let directory = client.0.fetch("org/name", true).unwrap();
    assert_eq!(std::fs::read(directory.join("model-00001-of-00002.safetensors")).unwrap(), b"first shard");
    let log = hub.log.lock().unwrap();
    let ranges: Vec<_> =
        log.iter().filter(|asked| asked.path.ends_with("00001-of-00002.safetensors")).collect();
    assert!(
        ranges.iter().any(|asked| asked.range.as_deref() == Some("bytes=5-")),
        "five bytes were there already"
    );
    assert!(!ranges.iter().any(|asked| asked.range.as_deref() == Some("bytes=0-")));
}

#[test]
fn weights_can_be_left_out() {
    let hub = FakeHub::start(Repository { files: sharded(), token: None });
    let client = Client::new("config", &hub.endpoint);
    let directory = client.0.fetch("org/name", false).unwrap();
    assert_eq!(names_in(&directory), ["chat_template.jinja", "config.json", "tokenizer.json"]);
}

#[test]
fn tokens_open_gated_models() {
    let hub = FakeHub::start(Repository { files: sharded(), token: Some("secret".into()) });
    let mut client = Client::new("gated", &hub.endpoint);
    let error = client.0.fetch("org/name", true).unwrap_err();
    assert!(matches!(error, HubError::Refused { status: 401, .. }), "{error}");
    assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    client.0.token = Some("secret".into());
    client.0.fetch("org/name", true).unwrap();
    assert!(hub.log.lock().unwrap().iter().any(|asked| asked.token.as_deref() == Some("Bearer secret")));
}

#[test]
fn unknown_and_unusable_repositories_say_why() {
    let error = |name: &str, id: &str, files: HashMap<String, Vec<u8>>| {
        let hub = FakeHub::start(Repository { files, token: None });
        Client::new(name, &hub.endpoint).0.fetch(id, true).unwrap_err().to_string()
    };
    let unknown = error("unknown", "org/unknown", sharded());
    assert!(unknown.contains("org/unknown") && unknown.contains("404"), "{unknown}");
    let pickles = error("pickles", "org/name", files(&[("config.json", "{}"), ("pytorch_model.bin", "x")]));
    assert!(pickles.contains("pickles"), "{pickles}");
    let gguf = error("gguf", "org/name", files(&[("model.Q4_0.GGUF", "x")]));
    assert!(gguf.contains("GGUF"), "{gguf}");
    let missing = files(&[("config.json", "{}"), (INDEX, r#"{"weight_map": {"a": "../../etc/passwd"}}"#)]);
    let missing = error("missing", "org/name", missing);
    assert!(missing.contains("../../etc/passwd"), "{missing}");
}

#[test]
fn ids() {
    for id in ["Qwen/Qwen3-0.6B", "a/b@main", "a/b@refs/pr/1", "HuggingFaceTB/SmolLM2-135M-Instruct"] {
        assert!(is_repo_id(id), "{id}");
    }
    for id in ["gpt2", "a/b/c", "a/", "/b", "a/..", "a/b@", "a b/c", "a/b@../x", "http://a/b", ""] {
        assert!(!is_repo_id(id), "{id}");
    }
}
