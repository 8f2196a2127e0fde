"""One visit to one engine: its cases, the server's trace, the time to ready. Failures become reasons."""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import ceiling
import load
import machine
from cases import Case, Job, Skip
from child import Child
from serving import Server
from stepped import Record
from table import Cell

PREPARE_TIMEOUT_S = 3600
OPEN_TIMEOUT_S = 600
CASE_TIMEOUT_S = 900
TRACE_TIMEOUT_S = 1800
WARMUP = [(64, 16)] * 4
"""Prompt and output lengths of requests before those that count."""
SETTLE_S = 5
"""Between those and the ones that count: a server that has been up for some seconds, as most are."""
TRACE_TOKENS = load.CLIENTS * (load.PROMPT_RANGE[1] + load.OUTPUT_RANGE[1])
"""KV cache for as many requests as run at once, all of them the longest."""


def _log(peer: ModuleType, work: Path) -> Path:
    return work / "logs" / f"{peer.NAME}.log"


def prepare(peer: ModuleType, job: Job, work: Path) -> None:
    """Has the model converted."""
    with Child(job, peer.environment(job), _log(peer, work)) as child:
        child.ask(PREPARE_TIMEOUT_S, do="prepare")


def visit(
    peer: ModuleType,
    job: Job,
    chosen: list[Case],
    number: int,
    args: Namespace,
    skips: dict[str, str],
    limits: ceiling.Limits | None = None,
) -> Iterator[list[Cell]]:
    """Everything asked of this engine in round `number`, as it comes. What failed in a round is not tried again."""
    parts = {"load": _cases(peer, job, chosen, number, args.work, skips, limits)} if chosen else {}
    if args.server:
        parts["server"] = _server(peer, job, number, args.work)
    if args.ready:
        parts["ready"] = _ready(peer, job, number, args.work)
    for name, part in parts.items():
        where = f"{_where(peer, job)} {name}"
        if where in skips:
            continue
        try:
            yield from part
        except Skip as skip:
            skips[where] = f"{skip} [round {number}]"


def _where(peer: ModuleType, job: Job) -> str:
    return f"{peer.TITLE} {job.model.name} {job.precision} ({job.setting.name})"


class Watch:
    """Makes cells, and looks at the machine before and after."""

    def __init__(self, peer: ModuleType, job: Job, number: int) -> None:
        self.peer, self.job, self.number = peer, job, number
        self.load, self.others = machine.load(), machine.Others()

    def cells(self, figures: dict[str, tuple[float, str]], cpu_seconds: float, rss_mib: int = 0) -> list[Cell]:
        """A cell for each of `figures`, value and unit by the row's name. Seconds are better when fewer."""
        others, after = self.others.share(cpu_seconds), machine.load()
        common = {"engine": self.peer.TITLE, "setting": self.job.setting.name, "round": self.number}
        common |= {"load_before": self.load, "load_after": after, "others": others, "peak_rss_mib": rss_mib}
        self.load = after
        return [
            Cell((self.job.model.name, name, self.job.precision), value=value, unit=unit, **common)
            for name, (value, unit) in figures.items()
        ]


def _cases(
    peer: ModuleType,
    job: Job,
    chosen: list[Case],
    number: int,
    work: Path,
    skips: dict[str, str],
    limits: ceiling.Limits | None,
) -> Iterator[list[Cell]]:
    """The model is loaded once, and each case runs on it; one that fails does not stop the next."""
    chosen = [case for case in chosen if f"{_where(peer, job)} {case.name}" not in skips]
    if not chosen:
        return
    with Child(job, peer.environment(job), _log(peer, work)) as child:
        child.ask(OPEN_TIMEOUT_S, do="open")
        watch = Watch(peer, job, number)
        for case in chosen:
            try:
                answer = child.ask(CASE_TIMEOUT_S, do="run", case=dataclasses.asdict(case))
            except Skip as skip:
                if child.process.poll() is not None:
                    raise
                skips[f"{_where(peer, job)} {case.name}"] = f"{skip} [round {number}]"
                continue
            figures = {case.name: (answer["value"], "tok/s")}
            found = watch.cells(figures, answer["cpu_seconds"], answer["peak_rss_mib"])
            yield [dataclasses.replace(cell, ceiling=_ceiling(job, case, limits)) for cell in found]


def _ceiling(job: Job, case: Case, limits: ceiling.Limits | None) -> float:
    bits = 8 if job.setting.options.get("kv_cache_dtype") == "int8" else 16
    return ceiling.rate(job.model, case, job.precision, bits, limits) if limits else 0.0


def _server(peer: ModuleType, job: Job, number: int, work: Path) -> Iterator[list[Cell]]:
    """The trace: over HTTP where the engine has a server, in process where it can be stepped, or not at all."""
    requests = load.trace()
    if hasattr(peer, "serve"):
        with Server(peer, job, peer.environment(job), _log(peer, work)) as server:
            server.ready()
            try:
                load.run(server.port, job.model.vocab_size, peer.EXTRA_FIELDS, WARMUP)
                time.sleep(SETTLE_S)
                watch = Watch(peer, job, number)
                before = machine.session_seconds(server.process.pid)
                records = load.run(server.port, job.model.vocab_size, peer.EXTRA_FIELDS, requests)
            except RuntimeError as error:
                raise Skip(str(error)) from None
            used = machine.session_seconds(server.process.pid) - before
            yield watch.cells(load.summary(records), used)
    elif hasattr(peer, "for_trace"):
        job = dataclasses.replace(job, setting=peer.for_trace(job.setting))
        with Child(job, peer.environment(job), _log(peer, work)) as child:
            child.ask(OPEN_TIMEOUT_S, do="open")
            child.ask(TRACE_TIMEOUT_S, do="trace", requests=WARMUP, clients=load.CLIENTS)
            watch = Watch(peer, job, number)
            answer = child.ask(TRACE_TIMEOUT_S, do="trace", requests=requests, clients=load.CLIENTS)
            records = [Record(**record) for record in answer["records"]]
            yield watch.cells(load.summary(records), answer["cpu_seconds"], answer["peak_rss_mib"])
    else:
        raise Skip("run in static batches here, without a server")


def _ready(peer: ModuleType, job: Job, number: int, work: Path) -> Iterator[list[Cell]]:
    """From the start of the process until it answers; once before to have its files in the page cache."""
    for counts in (False, True):
        watch = Watch(peer, job, number)
        if hasattr(peer, "serve"):
            with Server(peer, job, peer.environment(job), _log(peer, work)) as server:
                seconds = server.ready()
                used = machine.session_seconds(server.process.pid)
        else:
            begin = time.perf_counter()
            with Child(job, peer.environment(job), _log(peer, work)) as child:
                child.ask(OPEN_TIMEOUT_S, do="open")
                seconds = time.perf_counter() - begin
                used = machine.session_seconds(child.process.pid)
        if counts:
            yield watch.cells({"start to ready": (seconds, "s")}, used)
