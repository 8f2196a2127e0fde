#!/usr/bin/env python3
"""Quire and its peers on this machine, in one run, at the same precision, each as well tuned as it can be."""

import argparse
import dataclasses
import importlib
import signal
import sys
from pathlib import Path
from types import ModuleType

import cases
import machine
import measure
import models
import table
import venvs
from cases import Job, Skip

PEERS = ("quire", "openvino", "vllm", "llama_cpp", "transformers")
ROOT = Path(__file__).resolve().parents[2]

HELP = """\
Examples:
  cargo build --release && python3 benches/peers/run.py
      everything: hours, about 30 GB under target/peers, most of it PyTorch
  python3 benches/peers/run.py --shapes qwen3-0.6b --precisions int8 --peers quire,openvino
      the peer to beat, and nothing else
  python3 benches/peers/run.py --layers 2 --rounds 1 --cases prefill-512,decode-1
      does everything run? Models of two layers; the figures mean nothing
  python3 benches/peers/run.py --server --shapes qwen3-0.6b --cases none
      the server row alone

Peers are installed from PyPI on first use, each into its own virtual environment (PIP_EXTRA_INDEX_URL and the like are
honoured: https://download.pytorch.org/whl/cpu saves gigabytes), and models are made up and converted once; later runs
find both. Engines take turns, one process at a time, all cases of an engine in a row: A B C A B C ... Each engine runs
under every setting that its documentation suggests, and its best one in a row counts. Whatever cannot run is named at
the end, with the reason. Nothing else should run meanwhile: watch the column "others".
Add an engine: write peer_NAME.py beside this file (README.md says what goes in), and name it here in PEERS."""


def words(known: tuple[str, ...]):
    """A parser of lists such as `a,b`, of known words."""

    def parse(text: str) -> list[str]:
        chosen = [word for word in text.split(",") if word and text != "none"]
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(known)}")
        return chosen

    return parse


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    shapes = tuple(models.shapes())[::-1]
    names = tuple(cases.BY_NAME)
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to measure").add_argument
    for flag, known, what in (
        ("--shapes", shapes, "models"),
        ("--precisions", cases.PRECISIONS, "precisions"),
        ("--cases", names, "cases, or none"),
        ("--peers", PEERS, "engines"),
    ):
        add(flag, type=words(known), default=list(known), metavar="NAME,…", help=f"{what} [{','.join(known)}]")
    add("--rounds", type=positive, default=3, metavar="N", help="visits to each engine, in turn [3]")
    add("--server", action="store_true", help="also the server rows: 64 requests, 32 clients, streamed over HTTP")
    add("--ready", action="store_true", help="also the time from start to ready, files in the page cache")
    add("--layers", type=positive, metavar="N", help="cut the models to N layers, to try things out")
    add = parser.add_argument_group("how").add_argument
    add("--threads", type=positive, default=2, metavar="N", help="threads, and cores to use [2]")
    binary = ROOT / "target/release/quire"
    add("--quire", type=Path, default=binary, metavar="PATH", help="the binary [target/release/quire]")
    add("--quire-args", default="", metavar="ARGS", help="more flags for Quire, such as '--no-prefix-cache'")
    work = ROOT / "target/peers"
    add("--work", type=Path, default=work, metavar="DIR", help="environments, models, logs [target/peers]")
    add("--no-install", action="store_true", help="skip what is not installed instead of installing it")
    add("--json", type=Path, metavar="FILE", help="write every single figure there, too, after each of them")
    return parser.parse_args(argv)


def installed(args: argparse.Namespace, skips: dict[str, str]) -> dict[ModuleType, tuple[Path, dict]]:
    """The engines that can take part, with their interpreters and versions."""
    found = {}
    for name in args.peers:
        peer = importlib.import_module(f"peer_{name}")
        try:
            python = venvs.ensure(peer, args.work, not args.no_install)
            if peer.NAME == "quire":
                if not args.quire.exists():
                    raise Skip(f"{args.quire} does not exist; run `cargo build --release`, or give --quire")
            found[peer] = (python, venvs.versions(peer, python))
        except Skip as skip:
            skips[peer.TITLE] = str(skip)
    return found


def jobs(args, engines, model, precision: str, skips: dict[str, str]) -> list[tuple[ModuleType, Job]]:
    """Every engine under every setting for `precision`, with its model converted."""
    found = []
    chosen = [cases.BY_NAME[name] for name in args.cases]
    for peer, (python, _) in engines.items():
        if precision in peer.LACKS:
            skips[f"{peer.TITLE} {precision}"] = peer.LACKS[precision]
            continue
        for setting in peer.SETTINGS[precision]:
            scratch = args.work / "converted" / peer.NAME
            scratch.mkdir(parents=True, exist_ok=True)
            job = Job(
                peer=peer.__name__,
                python=str(python),
                model=model,
                precision=precision,
                setting=setting,
                threads=args.threads,
                cores=tuple(machine.cores(args.threads)),
                scratch=scratch,
                max_tokens=max([case.tokens for case in chosen] + [measure.TRACE_TOKENS * args.server, 1]),
                quire=str(args.quire.resolve()),
                quire_args=tuple(args.quire_args.split()),
            )
            try:
                measure.prepare(peer, job, args.work)
                found.append((peer, job))
            except Skip as skip:
                skips[f"{peer.TITLE} {model.name} {precision} ({setting.name})"] = str(skip)
    return found


class Results:
    """What is known so far; printed at the end, and written as it grows."""

    def __init__(self, args: argparse.Namespace, engines: dict, skips: dict[str, str]) -> None:
        self.path, self.skips = args.json, skips
        self.cells: list[table.Cell] = []
        self.head = {
            "machine": machine.describe(args.threads),
            "versions": {peer.TITLE: found for peer, (_, found) in engines.items()},
            "arguments": {key: str(value) for key, value in vars(args).items()},
        }

    def add(self, cells: list[table.Cell]) -> None:
        """Takes new figures, and tells of them."""
        self.cells += cells
        for cell in cells:
            where = " ".join(cell.row)
            load = f"load {cell.load_before:.2f} to {cell.load_after:.2f}, others {cell.others:.2f}"
            value = f"{table.number(cell.value)} {cell.unit}"
            print(f"round {cell.round}  {where}  {cell.engine} ({cell.setting})  {value}  [{load}]", file=sys.stderr)
        self.save()

    def save(self) -> None:
        if self.path:
            value = self.head | {"cells": [dataclasses.asdict(cell) for cell in self.cells], "skipped": self.skips}
            models.write_json(self.path, value)

    def print(self) -> None:
        described = self.head["machine"]
        print("\nmachine: " + ", ".join(f"{key} {value}" for key, value in described.items()))
        for engine, found in self.head["versions"].items():
            print(f"{engine}: " + (", ".join(f"{name} {version}" for name, version in found.items()) or "this tree"))
        print()
        if self.cells:
            print(table.render(self.cells) + "\n\n" + table.LEGEND)
        for where, reason in self.skips.items():
            print(f"skipped: {where}: {reason}")


def main() -> None:
    args = arguments()
    # Ended politely, everything started here ends, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.work = args.work.resolve()
    skips: dict[str, str] = {}
    engines = installed(args, skips)
    results = Results(args, engines, skips)
    chosen = [cases.BY_NAME[name] for name in args.cases]
    try:
        for shape in args.shapes:
            model = models.make(shape, args.layers, args.work / "models")
            for precision in args.precisions:
                entrants = jobs(args, engines, model, precision, skips)
                for number in range(1, args.rounds + 1):
                    for peer, job in entrants:
                        for cells in measure.visit(peer, job, chosen, number, args, skips):
                            results.add(cells)
    except KeyboardInterrupt:
        print("stopped; this is what there is", file=sys.stderr)
    results.save()
    results.print()


if __name__ == "__main__":
    main()
