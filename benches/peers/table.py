"""One table out of many cells."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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

    @property
    def lower_is_better(self) -> bool:
        return self.unit == "s"


@dataclass(frozen=True)
class Figure:
    """An engine's figure of a row: that of its best setting."""

    engine: str
    setting: str
    rounds: dict[int, float]

    @property
    def value(self) -> float:
        return median(list(self.rounds.values()))

    @property
    def spread(self) -> float:
        return spread(list(self.rounds.values()))


def best(figures: Iterable[Figure], lower: bool) -> Figure | None:
    """The one with the best median."""
    choose = min if lower else max
    return choose(figures, key=lambda figure: figure.value, default=None)


def figures(cells: Sequence[Cell]) -> dict[str, Figure]:
    """Of one row: each engine's best setting by the median over the rounds."""
    rounds: dict[tuple[str, str], dict[int, float]] = {}
    for cell in cells:
        rounds.setdefault((cell.engine, cell.setting), {})[cell.round] = cell.value
    engines = dict.fromkeys(cell.engine for cell in cells)
    lower = cells[0].lower_is_better
    all_figures = [Figure(engine, setting, values) for (engine, setting), values in rounds.items()]
    return {engine: best((f for f in all_figures if f.engine == engine), lower) for engine in engines}


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
    lines = [["model", "row", "precision", *engines, "best peer", "ratio", "rounds", "others"]]
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
    compared = "-"
    if peer and QUIRE in found:
        middle, low, high = ratio(found[QUIRE], peer, lower)
        compared = f"{middle:.2f}" + (f" ({low:.2f}-{high:.2f})" if low < high else "")
    who = f"{peer.engine} ({peer.setting})" if peer else "-"
    rounds = str(max(len(figure.rounds) for figure in found.values()))
    label = case if unit == "tok/s" else f"{case}, {unit}"
    return [model, label, precision, *shown, who, compared, rounds, f"{max(cell.others for cell in cells):.2f}"]


def _figure(figure: Figure) -> str:
    return number(figure.value) + (f" ±{figure.spread:.0%}" if len(figure.rounds) > 1 else "")


LEGEND = """\
Figures: median over the rounds, ± half the range, of the engine's best setting in that row; tokens per second unless
the row says otherwise. ratio: how many times as fast Quire is as the best peer (of the medians; least and greatest of
single rounds). others: cores kept busy by other processes, in the worst cell of the row; trust rows near 0."""
