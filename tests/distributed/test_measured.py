"""One case of `tools.calibrate measure`, run for real."""

from __future__ import annotations

from pathlib import Path

from tools.measured_cases import cases_of
from tools.measured_runs import DONE, Place, run_cases


def test_a_case_runs_as_fleetune_would_run_it(tmp_path: Path) -> None:
    """It plans, trains and records; its prediction and its step time are there, its checkpoint is gone."""
    case = next(case for case in cases_of("cpu") if case.strategy == "ddp" and case.method == "full")
    (row,) = run_cases([case], tmp_path / "out.csv", Place(tmp_path / "work", "cpu", 1, 1), lambda _: None)
    assert (row.status, row.message) == (DONE, "")
    assert row.predicted_memory_bytes > 0
    assert row.predicted_step_seconds > 0
    assert row.step_seconds > 0
    assert row.peak_reserved_bytes == 0  # a CPU keeps no account
    assert (tmp_path / "work" / case.name / "metrics.jsonl").is_file()
    assert not (tmp_path / "work" / case.name / "checkpoints").exists()
