//! What an open stream holds: heap of the whole process, engine and connection included.

#![allow(clippy::unwrap_used, reason = "a test helper that fails is a test that fails")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicIsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::net::TcpListener;

use crate::harness::{Server, Setup, eventually};

#[allow(dead_code, reason = "shared with other tests")]
mod harness;

/// Bytes of one stream at most. Two buffers of 8 KiB are hyper's, and most of those is never touched: resident memory is less
/// (docs/performance.md).
const MAX_BYTES: isize = 24 << 10;
const NUM_STREAMS: u32 = 64;

/// Allocations are counted apart by size, in steps of this, up to [`LARGE`].
const STEP: usize = 64;
const LARGE: usize = 16 << 10;

struct Counting;

/// Live allocations by size.
static LIVE: [AtomicIsize; LARGE / STEP] = [const { AtomicIsize::new(0) }; LARGE / STEP];
static LIVE_BYTES: AtomicIsize = AtomicIsize::new(0);

fn count(size: usize, sign: isize) {
    LIVE_BYTES.fetch_add(sign * size as isize, Ordering::Relaxed);
    LIVE[(size / STEP).min(LARGE / STEP - 1)].fetch_add(sign, Ordering::Relaxed);
}

// SAFETY: every call is passed on unchanged to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn live() -> (isize, Vec<isize>) {
    let sizes = LIVE.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    (LIVE_BYTES.load(Ordering::Relaxed), sizes)
}

/// A stream that has begun, over a socket that the kernel alone pays for.
fn open(address: SocketAddr) -> TcpStream {
    let body =
        json!({ "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": true, "stream": true }).to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json";
    write!(stream, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut begin = [0; 1024];
    let mut end = 0;
    while !String::from_utf8_lossy(&begin[..end]).contains("data: ") {
        end += stream.read(&mut begin[end..]).unwrap();
    }
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_stream_holds_little() {
    let setup = Setup {
        step: Duration::from_millis(40),
        max_num_seqs: 2 * NUM_STREAMS,
        num_blocks: 8192,
        ..Setup::default()
    };
    let server = Server::start(&setup);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(quire_http::serve(listener, server.state.clone(), std::future::pending()));
    let open_all = move || (0..NUM_STREAMS).map(|_| open(address)).collect::<Vec<_>>();
    // Tables grow to what so many need, and stay.
    drop(tokio::task::spawn_blocking(open_all).await.unwrap());
    server.wait_idle().await;
    let engine = server.llm.engine().clone();
    let streams = tokio::task::spawn_blocking(open_all).await.unwrap();
    eventually("all stream", || engine.snapshot().num_running == NUM_STREAMS).await;
    let (open, sizes_open) = live();
    drop(streams);
    server.wait_idle().await;
    // Connections notice their end by themselves. What is left then is not the streams': samples of metrics, which grow
    // with every token until they are summed up.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (closed, sizes_closed) = live();
    let per_stream = (open - closed) / NUM_STREAMS as isize;
    println!("{per_stream} bytes a stream; allocations a stream, by size:");
    for (at, (open, closed)) in sizes_open.iter().zip(sizes_closed).enumerate() {
        let count = (open - closed) as f64 / f64::from(NUM_STREAMS);
        if count.abs() > 0.2 {
            println!("{:>6} bytes: {count:.1}", at * STEP);
        }
    }
    assert!(per_stream <= MAX_BYTES, "{per_stream} bytes of heap a stream");
}
