"""Where a model is weaker: the headline score in each slice of the data, the worst slice, and the gap to the best.

A slice is a value of a column, a file (`source`), or a quarter of the examples by a number (`length`, or any column of
numbers). The gap is that between the two slices that are best and worst on the whole data; its interval is that of their
difference under the same resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.errors import DataError
from tools.evaluation.intervals import RESAMPLES, Interval, bounds, draws
from tools.evaluation.values import Floats, Measure, Table, direction

MOST_SLICES = 50
MOST_NUMBERS = 8  # different numbers that are values; more are ranges
_QUARTERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Slices:
    column: str
    metric: str
    parts: tuple[tuple[str, int, Interval], ...]
    """(name, examples, score)."""
    worst: str
    best: str
    gap: Interval
    """Score of the best slice less that of the worst; 0 or more where more is better."""


def sliced(measure: Measure, table: Table, column: str, metric: str, resamples: int = RESAMPLES) -> Slices:
    names, member = _members(table, column)
    values = np.array([measure(row[None])[metric][0] for row in member])
    spread = _spread(measure, member, table.num_examples, metric, resamples)
    numbers = member.sum(1).astype(int)
    parts = tuple(
        (name, int(n), Interval(float(value), *bounds(draw, int(n))))
        for name, n, value, draw in zip(names, numbers, values, spread, strict=True)
    )
    order = np.argsort(np.where(np.isnan(values), np.inf, values * direction(metric)))
    worst, best = int(order[0]), int(order[np.count_nonzero(~np.isnan(values)) - 1])
    gap = Interval(float(values[best] - values[worst]), *bounds(spread[best] - spread[worst], table.num_examples))
    return Slices(column, metric, parts, names[worst], names[best], gap)


def _spread(measure: Measure, member: Floats, num_examples: int, metric: str, resamples: int) -> Floats:
    """(slices, resamples)."""
    pieces = [[measure(weights * row)[metric] for row in member] for weights in draws(num_examples, resamples)]
    return np.concatenate([np.stack(piece) for piece in pieces], axis=1)


def _members(table: Table, column: str) -> tuple[list[str], Floats]:
    """Names of the slices, and (slices, N) of 0 and 1."""
    values = table.columns[column if column == "length" else f"slice:{column}"]
    if values.dtype.kind == "f" and (column == "length" or len(np.unique(values)) > MOST_NUMBERS):
        return _ranges(values)
    kinds = np.unique(values)
    if len(kinds) > MOST_SLICES:
        rule = f"has {len(kinds)} different values, more than the {MOST_SLICES} that a table of slices holds"
        raise DataError("--slice", column, rule, "slice by a column with few values, or with numbers")
    return [_shown(kind) for kind in kinds], np.stack([values == kind for kind in kinds]).astype(np.float64)


def _ranges(values: Floats) -> tuple[list[str], Floats]:
    edges = np.unique(np.quantile(values, _QUARTERS, method="lower"))
    bins = np.searchsorted(edges, values, side="left")  # up to and with the edge
    kinds = np.unique(bins)
    names = [f"{_shown(values[bins == kind].min())} to {_shown(values[bins == kind].max())}" for kind in kinds]
    return names, np.stack([bins == kind for kind in kinds]).astype(np.float64)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)
