"""Runs the cases of `measured_cases.py`, each as `fleetune launch` would, and keeps what came of them in a CSV file.

Every case is a run of the product in processes of its own: it plans, trains, and writes its plan, its metrics and its
outcome, which are read here. What ran out of memory is such an outcome and does not end the grid.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.data.prepare import prepare
from launcher.errors import ABSENT, EXIT_DONE, DataError, UserError
from launcher.job import load_spec
from launcher.spawn import run_ranks
from tools.measured_cases import GridCase

WARM_UP_STEPS = 3
"""Left out of the median: kernels are loaded and chosen, the allocator fills, DeepSpeed makes its buffers."""
DONE, OUT_OF_MEMORY, FAILED = "done", "out of memory", "failed"


@dataclass(frozen=True)
class Measured:
    """A line of the CSV file; sizes in bytes, 0 where there is none."""

    case: str
    status: str
    strategy: str
    method: str
    recompute: str
    precision: str
    seq_len: int
    micro_batch_size: int
    accumulation_steps: int
    num_ranks: int
    cluster: str
    torch: str
    predicted_memory_bytes: int = 0
    """The plan's total, the context not counted."""
    usable_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    context_bytes: int = 0
    predicted_step_seconds: float = 0.0
    step_seconds: float = 0.0
    """Median after the warm-up."""
    message: str = ""
    """What the run said of itself when it did not get to its end."""


@dataclass(frozen=True)
class Place:
    """Where the grid runs."""

    work: Path
    """Folder of the specs, the data, the logs and the runs."""
    cluster: str
    """Cluster file, by name or path, that predicts."""
    num_ranks: int
    threads: int
    """Cores of a rank."""


def run_cases(cases: list[GridCase], table: Path, place: Place, say: Callable[[str], None]) -> list[Measured]:
    """All of them, those that the file holds already left as they are; the file is complete after every case."""
    known = {row.case: row for row in read_measured(table)} if table.is_file() else {}
    write_texts(place.work / "data", max(case.seq_len for case in cases))
    for number, case in enumerate(cases, start=1):
        if case.name in known and known[case.name].status != FAILED:
            continue
        say(f"{number} of {len(cases)}: {case.name}")
        known[case.name] = run_case(case, place)
        _write(table, list(known.values()))
    return [known[case.name] for case in cases]


def run_case(case: GridCase, place: Place) -> Measured:
    """Train it, read what it left, and remove its checkpoint."""
    work, num_ranks = place.work, place.num_ranks
    folder = work / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = work / f"{case.name}.yaml"
    spec.write_text(yaml.safe_dump(case.spec(folder, work / "data", place.cluster, num_ranks), sort_keys=False))
    try:
        prepare(load_spec(spec))  # found again by the other cases of this task and length
    except UserError as error:
        return _row(case, folder, place, error.exit_code, [str(error)])
    lines: list[str] = []
    code = run_ranks(
        "launcher.run", num_ranks, ["--spec", str(spec)], {"OMP_NUM_THREADS": str(place.threads)}, lines.append
    )
    (work / f"{case.name}.log").write_text("\n".join(lines) + "\n")
    row = _row(case, folder, place, code, lines)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return row


def _row(case: GridCase, folder: Path, place: Place, code: int, lines: list[str]) -> Measured:
    import torch

    message = "" if code == EXIT_DONE else _message(folder, lines)
    out_of_memory = "OutOfMemoryError" in message
    row = Measured(
        case=case.name,
        status=DONE if code == EXIT_DONE else OUT_OF_MEMORY if out_of_memory else FAILED,
        num_ranks=place.num_ranks,
        cluster=place.cluster,
        torch=torch.__version__,
        message=message,
        **{key: getattr(case, key) for key in ("strategy", "method", "recompute", "precision", "seq_len")},
        micro_batch_size=case.micro_batch_size,
        accumulation_steps=case.accumulation_steps,
    )
    plan = _json(folder / "plan.json")
    if plan is not None:
        memory, seconds = plan["memory"], plan["step_time"]["seconds"]
        row = dataclasses.replace(
            row,
            predicted_memory_bytes=memory["total_bytes"],
            usable_bytes=memory["usable_bytes"],
            predicted_step_seconds=seconds,
        )
    return dataclasses.replace(row, **_seen(folder)) if row.status == DONE else row


def _seen(folder: Path) -> dict[str, Any]:
    """Step time and peaks from the run's own records."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    found = {"step_seconds": statistics.median(record["step_seconds"] for record in steps[WARM_UP_STEPS:])}
    for key in ("peak_allocated_bytes", "peak_reserved_bytes", "context_bytes"):
        found[key] = steps[-1].get(key, 0)
    return found


def _message(folder: Path, lines: list[str]) -> str:
    """The run's last word, which torchrun would bury."""
    outcome = _json(folder / "outcome.json")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return " ".join((outcome["message"] if outcome else last).split())[:300]


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def write_texts(folder: Path, longest: int) -> None:
    """Labelled texts of known words, each longer than the longest sequence, so that every sample is full."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefghij") for _ in range(4)) for _ in range(100)]
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(64):
            text = " ".join(draw.choice(words) for _ in range(2 * longest))
            file.write(json.dumps({"text": text, "label": ("even", "odd")[number % 2]}) + "\n")


def read_measured(table: Path) -> list[Measured]:
    """The rows of a CSV file that this module wrote; raises `DataError` for any other."""
    kinds = {
        field.name: {"int": int, "float": float}.get(str(field.type), str) for field in dataclasses.fields(Measured)
    }
    try:
        with table.open(newline="", encoding="utf-8") as file:
            return [
                Measured(**{key: kinds[key](value) for key, value in line.items()}) for line in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        rule = f"is no table of measured cases ({type(error).__name__}: {error})"
        raise DataError(str(table), ABSENT, rule, "name another file with --out") from None


def _write(table: Path, rows: list[Measured]) -> None:
    """Whole, and beside it first: a kill leaves the last good one."""
    partial = table.with_suffix(".tmp")
    with partial.open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, [field.name for field in dataclasses.fields(Measured)])
        lines.writeheader()
        lines.writerows(_cells(rows))
    os.replace(partial, table)


def _cells(rows: list[Measured]) -> Iterator[dict[str, Any]]:
    return (dataclasses.asdict(row) for row in rows)
