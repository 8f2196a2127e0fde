"""Loads for engines that run in this process one step at a time: the same clockwork for each of them.

Such an engine has `add(id, prompt, output_len)`, and `step()`, which computes one step and says how many tokens each
request got: {id: tokens}. Requests run to their output length.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

import models
from cases import REPEATS, WARMUP_STEPS, Case
from stats import median


class Stepped(Protocol):
    """What an engine must be able to do."""

    vocab_size: int

    def add(self, request: int, prompt: list[int], output_len: int) -> None: ...

    def step(self) -> dict[int, int]: ...


def run(engine: Stepped, case: Case) -> float:
    """Tokens per second."""
    prompts = models.prompts(case.batch, case.length, engine.vocab_size)
    if case.kind == "prefill":
        rates = [_prefill(engine, prompts[0]) for _ in range(1 + REPEATS)]
        return median(rates[1:])
    return _decode(engine, case, prompts)


def _prefill(engine: Stepped, prompt: list[int]) -> float:
    begin = time.perf_counter()
    engine.add(0, prompt, 1)
    while not engine.step().get(0):
        pass
    return len(prompt) / (time.perf_counter() - begin)


def _decode(engine: Stepped, case: Case, prompts: list[list[int]]) -> float:
    """Counts only steps in which every sequence decodes, and none computes its prompt."""
    left = [case.output_len] * case.batch
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, case.output_len)
    times: list[float] = []
    while any(left):
        all_decode = all(0 < tokens < case.output_len for tokens in left)
        begin = time.perf_counter()
        given = engine.step()
        elapsed = time.perf_counter() - begin
        for index, tokens in given.items():
            left[index] -= tokens
        if all_decode and all(given.get(index) == 1 for index in range(case.batch)):
            times.append(elapsed)
    counted = times[WARMUP_STEPS : WARMUP_STEPS + case.steps]
    if len(counted) < case.steps:
        raise RuntimeError(f"only {len(counted)} of {case.steps} steps had all {case.batch} sequences decoding")
    return case.batch * case.steps / sum(counted)


@dataclass
class Record:
    """One request: when it was sent and when its tokens came, in seconds."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    """One entry for each piece that came."""
    num_tokens: int = 0


def trace(engine: Stepped, requests: list[list[int]], clients: int) -> list[Record]:
    """A closed loop in process: `clients` requests run, and the end of one lets the next one in.

    `requests` are pairs of a prompt's and an output's length.
    """
    waiting = list(enumerate(requests))
    records: dict[int, Record] = {}
    left: dict[int, int] = {}
    prompts = models.prompts(1, sum(length for length, _ in requests), engine.vocab_size)[0]
    offset = 0
    while waiting or left:
        while waiting and len(left) < clients:
            index, (length, output_len) = waiting.pop(0)
            records[index] = Record(time.perf_counter())
            left[index] = output_len
            engine.add(index, prompts[offset : offset + length], output_len)
            offset += length
        given = engine.step()
        now = time.perf_counter()
        for index, tokens in given.items():
            if not tokens:
                continue
            records[index].tokens.append(now)
            records[index].num_tokens += tokens
            left[index] -= tokens
            if left[index] <= 0:
                del left[index]
    return [records[index] for index in sorted(records)]
