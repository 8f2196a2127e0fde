"""One virtual environment an engine, filled by pip with the versions that its module names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from cases import Skip
from child import last_words

PIP_TIMEOUT_S = 5400
"""Long enough to build llama.cpp on one core."""


def python_of(peer: ModuleType, work: Path) -> Path:
    """The interpreter of the engine's environment; this one if it needs none."""
    return work / "venvs" / peer.NAME / "bin" / "python" if peer.REQUIREMENTS else Path(sys.executable)


def ensure(peer: ModuleType, work: Path, install: bool) -> Path:
    """The interpreter of an environment that has what `peer` requires; Skip if it cannot be had."""
    python = python_of(peer, work)
    if not peer.REQUIREMENTS:
        return python
    stamp = work / "venvs" / f"{peer.NAME}.json"
    wanted = [*peer.REQUIREMENTS, *getattr(peer, "WITHOUT_DEPENDENCIES", ())]
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    if not install:
        raise Skip(f"not installed under {work} (and --no-install was given)")
    log = work / "logs" / f"{peer.NAME}-install.log"
    print(f"installing {peer.TITLE} (log: {log})", file=sys.stderr)
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(python.parent.parent)], log, {})
    alone = list(getattr(peer, "WITHOUT_DEPENDENCIES", ()))
    env = getattr(peer, "INSTALL_ENVIRONMENT", {})
    options = list(getattr(peer, "PIP_OPTIONS", ()))
    if alone:
        _run([str(python), "-m", "pip", "install", "--no-deps", *alone], log, env)
    requirements = [*peer.REQUIREMENTS, *(_dependencies(python, alone) if alone else [])]
    _run([str(python), "-m", "pip", "install", *options, *requirements], log, env)
    stamp.write_text(json.dumps(wanted))
    return python


def _run(command: list[str], log: Path, env: dict[str, str]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        try:
            done = subprocess.run(command, env=os.environ | env, stdout=file, stderr=file, timeout=PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Skip(f"installing took more than {PIP_TIMEOUT_S} s; see {log}") from None
    if done.returncode:
        raise Skip(f"installing failed; see {log}: {last_words(log)}")


def _dependencies(python: Path, packages: list[str]) -> list[str]:
    """What `packages` require, with local versions (torch==2.13.0+cpu) loosened to the public ones that PyPI has."""
    script = (
        "import json, sys, importlib.metadata as m\n"
        "from pip._vendor.packaging.requirements import Requirement as R\n"
        "all = [R(line) for name in sys.argv[1:] for line in m.requires(name) or []]\n"
        "fits = lambda r: r.marker is None or r.marker.evaluate({'extra': ''})\n"
        "def text(r): r.marker = None; return str(r)\n"
        "print(json.dumps([text(r) for r in all if fits(r)]))"
    )
    names = [package_name(package) for package in packages]
    listed = subprocess.run([str(python), "-c", script, *names], capture_output=True, check=True, text=True)
    return [public_version(line) for line in json.loads(listed.stdout)]


def public_version(requirement: str) -> str:
    """`torch==2.13.0+cpu` without its `+cpu`: PyPI has no local versions."""
    return re.sub(r"(==[^+,;]+)\+[a-z0-9.]+", r"\1", requirement)


def package_name(requirement: str) -> str:
    """`torch` of `torch==2.13.0`."""
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def versions(peer: ModuleType, python: Path) -> dict[str, str]:
    """Installed versions of the packages named by the module."""
    names = [package_name(line) for line in [*getattr(peer, "WITHOUT_DEPENDENCIES", ()), *peer.REQUIREMENTS]]
    # Some are for other processors.
    script = (
        "import json, sys, importlib.metadata as m\n"
        "found = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    done = subprocess.run([str(python), "-c", script, *names], capture_output=True, text=True)
    if done.returncode:
        raise Skip(f"broken environment: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)
