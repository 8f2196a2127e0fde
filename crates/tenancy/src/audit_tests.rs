use super::*;
use crate::{Demand, Keys, Tenancy};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("quire-audit-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn log(&self) -> PathBuf {
        self.0.join("audit.jsonl")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn lines(path: &PathBuf) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

async fn begin(log: &AuditLog, id: &str) -> Trail {
    let trail = log.begin("http", || "POST /x".into(), Some([127, 0, 0, 1].into())).await;
    trail.named(id);
    trail
}

#[tokio::test]
async fn a_record_is_written_with_the_last_clone_and_tells_all_but_the_key() {
    let folder = Folder::new("record");
    let log = AuditLog::open(AuditTarget::File(folder.log()), OnFull::Block).unwrap();
    let tenancy = Tenancy::from(Keys::new(["sk-canary"]).unwrap());
    let trail = begin(&log, "id-1").await;
    let access = tenancy.authenticate(Some("sk-canary"), None).unwrap().with_trail(trail.clone());
    trail.by(&access);
    trail.asks("m", || "abc".into());
    let mut demand = Demand::default();
    demand.add(7, 1, 9);
    let permit = tenancy.admit(&access, demand).await.unwrap();
    let mut meter = permit.meter(7, 1);
    meter.started(4);
    trail.answered(Answer::Http(200), None);
    drop((trail, access, permit));
    log.flush().await;
    assert_eq!(lines(&folder.log()), [] as [Value; 0], "it still runs");
    meter.ended(5, FinishReason::Length);
    drop(meter);
    log.flush().await;
    let [line] = &lines(&folder.log())[..] else { panic!("one line") };
    for (field, expected) in [
        ("request_id", "id-1"),
        ("tenant", "default"),
        ("key", "api-key"),
        ("ip", "127.0.0.1"),
        ("protocol", "http"),
        ("route", "POST /x"),
        ("model", "m"),
        // printf %s abc | sha256sum
        ("params_sha256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ("finish_reason", "length"),
    ] {
        assert_eq!(line[field], expected, "{field} of {line}");
    }
    assert_eq!([&line["prompt_tokens"], &line["cached_tokens"], &line["completion_tokens"]], [7, 4, 5]);
    assert_eq!((&line["status"], &line["error"]), (&Value::from(200), &Value::Null));
    assert!(line["time"].as_str().unwrap().ends_with('Z') && line["duration_ms"].is_u64(), "{line}");
    assert!(!line.to_string().contains("canary"), "{line}");
}

#[tokio::test]
async fn a_file_that_was_moved_away_is_made_again() {
    let folder = Folder::new("reopen");
    let log = AuditLog::open(AuditTarget::File(folder.log()), OnFull::Drop).unwrap();
    drop(begin(&log, "one").await);
    log.flush().await;
    let moved = folder.0.join("audit.jsonl.1");
    std::fs::rename(folder.log(), &moved).unwrap();
    drop(begin(&log, "two").await);
    log.reopen().await;
    drop(begin(&log, "three").await);
    log.flush().await;
    let ids = |path: &PathBuf| -> Vec<String> {
        lines(path).iter().map(|line| line["request_id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!((ids(&moved), ids(&folder.log())), (vec!["one".into(), "two".into()], vec!["three".into()]));
}

/// A pipe that nobody reads holds the writer up.
#[cfg(unix)]
#[tokio::test]
async fn a_full_queue_blocks_or_drops() {
    let folder = Folder::new("full");
    for on_full in [OnFull::Block, OnFull::Drop] {
        let path = folder.0.join(format!("{on_full:?}"));
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        // Both ends, so that opening waits for nobody.
        let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let log = AuditLog::with_capacity(AuditTarget::File(path), on_full, 4).unwrap();
        let long = "x".repeat(100_000);
        // More than a pipe holds: the writer is stuck with it.
        drop(begin(&log, &long).await);
        let hasty = Duration::from_millis(200);
        let mut trails = Vec::new();
        let mut num_blocked = 0;
        for at in 0..12 {
            match tokio::time::timeout(hasty, begin(&log, &format!("id-{at}"))).await {
                Ok(trail) => trails.push(trail),
                Err(_) => {
                    num_blocked += 1;
                    break;
                }
            }
        }
        match on_full {
            OnFull::Block => assert!(num_blocked == 1 && trails.len() <= 5, "{} went on", trails.len()),
            OnFull::Drop => assert_eq!((num_blocked, trails.len()), (0, 12)),
        }
        let num_trails = trails.len();
        drop(trails);
        let reading = std::thread::spawn(move || {
            let mut text = Vec::new();
            let mut piece = vec![0; 1 << 16];
            while !text.ends_with(b"the end\n") {
                let len = std::io::Read::read(&mut reader, &mut piece).unwrap();
                text.extend_from_slice(&piece[..len]);
            }
            String::from_utf8(text).unwrap()
        });
        log.flush().await;
        let mut end =
            std::fs::OpenOptions::new().write(true).open(folder.0.join(format!("{on_full:?}"))).unwrap();
        std::io::Write::write_all(&mut end, b"the end\n").unwrap();
        let text = reading.join().unwrap();
        let written = text.matches("\"id-").count();
        match on_full {
            OnFull::Block => assert_eq!(written, num_trails, "none is lost"),
            OnFull::Drop => assert!(written <= 5, "{written} of {num_trails} fit into the queue"),
        }
    }
}

#[tokio::test]
async fn without_a_log_nothing_is_kept() {
    let log = AuditLog::default();
    let trail = log.begin("http", || unreachable!("nobody asks for the route"), None).await;
    trail.asks("m", || unreachable!("nobody asks for the parameters"));
    log.flush().await;
}
