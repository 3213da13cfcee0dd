"""How sure a score is: bootstrap over the examples (Efron 1979), the same draws for every score and every model.

Examples are drawn with replacement 1000 times; the interval is that of the draws' percentiles, widened for small samples
as Hesterberg (2015) does: at the level of Student's t with n - 1 degrees, times sqrt(n / (n - 1)). What is drawn are whole
examples (documents, sentences, questions), whose tokens are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tools.evaluation.values import Floats, Measure

RESAMPLES = 1000
LEVEL = 0.95
SEED = 20_261_128
_CELLS = 1 << 21  # weights in memory at once: 16 MiB


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float
    """nan, both, where one example or less is no sample."""


def draws(num_examples: int, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[Floats]:
    """Weights (R, N), a few resamples at a time: how often each example was drawn."""
    random = np.random.default_rng(seed)
    at_once = max(1, min(resamples, _CELLS // max(1, num_examples)))
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        places = random.integers(0, num_examples, (count, num_examples)) + num_examples * np.arange(count)[:, None]
        yield np.bincount(places.ravel(), minlength=count * num_examples).reshape(count, -1).astype(np.float64)


def drawn(measure: Measure, num_examples: int, resamples: int = RESAMPLES) -> dict[str, Floats]:
    """Each score of each resample."""
    pieces = [measure(weights) for weights in draws(num_examples, resamples)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def point(measure: Measure, num_examples: int) -> dict[str, float]:
    return {name: float(value[0]) for name, value in measure(np.ones((1, num_examples))).items()}


def bounds(values: Floats, num_examples: int) -> tuple[float, float]:
    """Of the draws of one score; what is undefined in a draw (a class that was not drawn) is left out."""
    from scipy import stats

    values = values[~np.isnan(values)]
    if num_examples < 2 or len(values) == 0:
        return math.nan, math.nan
    quantile = stats.t.ppf((1 - LEVEL) / 2, num_examples - 1) * math.sqrt(num_examples / (num_examples - 1))
    share = stats.norm.cdf(quantile)
    low, high = np.quantile(values, [share, 1 - share])
    return float(low), float(high)


def intervals(measure: Measure, num_examples: int, resamples: int = RESAMPLES) -> dict[str, Interval]:
    values, spread = point(measure, num_examples), drawn(measure, num_examples, resamples)
    return {name: Interval(value, *bounds(spread[name], num_examples)) for name, value in values.items()}
