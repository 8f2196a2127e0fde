"""Servers as child processes: started, waited for, and ended. Loopback alone."""

import http.client
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from cases import Job, Skip
from child import confined, end, last_words

READY_TIMEOUT_S = 600
POLL_S = 0.01


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A running server. A context manager: at its end the process is gone."""

    def __init__(self, peer, job: Job, env: Mapping[str, str], log: Path) -> None:
        self.port, self.log, self.health = free_port(), log, peer.HEALTH
        self.begin = time.perf_counter()
        self.process = confined(peer.serve(job, self.port), job.cores, env, log, stdin=subprocess.DEVNULL)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_error) -> None:
        end(self.process)

    def ready(self) -> float:
        """Waits until the server says that it is ready; seconds since its start."""
        while time.perf_counter() - self.begin < READY_TIMEOUT_S:
            if self.process.poll() is not None:
                raise Skip(f"the server ended with status {self.process.returncode}: {last_words(self.log)}")
            if self._healthy():
                return time.perf_counter() - self.begin
            time.sleep(POLL_S)
        raise Skip(f"the server was not ready within {READY_TIMEOUT_S} s")

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self.health)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
