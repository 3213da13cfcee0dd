"""What a run's folder holds, read for a report: nothing is computed that the run did not write down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ABSENT, UserError
from launcher.train.manifest import read_saved

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run. A run that is still going, or was killed, has what it has written so far."""

    name: str
    folder: Path
    plan: dict[str, Any]
    """As `fleetune plan --json`."""
    steps: list[Record]
    """The `train` records of `metrics.jsonl`, oldest first."""
    evaluations: list[Record]
    spec: dict[str, Any] | None
    """With every default, from the newest checkpoint; None before the first one."""
    versions: dict[str, str]
    data: dict[str, Any] | None
    """`index.json` of the prepared data."""
    outcome: dict[str, Any] | None
    scores: list[Record]
    """Of `fleetune eval --json`, where its `results.json` lies in the run's folder: metric, value, low, high, n."""
    num_bad_lines: int
    """Lines of `metrics.jsonl` that are no record: a kill may cut the last one short."""

    def column(self, key: str, kind: str = "steps") -> tuple[list[float], list[float]]:
        """(steps, values) of the records that have this key as a number."""
        records = [r for r in getattr(self, kind) if isinstance(r.get(key), int | float)]
        return [float(r["step"]) for r in records], [float(r[key]) for r in records]

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def num_steps(self) -> int | None:
        planned = self.plan["step_time"]["num_steps"]
        return None if planned is None else int(planned)

    @property
    def ended(self) -> str:
        """How the run stands, in words."""
        if self.outcome is None:
            return f"no outcome: still running, or killed after step {self.last_step}"
        words = {0: "done", 75: "stopped and saved; the same command goes on"}
        return words.get(self.outcome["exit_code"], f"failed: {self.outcome['message']}")


def read_run(folder: Path) -> RunRecord:
    """Raises `UserError` for a folder that no run wrote."""
    plan_path, metrics_path = folder / "plan.json", folder / "metrics.jsonl"
    if not metrics_path.is_file() or not plan_path.is_file():
        missing = plan_path if not plan_path.is_file() else metrics_path
        rule = f"is not the folder of a run: it has no {missing.name}"
        raise UserError(str(folder), ABSENT, rule, "name the `output_dir` of a spec that was launched")
    records, num_bad_lines = _records(metrics_path)
    spec, versions = _saved(folder)
    return RunRecord(
        name=folder.resolve().name,
        folder=folder,
        plan=_json(plan_path),
        steps=[record for record in records if record.get("kind") == "train"],
        evaluations=[record for record in records if record.get("kind") == "evaluation"],
        spec=spec,
        versions=versions,
        data=_prepared(folder, spec),
        outcome=_json(folder / "outcome.json") if (folder / "outcome.json").is_file() else None,
        scores=list(_scores(folder)),
        num_bad_lines=num_bad_lines,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), ABSENT, f"cannot be read ({error})", "remove it, or name another run") from None


def _records(path: Path) -> tuple[list[Record], int]:
    found, num_bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
        else:
            num_bad += 1
    return found, num_bad


def _saved(folder: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    for step in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        if (step / "manifest.json").is_file():
            manifest = read_saved(step).manifest
            return manifest.spec, manifest.versions
    return None, {}


def _prepared(folder: Path, spec: dict[str, Any] | None) -> dict[str, Any] | None:
    """The data may lie elsewhere, and may be gone: a report is written all the same."""
    named = (spec or {}).get("data", {}).get("prepared")
    places = [folder / "data", *([Path(named)] if named else [])]
    return next((_json(place / "index.json") for place in places if (place / "index.json").is_file()), None)


def _scores(folder: Path) -> Iterator[Record]:
    """From the folder itself, and from those directly in it."""
    for path in sorted([*folder.glob("results*.json"), *folder.glob("*/results*.json")]):
        found = _json(path)
        for row in found.get("results", []) if isinstance(found, dict) else []:
            yield {**row, "file": str(path.relative_to(folder))}
