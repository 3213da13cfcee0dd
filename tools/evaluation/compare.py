"""Whether a model is better than another on the same examples: paired bootstrap, and McNemar's test where an example is
right or wrong. Resamples of both are the same, so what makes an example hard for both does not count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.errors import ABSENT, DataError
from tools.evaluation.intervals import RESAMPLES, bounds, drawn, point
from tools.evaluation.values import Measure, Table, direction


@dataclass(frozen=True)
class Difference:
    metric: str
    value: float
    """Ours less the other's."""
    low: float
    high: float
    p: float
    """Two-sided, of no difference."""
    verdict: str
    """`better`, `worse`, or `no difference shown`: whether the interval holds 0."""


def differences(ours: Measure, theirs: Measure, num_examples: int, resamples: int = RESAMPLES) -> list[Difference]:
    here, there = point(ours, num_examples), point(theirs, num_examples)
    spread, other = drawn(ours, num_examples, resamples), drawn(theirs, num_examples, resamples)
    found = []
    for name in [name for name in here if name in there]:
        gaps = spread[name] - other[name]
        low, high = bounds(gaps, num_examples)
        p = _p_value(gaps[~np.isnan(gaps)])
        found.append(Difference(name, here[name] - there[name], low, high, p, _verdict(name, low, high)))
    return found


def _p_value(gaps: Any) -> float:
    """Twice the smaller tail of the draws beyond 0, itself counted: never 0 from a finite number of draws."""
    tails = (1 + np.sum(gaps <= 0)) / (len(gaps) + 1), (1 + np.sum(gaps >= 0)) / (len(gaps) + 1)
    return float(min(1.0, 2 * min(tails)))


def _verdict(name: str, low: float, high: float) -> str:
    if not (low > 0 or high < 0):
        return "no difference shown"
    return "better" if (low > 0) == (direction(name) > 0) else "worse"


def mcnemar(ours: Table, theirs: Table) -> dict[str, float] | None:
    """Examples that only one of the two has right, and the exact p that neither is likelier (McNemar 1947)."""
    if not (ours.has("right") and theirs.has("right")):
        return None
    from scipy.stats import binomtest

    here, there = ours.columns["right"] == 1, theirs.columns["right"] == 1
    only_ours, only_theirs = int((here & ~there).sum()), int((there & ~here).sum())
    p = binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1.0
    return {"only_this_right": only_ours, "only_other_right": only_theirs, "p": float(p)}


def check_same(ours: Table, theirs: Table, other: str) -> None:
    if ours.num_examples != theirs.num_examples:
        rule = f"has {theirs.num_examples} examples where this has {ours.num_examples}"
        raise DataError("--against", other, rule, "score both on the same data")
    if set(ours.columns) ^ set(theirs.columns) - {name for name in theirs.columns if name.startswith("slice:")}:
        missing = sorted(set(ours.columns) - set(theirs.columns))
        if [name for name in missing if not name.startswith("slice:")]:
            raise DataError("--against", other, f"lacks {missing[0]}", "make it again with the same --task")
    if "truth" in ours.columns and (ours.columns["truth"] != theirs.columns["truth"]).any():
        raise DataError("--against", ABSENT, f"{other} has other truths", "score both on the same data")
