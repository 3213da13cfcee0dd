"""`metrics.jsonl`: one line per record, and no step that no checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.train.report import METRICS, Reporter


def write(folder: Path, *lines: str) -> Path:
    path = folder / METRICS
    path.write_text("".join(lines))
    return path


def line(step: int, kind: str = "train") -> str:
    return json.dumps({"kind": kind, "step": step, "loss": 1.0}) + "\n"


def reopened(folder: Path, first_step: int, is_first: bool = True) -> list[tuple[str, int]]:
    """(kind, step) of the records after a run was started again at this step."""
    with Reporter(folder, is_first, first_step, num_steps=9):
        pass
    path = folder / METRICS
    return [(record["kind"], record["step"]) for record in map(json.loads, path.read_text().splitlines())]


def test_steps_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    """They are trained, and recorded, again; evaluations as well."""
    write(tmp_path, line(1), line(2), line(2, "evaluation"), line(3), line(4, "evaluation"))
    assert reopened(tmp_path, 2) == [("train", 1), ("train", 2), ("evaluation", 2)]


def test_a_fresh_start_forgets_all(tmp_path: Path) -> None:
    write(tmp_path, line(1), line(2))
    assert reopened(tmp_path, 0) == []


@pytest.mark.parametrize(
    "cut", ['{"kind": "train", "st', '{"kind": "train"}\n', "\n", "[1]\n", "null\n", "\x00\x00", '"x"\n']
)
def test_a_line_cut_short_by_the_kill_is_forgotten(cut: str, tmp_path: Path) -> None:
    """So that every line can be read, and the next record does not continue it."""
    write(tmp_path, line(1), line(2), cut)
    assert reopened(tmp_path, 2) == [("train", 1), ("train", 2)]


def test_the_next_record_starts_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, line(1).rstrip("\n"))
    with Reporter(tmp_path, True, 1, 9) as report:
        report.record("evaluation", {"step": 2, "loss": 0.5})
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2]


def test_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write(tmp_path, line(1))
    reopened(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_other_ranks_write_and_alter_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, line(1), line(2))
    with Reporter(tmp_path, False, 0, 9) as report:
        report.record("evaluation", {"step": 1, "loss": 0.5})
    assert path.read_text() == line(1) + line(2)


VALUES: dict[str, Any] = {"step": 3, "loss": 1.23456, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_second": 12_345.0}


def test_a_record_is_on_disk_at_once_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Piped, one plain line each; whole numbers and names are left to the file."""
    with Reporter(tmp_path, True, 0, 9) as report:
        report.record("train", VALUES)
        assert json.loads((tmp_path / METRICS).read_text()) == {"kind": "train", **VALUES}
        report.record("evaluation", {"step": 3, "loss": 0.25, "samples": 12})
    shown = capsys.readouterr().err.splitlines()
    assert shown == [
        "train step 3: loss 1.2346  lr 1.00e-04  grad norm 0.5  12.3 K tokens/s",
        "evaluation step 3: loss 0.25",
    ]
