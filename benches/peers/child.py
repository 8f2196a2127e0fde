"""Starting engines as child processes, asking them, and ending them again, whatever happens."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from cases import Job, Skip

HERE = Path(__file__).resolve().parent
GRACE_S = 10
"""How long a process may take to end when asked to, before it is killed."""


def confined(
    command: list[str], cores: tuple[int, ...], env: Mapping[str, str], log: Path, **pipes
) -> subprocess.Popen:
    """Starts `command` in a process group of its own, on `cores` alone. Its standard error is added to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    own = os.sched_getaffinity(0)
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        # A child inherits its parent's cores.
        os.sched_setaffinity(0, cores)
        try:
            return subprocess.Popen(
                command, env=os.environ | dict(env), stderr=file, start_new_session=True, **({"stdout": file} | pipes)
            )
        finally:
            os.sched_setaffinity(0, own)


def end(process: subprocess.Popen) -> None:
    """Ends `process` and whatever it started: its group is its own, so no other process is in it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def last_words(log: Path, lines: int = 3) -> str:
    """The end of a log, on one line, for messages."""
    # Only what the last command said.
    text = log.read_text(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(said[-lines:])[-400:]


class Child:
    """An engine in a worker process. A context manager: at its end the process is gone."""

    def __init__(self, job: Job, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        env = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | dict(env)
        command = [job.python, str(HERE / "worker.py"), json.dumps(job.to_json())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self.process = confined(command, job.cores, env, log, **pipes)
        self.buffer = b""

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_error) -> None:
        self.process.stdin.close()  # the worker ends with its input
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        end(self.process)
        self.process.stdout.close()

    def ask(self, timeout_s: float, **request) -> dict:
        """The answer to one request, or Skip with the reason why there is none."""
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            answer = json.loads(self._line(timeout_s))
        except (BrokenPipeError, EOFError):
            code = self.process.wait()
            raise Skip(f"the process ended with status {code}: {last_words(self.log)}") from None
        if "error" in answer:
            raise Skip(" ".join(answer["error"].split())[:300])
        return answer

    def _line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    end(self.process)  # or its late answer would be taken for that to the next request
                    raise Skip(f"no answer within {timeout_s:.0f} s")
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise EOFError
                self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line
