"""What is said at the end: one JSON object with stable keys, the same as a table for people, and the predictions.

Numbers are given to six significant digits: what follows from the batch size or from the number of ranks is smaller.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools.evaluation.compare import Difference
from tools.evaluation.intervals import Interval
from tools.evaluation.scoring import Found
from tools.evaluation.slices import Slices

DIGITS = 6
VERSION = 1
_PACKAGES = (
    "fleetune",
    "torch",
    "transformers",
    "scikit-learn",
    "scipy",
    "seqeval",
    "sacrebleu",
    "rouge-score",
    "lm-eval",
)


@dataclass(frozen=True)
class Results:
    task: str
    model: str
    data: str
    num_samples: int
    scores: dict[str, Interval]
    seconds: float
    """Of scoring, without opening models."""
    fingerprints: dict[str, str]
    """`model`, `data`, `question`: equal ones give equal numbers."""
    limited: bool = False
    """Only the first examples were scored: not comparable."""
    slices: tuple[Slices, ...] = ()
    against: str | None = None
    differences: tuple[Difference, ...] = ()
    mcnemar: dict[str, float] | None = None
    calibration: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Values that do not exist are null."""
        said: dict[str, Any] = {
            "version": VERSION,
            "task": self.task,
            "model": self.model,
            "data": self.data,
            "num_samples": self.num_samples,
            "limited": self.limited,
            "seconds": self.seconds,
            "metrics": {name: score.value for name, score in self.scores.items()},
            "results": [
                {"metric": name, **asdict(score), "n": self.num_samples} for name, score in self.scores.items()
            ],
            "slices": [_slices_json(some) for some in self.slices],
            "against": self.against,
            "differences": [asdict(difference) for difference in self.differences],
            "mcnemar": self.mcnemar,
            "calibration": self.calibration,
            "fingerprints": self.fingerprints,
            "versions": versions(),
        }
        return {name: rounded(value) for name, value in said.items()}


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _slices_json(some: Slices) -> dict[str, Any]:
    parts = [{"slice": name, "n": n, **asdict(score)} for name, n, score in some.parts]
    named = {"column": some.column, "metric": some.metric, "worst": some.worst, "best": some.best}
    return {**named, "gap": asdict(some.gap), "parts": parts}


def table_of(results: Results) -> str:
    """Aligned columns for a terminal, a log or a note."""
    warning = " (the first only: not comparable)" if results.limited else ""
    lines = [f"{results.model} on {results.data}: {results.num_samples} samples{warning}"]
    lines += [f"  {name:<18} {_digits(s.value):<12} {_range(s)}".rstrip() for name, s in results.scores.items()]
    for some in results.slices:
        lines += ["", f"{some.metric} by {some.column}:"]
        lines += [f"  {name:<24} {_digits(s.value):<12} {_range(s):<26} n={n}" for name, n, s in some.parts]
        gap = f"{_digits(some.gap.value)} {_range(some.gap)}".strip()
        lines += [f"  worst: {some.worst}; {some.best} is better by {gap}"]
    if results.against is not None:
        lines += ["", f"against {results.against}, on the same samples:"]
        lines += [
            f"  {d.metric:<18} {d.value:+.{DIGITS}g} [{_digits(d.low)}, {_digits(d.high)}]  p={d.p:.3g}  {d.verdict}"
            for d in results.differences
        ]
        lines += _mcnemar_lines(results.mcnemar)
    return "\n".join(lines) + "\n"


def _mcnemar_lines(test: dict[str, float] | None) -> Iterator[str]:
    if test is not None:
        counts = f"{test['only_this_right']} only this has right, {test['only_other_right']} only the other"
        yield f"  McNemar            {counts}: p={test['p']:.3g}"


def _digits(value: float) -> str:
    return f"{value:.{DIGITS}g}"


def _range(score: Interval) -> str:
    return "" if math.isnan(score.low) else f"[{_digits(score.low)}, {_digits(score.high)}]"


def write_results(results: Results, path: Path) -> None:
    write_whole(path, json.dumps(results.to_json(), indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def saved(path: Path, head: dict[str, Any], num_examples: int, examples: Iterable[Found]) -> None:
    """`--save`: a first line that says what this is and how many lines follow, then one line for each example."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**head, "num_examples": num_examples}) + "\n")
        for example in examples:
            file.write(json.dumps({"example": example.number, **example.facts, **example.outcome}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
