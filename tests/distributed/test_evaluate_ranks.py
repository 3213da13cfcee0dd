"""The same numbers to the last digit from 1, 2 and 3 ranks, from any batch size, and after a kill; from any checkpoint."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.support import REPO, job, kill_tree, rank_environment, run_ranks, started, torchrun
from tests.unit.small_models import rows_of, small_models
from tools.evaluate import main

BODY = REPO / "tests" / "distributed" / "evaluate_ranks.py"
SIZES = ("1", "8", "32")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.mktemp("ranks"))


def without_time(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name != "seconds"}


def test_ranks_and_batches_change_no_digit(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """50 documents of several windows: 3 ranks do not divide them, nor do batches of 8 or 32. One rank is this process."""
    words = [
        str(home / "gpt"),
        "--task",
        "perplexity",
        "--data",
        str(home / "rows.jsonl"),
        "--resamples",
        "50",
        "--json",
    ]
    assert [main([*words, "--batch-size", size]) for size in SIZES] == [0, 0, 0]
    found = [without_time(json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    for num_ranks in (2, 3):
        argv = torchrun(num_ranks, BODY, home / "gpt", "perplexity", home / "rows.jsonl", *SIZES)
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=rank_environment())
        assert done.returncode == 0, done.stderr
        found += [without_time(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 9
    assert all(said == found[0] for said in found[1:])
    assert found[0]["num_samples"] == 50


def test_a_killed_evaluation_goes_on(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kill -9` of two ranks in the middle; one rank ends it, computes only what is missing, and says the same."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(home) * 30))
    words = [str(home / "gpt"), "--task", "perplexity", "--data", str(rows), "--resamples", "50", "--json"]
    saved = tmp_path / "saved.jsonl"
    argv = torchrun(2, "-m", "tools.evaluate", *words, "--batch-size", "1", "--save", saved)
    with started(argv, tmp_path / "log") as child:
        until = time.monotonic() + 300
        while num_lines(saved) < 40:
            assert child.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        kill_tree(child)
    assert not saved.exists()
    before = num_lines(saved)
    assert main([*words, "--save", str(saved)]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "saved.jsonl.parts").exists(), "what was found lies in the file now"
    assert main(words) == 0
    assert without_time(resumed) == without_time(json.loads(capsys.readouterr().out))
    assert 40 <= before < 1500
    assert len(saved.read_text().splitlines()) == 1 + 1500


def num_lines(saved: Path) -> int:
    return sum(path.read_bytes().count(b"\n") - 1 for path in saved.with_name(f"{saved.name}.parts").glob("*.jsonl"))


@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_a_run_and_its_steps_are_scored_as_they_lie(
    strategy: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded checkpoint scores what training said of it, and is converted once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = job(tmp_path / "run", corpus, "gpt", training__max_steps=3, parallel=strategy)
    prepare(parse_spec(raw))
    spec = tmp_path / "job.json"
    spec.write_text(json.dumps(raw))
    log = tmp_path / "log"
    assert run_ranks(torchrun(2, REPO / "launcher" / "run.py", "--spec", spec), log) == 0, log.read_text()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    said = next(record for record in map(json.loads, lines) if record["kind"] == "evaluation")
    folders = [tmp_path / "run", next((tmp_path / "run" / "checkpoints").glob("step-*"))]
    for folder in folders:
        argv = [str(folder), "--prepared", str(tmp_path / "run" / "data"), "--resamples", "20", "--json"]
        assert main(argv) == 0
        found = json.loads(capsys.readouterr().out)["metrics"]
        assert found["loss"] == pytest.approx(said["loss"], rel=1e-5)
        assert found["accuracy"] == pytest.approx(said["accuracy"], rel=1e-5)
    assert len(list((tmp_path / "cache" / "fleetune" / "converted").iterdir())) == 1


def test_no_rank_stays_behind_when_the_data_will_not_do(home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "a"}\n')
    argv = torchrun(2, "-m", "tools.evaluate", home / "gpt", "--task", "perplexity", "--data", rows)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=rank_environment(), timeout=300)
    assert done.returncode != 0
    assert f"error: {rows}:1: has no column `text` but body" in done.stderr
