"""How far the fitted constants carry: fitted on every second published run, held against the others, and both ways round.

    python -m tools.bench calibration FILE.csv

The constants are those that the cluster files call fitted, common to all GPUs of a kind. Method: a pattern search over
them (Hooke & Jeeves 1961) that lowers the mean absolute and five times the mean squared logarithm of predicted over
published throughput; the second part keeps the worst runs in view.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tools import calibrate
from tools.published_table import GPUS, Row, cluster_of, read_table

STEPS = {
    "matmul_share": 0.04,
    "matmul_half_width": 80.0,
    "attention_share": 0.04,
    "overlap_share": 0.1,
    "fp8_speedup": 0.08,
}
"""What is fitted, and the first step of its search."""
SMALLEST_STEP = 1 / 8
"""Of the first: about a per cent of the constant."""
LARGEST = {"matmul_half_width": 5000.0, "fp8_speedup": 4.0}
Constants = dict[str, float]


def kind_of(row: Row) -> str:
    """A100 or H100: parts of a kind differ in memory, not in arithmetic."""
    return GPUS[row.text["gpu"]][0].partition("-")[0]


def cases_with(rows: Sequence[Row], constants: dict[str, Constants]) -> list[calibrate.Case]:
    """Predictions with the fitted constants replaced, by kind."""
    cases = []
    for row in rows:
        cluster = cluster_of(row)
        gpu = cluster.gpu.model_copy(update=constants[kind_of(row)])
        cases.append(calibrate.published_case(row, cluster.model_copy(update={"gpu": gpu})))
    return cases


def loss(rows: Sequence[Row], kind: str, constants: Constants) -> float:
    errors = [abs(math.log1p(case.error)) for case in cases_with(rows, {kind: constants})]
    return sum(errors) / len(errors) + 5 * sum(error**2 for error in errors) / len(errors)


def fit(rows: Sequence[Row], kind: str) -> Constants:
    """The constants of one kind, from those of its cluster file on."""
    gpu = cluster_of(rows[0]).gpu
    best: Constants = {key: getattr(gpu, key) for key in STEPS if getattr(gpu, key) is not None}
    lowest, scale = loss(rows, kind, best), 1.0
    while scale >= SMALLEST_STEP:
        before = lowest
        for key in best:
            for sign in (1, -1):
                value = best[key] + sign * scale * STEPS[key]
                tried = {**best, key: min(LARGEST.get(key, 1.0), max(1.0 if key == "fp8_speedup" else 1e-3, value))}
                if (found := loss(rows, kind, tried)) < lowest:
                    best, lowest = tried, found
                    break
        scale = scale if lowest < before else scale / 2
    return best


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench calibration", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("table", metavar="FILE.csv", type=Path, help="as for `tools.calibrate published`")
    rows = read_table(parser.parse_args(argv).table)
    halves = {"even": rows[::2], "odd": rows[1::2]}
    for learnt, held in (("even", "odd"), ("odd", "even")):
        kinds = sorted({kind_of(row) for row in halves[learnt]})
        constants = {kind: fit([row for row in halves[learnt] if kind_of(row) == kind], kind) for kind in kinds}
        for kind, values in constants.items():
            words = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
            sys.stdout.write(f"{learnt} rows, {kind}: {words}\n")
        total = calibrate.summary(cases_with(halves[held], constants))
        errors = ", ".join(f"{name} {total[f'{name}_abs_error']:.1%}" for name in ("median", "p90", "worst"))
        sys.stdout.write(f"held back, {held} rows: {total['cases']} cases: {errors}\n")
    return 0
