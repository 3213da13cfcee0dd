"""`fleetune launch`: the launcher that fits the plan, and the run's own exit code behind it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from tests.support import REPO, job, kill_tree, rank_environment, records, run_ranks

FLEETUNE = [sys.executable, "-m", "launcher"]


def spec_file(folder: Path, corpus: Path, strategy: str, **overrides: Any) -> Path:
    raw = job(folder / "run", corpus, "bert", parallel__strategy=strategy, training__max_steps=300, **overrides)
    raw["data"]["prepared"] = str(folder / "data")
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    prepare(parse_spec(raw))
    return path


def interrupt(path: Path, log: Path, via: str, number: signal.Signals) -> int:
    """Launch, wait for the fifth step, signal the launcher, and return its exit code."""
    run = path.parent / "run"
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*FLEETUNE, "launch", str(path), "--via", via], stdout=output, stderr=output, env=rank_environment()
        )
        try:
            end = time.monotonic() + 180
            while not (run / "metrics.jsonl").is_file() or len(records(run)) < 5:
                assert child.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end
                time.sleep(0.1)
            child.send_signal(number)
            return child.wait(timeout=120)
        finally:
            kill_tree(child)


@pytest.mark.parametrize(("strategy", "via"), [("fsdp", "torchrun"), ("zero2", "deepspeed")])
def test_told_to_stop_saves_and_leaves_with_75(strategy: str, via: str, corpus: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher: all ranks save at a step's end, exit code 75; the same command goes on from there."""
    path, log = spec_file(tmp_path, corpus, strategy), tmp_path / "log"
    assert interrupt(path, log, via, signal.SIGTERM) == 75, log.read_text()[-3000:]
    run = path.parent / "run"
    stopped_after = records(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{stopped_after:08d}" / "manifest.json").is_file()
    assert "told to stop: saved after step" in log.read_text()

    more = ["--set", f"training.max_steps={stopped_after + 2}"]
    assert run_ranks([*FLEETUNE, "launch", str(path), *more], log) == 0, log.read_text()[-3000:]
    assert "resuming from" in log.read_text()
    assert [record["step"] for record in records(run)] == list(range(1, stopped_after + 3))


def test_dry_run_prints_what_runs_and_runs_nothing(corpus: Path, tmp_path: Path) -> None:
    """The DeepSpeed JSON and the command line are on the screen; no folder is made."""
    path = spec_file(tmp_path, corpus, "zero2")
    done = subprocess.run(
        [*FLEETUNE, "launch", str(path), "--dry-run"],
        capture_output=True,
        text=True,
        env=rank_environment(),
        check=True,
    )
    assert '"stage": 2' in done.stdout
    assert "torch.distributed.run" in done.stdout
    assert str(REPO / "launcher" / "run.py") in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_users_mistake_found_by_the_ranks_is_exit_code_2(corpus: Path, tmp_path: Path) -> None:
    """Unprepared data: one clear line, once, and exit code 2 behind torchrun, which itself would say 1."""
    path, log = spec_file(tmp_path, corpus, "ddp"), tmp_path / "log"
    assert run_ranks([*FLEETUNE, "launch", str(path), "--set", f"data.prepared={tmp_path / 'none'}"], log) == 2
    assert log.read_text().count("error: ") == 1, log.read_text()
    assert "fleetune prepare" in log.read_text()
    assert json.loads((path.parent / "run" / "outcome.json").read_text())["exit_code"] == 2


def test_plain_python_is_one_rank_of_any_engine(corpus: Path, tmp_path: Path) -> None:
    """`python launcher/run.py` with no launcher at all, from another folder: ZeRO on one rank, told so, same batch."""
    path, log = spec_file(tmp_path, corpus, "zero2"), tmp_path / "log"
    command = [sys.executable, str(REPO / "launcher" / "run.py"), "--spec", str(path), "--set", "training.max_steps=2"]
    assert run_ranks(command, log) == 0, log.read_text()[-3000:]
    assert "the launcher started 1 x 1" in log.read_text()
    assert [record["samples"] for record in records(path.parent / "run")] == [8, 16]
