"""The server's load: 64 requests from 32 clients in a closed loop, streamed over HTTP, and what the clients see."""

import http.client
import json
import queue
import random
import threading
import time
from collections.abc import Sequence

import models
from stats import percentile
from stepped import Record

CLIENTS = 32
REQUESTS = 64
PROMPT_RANGE, PROMPT_TOTAL = (64, 1024), 32_217
OUTPUT_RANGE, OUTPUT_TOTAL = (64, 256), 11_175
REQUEST_TIMEOUT_S = 600


def lengths(count: int, low: int, high: int, total: int, seed: int) -> list[int]:
    """`count` random lengths from `low` to `high` that add up to `total`."""
    if not count * low <= total <= count * high:
        raise ValueError(f"{count} lengths from {low} to {high} cannot add up to {total}")
    rng = random.Random(seed)
    values = [rng.randint(low, high) for _ in range(count)]
    while (missing := total - sum(values)) != 0:
        index = rng.randrange(count)
        values[index] = min(max(values[index] + missing, low), high)
    return values


def trace() -> list[tuple[int, int]]:
    """Prompt and output length of each request, the same every time."""
    prompt = lengths(REQUESTS, *PROMPT_RANGE, PROMPT_TOTAL, seed=1)
    output = lengths(REQUESTS, *OUTPUT_RANGE, OUTPUT_TOTAL, seed=2)
    return list(zip(prompt, output, strict=True))


def stream(port: int, fields: dict) -> Record:
    """One request, on a connection of its own: some servers close those that wait."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    body = fields | {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    record = Record(time.perf_counter())
    try:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(500).decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if event.get("error"):
                raise RuntimeError(str(event["error"]))
            # The last event has the usage; one with an empty text brings no token that the user sees.
            if any(choice.get("text") for choice in event.get("choices", ())):
                record.tokens.append(time.perf_counter())
            if usage := event.get("usage"):
                record.num_tokens = usage["completion_tokens"]
    finally:
        connection.close()
    if not record.tokens:
        raise RuntimeError("a request was answered without a token")
    record.num_tokens = record.num_tokens or len(record.tokens)
    return record


def run(port: int, vocab_size: int, extra_fields: dict, requests: Sequence[tuple[int, int]]) -> list[Record]:
    """Sends `requests` from CLIENTS threads, each of which has one on its way at a time. RuntimeError if one fails."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    prompts = models.prompts(1, sum(length for length, _ in requests), vocab_size)[0]
    for length, output_len in requests:
        waiting.put((prompts[:length], output_len))
        prompts = prompts[length:]
    records: list[Record] = []
    failures: list[Exception] = []

    def client() -> None:
        while not failures:
            try:
                prompt, output_len = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                fields = {"model": "model", "prompt": prompt, "max_tokens": output_len}
                records.append(stream(port, fields | extra_fields))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(str(failures[0]) or type(failures[0]).__name__)
    return records


def summary(records: Sequence[Record]) -> dict[str, tuple[float, str]]:
    """Rows of the table: output tokens per second, time to the first token, time between pieces; value and unit."""
    begin = min(record.sent for record in records)
    end = max(record.tokens[-1] for record in records)
    first = [record.tokens[0] - record.sent for record in records]
    gaps = [later - earlier for r in records for earlier, later in zip(r.tokens, r.tokens[1:], strict=False)] or [0.0]
    rows = {"server output": (sum(record.num_tokens for record in records) / (end - begin), "tok/s")}
    rows |= {f"server TTFT p{share}": (percentile(first, share / 100), "s") for share in (50, 99)}
    return rows | {f"server ITL p{share}": (percentile(gaps, share / 100), "s") for share in (50, 90, 99)}
