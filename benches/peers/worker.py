"""The child process of one engine: runs in the engine's own virtual environment and answers requests on its pipes.

Each line of standard input is a request, each line of standard output its answer, both JSON. Engines print what they
like: everything that they write to standard output goes to standard error, which is the log. The process ends with its
input, and its memory with it.
"""

import importlib
import json
import os
import resource
import sys
import traceback
from dataclasses import asdict

from cases import Case, Job


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def peak_rss_mib() -> int:
    """The largest memory of this process, or of a child that has ended."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024


class Worker:
    """One engine, made by the first request that needs it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.peer = importlib.import_module(job.peer)
        self.engine = None

    def answer(self, request: dict) -> dict:
        """Does what is asked. `open` may take long, as it loads the model."""
        match request["do"]:
            case "prepare":
                return {"path": str(self.peer.prepare(self.job))}
            case "open":
                self.engine = self.peer.Engine(self.job)
                return {}
            case "run":
                return {"value": self.engine.run(Case(**request["case"]))}
            case "trace":
                import stepped

                records = stepped.trace(self.engine, request["requests"], request["clients"])
                return {"records": [asdict(record) for record in records]}
            case other:
                raise ValueError(f"unknown request {other!r}")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(Job.from_json(json.loads(sys.argv[1])))
    for line in sys.stdin:
        before = cpu_seconds()
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip() or type(error).__name__
            answer = {"error": text}
        answer |= {"cpu_seconds": cpu_seconds() - before, "peak_rss_mib": peak_rss_mib()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
