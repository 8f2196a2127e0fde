//! The server under load, as a process: started for the run if there is none, and its CPU time.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Failure, Result};

/// A server that was asked to end has no stream to finish.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Clock ticks per second in `/proc/PID/stat`: 100 on every architecture Linux runs on today.
const TICKS_PER_SECOND: f64 = 100.0;

/// A `quire serve` of this program on a free port; ended when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
    pub(crate) grpc_url: String,
}

impl Server {
    /// Starts it with `args`, and returns when it is ready.
    pub(crate) fn start(args: &[OsString], api_key: Option<&str>) -> Result<Self> {
        let fail = |error: std::io::Error| Failure(format!("cannot start the server: {error}"));
        let mut command = Command::new(std::env::current_exe().map_err(fail)?);
        // What comes later wins: the user may choose ports, but not a form in which we cannot find the address.
        command.args(["serve", "--host", "127.0.0.1", "--port", "0", "--grpc-port", "0"]);
        command.args(args).args(["--log-format", "text"]).stdin(Stdio::null()).stdout(Stdio::piped());
        if let Some(key) = api_key {
            command.env("QUIRE_API_KEY", key);
        }
        if std::env::var_os("QUIRE_LOG").is_none() {
            command.env("QUIRE_LOG", "warn");
        }
        let mut child = command.spawn().map_err(fail)?;
        let stdout = child.stdout.take().expect("it is piped");
        let mut server = Self { child, url: String::new(), grpc_url: String::new() };
        let mut lines = BufReader::new(stdout).lines();
        for line in &mut lines {
            let line = line.map_err(fail)?;
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["http", url] => url.clone_into(&mut server.url),
                ["grpc", address] => {
                    server.grpc_url = format!("http://{address}");
                    break;
                }
                _ => {}
            }
        }
        if server.grpc_url.is_empty() {
            let status = server.child.wait().map_err(fail)?;
            return Err(Failure(format!("the server ended before it was ready ({status})")));
        }
        // It must never wait for somebody to read what else it says.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(server)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = self.child.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &pid]).stderr(Stdio::null()).status();
        let deadline = Instant::now() + STOP_TIMEOUT;
        while asked.as_ref().is_ok_and(|status| status.success()) && Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // Either fails only if it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Seconds of CPU time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct CpuTime {
    pub(crate) user: f64,
    /// In the kernel: sockets, mostly.
    pub(crate) system: f64,
}

impl CpuTime {
    /// What a process has used so far, all threads. `None`: no such process, or no `/proc`.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command's name may hold spaces, so fields count from behind its closing parenthesis.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
        let mut seconds = || Some(fields.next()?.parse::<f64>().ok()? / TICKS_PER_SECOND);
        Some(Self { user: seconds()?, system: seconds()? })
    }

    pub(crate) fn total(self) -> f64 {
        self.user + self.system
    }
}

impl std::ops::Sub for CpuTime {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { user: self.user - before.user, system: self.system - before.system }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_that_of_the_process() {
        if !cfg!(target_os = "linux") {
            println!("skipped: /proc is Linux");
            return;
        }
        let pid = std::process::id();
        let before = CpuTime::of(pid).unwrap();
        let mut sum = 0u64;
        // The clock ticks every 10 ms, and other threads of this process count as well.
        while (CpuTime::of(pid).unwrap() - before).total() < 0.05 {
            sum = (0..1_000_000).fold(sum, |sum, i| std::hint::black_box(sum ^ i));
        }
        assert!(CpuTime::of(0).is_none());
    }
}
