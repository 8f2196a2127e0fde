//! A real redis-server of a test's own, on a free port of the loopback interface.
#![allow(dead_code, clippy::print_stdout)] // no test binary needs all of it; a test that skips says so

use std::io::{Read, Write};
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
        // A port that was free may be taken by another test before this server has it.
        for _ in 0..10 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let Some(mut server) = Self::spawn(port) else {
                assert!(std::env::var_os("QUIRE_REQUIRE_REDIS").is_none(), "redis-server is not installed");
                println!("skipped: redis-server is not installed (apt-get install redis-server)");
                return None;
            };
            if server.comes_up() {
                return Some(server);
            }
        }
        panic!("redis-server finds no free port");
    }

    pub fn start_on(port: u16) -> Option<Self> {
        let mut server = Self::spawn(port)?;
        assert!(server.comes_up(), "redis-server does not listen on port {port}");
        Some(server)
    }

    fn spawn(port: u16) -> Option<Self> {
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .spawn()
            .ok()?;
        Some(Self { child, port })
    }

    /// Whether it, and nobody else, answers on its port.
    fn comes_up(&mut self) -> bool {
        for _ in 0..1000 {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if self.process_id() == Some(self.child.id()) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("redis-server does not answer");
    }

    /// Of the server on the port.
    fn process_id(&self) -> Option<u32> {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        connection.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        connection.write_all(b"INFO server\r\nQUIT\r\n").ok()?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).ok()?;
        answer.lines().find_map(|line| line.strip_prefix("process_id:")?.trim().parse().ok())
    }

    /// The raw answer to an inline command.
    pub fn command(&self, command: &str) -> String {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        connection.write_all(format!("{command}\r\nQUIT\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
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
