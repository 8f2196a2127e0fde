"""The machine: what it is, which cores the engines get, and what else runs on it."""

import os
import platform
import time
from pathlib import Path


def describe(threads: int) -> dict:
    """Facts for the head of the report."""
    return {
        "cpu": cpu_model(),
        "simd": simd(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_average": load(),
    }


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def cpu_model() -> str:
    """As the kernel calls it, with family and model, since virtual machines hide the rest."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model\t")
    return f"{name} (family {family}, model {model})" if family else name


def simd() -> list[str]:
    """The instruction sets that decide which kernels run."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimd")
    has = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in wanted if name in has]


def load() -> float:
    """Processes that run or want to, averaged over the last minute. The engines themselves count."""
    return round(os.getloadavg()[0], 2)


def cores(threads: int) -> list[int]:
    """The cores that every engine is confined to: the first `threads` of those this process may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise SystemExit(f"--threads {threads}: this process may use only {len(allowed)} cores")
    return allowed[:threads]


def session_seconds(session: int) -> float:
    """CPU time so far of the processes of a session, and of their children that have ended."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; what follows is numbers.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


class Others:
    """How many cores everything but the engine under test kept busy since the last look."""

    def __init__(self) -> None:
        self._busy, self._time = self._read()
        self._own = time.process_time()

    def _read(self) -> tuple[float, float]:
        """Busy seconds of all cores together, and the time."""
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return 0.0, time.monotonic()
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, words[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.monotonic()

    def share(self, engine_seconds: float) -> float:
        """Cores that others used on average, given the CPU time of the engine. This process (the clients) is none."""
        (busy, now), own = self._read(), time.process_time()
        used = busy - self._busy - engine_seconds - (own - self._own)
        elapsed = max(now - self._time, 1e-9)
        self._busy, self._time, self._own = busy, now, own
        return round(max(used, 0.0) / elapsed, 3)
