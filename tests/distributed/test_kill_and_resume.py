"""A run killed with SIGKILL goes on from its newest checkpoint as if nothing had happened, bit for bit."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from launcher.data.prepare import prepare
from launcher.job import parse_spec
from launcher.train.due import WISH
from tests.support import REPO, job, kill_tree, records, run_ranks, started, torchrun
from tools.convert import convert

RUN = REPO / "launcher" / "run.py"
STALLING = Path(__file__).with_name("stalling_run.py")
CURVE = ("step", "loss", "lr", "grad_norm")


def spec_file(folder: Path, corpus: Path, strategy: str) -> Path:
    """Six steps with dropout and accumulation, saved every three."""
    parallel = {"strategy": strategy, "micro_batch_size": 2, "recompute": "none"}
    raw = job(folder / "run", corpus, "gpt", parallel=parallel, training__max_steps=6, checkpoint__every_steps=3)
    raw["model"]["from_config"] |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    raw["data"]["prepared"] = str(folder.parent / "data")
    folder.mkdir()
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    prepare(parse_spec(raw))
    return path


def wait_for(condition: Any, child: Any, timeout_seconds: float = 180) -> None:
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert child.poll() is None, "the ranks ended by themselves"
        assert time.monotonic() < end, "the ranks did not get there"
        time.sleep(0.05)


def tensors(run: Path, prefix: str) -> dict[str, Any]:
    out = run / "converted"
    convert(f"{prefix}:{run}", f"hf:{out}")
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize(("strategy", "prefix"), [("zero2", "zero"), ("fsdp", "dcp")])
def test_killed_after_three_steps_equals_six_straight(strategy: str, prefix: str, corpus: Path, tmp_path: Path) -> None:
    """3 steps, kill -9 of every rank in the next ones, resume: the same losses, norms and weights, bit for bit."""
    straight = spec_file(tmp_path / "straight", corpus, strategy)
    log = tmp_path / "log"
    assert run_ranks(torchrun(2, RUN, "--spec", straight), log) == 0, log.read_text()[-3000:]

    killed = spec_file(tmp_path / "killed", corpus, strategy)
    run = killed.parent / "run"
    with started(torchrun(2, STALLING, "5", "--spec", killed), log) as child:
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(records(run)) == 5, child)
        assert (run / "checkpoints" / "step-00000003" / "manifest.json").is_file()
        ranks = psutil.Process(child.pid).children(recursive=True)
        kill_tree(child)
        assert len(ranks) >= 2
        assert not any(rank.is_running() for rank in ranks)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000003"]
    (run / "checkpoints" / "step-00000006.tmp").mkdir()  # as a kill in the next save would leave it

    assert run_ranks(torchrun(2, RUN, "--spec", killed), log) == 0, log.read_text()[-3000:]
    assert "resuming from" in log.read_text()

    expected, got = records(straight.parent / "run"), records(run)
    assert [[r[key] for key in CURVE] for r in got] == [[r[key] for key in CURVE] for r in expected]
    ours, theirs = tensors(run, prefix), tensors(straight.parent / "run", prefix)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_cut_checkpoint_is_passed_over(corpus: Path, tmp_path: Path) -> None:
    """The newest checkpoint has lost bytes: the one before is taken, and said so; with none left, exit code 2."""
    path = spec_file(tmp_path / "cut", corpus, "ddp")
    run, log = path.parent / "run", tmp_path / "log"
    one = ["--set", "cluster.gpus_per_node=1", "--set", "parallel.micro_batch_size=8"]
    command = [*torchrun(1, RUN, "--spec", path), *one]
    assert run_ranks(command, log) == 0, log.read_text()[-3000:]
    newest, older = run / "checkpoints" / "step-00000006", run / "checkpoints" / "step-00000003"
    largest = max(newest.glob("dcp/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])

    assert run_ranks(command, log) == 0, log.read_text()[-3000:]
    said = log.read_text()
    assert "bytes where the manifest says" in said
    assert f"resuming from {older}" in said
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]

    whole = bytearray(largest.read_bytes())
    whole[len(whole) // 2] ^= 1
    largest.write_bytes(whole)
    assert run_ranks(command, log) == 0, log.read_text()[-3000:]
    assert "was altered: its checksum differs" in log.read_text()
    assert f"resuming from {older}" in log.read_text()

    shutil.rmtree(older)
    (newest / "manifest.json").unlink()
    run_ranks(command, log)
    assert '"exit_code": 2' in (run / "outcome.json").read_text()
    assert "is incomplete: it has no manifest.json" in log.read_text()


def test_another_batch_size_goes_on_where_the_data_stood(corpus: Path, tmp_path: Path) -> None:
    """Resumed with twice the batch: the samples go on from the last one trained, none again and none left out."""
    path, log = spec_file(tmp_path / "batch", corpus, "ddp"), tmp_path / "log"
    one = ["--set", "cluster.gpus_per_node=1", "--set", "parallel.micro_batch_size=8"]
    command = [sys.executable, RUN, "--spec", path, *one]
    assert run_ranks([*map(str, command), "--set", "training.max_steps=3"], log) == 0, log.read_text()[-3000:]
    assert run_ranks([*map(str, command), "--set", "training.global_batch_size=16"], log) == 0, log.read_text()[-3000:]
    assert [record["samples"] for record in records(path.parent / "run")] == [8, 16, 24, 40, 56, 72]


def test_another_engine_goes_on_from_there(corpus: Path, tmp_path: Path) -> None:
    """Saved by torch on one rank, gone on with by ZeRO-2, then asked for weights only: the same curve, then another.

    A file in the run's folder asks for a checkpoint after the first step; the manifest knows the run that it was.
    """
    path, log = spec_file(tmp_path / "engines", corpus, "ddp"), tmp_path / "log"
    run = path.parent / "run"
    one = ["--set", "cluster.gpus_per_node=1", "--set", "parallel.micro_batch_size=8"]
    command = [sys.executable, str(RUN), "--spec", str(path), *one, "--set", "checkpoint.keep_last=9"]
    run.mkdir(exist_ok=True)
    (run / WISH).touch()
    assert run_ranks(command, log) == 0, log.read_text()[-3000:]
    saved = run / "checkpoints"
    assert sorted(folder.name for folder in saved.glob("step-*")) == [f"step-{step:08d}" for step in (1, 3, 6)]
    assert not (run / WISH).exists()
    straight = [record["loss"] for record in records(run)]

    def again(*more: str) -> list[float]:
        shutil.rmtree(saved / "step-00000006")
        assert run_ranks([*command, *more], log) == 0, log.read_text()[-3000:]
        return [record["loss"] for record in records(run)]

    assert again("--set", "parallel.strategy=zero2") == pytest.approx(straight, rel=1e-5)
    fresh = again("--set", "checkpoint.resume=weights_only")
    assert fresh[:4] == pytest.approx(straight[:4], rel=1e-5)
    assert abs(fresh[4] - straight[4]) > 1e-4 * straight[4]
