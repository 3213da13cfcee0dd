"""Scores from counts and from tables: what several tasks report, in one place.

Everything is float64, in which counts are exact up to 2^53. Undefined ratios are 0, as scikit-learn has them by default.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Scores = dict[str, Floats]
"""Each score by its name; as many values as there were sums, so that thousands of resamples are scored at once."""


def mean(total: Floats, number: Floats) -> Floats:
    """total / number; nan where nothing was counted."""
    return np.asarray(total / np.where(number > 0, number, np.nan))


def class_scores(hits: Floats, predicted: Floats, truths: Floats) -> Scores:
    """Precision, recall and F1 from counts per class (..., C): their means over the classes that occur as truth or
    prediction (macro), and of all counts together (micro). Every score is (...)."""
    seen = (truths + predicted) > 0
    num_seen = np.maximum(seen.sum(-1), 1)
    names = ("precision", "recall", "f1")
    ratios = zip(names, _ratios(hits, predicted, truths), strict=True)
    macro = {name: (ratio * seen).sum(-1) / num_seen for name, ratio in ratios}
    micro = _ratios(*(counts.sum(-1) for counts in (hits, predicted, truths)))
    return {**macro, **{f"{name}_micro": ratio for name, ratio in zip(names, micro, strict=True)}}


def _ratios(hits: Floats, predicted: Floats, truths: Floats) -> tuple[Floats, Floats, Floats]:
    return (
        hits / np.maximum(predicted, 1),
        hits / np.maximum(truths, 1),
        2 * hits / np.maximum(truths + predicted, 1),
    )


def matthews(counts: Floats) -> Floats:
    """Matthews' correlation of tables of counts (..., C, C) [truth, prediction]: Gorodkin's R_K, as in scikit-learn."""
    truths, predicted, total = counts.sum(-1), counts.sum(-2), counts.sum((-2, -1))
    hits = np.trace(counts, axis1=-2, axis2=-1)
    covariance = hits * total - (truths * predicted).sum(-1)
    spread = (total**2 - (truths**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    return np.asarray(covariance / np.sqrt(np.where(spread > 0, spread, np.inf)))


def pearson(x: Floats, y: Floats) -> float:
    """Correlation of two samples; nan where one of them does not vary."""
    dx, dy = x - x.mean(), y - y.mean()
    spread = np.sqrt((dx @ dx) * (dy @ dy))
    return float(dx @ dy / spread) if spread > 0 else float("nan")


def spearman(x: Floats, y: Floats) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Floats) -> Floats:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group], dtype=np.float64)


class Table:
    """A row of numbers for each sample, by its place in the split. Ranks fill different rows of equal tables of 0s, so
    that the sum over ranks is the whole; 8 bytes per number, on the CPU until then.

    The first number of a row is 1 where something was put.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self.rows = torch.zeros(num_rows, 1 + width, dtype=torch.float64)

    def put(self, samples: Tensor, values: Tensor) -> None:
        """samples (B,), where below 0 stands for no sample; values (B, width)."""
        samples, values = samples.cpu(), values.detach().double().cpu()
        kept = samples >= 0
        if not bool(kept.any()):
            return
        missing = int(samples.max()) + 1 - len(self.rows)
        if missing > 0:  # the number of samples was not known before: they are read from a file
            self.rows = torch.cat([self.rows, self.rows.new_zeros(max(missing, len(self.rows)), self.rows.shape[1])])
        self.rows[samples[kept]] = torch.cat([torch.ones(int(kept.sum()), 1, dtype=torch.float64), values[kept]], dim=1)

    def found(self) -> Floats:
        """(number of samples, width), in the order of the samples."""
        rows = self.rows.cpu().numpy()
        return np.asarray(rows[rows[:, 0] > 0, 1:])
