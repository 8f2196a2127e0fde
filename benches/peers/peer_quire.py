"""Quire itself: `quire bench latency`, and `quire serve` for the trace. No environment; the binary is the user's."""

import json
import subprocess
from pathlib import Path

from cases import REPEATS, Case, Job, Setting

NAME = "quire"
TITLE = "Quire"
REQUIREMENTS: tuple[str, ...] = ()
CACHES = (Setting("default"), Setting("int8 cache", {"kv_cache_dtype": "int8"}))
"""The KV cache in bf16, and in 8 bits as OpenVINO's is by default."""
SETTINGS = {precision: CACHES for precision in ("bf16", "int8", "int4")}
LACKS: dict[str, str] = {}
HEALTH = "/health"
EXTRA_FIELDS: dict = {}


def environment(_job: Job) -> dict[str, str]:
    """Nothing special."""
    return {}


def prepare(job: Job) -> Path:
    """The checkpoint as it is."""
    return job.model.path


def _options(job: Job) -> list[str]:
    precision = [] if job.precision == "bf16" else ["--quantize", job.precision]
    cache = [f"--{name.replace('_', '-')}={value}" for name, value in job.setting.options.items()]
    return ["--threads", str(job.threads), *precision, *cache, *job.quire_args]


def serve(job: Job, port: int) -> list[str]:
    """HTTP on `port`, gRPC on any."""
    command = [job.quire, "serve", str(job.model.path), "--port", str(port), "--grpc-port", "0"]
    return [*command, "--served-model-name", "model", "--no-prefix-cache", *_options(job)]


def bench(job: Job, case: Case) -> list[str]:
    """The command of one case. Prefill is timed at the smallest batch size: a size of 1 beside the wanted one keeps the
    part that is thrown away short. The first of the generated tokens belongs to the prompt."""
    batches = str(case.batch) if case.batch == 1 else f"1,{case.batch}"
    command = [job.quire, "bench", "latency", str(job.model.path), "--json", "--batch-size", batches]
    command += ["--input-len", str(case.length), "--output-len", str(max(case.steps + 1, 2))]
    repeats = REPEATS if case.kind == "prefill" else 1
    return [*command, "--num-iters-warmup", "1", "--num-iters", str(repeats), *_options(job)]


def rate(report: dict, case: Case) -> float:
    """Tokens per second of `case` in what `quire bench latency --json` printed."""
    what, size = ("prefill_tok_s", case.length) if case.kind == "prefill" else ("decode_tok_s", case.batch)
    for row in report["rows"]:
        parts = row["name"].split("/")
        if parts[0] == what and parts[2] == str(size):
            return row["value"]
    raise RuntimeError(f"quire bench printed no {what} row for {size}")


class Engine:
    """A process for each case."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def run(self, case: Case) -> float:
        done = subprocess.run(bench(self.job, case), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or f"quire ended with status {done.returncode}")
        return rate(json.loads(done.stdout), case)
