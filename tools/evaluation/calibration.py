"""Whether a model's probabilities are meant: expected calibration error, and the diagram that shows it.

ECE (Naeini et al. 2015; Guo et al. 2017) with 15 bins of equal width: the mean over the examples of |right - confidence|
of their bins. A bin with few examples says little, so the diagram shows their numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import ABSENT, UserError
from tools.evaluation.values import Floats

NUM_BINS = 15


def _bins(confidence: Floats) -> Any:
    return np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def ece_of(confidence: Floats, right: Floats, weights: Floats) -> Floats:
    """(R,) for weights (R, N): sum over bins |sum of (right - confidence)| / sum of weights."""
    member = np.eye(NUM_BINS)[_bins(confidence)]  # (N, bins)
    gaps = np.abs((weights * (right - confidence)) @ member).sum(1)
    return np.asarray(gaps / np.maximum(weights.sum(1), 1))


def reliability(confidence: Floats, right: Floats) -> list[dict[str, float]]:
    """Of each bin that is not empty: its edges, its number, its mean confidence, its accuracy."""
    bins, found = _bins(confidence), []
    for number in np.unique(bins):
        some = bins == number
        found.append(
            {
                "low": float(number / NUM_BINS),
                "high": float((number + 1) / NUM_BINS),
                "n": int(some.sum()),
                "confidence": float(confidence[some].mean()),
                "accuracy": float(right[some].mean()),
            }
        )
    return found


def draw_reliability(path: Path, title: str, curves: dict[str, list[dict[str, float]]]) -> None:
    """Reliability diagram (PNG, SVG or PDF by the suffix) of one or two models, with the numbers of their bins below."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--out", ABSENT, "needs matplotlib to draw", "pip install 'fleetune[plot]'") from None
    figure = Figure(figsize=(5.2, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="as sure as right")
    width = 0.8 / NUM_BINS / len(curves)
    for number, (name, bins) in enumerate(curves.items()):
        middles = [row["low"] + (number + 0.5) * width + 0.1 / NUM_BINS for row in bins]
        top.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], "o-", label=name, markersize=4)
        bottom.bar(middles, [row["n"] for row in bins], width=width)
    top.set(ylabel="share that is right", ylim=(0, 1.02), xlim=(0, 1), title=title)
    top.legend(loc="upper left", frameon=False)
    bottom.set(ylabel="examples", xlabel="probability of the answer")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
