"""One table out of many cells."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cases import Job
from ceiling import TARGETS
from stats import median, spread

QUIRE = "Quire"


@dataclass(frozen=True)
class Cell:
    """One figure: an engine under one setting, one case, one round."""

    row: tuple[str, str, str]
    """Model, case, precision."""
    engine: str
    setting: str
    round: int
    value: float
    unit: str = "tok/s"
    """tok/s, or s: of time, less is better."""
    load_before: float = 0.0
    load_after: float = 0.0
    others: float = 0.0
    """Cores that other processes kept busy meanwhile."""
    peak_rss_mib: int = 0
    ceiling: float = 0.0
    """What the machine's limits, measured just before, would allow; 0 if not known."""

    @property
    def lower_is_better(self) -> bool:
        return self.unit == "s"

    @staticmethod
    def from_json(value: dict) -> "Cell":
        return Cell(**value | {"row": tuple(value["row"])})


@dataclass(frozen=True)
class Figure:
    """An engine's figure of a row: that of its best setting."""

    engine: str
    setting: str
    rounds: dict[int, float]
    ceilings: dict[int, float]

    @property
    def value(self) -> float:
        return median(list(self.rounds.values()))

    @property
    def spread(self) -> float:
        return spread(list(self.rounds.values()))

    @property
    def share(self) -> float | None:
        """Of the ceiling, round by round; the median."""
        shares = [self.rounds[number] / ceiling for number, ceiling in self.ceilings.items() if ceiling]
        return median(shares) if shares else None


def best(figures: Iterable[Figure], lower: bool) -> Figure | None:
    """The one with the best median."""
    choose = min if lower else max
    return choose(figures, key=lambda figure: figure.value, default=None)


def figures(cells: Sequence[Cell]) -> dict[str, Figure]:
    """Of one row: each engine's best setting by the median over the rounds. Settings that were left out early do not count:
    one round that happened to be fast would beat the median of many."""
    rounds: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        rounds.setdefault((cell.engine, cell.setting), []).append(cell)
    engines = dict.fromkeys(cell.engine for cell in cells)
    most = {engine: max(len(own) for (name, _), own in rounds.items() if name == engine) for engine in engines}
    rounds = {key: own for key, own in rounds.items() if 2 * len(own) > most[key[0]]}
    lower = cells[0].lower_is_better
    all_figures = [
        Figure(engine, setting, {c.round: c.value for c in own}, {c.round: c.ceiling for c in own})
        for (engine, setting), own in rounds.items()
    ]
    return {engine: best((f for f in all_figures if f.engine == engine), lower) for engine in engines}


def is_close(cells: Sequence[Cell], engine: str, job: Job, case: str, share: float) -> bool:
    """Whether a setting may still be the best one that counts: of all peers in a row, or of Quire."""
    row = (job.model.name, case, job.precision)
    rivals = [cell for cell in cells if cell.row == row and (cell.engine == QUIRE) == (engine == QUIRE)]
    own = [cell.value for cell in rivals if (cell.engine, cell.setting) == (engine, job.setting.name)]
    return not own or max(own) >= share * max(cell.value for cell in rivals)


def ratio(quire: Figure, peer: Figure, lower: bool) -> tuple[float, float, float]:
    """How many times as fast Quire is: of the medians, and the least and greatest of the rounds that both have."""

    def times(ours: float, theirs: float) -> float:
        return theirs / ours if lower else ours / theirs

    both = [times(quire.rounds[r], peer.rounds[r]) for r in quire.rounds.keys() & peer.rounds.keys()]
    middle = times(quire.value, peer.value)
    return middle, min(both, default=middle), max(both, default=middle)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"


def render(cells: Sequence[Cell]) -> str:
    """The table in Markdown: a row a line, an engine a column; then which setting was the best."""
    engines = list(dict.fromkeys(cell.engine for cell in cells))
    rows = dict.fromkeys(cell.row for cell in cells)
    lines = [["model", "row", "precision", *engines, "best peer", "ratio", "of ceiling", "target", "rounds", "others"]]
    for row in rows:
        lines.append(_line(row, [cell for cell in cells if cell.row == row], engines))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _line(row: tuple[str, str, str], cells: Sequence[Cell], engines: Sequence[str]) -> list[str]:
    model, case, precision = row
    lower = cells[0].lower_is_better
    unit = cells[0].unit
    found = figures(cells)
    peer = best((figure for engine, figure in found.items() if engine != QUIRE), lower)
    shown = [_figure(found[engine]) if engine in found else "-" for engine in engines]
    compared, middle = "-", None
    if peer and QUIRE in found:
        middle, low, high = ratio(found[QUIRE], peer, lower)
        compared = f"{middle:.2f}" + (f" ({low:.2f}-{high:.2f})" if low < high else "")
    share = found[QUIRE].share if QUIRE in found else None
    of_ceiling = f"{share:.0%}" if share else "-"
    wanted = _target(row, middle, share)
    who = f"{peer.engine} ({peer.setting})" if peer else "-"
    rounds = str(max(len(figure.rounds) for figure in found.values()))
    label = case if unit == "tok/s" else f"{case}, {unit}"
    return [model, label, precision, *shown, who, compared, of_ceiling, wanted, rounds, f"{max(cell.others for cell in cells):.2f}"]


def _target(row: tuple[str, str, str], middle: float | None, share: float | None) -> str:
    """What was aimed at, and whether it is met."""
    model, case, precision = row
    target = TARGETS.get((model, case), {}).get(precision)
    if target is None:
        return "-"
    met = (middle or 0) >= target.ratio or (share or 0) >= target.share
    return f"{target.ratio:.2f} or {target.share:.0%}: " + ("met" if met else "missed")


def _figure(figure: Figure) -> str:
    return number(figure.value) + (f" ±{figure.spread:.0%}" if len(figure.rounds) > 1 else "")


LEGEND = """\
Figures: median over the rounds, ± half the range, of the engine's best setting in that row; tokens per second unless
the row says otherwise. ratio: how many times as fast Quire is as the best peer (of the medians; least and greatest of
single rounds). of ceiling: what that is of what the machine's limits, measured before each visit, would allow. target: that
ratio, or that share. others: cores kept busy by other processes, in the worst cell of the row; trust rows near 0."""
