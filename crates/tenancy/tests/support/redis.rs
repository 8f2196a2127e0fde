//! A real redis-server of a test's own, on a free port of the loopback interface.
#![allow(dead_code, clippy::print_stdout)] // no test binary needs all of it; a test that skips says so

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Ends with the value.
pub struct RedisServer {
    child: Child,
    port: u16,
}

impl RedisServer {
    /// Starts one. `None`, and why on standard output, where redis-server is not installed; CI insists on it by
    /// `QUIRE_REQUIRE_REDIS`.
    pub fn start() -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Self::start_on(port);
        if server.is_none() {
            assert!(std::env::var_os("QUIRE_REQUIRE_REDIS").is_none(), "redis-server is not installed");
            println!("skipped: redis-server is not installed (apt-get install redis-server)");
        }
        server
    }

    pub fn start_on(port: u16) -> Option<Self> {
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .spawn()
            .ok()?;
        let server = Self { child, port };
        for _ in 0..1000 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Some(server);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("redis-server does not listen");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Patient: what these tests count must not depend on how busy the machine is.
    pub fn url(&self) -> String {
        format!("{}?timeout_ms=10000", self.hasty_url())
    }

    /// With the timeout that operators get.
    pub fn hasty_url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Stops answering without closing connections, and goes on.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
