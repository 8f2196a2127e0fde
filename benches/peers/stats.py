"""Medians, spreads and percentiles."""

from collections.abc import Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of `values` lie, interpolated between neighbours as numpy does."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = min(max(share, 0.0), 1.0) * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the middle two."""
    return percentile(values, 0.5)


def spread(values: Sequence[float]) -> float:
    """Half the distance from the least to the greatest, as a share of the median: the ± of a figure."""
    middle = median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0
