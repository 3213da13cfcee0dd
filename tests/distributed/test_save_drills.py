"""A save that is killed, or whose disk is full, at any of its system calls costs at most the work since the one before."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.stored.state import STEP
from launcher.train.by_name import open_state, read_box
from launcher.train.checkpoint import newest_complete
from tests.support import run_ranks

RANK = Path(__file__).with_name("drill_rank.py")
STRIDES = {"ddp": 1, "zero2": 5}
"""Every point of a torch save; every fifth of DeepSpeed's, where each process builds its engine anew."""


@pytest.fixture(scope="module", params=STRIDES)
def drilled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp(request.param)
    log = root / "log"
    argv = [sys.executable, str(RANK), str(root), request.param, str(STRIDES[request.param])]
    assert run_ranks(argv, log) == 0, log.read_text()[-3000:]
    return root, json.loads((root / f"{request.param}.json").read_text())


def newest_step(root: Path, result: dict[str, Any]) -> int:
    """Of the newest checkpoint that a resume would take; its bytes are those that were saved, and it opens."""
    warnings: list[str] = []
    saved = newest_complete(root / result["folder"] / "checkpoints", warnings.append)
    assert saved is not None, result
    assert not any(saved.is_altered(name) for name in saved.manifest.files)
    state = open_state(saved.folder, "zero" if saved.manifest.engine == "deepspeed" else "dcp")
    assert state.optimizer is not None
    updates = {float(read_box(states[STEP], (), ())) for states in state.optimizer.state.values()}
    if saved.manifest.step < 3:
        assert updates == {1.0}, "what was saved is the state before the step that went on meanwhile"
    return saved.manifest.step


def test_killed_at_any_point(drilled: tuple[Path, list[dict[str, Any]]]) -> None:
    """Before the rename the one before is found, after it the new one; nothing between."""
    root, results = drilled
    whole, kills = results[0], [result for result in results[1:] if "-kill-" in result["folder"]]
    assert whole["error"] is None
    assert len(kills) >= (30 if len(results) > 80 else 5)
    assert all(result["killed"] for result in kills)
    found = [newest_step(root, result) for result in kills]
    assert found == sorted(found), "once the new one is there, it stays"
    counts = Counter(found)
    assert counts.keys() == {1, 2}
    print(
        f"killed at {len(kills)} points of {whole['points']} calls: {counts[1]} find the one before, {counts[2]} the new"
    )


def test_disk_full_at_any_point(drilled: tuple[Path, list[dict[str, Any]]]) -> None:
    """The save says so and leaves nothing half written; with room again the next one is complete."""
    root, results = drilled
    fulls = [result for result in results[1:] if "-full-" in result["folder"]]
    assert fulls
    refused = [result for result in fulls if result["error"] is not None]
    for result in fulls:
        assert result["code"] == 0, result
        step = newest_step(root, result)
        assert step == (3 if result["error"] is not None else 2), result
        assert not list((root / result["folder"] / "checkpoints").glob("*.tmp"))
    for result in refused:
        assert "could not be written" in result["error"]
        assert "bytes are free" in result["error"]
    assert len(refused) > len(fulls) // 2
    print(f"full at {len(fulls)} points: {len(refused)} refused, and the next save was complete; none lost")
